"""What a draft head is: static data from which the network, its weights and its checkpoint follow."""

import dataclasses
from typing import Any, Literal

from specjax.errors import ConfigError
from specjax.target.families import ModelConfig

HeadMethod = Literal["eagle", "eagle3", "mtp"]

WIRINGS = ("deepseek", "glm4_moe", "mimo", "ernie", "qwen3_next")
"""Families of MTP heads; `mtp_wiring` says what differs."""


@dataclasses.dataclass(frozen=True)
class HeadConfig:
    """A head that drafts from what its target computed: feature t and token t + 1 predict token t + 2.

    One network serves all: [embedding; feature] -> one or several decoder layers -> logits. The embedding and feature
    are joined by a product (`joined_by` "product": EAGLE, MTP) or in the first layer's attention ("attention":
    EAGLE-3). What a step hands to the next one in the place of the target's feature is the layers' output.

    Attributes:
        method: which of the three.
        layer: its decoder layers; width D, and vocab_size V as the target's. num_layers counts a block's layers.
        target_width: D_t of the target's hidden states.
        taps: target layers whose entering states are the feature; empty for the state after the final norm.
        draft_vocab_size: tokens that it can propose, V where it has no vocabulary of its own.
        num_blocks: distinct blocks; step i runs block i mod num_blocks.
        joined_by: "product" or "attention".
        embedding_first: order in the product.
        embedding_norm, hidden_norm: RMSNorm before joining.
        joining_bias: whether the product has a bias.
        norm_input: whether the first layer norms its input (EAGLE-1 does not).
        norm_output: whether logits are read behind a norm.
        own_head: whether it has an output head of its own; else the target's.
        own_embedding: whether it has an embedding of its own; else the target's.
        recycle_normed: whether the next step gets the layers' output behind the norm, or before it.
        first_embedding_zeroed: whether position 0 has no embedding.
        norm_before_fusing: EAGLE-3: one RMSNorm over all taps before they are fused.
        norm_each_tap: EAGLE-3.1: one RMSNorm for each tap instead.
        norm_before_residual: EAGLE-3: whether the first layer's residual starts behind hidden_norm.
        wiring: of MTP: one of WIRINGS, which names the tensors in checkpoints.
    """

    method: HeadMethod
    layer: ModelConfig
    target_width: int
    taps: tuple[int, ...] = ()
    draft_vocab_size: int = 0
    num_blocks: int = 1
    joined_by: Literal["product", "attention"] = "product"
    embedding_first: bool = True
    embedding_norm: bool = False
    hidden_norm: bool = False
    joining_bias: bool = False
    norm_input: bool = True
    norm_output: bool = True
    own_head: bool = False
    own_embedding: bool = False
    recycle_normed: bool = False
    first_embedding_zeroed: bool = False
    norm_before_fusing: bool = False
    norm_each_tap: bool = False
    norm_before_residual: bool = False
    wiring: str | None = None

    @property
    def reduced(self) -> bool:
        """Whether it proposes only some of the target's tokens."""
        return self.draft_vocab_size < self.layer.vocab_size

    @property
    def num_features(self) -> int:
        """Hidden states of the target that make a feature."""
        return len(self.taps) or 1


def eagle(layer: ModelConfig, target_width: int, joining_bias: bool = False, layernorms: bool = False) -> HeadConfig:
    """EAGLE-1 and 2 (2401.15077): no norms, and the layer's output goes straight to the target's head.

    Args:
        layernorms: the variant of HASS, with norms of embedding, of the layer's input and before the head.
    """
    return HeadConfig(
        "eagle",
        layer,
        target_width,
        draft_vocab_size=layer.vocab_size,
        joining_bias=joining_bias,
        embedding_norm=layernorms,
        norm_input=layernorms,
        norm_output=layernorms,
    )


