"""Llama-3.1-70B with an EAGLE-3 head on TPUs that need not be there: compiled, not run.

Command:   specjax preflight --config=configs/preflight_llama31_70b_eagle3.py --topology=v5p:2x2x2 --workdir=DIR
Minutes:   1.5 on two cores.
Expected:  12.3 ms a plain round, 14.8 ms with four drafts.
"""

from ml_collections import ConfigDict

from specjax.configs import preflight_llama31_8b_eagle3


def get_config() -> ConfigDict:
    """That of preflight_llama31_8b_eagle3, which explains the fields, but for the model and the numbers of drafts."""
    config = preflight_llama31_8b_eagle3.get_config()
    config.model = "llama31_70b"
    # The head follows the rule of the 8B's. The one published for the 70B is narrower and has its own embedding.
    config.drafts = (4,)
    return config
