"""The network of all draft heads: weights described once, init and pure functions to run it."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from specjax.heads.config import HeadConfig
from specjax.target import layers
from specjax.target.decoder import Attend, AttendWithin, DecoderLayer, bias, scale, weight

Params = dict[str, Any]


class Shared(NamedTuple):
    """What a head borrows from its target.

    Attributes:
        embedding: dtype[V, D].
        head: a kernel dtype[D, V].
    """

    embedding: jax.Array
    head: layers.Kernel


class HeadOutput(NamedTuple):
    """What one pass gives.

    Attributes:
        hidden: dtype[B, T, D], what logits are read from; of the wanted slots, where only some are.
        recycled: dtype[B, T, D], what takes the feature's place in the next step; of the same slots.
        memories: what the attention of each layer remembers.
    """

    hidden: jax.Array
    recycled: jax.Array
    memories: list[Any]


class Fusion(nn.Module):
    """EAGLE-3: the target's taps to one feature of the head's width."""

    config: HeadConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, taps: jax.Array) -> jax.Array:
        """dtype[B, T, n, D_t] -> dtype[B, T, D]."""
        c = self.config
        n, D = len(c.taps), c.target_width
        eps = c.layer.norm_eps
        if c.norm_each_tap:
            norms = [scale(self, f"tap_norm_{index}", D) for index in range(n)]
            taps = jnp.stack([layers.rms_norm(taps[:, :, i], norms[i], eps) for i in range(n)], axis=2)
        joined = taps.reshape(*taps.shape[:2], n * D)
        if c.norm_before_fusing:
            joined = layers.rms_norm(joined, scale(self, "norm", n * D), eps)
        return layers.product(joined, weight(self, "kernel", (n * D, c.layer.width), (None, "width")))


class Block(nn.Module):
    """One block: joins token and feature, runs its layers, norms what logits are read from."""

    config: HeadConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self,
        embedded: jax.Array,
        feature: jax.Array,
        positions: jax.Array,
        attends: Sequence[Attend],
        wanted: jax.Array | None = None,
    ) -> HeadOutput:
        c = self.config
        eps, D = c.layer.norm_eps, c.layer.width
        if c.first_embedding_zeroed:
            embedded = jnp.where(positions[..., None] == 0, 0, embedded)
        residual = feature
        if c.embedding_norm:
            embedded = layers.rms_norm(embedded, scale(self, "embedding_norm", D), eps)
        if c.hidden_norm:
            feature = layers.rms_norm(feature, scale(self, "hidden_norm", feature.shape[-1]), eps)
        joined = jnp.concatenate([embedded, feature] if c.embedding_first else [feature, embedded], axis=-1)
        if c.joined_by == "attention":
            x = feature if c.norm_before_residual else residual
        else:
            x = layers.product(joined, weight(self, "join", (joined.shape[-1], D), (None, "width")))
            if c.joining_bias:
                x += bias(self, "join_bias", (D,), ("width",))
        cos_sin = layers.rope(c.layer, positions)
        memories = []
        for index in range(c.layer.num_layers):
            at_first = c.joined_by == "attention" and index == 0
            layer = DecoderLayer(
                c.layer,
                self.dtype,
                input_width=joined.shape[-1] if at_first else None,
                norm_input=c.norm_input or index > 0,
                name=f"layer_{index}",
            )
            last = index == c.layer.num_layers - 1
            attention_input = joined if at_first else None
            x, memory = layer(x, cos_sin, attends[index], attention_input, wanted if last else None)
            memories.append(memory)
        hidden = layers.rms_norm(x, scale(self, "output_norm", D), eps) if c.norm_output else x
        return HeadOutput(hidden, hidden if c.recycle_normed else x, memories)


class Head(nn.Module):
    """All weights of a head; which of its functions runs is the caller's."""

    config: HeadConfig
    dtype: jnp.dtype = jnp.float32

    def setup(self) -> None:
        c = self.config
        if c.taps:
            self.fusion = Fusion(c, self.dtype)
        self.blocks = [Block(c, self.dtype, name=f"block_{index}") for index in range(c.num_blocks)]
        if c.own_head:
            self.head = weight(self, "head", (c.layer.width, c.draft_vocab_size), ("width", "vocab"))
        if c.own_embedding:
            self.embedding = weight(self, "embedding", (c.layer.vocab_size, c.layer.width), ("vocab", "width"))

    def fuse(self, features: jax.Array) -> jax.Array:
        """dtype[B, T, n, D_t] -> dtype[B, T, D]."""
        return self.fusion(features) if self.config.taps else features[:, :, 0]

    def run(
        self,
        shared: Shared,
        tokens: jax.Array,
        feature: jax.Array,
        positions: jax.Array,
        attends: Sequence[Attend],
        block: int,
        wanted: jax.Array | None = None,
    ) -> HeadOutput:
        """One block over int32[B, T] tokens and dtype[B, T, D] features."""
        embedding = self.embedding if self.config.own_embedding else shared.embedding
        embedded = embedding[tokens].astype(feature.dtype)
        return self.blocks[block](embedded, feature, positions, attends, wanted)

    def logits(self, shared: Shared, hidden: jax.Array) -> jax.Array:
        """float32[..., draft_vocab_size]."""
        return layers.project(hidden, self.head if self.config.own_head else shared.head)

    def everything(self, shared: Shared, features: jax.Array) -> jax.Array:
        """Touches every weight, for init."""
        tokens = positions = jnp.zeros((1, 1), jnp.int32)
        attends = [AttendWithin(jnp.ones((1, 1, 1), bool))] * self.config.layer.num_layers
        feature = self.fuse(features)
        for block in range(self.config.num_blocks):
            feature = self.run(shared, tokens, feature, positions, attends, block).recycled
        return self.logits(shared, feature)


