"""The speed claims of the README, on SmolLM2-135M-Instruct: greedy, float32, batch 1 unless a row says otherwise.

Command:   specjax benchmark --config=configs/bench_smollm2.py --workdir=DIR   (pip install -e ".[compare]" for torch)
Minutes:   25 on two cores.
Expected:  the table in the README; its absolute numbers depend on the memory bandwidth of the machine.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """See the module's docstring."""
    config = ConfigDict()
    # A named asset, a Hugging Face directory or hub id, or a GGUF file.
    config.target = "smollm2-135m-instruct"
    # float32, bfloat16 or float16; empty for float32 on CPU and bfloat16 on accelerators.
    config.dtype = "float32"
    # built_in, or a JSONL file of {"id", "category", "turns": [text, ...]}.
    config.prompts = "built_in"
    # Whether prompts go through the model's chat template.
    config.chat = True
    # Use only so many prompts; 0 for all.
    config.num_prompts = 0
    # New tokens a prompt.
    config.max_tokens = 128
    # Times that everything is measured, interleaved; the fastest counts.
    config.repeats = 3
    # Rows side by side in the batch measurements. That of plain decoding alone has them all of the same prompt.
    config.batch = 8
    # Times a repeat that the step times are measured, interleaved.
    config.step_repeats = 5
    # Positions in the cache when a step's time is measured, and the two cache capacities compared.
    config.step_context = 200
    config.capacities = (512, 2048)
    # Drafts in the measurement of what acceptance takes of a round, and how its row samples: fields of SamplingParams.
    config.acceptance_drafts = 4
    config.acceptance = ConfigDict(
        {"no cut": {"temperature": 1.0}, "top-k, top-p": {"temperature": 1.0, "top_k": 50, "top_p": 0.9}}
    )
    # Name -> a training config, of which one step of one draft is compared with a product of matrices.
    config.training = ConfigDict(
        {"eagle3": "train_eagle3_smollm2", "eagle": "train_eagle_smollm2", "mtp": "train_mtp_smollm2"}
    )
    # Name -> fields of SpeculativeConfig, each measured against plain decoding.
    config.methods = ConfigDict(
        {
            "ngram": {
                "method": "ngram",
                "num_speculative_tokens": 6,
                "prompt_lookup_min": 3,
                "prompt_lookup_max": 5,
            },
        }
    )
    # Times a repeat that methods are compared in a batch; one time alone may be 6 % off.
    config.batched_repeats = 3
    # The same, in a batch: against plain decoding of all prompts, in turns of a few rounds. {} for none.
    config.batched_methods = ConfigDict(
        {
            "eagle3, auto": {"method": "eagle3", "num_speculative_tokens": "auto"},
            "ngram, auto": {
                "method": "ngram",
                "num_speculative_tokens": "auto",
                "prompt_lookup_min": 3,
                "prompt_lookup_max": 5,
            },
        }
    )
    return config
