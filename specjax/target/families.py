"""Hugging Face config.json -> ModelConfig, for the llama, mistral, qwen2, qwen3 and mimo families."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

from specjax.errors import CheckpointError

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "mimo")
QWEN2 = ("qwen2", "mimo")
"""MiMo is a Qwen2 with multi-token-prediction heads."""


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the trained context.

    Attributes:
        kind: linear (all frequencies divided), llama3 (long wavelengths divided, a smooth band between)
            or yarn (interpolation by wavelength, and a factor on the attention logits).
        factor: the stretch, >= 1.
        original_max_position: tokens of context that the model was trained with before stretching.
        low_freq_factor, high_freq_factor: llama3's band, in wavelengths per original context.
        beta_fast, beta_slow, truncate: yarn's band, in rotations per original context; truncate rounds its ends.
        attention_factor: what yarn multiplies cos and sin by.
    """

    kind: Literal["linear", "llama3", "yarn"]
    factor: float
    original_max_position: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """What the decoder needs to know of a model: static, hashable, independent of any file format.

    Attributes:
        family: one of FAMILIES, kept for messages only.
        vocab_size: V. width: D. num_layers: L. num_heads: N. num_kv_heads: K. head_dim: H. mlp_width: F.
        norm_eps: added to the mean square in every RMSNorm.
        rope_theta: base of the rotary frequencies.
        rope_scaling: None, or how they are stretched.
        max_position: longest context in tokens that the model was made for.
        qkv_bias, out_bias, mlp_bias: which projections have a bias.
        qk_norm: whether each head's q and k go through an RMSNorm before rotation.
        sliding_windows: per layer None (full attention) or how many tokens back a query sees, itself included.
        tied_head: whether the checkpoint has no output head of its own and reuses the embedding.
    """

    family: str
    vocab_size: int
    width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_width: int
    norm_eps: float
    rope_theta: float
    max_position: int
    rope_scaling: RopeScaling | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_windows: tuple[int | None, ...] = ()
    tied_head: bool = False

    @property
    def queries_per_kv(self) -> int:
        """Query heads that share one KV head."""
        return self.num_heads // self.num_kv_heads


