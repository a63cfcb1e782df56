"""The decoder-only transformer: weights described once, init and apply as pure functions."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from specjax import cache as kv
from specjax.sharding import CACHE, per_device
from specjax.target import layers
from specjax.target.families import ModelConfig

Params = dict[str, Any]

Attend = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]
"""How a layer attends: queries dtype[B, T, K, N / K, H], scaled by 1 / sqrt(H), and the tokens' own keys and values
dtype[B, T, K, H], rotated -> dtype[B, T, N * H] and what is remembered of them."""


class TargetOutput(NamedTuple):
    """What one forward pass of a window gives.

    Attributes:
        logits: float32[B, T, V], or None when they were not asked for.
        taps: one dtype[B, T, D] for each layer asked for, the residual stream entering it (L: leaving the last one).
        final: dtype[B, T, D], after the final norm: what the output head reads.
        cache: the cache with the window's entries written at start.
    """

    logits: Any
    taps: tuple[jax.Array, ...]
    final: jax.Array
    cache: kv.KVCache


class Decoder(nn.Module):
    """One decoder for all families; what differs between them is data in the config.

    Kernels are stored [in, ..., out] and projections of one input share a kernel: qkv is [D, K, N / K + 2, H], each
    KV head's queries followed by its key and its value, and gate_up is [D, 2, F]. So a decode step reads each weight
    once in few large products, and both still shard over heads (K) and over F.
    """

    config: ModelConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        attends: Sequence[Attend],
        taps: tuple[int, ...] = (),
        with_logits: bool = True,
    ) -> tuple[Any, tuple[jax.Array, ...], jax.Array, list[Any]]:
        """Logits or None, the taps, the final hidden states, and what each layer's attention remembers."""
        c = self.config
        x = weight(self, "embedding", (c.vocab_size, c.width), ("vocab", "width"))[tokens].astype(self.dtype)
        cos_sin = layers.rope(c, positions)
        tapped = {}
        memories = []
        layer = DecoderLayer if self.is_initializing() else _SharedLayer  # lifted, layers would draw other weights
        for index in range(c.num_layers):
            tapped[index] = x
            x, memory = layer(c, self.dtype, name=f"layer_{index}")(x, cos_sin, attends[index])
            memories.append(memory)
        tapped[c.num_layers] = x
        final = layers.rms_norm(x, scale(self, "final_norm", c.width), c.norm_eps)
        head = weight(self, "head", (c.width, c.vocab_size), ("width", "vocab"))
        logits = None
        if with_logits:
            with jax.named_scope("head"):
                logits = layers.project(final, head)
        return logits, tuple(tapped[tap] for tap in taps), final, memories


class DecoderLayer(nn.Module):
    """Attention and SwiGLU MLP, each behind a norm. How tokens attend, and to what, is the caller's.

    Attributes:
        input_width: of what the attention's projections read; None where it is the layer's own normed input.
        norm_input: False for heads whose layer reads an input that is normed already (EAGLE).
    """

    config: ModelConfig
    dtype: jnp.dtype
    input_width: int | None = None
    norm_input: bool = True

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        cos_sin: tuple[jax.Array, jax.Array],
        attend: Attend,
        attention_input: Any = None,
        wanted: Any = None,
    ) -> tuple[jax.Array, Any]:
        """What leaves the layer, and what attention remembers; wanted int32[B, n] slots leave it, or None for all."""
        c = self.config
        K, Q, H = c.num_kv_heads, c.queries_per_kv, c.head_dim
        with jax.named_scope("attention"):
            if attention_input is None:
                attention_input = x
                if self.norm_input:
                    attention_input = layers.rms_norm(x, scale(self, "attention_norm", c.width), c.norm_eps)
            width = c.width if self.input_width is None else self.input_width
            kernel = weight(self, "qkv", (width, K, Q + 2, H), ("width", "kv_heads", None, "head"))
            qkv = layers.product(attention_input, kernel)
            if c.qkv_bias:
                qkv += bias(self, "qkv_bias", (K, Q + 2, H), ("kv_heads", None, "head"))
            q, k, v = qkv[..., :Q, :], qkv[..., Q, :], qkv[..., Q + 1, :]
            if c.qk_norm:
                q = layers.rms_norm(q, scale(self, "q_norm", H), c.norm_eps)
                k = layers.rms_norm(k, scale(self, "k_norm", H), c.norm_eps)
            B, T = x.shape[:2]
            q = layers.rotate(q.reshape(B, T, -1, H), cos_sin).reshape(q.shape) * (H**-0.5)
            # Finite, because a hidden slot weighs 0 and 0 * inf is NaN; a row that overflows shows it elsewhere.
            mixed, memory = attend(q, layers.rotate(k, cos_sin), jnp.nan_to_num(v))
            if wanted is not None:
                x, mixed = layers.take_slots(x, wanted), layers.take_slots(mixed, wanted)
            out_kernel = weight(self, "out", (K, Q, H, c.width), ("kv_heads", "queries", "head", "width"))
            out = layers.product(mixed, layers.with_one_input(out_kernel, c.width))
            if c.out_bias:
                out += bias(self, "out_bias", (c.width,), ("width",))
            x = x + out
        with jax.named_scope("mlp"):
            normed = layers.rms_norm(x, scale(self, "mlp_norm", c.width), c.norm_eps)
            gate_up = layers.product(normed, weight(self, "gate_up", (c.width, 2, c.mlp_width), ("width", None, "mlp")))
            if c.mlp_bias:
                gate_up += bias(self, "gate_up_bias", (2, c.mlp_width), (None, "mlp"))
            hidden = jax.nn.silu(gate_up[..., 0, :]) * gate_up[..., 1, :]
            down = layers.product(hidden, weight(self, "down", (c.mlp_width, c.width), ("mlp", "width")))
            if c.mlp_bias:
                down += bias(self, "down_bias", (c.width,), ("width",))
            x = x + down
        return x, memory


