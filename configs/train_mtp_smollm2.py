"""Trains an MTP head for SmolLM2-135M-Instruct on the target's own answers.

Command:   specjax train --config=configs/train_mtp_smollm2.py --workdir=DIR
Minutes:   74 on two cores with AMX and --config.compute_dtype=bfloat16, other jobs beside it, once the target's states
           are there (train_eagle3_smollm2 says more).
Expected:  held-out accuracy of the four drafts 0.62 0.53 0.51 0.50, 2.4 tokens a round of at most 5, from 771,000
           answered tokens. The head that comes along went on from there; its card says how.
"""

from ml_collections import ConfigDict

from specjax.configs import train_eagle3_smollm2


def get_config() -> ConfigDict:
    """That of train_eagle3_smollm2, which explains the fields, but for the head and its loss."""
    config = train_eagle3_smollm2.get_config()
    # This wiring and these layers are what the speculators package reads.
    config.head = ConfigDict(
        {"method": "mtp", "wiring": "qwen3_next", "qk_norm": True, "num_layers": 1, "mlp_width": 1536}
    )
    # The loss looks at the most frequent tokens; a step over all 49,152 takes several times longer.
    config.loss_vocab_size = 8192
    config.steps = 1600
    config.unroll = ((0, 1), (1200, 4))
    return config