def from_hf(config: Mapping[str, Any]) -> ModelConfig:
    """Reads the fields of a config.json.

    Raises:
        CheckpointError: an unsupported model_type, activation, rope type or quantisation, or a missing or
            inconsistent field; the message names it.
    """
    family = config.get("model_type")
    if family not in FAMILIES:
        raise CheckpointError(f"config.json: model_type={family!r} is not supported; expected one of {FAMILIES}.")
    _refuse(config, "hidden_act", ("silu",), default="silu")
    _refuse(config, "quantization_config", (None,), default=None)
    num_layers = _integer(config, "num_hidden_layers")
    num_heads = _integer(config, "num_attention_heads")
    num_kv_heads = _integer(config, "num_key_value_heads", default=num_heads)
    width = _integer(config, "hidden_size")
    if num_heads % num_kv_heads:
        raise CheckpointError(
            f"config.json: num_attention_heads={num_heads} is not a multiple of num_key_value_heads={num_kv_heads}."
        )
    attention_bias = bool(config.get("attention_bias", False))
    max_position = _integer(config, "max_position_embeddings")
    rope = _rope_parameters(config)
    return ModelConfig(
        family=family,
        vocab_size=_integer(config, "vocab_size"),
        width=width,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=_integer(config, "head_dim", default=128 if family == "qwen3" else width // num_heads),
        mlp_width=_integer(config, "intermediate_size"),
        norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        rope_theta=float(rope.get("rope_theta", 10000.0)),
        rope_scaling=_rope_scaling(rope, max_position),
        max_position=max_position,
        qkv_bias=True if family in QWEN2 else attention_bias,
        out_bias=False if family in QWEN2 else attention_bias,
        mlp_bias=bool(config.get("mlp_bias", False)),
        qk_norm=family == "qwen3",
        sliding_windows=_sliding_windows(config, family, num_layers),
        tied_head=bool(config.get("tie_word_embeddings", False)),
    )


def _integer(config: Mapping[str, Any], field: str, default: int | None = None) -> int:
    value = config.get(field)
    if value is None:
        value = default
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(f"config.json: {field}={value!r}; expected an integer >= 1.")
    return value


def _refuse(config: Mapping[str, Any], field: str, supported: tuple, default: Any) -> None:
    value = config.get(field, default)
    if value not in supported:
        raise CheckpointError(f"config.json: {field}={value!r} is not supported; expected one of {supported}.")


def _rope_parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """Both spellings: rope_parameters (transformers 5), and rope_theta beside rope_scaling (before)."""
    rope = dict(config.get("rope_scaling") or {}) | dict(config.get("rope_parameters") or {})
    if "rope_theta" not in rope and config.get("rope_theta") is not None:
        rope["rope_theta"] = config["rope_theta"]
    partial = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    if partial not in (None, 1.0):
        raise CheckpointError(f"config.json: partial_rotary_factor={partial!r} is not supported; expected 1.0.")
    return rope


def _rope_scaling(rope: Mapping[str, Any], max_position: int) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind in ("default", None):
        return None
    if kind not in ("linear", "llama3", "yarn"):
        raise CheckpointError(
            f"config.json: rope_type={kind!r} is not supported; expected default, linear, llama3 or yarn."
        )
    factor = _rope_number(rope, "factor")
    if factor < 1:
        raise CheckpointError(f"config.json: rope factor={factor!r}; expected a number >= 1.")
    original = int(rope.get("original_max_position_embeddings") or max_position)
    if kind == "linear":
        return RopeScaling("linear", factor)
    if kind == "llama3":
        return RopeScaling(
            "llama3",
            factor,
            original,
            low_freq_factor=_rope_number(rope, "low_freq_factor"),
            high_freq_factor=_rope_number(rope, "high_freq_factor"),
        )
    return RopeScaling(
        "yarn",
        factor,
        original,
        beta_fast=float(rope.get("beta_fast") or 32.0),
        beta_slow=float(rope.get("beta_slow") or 1.0),
        truncate=bool(rope.get("truncate", True)),
        attention_factor=_yarn_attention_factor(rope, factor),
    )


def _rope_number(rope: Mapping[str, Any], field: str) -> float:
    value = rope.get(field)
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise CheckpointError(f"config.json: rope {field}={value!r}; expected a number.")
    return float(value)


def _yarn_attention_factor(rope: Mapping[str, Any], factor: float) -> float:
    """0.1 ln(factor) + 1 unless the checkpoint overrides it (YaRN, 2309.00071, section 3.4)."""

    def magnitude(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return magnitude(float(rope["mscale"])) / magnitude(float(rope["mscale_all_dim"]))
    return magnitude(1.0)


def _sliding_windows(config: Mapping[str, Any], family: str, num_layers: int) -> tuple[int | None, ...]:
    """The window of each layer; an absent field has the value that transformers gives it."""
    layer_types = config.get("layer_types")
    if layer_types is not None:
        if len(layer_types) != num_layers:
            raise CheckpointError(
                f"config.json: layer_types has {len(layer_types)} entries; expected num_hidden_layers={num_layers}."
            )
        unknown = sorted(set(layer_types) - {"full_attention", "sliding_attention"})
        if unknown:
            raise CheckpointError(
                f"config.json: layer_types has {unknown}; expected full_attention or sliding_attention."
            )
    switched_off = family in (*QWEN2, "qwen3") and not config.get("use_sliding_window", False)
    if family == "llama" or switched_off or ("sliding_window" in config and config["sliding_window"] is None):
        return (None,) * num_layers
    window = _integer(config, "sliding_window", default=4096)
    if layer_types is not None:
        return tuple(window if kind == "sliding_attention" else None for kind in layer_types)
    first = config.get("max_window_layers", 28) if family in (*QWEN2, "qwen3") else 0
    return tuple(window if layer >= first else None for layer in range(num_layers))
