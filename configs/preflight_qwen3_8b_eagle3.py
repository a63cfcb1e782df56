"""Qwen3-8B with an EAGLE-3 head on TPUs that need not be there: compiled, not run.

Command:   specjax preflight --config=configs/preflight_qwen3_8b_eagle3.py --topology=v6e:2x2 --workdir=DIR
Minutes:   7 on two busy cores, by the 2 min 39 that plain decoding and K = 4 took (--config.drafts="(4,)").
Expected:  5.9 of 31.2 GiB a chip at K = 4, caches aliased in full, 1.16 x the roofline plainly and 1.13 x with drafts,
           a round at K = 4 1.15 times a plain step.
"""

from ml_collections import ConfigDict

from specjax.configs import preflight_llama31_8b_eagle3


def get_config() -> ConfigDict:
    """That of preflight_llama31_8b_eagle3, which explains the fields, but for the model and its head."""
    config = preflight_llama31_8b_eagle3.get_config()
    config.model = "qwen3_8b"
    # By the rule of the published head of Llama-3.1-8B, but as there without norms of queries and keys.
    config.head = ConfigDict({**config.head, "qk_norm": False})
    return config
