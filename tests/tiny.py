"""Tiny Hugging Face directories of every supported family, the same on every machine; needs neither torch nor network.

Weights are drawn from numpy's frozen RandomState, seeded by the tensor's name, so that a tensor is the same in every
case and no other tensor's presence moves it. Names and shapes are written here anew, from the transformers models,
so that the reader's own table is tested against a second one.
"""

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

Config = dict[str, Any]

VOCAB, WIDTH, NUM_LAYERS = 97, 48, 3
BASE: Config = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 80,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "attention_bias": False,
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64}

CASES: dict[str, Config] = {
    "llama-tied": {"model_type": "llama", "tie_word_embeddings": True, "rope_theta": 10000.0},
    "llama-untied": {"model_type": "llama", "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "llama-biases-head-dim": {"model_type": "llama", "attention_bias": True, "mlp_bias": True, "head_dim": 16},
    "llama-one-kv-head": {"model_type": "llama", "num_key_value_heads": 1, "rope_scaling": None},
    "llama-no-grouping": {"model_type": "llama", "num_key_value_heads": 6, "head_dim": None},
    "llama-linear": {"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 2.0}},
    "llama-linear-new": {
        "model_type": "llama",
        "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0},
    },
    "llama-llama3": {"model_type": "llama", "rope_theta": 500.0, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
    "llama-llama3-new": {
        "model_type": "llama",
        "head_dim": 16,
        "rope_parameters": {"rope_type": "llama3", "rope_theta": 300.0, **LLAMA3},
    },
    "llama-yarn": {"model_type": "llama", "rope_theta": 10000.0, "rope_scaling": YARN},
    "llama-yarn-not-truncated": {
        "model_type": "llama",
        "rope_parameters": {**YARN, "rope_theta": 10000.0, "truncate": False, "beta_fast": 8.0, "beta_slow": 0.5},
    },
    "llama-yarn-mscale": {
        "model_type": "llama",
        "rope_parameters": {**YARN, "rope_theta": 500.0, "mscale": 1.5, "mscale_all_dim": 0.5},
    },
    "llama-yarn-attention-factor": {
        "model_type": "llama",
        "rope_parameters": {**YARN, "rope_theta": 500.0, "attention_factor": 1.3},
    },
    "mistral-window-head-dim": {"model_type": "mistral", "sliding_window": 7, "head_dim": 16, "rope_theta": 10000.0},
    "mistral-no-window": {"model_type": "mistral", "sliding_window": None},
    "qwen2-window": {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    "qwen2-window-unused": {"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 9},
    "qwen2-layer-types": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 9,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "qwen3-biases-head-dim": {"model_type": "qwen3", "attention_bias": True, "head_dim": 16},
    "qwen3-tied": {"model_type": "qwen3", "head_dim": 8, "tie_word_embeddings": True, "rope_theta": 1000000.0},
}


def hf_config(case: str, **overrides: Any) -> Config:
    """The config.json of a case; overrides replace fields."""
    return BASE | CASES[case] | overrides


def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A float32 tensor that depends on its name and shape alone: a kernel, a bias, or a norm's scale around 1."""
    normal = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
    return (0.16 * normal + name.endswith("norm.weight")).astype(np.float32)


def tensors(config: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Every tensor that a checkpoint of this config.json holds, by its Hugging Face name."""
    family, width, mlp_width = config["model_type"], config["hidden_size"], config["intermediate_size"]
    head_dim = config.get("head_dim") or width // config["num_attention_heads"]
    q_width, kv_width = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], width)}
    shapes["model.norm.weight"] = (width,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], width)
    for index in range(config["num_hidden_layers"]):
        layer = f"model.layers.{index}"
        shapes[f"{layer}.input_layernorm.weight"] = (width,)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (width,)
        for projection, (out, into) in {
            "self_attn.q_proj": (q_width, width),
            "self_attn.k_proj": (kv_width, width),
            "self_attn.v_proj": (kv_width, width),
            "self_attn.o_proj": (width, q_width),
            "mlp.gate_proj": (mlp_width, width),
            "mlp.up_proj": (mlp_width, width),
            "mlp.down_proj": (width, mlp_width),
        }.items():
            shapes[f"{layer}.{projection}.weight"] = (out, into)
            biased = config["attention_bias"] if "self_attn" in projection else config.get("mlp_bias", False)
            if biased or (family == "qwen2" and projection[-6:] in ("q_proj", "k_proj", "v_proj")):
                shapes[f"{layer}.{projection}.bias"] = (out,)
        if family == "qwen3":
            shapes[f"{layer}.self_attn.q_norm.weight"] = (head_dim,)
            shapes[f"{layer}.self_attn.k_norm.weight"] = (head_dim,)
    return {name: draw(name, shape) for name, shape in shapes.items()}


def write_directory(
    directory: Path, config: Mapping[str, Any], weights: Mapping[str, np.ndarray] | None = None, num_shards: int = 1
) -> Path:
    """Writes config.json and model.safetensors, or as many shards and their index; returns the directory.

    Args:
        weights: None is tensors(config).
    """
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    weights = dict(tensors(config) if weights is None else weights)
    if num_shards == 1:
        save_file(weights, directory / "model.safetensors")
        return directory
    weight_map: dict[str, str] = {}
    for shard in range(num_shards):
        file_name = f"model-{shard + 1:05}-of-{num_shards:05}.safetensors"
        names = list(weights)[shard::num_shards]
        save_file({name: weights[name] for name in names}, directory / file_name)
        weight_map |= dict.fromkeys(names, file_name)
    index = {"metadata": {"total_size": sum(x.nbytes for x in weights.values())}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def prompt(batch: int, length: int) -> np.ndarray:
    """Token ids, int32[batch, length]; a shorter prompt of the same batch is not the beginning of a longer one."""
    return np.random.RandomState(0).randint(0, VOCAB, (batch, length)).astype(np.int32)