def eagle3(
    layer: ModelConfig,
    target_width: int,
    taps: tuple[int, ...],
    draft_vocab_size: int,
    norm_before_residual: bool = False,
    norm_before_fc: bool = False,
    fc_norm: bool = False,
    norm_output: bool = False,
    own_embedding: bool = False,
) -> HeadConfig:
    """EAGLE-3 (2503.01840) and 3.1 (fc_norm, norm_output); the options have the names of the checkpoints' config.

    Raises:
        ConfigError: norm_before_fc together with fc_norm, or no taps.
    """
    if norm_before_fc and fc_norm:
        raise ConfigError("norm_before_fc=True, fc_norm=True: expected one of them at most; leave one out.")
    if not taps:
        raise ConfigError("taps=(): expected the target layers whose states EAGLE-3 reads, three as a rule.")
    return HeadConfig(
        "eagle3",
        layer,
        target_width,
        taps=taps,
        draft_vocab_size=draft_vocab_size,
        joined_by="attention",
        embedding_norm=True,
        hidden_norm=True,
        own_head=True,
        own_embedding=own_embedding,
        recycle_normed=norm_output,
        norm_before_fusing=norm_before_fc,
        norm_each_tap=fc_norm,
        norm_before_residual=norm_before_residual,
    )


def mtp(
    layer: ModelConfig,
    target_width: int,
    wiring: str = "deepseek",
    num_blocks: int = 1,
    own_head: bool = False,
    own_embedding: bool = False,
) -> HeadConfig:
    """Multi-token prediction in the wiring of a family (DeepSeek-V3, 2412.19437, section 2.2, and its relatives).

    Raises:
        ConfigError: no such wiring.
    """
    if wiring not in WIRINGS:
        raise ConfigError(f"wiring={wiring!r}: expected one of {WIRINGS}.")
    return HeadConfig(
        "mtp",
        layer,
        target_width,
        draft_vocab_size=layer.vocab_size,
        num_blocks=num_blocks,
        embedding_norm=True,
        hidden_norm=True,
        embedding_first=wiring != "mimo",
        own_head=own_head,
        own_embedding=own_embedding,
        recycle_normed=wiring in ("deepseek", "mimo", "qwen3_next"),
        first_embedding_zeroed=wiring != "qwen3_next",
        wiring=wiring,
    )


def default_taps(num_layers: int) -> tuple[int, int, int]:
    """The layers that EAGLE-3 heads read where a checkpoint names none: an early, the middle and a late one.

    Raises:
        ConfigError: the target has too few layers for three different ones.
    """
    taps = 2, num_layers // 2, num_layers - 3
    if not 0 < taps[0] < taps[1] < taps[2]:
        raise ConfigError(f"head.taps: the target has {num_layers} layers; expected at least 8, or taps of your own.")
    return taps


def for_target(target: ModelConfig, method: HeadMethod, **fields: Any) -> HeadConfig:
    """A head to train for a target: layers like the target's, one of them, unless fields say otherwise.

    Args:
        fields: of the method's function in this module; and num_layers, mlp_width, num_heads, num_kv_heads and
            qk_norm of the head's own layers, which have no biases. An empty or absent `taps` means default_taps.

    Raises:
        ConfigError: a field that the method does not have.
    """
    own = {name: fields.pop(name) for name in ("mlp_width", "num_heads", "num_kv_heads") if fields.get(name)}
    if "qk_norm" in fields:
        own["qk_norm"] = fields.pop("qk_norm")
    num_layers = fields.pop("num_layers", 1) or 1
    layer = dataclasses.replace(
        target,
        **own,
        num_layers=num_layers,
        sliding_windows=(None,) * num_layers,
        tied_head=False,
        qkv_bias=False,
        out_bias=False,
        mlp_bias=False,
    )
    builders: dict[str, Any] = {"eagle": eagle, "eagle3": eagle3, "mtp": mtp}
    if method not in builders:
        raise ConfigError(f"method={method!r}: expected one of {tuple(builders)}, the heads that can be trained.")
    if method == "eagle3":
        fields["taps"] = tuple(fields.get("taps") or default_taps(target.num_layers))
        fields["draft_vocab_size"] = fields.get("draft_vocab_size") or target.vocab_size
    fields = {name: value for name, value in fields.items() if value is not None}
    try:
        head: HeadConfig = builders[method](layer, target.width, **fields)
    except TypeError as error:
        raise ConfigError(f"head: {error}; expected fields of specjax.heads.config.{method}.") from error
    return head
