"""Distils SmolLM2-135M-Instruct into a draft model of 7 million weights, on the target's own answers.

Command:   specjax train --config=configs/train_draft_smollm2.py --workdir=DIR
Minutes:   not measured to the end yet.
Expected:  not measured to the end yet.
"""

from ml_collections import ConfigDict

from specjax.configs import train_eagle3_smollm2


def get_config() -> ConfigDict:
    """That of train_eagle3_smollm2, which explains the fields, but for the head and its loss."""
    config = train_eagle3_smollm2.get_config()
    # A language model of the target's vocabulary, with a tied head.
    config.head = ConfigDict(
        {"method": "draft_model", "width": 128, "num_layers": 5, "num_heads": 4, "num_kv_heads": 2, "mlp_width": 384}
    )
    # It learns from true text alone: one step.
    config.unroll = ((0, 1),)
    return config
