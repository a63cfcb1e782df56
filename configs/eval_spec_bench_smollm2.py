"""Plain against speculative decoding of SmolLM2-135M-Instruct on half of Spec-Bench: 240 prompts, 280 turns.

Prompts:   the questions of odd number of Spec-Bench (Xia et al. 2024, arXiv 2401.07851); see
           specjax/evaluate/prompts/README.md.
Command:   specjax evaluate --config=configs/eval_spec_bench_smollm2.py --workdir=DIR
Minutes:   about 20 for plain decoding and again for each of the five methods, on two cores (an estimate, from 280
           answers of at most 128 tokens); the same command goes on after a kill.
Expected:  mismatch 0.
"""

from ml_collections import ConfigDict

from specjax.configs import eval_smollm2


def get_config() -> ConfigDict:
    """See the module's docstring; configs/eval_smollm2.py comments on the fields."""
    config = eval_smollm2.get_config()
    config.prompts = "spec_bench_odd"
    del config.methods.eagle
    config.costs = True
    config.profile = True
    return config