_SharedLayer: Any = nn.jit(DecoderLayer)
"""DecoderLayer, traced once for all layers of one kind: what they run, attends included, has to be a pytree."""


def weight(module: nn.Module, name: str, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> jax.Array:
    """A kernel of the module: its shape, logical axes and initialiser, the one place that says them."""
    return _param(module, name, nn.initializers.normal(0.02), shape, axes)


def bias(module: nn.Module, name: str, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> jax.Array:
    """A bias of the module, 0 at first."""
    return _param(module, name, nn.initializers.zeros, shape, axes)


def scale(module: nn.Module, name: str, width: int) -> jax.Array:
    """The scale of an RMSNorm, 1 at first."""
    return _param(module, name, nn.initializers.ones, (width,), (None,))


def _param(module: nn.Module, name: str, init: Any, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> Any:
    stored: Any = module.get_variable("params", name)
    if isinstance(stored, layers.RowsFirst):
        return stored
    return module.param(name, nn.with_logical_partitioning(init, axes), shape, module.dtype)


def rows_first(params: Params, tied_head: bool = False) -> Params:
    """The same weights with each kernel as layers.RowsFirst. params is emptied on the way, so that nothing lies twice.

    Args:
        tied_head: the head's rows are the embedding itself.
    """
    made: Params = {}
    if tied_head:
        del params["head"]
        made["head"] = layers.RowsFirst(params["embedding"], params["embedding"].shape[:1])
    for name in list(params):
        value = params.pop(name)
        if isinstance(value, dict):
            made[name] = rows_first(value)
        elif name == "embedding" or name.endswith("bias") or value.ndim < 2:
            made[name] = value
        else:
            made[name] = layers.RowsFirst.of(value, num_inputs=3 if name == "out" else 1)
    return made


def as_arrays(params: Params, shapes: Params) -> Params:
    """Weights of any form as arrays of the shapes that param_shapes gives."""
    return jax.tree.map(lambda shape, kernel: layers.as_array(kernel).reshape(shape.shape), shapes, params)


def init_cache(config: ModelConfig, batch: int, capacity: int, dtype: jnp.dtype) -> kv.KVCache:
    """An empty cache for this model; capacity in positions."""
    return kv.init_cache(config.num_layers, batch, config.num_kv_heads, capacity, config.head_dim, dtype)


def init(config: ModelConfig, key: jax.Array, dtype: jnp.dtype = jnp.float32) -> Params:
    """Random weights as a nested dict of arrays."""
    return nn.unbox(_init_boxed(config, key, dtype))


def param_shapes(config: ModelConfig, dtype: jnp.dtype = jnp.float32) -> Params:
    """The nested dict of jax.ShapeDtypeStruct that init would fill and a checkpoint has to."""
    return jax.eval_shape(lambda: init(config, jax.random.key(0), dtype))


def param_axes(config: ModelConfig) -> Params:
    """The same nested dict with a PartitionSpec of logical axis names for each weight."""
    return nn.get_partition_spec(jax.eval_shape(lambda: _init_boxed(config, jax.random.key(0), jnp.float32)))


def _init_boxed(config: ModelConfig, key: jax.Array, dtype: jnp.dtype) -> Params:
    tokens = positions = jnp.zeros((1, 1), jnp.int32)
    attends = [AttendWithin(jnp.ones((1, 1, 1), bool))] * config.num_layers
    return Decoder(config, dtype).init(key, tokens, positions, attends)["params"]


class AttendToCache(flax.struct.PyTreeNode):
    """A layer's attention over its cache, in which the window's entries are written at start.

    Attributes:
        keys, values: dtype[B, K, S, H], as the cache has them; the new ones are what is remembered.
        start: int32[B].
        sliding_window: None, or how many positions back a query sees.
    """

    keys: jax.Array
    values: jax.Array
    start: jax.Array
    sliding_window: int | None = flax.struct.field(pytree_node=False)

    def __call__(self, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        heads, entries = ("batch", None, "kv_heads", "queries", None), ("batch", None, "kv_heads", None)
        inputs = heads, entries, entries, CACHE, CACHE, ("batch",)
        outputs = (heads, q.shape), (CACHE, self.keys.shape), (CACHE, self.values.shape)
        mixed, *memory = per_device(self._local, inputs, outputs, q, k, v, self.keys, self.values, self.start)
        return mixed.reshape(*mixed.shape[:2], -1), tuple(memory)

    def _local(self, q: Any, k: Any, v: Any, keys: Any, values: Any, start: Any) -> tuple[jax.Array, ...]:
        mixed, keys, values = layers.write_and_attend(q, k, v, keys, values, start, self.sliding_window)
        return mixed.reshape(q.shape), keys, values


class AttendWithin(flax.struct.PyTreeNode):
    """Attention of whole sequences to themselves; remembers nothing. mask: bool[B, T, T]."""

    mask: jax.Array

    def __call__(self, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, None]:
        return layers.attend_within(q, k, v, self.mask), None


def apply(
    config: ModelConfig,
    params: Params,
    tokens: jax.Array,
    start: jax.Array,
    cache: kv.KVCache,
    taps: tuple[int, ...] = (),
    with_logits: bool = True,
) -> TargetOutput:
    """Runs a window of tokens at per-row positions start .. start + T - 1 against the cache.

    Args:
        params: as init gives them.
        tokens: int32[B, T].
        start: int32[B]; the cache holds this row's positions below it.
        cache: its capacity must hold start + T positions.
        taps: layers j whose entering residual stream is returned (j = L: leaving the last layer).
        with_logits: False skips the output head, as prefill does.
    """
    attends = [
        AttendToCache(keys, values, start, window)
        for keys, values, window in zip(cache.keys, cache.values, config.sliding_windows, strict=True)
    ]
    positions = start[:, None] + jnp.arange(tokens.shape[1])
    output: Any = Decoder(config, cache.keys[0].dtype).apply(
        {"params": params}, tokens, positions, attends, taps, with_logits
    )
    logits, tapped, final, memories = output
    keys, values = zip(*memories, strict=True)
    return TargetOutput(logits, tapped, final, kv.KVCache(keys, values))


def forward(
    config: ModelConfig,
    params: Params,
    tokens: jax.Array,
    positions: jax.Array,
    mask: jax.Array,
    taps: tuple[int, ...],
    dtype: Any = None,
) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """Taps and final hidden states, dtype[B, T, D] each, of whole sequences, without a cache.

    Args:
        tokens, positions: int32[B, T].
        mask: bool[B, T, T], which tokens (last axis) a token may attend to; sliding windows narrow it further.
        taps: as in apply.
        dtype: of activations; None for the weights'.
    """
    distance = positions[:, :, None] - positions[:, None, :]
    masks = [mask if window is None else mask & (distance < window) for window in config.sliding_windows]
    attends = [AttendWithin(mask) for mask in masks]
    module = Decoder(config, dtype or params["embedding"].dtype)
    output: Any = module.apply({"params": params}, tokens, positions, attends, taps, False)
    _, tapped, final, _ = output
    return tapped, final
