"""Plain against speculative decoding of SmolLM2-135M-Instruct on the 12 built-in prompts.

Command:   specjax evaluate --config=configs/eval_smollm2.py --workdir=DIR
Minutes:   6 on two cores (--config.num_prompts=2 --config.repeats=1: one).
Expected:  ngram 1.2 to 1.3 times plain decoding at 1.5 tokens a round, identical 12, mismatch 0.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """See the module's docstring."""
    config = ConfigDict()
    # A named asset, a Hugging Face directory or hub id, or a GGUF file.
    config.target = "smollm2-135m-instruct"
    # float32, bfloat16 or float16; empty for float32 on CPU and bfloat16 on accelerators.
    config.dtype = "float32"
    # built_in, or a JSONL file of {"id", "category", "turns": [text, ...]}; the first turn is used.
    config.prompts = "built_in"
    # Whether prompts go through the model's chat template.
    config.chat = True
    # Use only so many prompts; 0 for all.
    config.num_prompts = 0
    # Times that each prompt is decoded with each method; the fastest counts.
    config.repeats = 3
    # Fields of SamplingParams, the same for all methods. Texts are compared only at temperature 0.
    config.sampling = ConfigDict(
        {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "max_tokens": 128, "seed": 0}
    )
    # Name -> fields of SpeculativeConfig. Plain decoding is always measured beside them.
    config.methods = ConfigDict(
        {
            "ngram": {
                "method": "ngram",
                "num_speculative_tokens": 6,
                "prompt_lookup_min": 3,
                "prompt_lookup_max": 5,
                "rejection_sampling_strategy": "residual",
            },
        }
    )
    return config
