"""Trains an EAGLE-1 head for SmolLM2-135M-Instruct on the target's own answers.

Command:   specjax train --config=configs/train_eagle_smollm2.py --workdir=DIR
Minutes:   not measured to the end yet.
Expected:  not measured to the end yet.
"""

from ml_collections import ConfigDict

from specjax.configs import train_eagle3_smollm2


def get_config() -> ConfigDict:
    """That of train_eagle3_smollm2, which explains the fields, but for the head and its loss."""
    config = train_eagle3_smollm2.get_config()
    config.head = ConfigDict({"method": "eagle", "num_layers": 1, "mlp_width": 1536, "layernorms": True})
    # The loss looks at the most frequent tokens; a step over all 49,152 takes several times longer.
    config.loss_vocab_size = 8192
    config.loss.feature_weight = 0.1
    return config
