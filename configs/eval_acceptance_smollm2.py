"""Acceptance rules side by side at temperature 1: SmolLM2-135M-Instruct drafts for itself with 28 of its 30 layers.

Command:   specjax evaluate --config=configs/eval_acceptance_smollm2.py --workdir=DIR
Minutes:   10 to 15 on two cores.
Expected:  tokens a round: block 1.72, residual 1.67, typical-acceptance 1.38. No speed-up: such a drafter costs nearly
           as much as the target. It is here because its drafts are sampled, from a law near the target's.
"""

from ml_collections import ConfigDict

from specjax.configs import eval_smollm2


def get_config() -> ConfigDict:
    """See the module's docstring; configs/eval_smollm2.py comments on the fields."""
    config = eval_smollm2.get_config()
    config.sampling.temperature = 1.0
    drafter = {"method": "draft_model", "assistant_early_exit": 28, "num_speculative_tokens": 4}
    rules = "residual", "block", "typical-acceptance"
    config.methods = ConfigDict({rule: {**drafter, "rejection_sampling_strategy": rule} for rule in rules})
    return config
