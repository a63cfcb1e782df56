"""A first look: plain against three methods on the 12 built-in prompts, with short answers.

Command:   specjax evaluate --config=configs/eval_smoke_smollm2.py --workdir=DIR
Minutes:   4.6 on two cores of an AMD EPYC with an empty compilation cache, more than half of them compiling.
Expected:  identical 12, mismatch 0 for all methods. For speeds to publish take eval_spec_bench_smollm2.py.
"""

from ml_collections import ConfigDict

from specjax.configs import eval_smollm2


def get_config() -> ConfigDict:
    """See the module's docstring; configs/eval_smollm2.py comments on the fields."""
    config = eval_smollm2.get_config()
    config.sampling.max_tokens = 64
    for name in ("mtp", "eagle", "draft_model"):
        del config.methods[name]
    return config
