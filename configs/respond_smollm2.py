"""The answers of SmolLM2-135M-Instruct to the training prompts, which its draft heads learn from.

Command:   specjax respond --config=configs/respond_smollm2.py --workdir=DIR
Minutes:   half an hour on two cores.
Expected:  1,500 answers, about 200,000 tokens.
"""

from ml_collections import ConfigDict

from specjax.configs import eval_smollm2


def get_config() -> ConfigDict:
    """See the module's docstring."""
    config = ConfigDict()
    # The model that answers, its dtype, and on how many devices and processes; as in eval_smollm2.py.
    config.target = "smollm2-135m-instruct"
    config.dtype = ""
    config.mesh = ConfigDict({"data": 1, "model": 1})
    config.distributed = eval_smollm2.get_config().distributed
    # built_in_training (1,500 prompts that come with SpecJAX), or a JSONL file of {"id", "category",
    # "turns": [text, ...]}; every turn is answered.
    config.prompts = "built_in_training"
    # Use only so many prompts; 0 for all.
    config.num_prompts = 0
    # Of an answer.
    config.max_tokens = 256
    # Longer prompts, earlier turns and chat template included, are left out.
    config.max_prompt_tokens = 600
    # Prompt i is answered at the i-th of them, round and round.
    config.temperatures = (0.0,)
    # Rows that decode at once.
    config.max_batch_size = 32
    return config