def init(config: HeadConfig, key: jax.Array, dtype: jnp.dtype = jnp.float32) -> Params:
    """Random weights as a nested dict of arrays."""
    return nn.unbox(_init_boxed(config, key, dtype))


def param_shapes(config: HeadConfig, dtype: jnp.dtype = jnp.float32) -> Params:
    """The nested dict of jax.ShapeDtypeStruct that init would fill and a checkpoint has to."""
    return jax.eval_shape(lambda: init(config, jax.random.key(0), dtype))


def param_axes(config: HeadConfig) -> Params:
    """The same nested dict with a PartitionSpec of logical axis names for each weight."""
    return nn.get_partition_spec(jax.eval_shape(lambda: _init_boxed(config, jax.random.key(0), jnp.float32)))


def _init_boxed(config: HeadConfig, key: jax.Array, dtype: jnp.dtype) -> Params:
    V, D = config.layer.vocab_size, config.layer.width
    shared = Shared(jnp.zeros((V, D), dtype), jnp.zeros((D, V), dtype))
    features = jnp.zeros((1, 1, config.num_features, config.target_width), dtype)
    params: Params = Head(config, dtype).init(key, shared, features, method="everything")["params"]
    return params


def fuse(config: HeadConfig, params: Params, features: jax.Array) -> jax.Array:
    """The target's hidden states dtype[B, T, n, D_t] as the feature dtype[B, T, D] of step 0."""
    fused: Any = Head(config).apply({"params": params}, features, method="fuse")
    return fused


def run(
    config: HeadConfig,
    params: Params,
    shared: Shared,
    tokens: jax.Array,
    feature: jax.Array,
    positions: jax.Array,
    attends: Sequence[Attend],
    block: int = 0,
    wanted: jax.Array | None = None,
) -> HeadOutput:
    """One pass of a block.

    Args:
        tokens: int32[B, T], the token after each feature's.
        feature: dtype[B, T, D], fused or recycled.
        positions: int32[B, T], of the features.
        attends: how each of the block's layers attends.
        block: which one.
        wanted: int32[B, n], the slots of the window whose output is read; None for all. The attention remembers all.
    """
    inputs = shared, tokens, feature, positions, attends, block, wanted
    output: Any = Head(config).apply({"params": params}, *inputs, method="run")
    return output


def logits(config: HeadConfig, params: Params, shared: Shared, hidden: jax.Array) -> jax.Array:
    """float32[..., draft_vocab_size] from dtype[..., D]."""
    out: Any = Head(config).apply({"params": params}, shared, hidden, method="logits")
    return out
