"""Qwen3-32B with an EAGLE-3 head on TPUs that need not be there: compiled, not run.

Command:   specjax preflight --config=configs/preflight_qwen3_32b_eagle3.py --topology=v6e:2x4 --workdir=DIR
Minutes:   3 on two busy cores.
Expected:  9.4 of 31.2 GiB a chip at K = 4, caches aliased in full, 1.08 x the roofline plainly and 1.13 x with drafts,
           a round at K = 4 1.16 times a plain step.
"""

from ml_collections import ConfigDict

from specjax.configs import preflight_qwen3_8b_eagle3


def get_config() -> ConfigDict:
    """That of preflight_qwen3_8b_eagle3, but for the model and the numbers of drafts."""
    config = preflight_qwen3_8b_eagle3.get_config()
    config.model = "qwen3_32b"
    config.drafts = (4,)
    return config
