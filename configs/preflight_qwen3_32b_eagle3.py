"""Qwen3-32B with an EAGLE-3 head on TPUs that need not be there: compiled, not run.

Command:   specjax preflight --config=configs/preflight_qwen3_32b_eagle3.py --topology=v6e:2x4 --workdir=DIR
Minutes:   not measured.
Expected:  planned in tests, not compiled yet.
"""

from ml_collections import ConfigDict

from specjax.configs import preflight_qwen3_8b_eagle3


def get_config() -> ConfigDict:
    """That of preflight_qwen3_8b_eagle3, but for the model and the numbers of drafts."""
    config = preflight_qwen3_8b_eagle3.get_config()
    config.model = "qwen3_32b"
    config.drafts = (4,)
    return config
