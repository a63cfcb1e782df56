"""Trains an EAGLE-1 head for SmolLM2-135M-Instruct on the target's own answers.

Command:   specjax train --config=configs/train_eagle_smollm2.py --workdir=DIR
Minutes:   34 on two cores with AMX and --config.compute_dtype=bfloat16, once the target's states are there
           (train_eagle3_smollm2 says more).
Expected:  held-out accuracy of three drafts 0.56 0.42 0.33, from 1.34 million answered tokens, of which 1.08 million
           come along. The head that comes along went on from there; its card says how.
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
    config.data.length = 896
    config.data.rows = 2
    config.steps = 1250
    config.unroll = ((0, 1), (900, 3))
    config.optimizer.warmup_steps = 60
    return config
