"""Distils SmolLM2-135M-Instruct into a draft model of 7 million weights, on the target's own answers.

Command:   specjax train --config=configs/train_draft_smollm2.py --workdir=DIR
Minutes:   29 on two cores with AMX and --config.compute_dtype=bfloat16, once the target's states are there
           (train_eagle3_smollm2 says more).
Expected:  held-out accuracy 0.47, from 1.34 million answered tokens, of which 1.08 million come along; with 4 drafts
           1.6 tokens a round on spec_bench_odd.
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
    # The loss looks at the most frequent tokens; a step over all 49,152 takes several times longer.
    config.loss_vocab_size = 8192
    # Narrow layers: attention over long rows would take most of a step.
    config.data.length = 448
    config.data.rows = 4
    config.optimizer.learning_rate = 2e-3
    config.steps = 2600
    return config
