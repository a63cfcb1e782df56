"""Qwen3-8B with an EAGLE-3 head on TPUs that need not be there: compiled, not run.

Command:   specjax preflight --config=configs/preflight_qwen3_8b_eagle3.py --topology=v6e:2x2 --workdir=DIR
Minutes:   not measured.
Expected:  planned in tests, not compiled yet.
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
