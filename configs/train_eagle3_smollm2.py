"""Trains an EAGLE-3 head for SmolLM2-135M-Instruct on the target's own answers.

Command:   specjax train --config=configs/train_eagle3_smollm2.py --workdir=DIR
Minutes:   52 on two cores with AMX and --config.compute_dtype=bfloat16, other jobs beside it, once the target's states
           are there; computing them takes an hour before that.
Expected:  held-out accuracy of the four drafts 0.67 0.63 0.62 0.61, 2.7 tokens a round of at most 5, from 771,000
           answered tokens, of which 632,000 are among the 1.08 million that come along.
"""

from ml_collections import ConfigDict

from specjax.configs import eval_smollm2


def get_config() -> ConfigDict:
    """See the module's docstring."""
    config = ConfigDict()
    # The model whose tokens the head is to guess; as in eval_smollm2.py.
    config.target = "smollm2-135m-instruct"
    # Of the frozen target: bfloat16 is faster also on CPUs with AMX, because nothing here decodes token by token.
    config.dtype = "bfloat16"
    # Fields of specjax.heads.config.for_target. The norms are those of EAGLE-3.1: some channels of the target's states
    # are hundreds of times larger than others; without norms the trainer learns in units of their root mean squares.
    config.head = ConfigDict(
        {
            "method": "eagle3",
            "draft_vocab_size": 5632,
            "num_layers": 1,
            "mlp_width": 1024,
            "taps": (2, 15, 27),
            "fc_norm": True,
            "norm_before_residual": True,
            "norm_output": True,
        }
    )
    # built_in_smollm2: answers that come with SpecJAX; or a file that `specjax respond` wrote; empty: written to
    # DIR/responses.jsonl first, from respond below.
    config.responses = "built_in_smollm2"
    # As in respond_smollm2.py; prompts empty: no responses.
    config.respond = ConfigDict(
        {
            "prompts": "built_in_training",
            "num_prompts": 0,
            "max_tokens": 256,
            "max_prompt_tokens": 600,
            "temperatures": (0.0,),
            "max_batch_size": 32,
        }
    )
    # Text to learn from besides, with loss on every token: a .txt file, or a JSONL file of prompts; empty: none.
    config.texts = ""
    # Use only so many of its prompts; 0 for all.
    config.num_texts = 0
    # cache: the target's states are computed once and kept; on_the_fly: in every step, for data that no disk holds.
    config.features = "cache"
    # Where they are kept; empty for DIR/features. Runs that share a target and its taps can share it.
    config.features_dir = ""
    # A head to go on from: the workdir of an earlier training, or the name or directory of a checkpoint, such as
    # smollm2-135m-eagle3; empty: random weights.
    config.init_from = ""
    # For heads with the target's whole vocabulary: the loss looks at so many frequent tokens; 0 for all.
    config.loss_vocab_size = 0
    # float32 or bfloat16, of the head's products; its weights and the optimiser's state are float32.
    config.compute_dtype = "float32"
    # Rows of so many tokens, so many a batch; about one prompt of so many validates.
    config.data = ConfigDict({"length": 512, "rows": 3, "held_out_every": 50})
    # Fields of specjax.train.trainer.OptimizerConfig.
    config.optimizer = ConfigDict(
        {
            "learning_rate": 1e-3,
            "warmup_steps": 100,
            "schedule": "cosine",
            "final_fraction": 0.05,
            "b1": 0.9,
            "b2": 0.95,
            "weight_decay": 0.1,
            "clip_norm": 0.5,
            "muon_rms": 0.4,
        }
    )
    # Of a batch each.
    config.steps = 2200
    # (from this step on, so many draft steps are unrolled in the loss).
    config.unroll = ((0, 1), (1600, 4))
    # Fields of specjax.train.losses.LossSettings.
    config.loss = ConfigDict(
        {
            "kind": "kl",
            "step_decay": 0.8,
            "token_weight": 1.0,
            "feature_weight": 0.0,
            "prompt_weight": 0.3,
            "feature_noise": 0.0,
        }
    )
    # Steps between two lines of metrics.jsonl, two checkpoints and two validations.
    config.log_every = 20
    config.checkpoint_every = 200
    config.eval_every = 200
    # Batches of a validation, at most.
    config.eval_batches = 16
    config.seed = 0
    # Devices that share the rows of a batch: data of them, of several processes all that they have; model stays 1.
    config.mesh = ConfigDict({"data": 1, "model": 1})
    # Several processes; as in eval_smollm2.py. All of them must see DIR.
    config.distributed = eval_smollm2.get_config().distributed
    return config
