"""Plain against speculative decoding of SmolLM2-135M-Instruct on the 12 built-in prompts.

Command:   specjax evaluate --config=configs/eval_smollm2.py --workdir=DIR
Minutes:   9 on two cores, 4 of them compiling.
Expected:  hybrid 1.5 to 1.7 times plain decoding, eagle3 1.3 to 1.4, ngram 1.3, draft_model 1.2; 12 identical.
"""

from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
    """See the module's docstring."""
    config = ConfigDict()
    # A named asset, a Hugging Face directory or hub id, or a GGUF file.
    config.target = "smollm2-135m-instruct"
    # float32, bfloat16 or float16; empty for float32 on CPU and bfloat16 on accelerators.
    config.dtype = "float32"
    # How many devices to spread over: rows of a batch over data, weights, caches and logits over model.
    config.mesh = ConfigDict({"data": 1, "model": 1})
    # Several processes, each started with this same command: enabled=True joins them, and data times model is then the
    # number of all their devices. Cloud TPU, Slurm, Open MPI and Kubernetes say the rest; elsewhere give the address
    # "HOST:PORT" of process 0, how many there are, and to each its own process_id. After so many silent seconds a
    # process counts as dead, and all end.
    config.distributed = ConfigDict(
        {
            "enabled": False,
            "coordinator_address": config_dict.placeholder(str),
            "num_processes": config_dict.placeholder(int),
            "process_id": config_dict.placeholder(int),
            "initialization_timeout": 300,
            "heartbeat_timeout_seconds": 30,
        }
    )
    # A set that comes with SpecJAX (built_in, spec_bench_odd, mt_bench_odd, humaneval_first80, gsm8k_test_100), or a
    # JSONL file of {"id", "category", "turns": [text, ...]}. Turns are answered one after the other.
    config.prompts = "built_in"
    # Use only prompts of these categories; () for all. On the command line: --config.categories="('qa',)".
    config.categories = ()
    # Use only the first so many of them; 0 for all.
    config.num_prompts = 0
    # Whether prompts go through the model's chat template; without it, turns and answers are joined by blank lines.
    config.chat = True
    # Times that each turn is decoded with each method; the fastest counts, the spread is reported.
    config.repeats = 1
    # 1 decodes prompt by prompt; more decode that many rows by continuous batching.
    config.batch_size = 1
    # Fields of SamplingParams, the same for all methods; others can replace them. Texts are compared only at
    # temperature 0.
    config.sampling = ConfigDict(
        {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "max_tokens": 128, "seed": 0}
    )
    # Name -> fields of SpeculativeConfig. Plain decoding is always measured beside them. On CPUs windows of an even
    # number of tokens, drafts and one more, cost least. To measure others, replace
    # these: --config.methods="{'four': {'method': 'eagle3', 'num_speculative_tokens': 4}}".
    config.methods = ConfigDict(
        {
            "ngram": {
                "method": "ngram",
                "num_speculative_tokens": 5,
                "prompt_lookup_min": 3,
                "prompt_lookup_max": 5,
                "rejection_sampling_strategy": "residual",
            },
            "eagle3": {"method": "eagle3", "num_speculative_tokens": 1},
            "mtp": {"method": "mtp", "num_speculative_tokens": 1},
            "eagle": {"method": "eagle", "num_speculative_tokens": 1},
            "draft_model": {"method": "draft_model", "model": "smollm2-135m-draft", "num_speculative_tokens": 1},
            "hybrid": {
                "method": "hybrid",
                "num_speculative_tokens": 5,
                "prompt_lookup_min": 3,
                "prompt_lookup_max": 5,
                "draft_confidence_threshold": 0.5,
            },
        }
    )
    # Other libraries measured in the same run, prompt by prompt at temperature 0, where they are installed:
    # "transformers", "transformers-lookup", "transformers-assisted", "vllm".
    config.compare = ()
    # The draft model of transformers-assisted: a Hugging Face directory or hub id.
    config.assistant = ""
    # Measure what scoring T tokens and drafting K cost, and predict the speed-up of every K from that.
    config.costs = False
    # Batch sizes of the cost curve, besides 1 and batch_size.
    config.cost_batches = ()
    # Measure how a round's time divides into propose, score, verify and commit.
    config.profile = False
    # Tokens in the cache where costs and profile are measured.
    config.step_context = 200
    return config
