"""Llama-3.1-8B with an EAGLE-3 head on TPUs that need not be there: compiled, not run.

Command:   specjax preflight --config=configs/preflight_llama31_8b_eagle3.py --topology=v6e:2x2 --workdir=DIR
Minutes:   3 on two cores (2:52; 242 s of CPU time).
Expected:  the table in the README.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """See the module's docstring."""
    config = ConfigDict()
    # A model whose config.json comes with SpecJAX, or a folder that has one; weights are not needed.
    config.model = "llama31_8b"
    # Of weights and caches: bfloat16, float16 or float32.
    config.dtype = "bfloat16"
    # Fields of SpeculativeConfig, but for the number of drafts; method "" compiles plain decoding only.
    config.speculative = ConfigDict({"method": "eagle3"})
    # The head: fields of specjax.heads.config.for_target. As the published yuhuili/EAGLE3-LLaMA3.1-Instruct-8B: one
    # layer of the target's widths, and the 32,000 tokens that occur most; taps () are the default layers.
    config.head = ConfigDict({"draft_vocab_size": 32000, "taps": ()})
    # Rows side by side.
    config.batch = 8
    # Live positions of each row, those of the round included.
    config.context = 4096
    # Positions of each row's cache; 0 for the bucket that holds the context.
    config.capacity = 0
    # Parts of the batch (data), and of weights and caches (model); model 0 is as many as there are devices for.
    config.mesh = ConfigDict({"data": 1, "model": 0})
    # Numbers of drafts a round that are compiled, besides plain decoding.
    config.drafts = (1, 2, 4, 8)
    # Probabilities that a draft is accepted after those before it, to predict speed-ups for.
    config.acceptance_rates = (0.5, 0.6, 0.7, 0.8, 0.9)
    # Measured: the share of rounds in which at least 1, 2, ... drafts are accepted, one for each draft; or ().
    config.acceptance_by_position = ()
    # Programs that are compiled at a time.
    config.compilers = 2
    return config
