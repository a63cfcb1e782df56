"""Plain against speculative decoding of SmolLM2-135M-Instruct on half of Spec-Bench: 240 prompts, 280 turns.

Prompts:   the questions of odd number of Spec-Bench (Xia et al. 2024, arXiv 2401.07851); see
           specjax/evaluate/prompts/README.md.
Command:   specjax evaluate --config=configs/eval_spec_bench_smollm2.py --workdir=DIR
Minutes:   77 on two cores of an AMD EPYC with AVX-512, 108 with AVX2; of these 7 compiled, 5 were costs and profile;
           the same command goes on after a kill.
Expected:  hybrid 1.67 times plain decoding, eagle3 1.42, ngram 1.36 (AVX2: 1.5, 1.4, 1.3); identical 280, mismatch 0.
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
