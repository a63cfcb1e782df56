"""The decoder-only transformer: weights described once, init and apply as pure functions."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from specjax import cache as kv
from specjax.target import layers
from specjax.target.families import ModelConfig

Params = dict[str, Any]


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
        start: jax.Array,
        cache: kv.KVCache,
        taps: tuple[int, ...] = (),
        with_logits: bool = True,
    ) -> TargetOutput:
        c = self.config
        x = _weight(self, "embedding", (c.vocab_size, c.width), ("vocab", "width"))[tokens]
        positions = start[:, None] + jnp.arange(tokens.shape[1])
        cos_sin = layers.rope(c, positions)
        tapped = {}
        keys, values = [], []
        for index in range(c.num_layers):
            tapped[index] = x
            layer = DecoderLayer(c, c.sliding_windows[index], self.dtype, name=f"layer_{index}")
            x, layer_keys, layer_values = layer(x, cos_sin, start, cache.keys[index], cache.values[index])
            keys.append(layer_keys)
            values.append(layer_values)
        tapped[c.num_layers] = x
        final = layers.rms_norm(x, _scale(self, "final_norm", c.width), c.norm_eps)
        head = _weight(self, "head", (c.width, c.vocab_size), ("width", "vocab"))
        logits = None
        if with_logits:
            with jax.named_scope("head"):
                logits = jnp.einsum("btd,dv->btv", final, head, preferred_element_type=jnp.float32)
        new_cache = kv.KVCache(tuple(keys), tuple(values))
        return TargetOutput(logits, tuple(tapped[tap] for tap in taps), final, new_cache)


class DecoderLayer(nn.Module):
    """Pre-norm attention and SwiGLU MLP. Tokens' entries are written to the cache, then attended to there."""

    config: ModelConfig
    sliding_window: int | None
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        cos_sin: tuple[jax.Array, jax.Array],
        start: jax.Array,
        keys: jax.Array,
        values: jax.Array,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        c = self.config
        Q, H = c.queries_per_kv, c.head_dim
        with jax.named_scope("attention"):
            normed = layers.rms_norm(x, _scale(self, "attention_norm", c.width), c.norm_eps)
            kernel = _weight(self, "qkv", (c.width, c.num_kv_heads, Q + 2, H), ("width", "kv_heads", None, "head"))
            qkv = jnp.einsum("btd,dkgh->btkgh", normed, kernel)
            if c.qkv_bias:
                qkv += _bias(self, "qkv_bias", (c.num_kv_heads, Q + 2, H), ("kv_heads", None, "head"))
            q, k, v = qkv[..., :Q, :], qkv[..., Q, :], qkv[..., Q + 1, :]
            if c.qk_norm:
                q = layers.rms_norm(q, _scale(self, "q_norm", H), c.norm_eps)
                k = layers.rms_norm(k, _scale(self, "k_norm", H), c.norm_eps)
            B, T = x.shape[:2]
            q = layers.rotate(q.reshape(B, T, -1, H), cos_sin).reshape(q.shape) * (H**-0.5)
            keys = kv.write(keys, layers.rotate(k, cos_sin), start)
            # Finite, because a hidden slot weighs 0 and 0 * inf is NaN; a row that overflows shows it elsewhere.
            values = kv.write(values, jnp.nan_to_num(v), start)
            mixed = layers.attend(q, keys, values, start, self.sliding_window)
            out_kernel = _weight(self, "out", (c.num_kv_heads, Q, H, c.width), ("kv_heads", None, "head", "width"))
            out = mixed @ out_kernel.reshape(-1, c.width)
            if c.out_bias:
                out += _bias(self, "out_bias", (c.width,), ("width",))
            x = x + out
        with jax.named_scope("mlp"):
            normed = layers.rms_norm(x, _scale(self, "mlp_norm", c.width), c.norm_eps)
            gate_up = jnp.einsum(
                "btd,dcf->btcf", normed, _weight(self, "gate_up", (c.width, 2, c.mlp_width), ("width", None, "mlp"))
            )
            if c.mlp_bias:
                gate_up += _bias(self, "gate_up_bias", (2, c.mlp_width), (None, "mlp"))
            hidden = jax.nn.silu(gate_up[..., 0, :]) * gate_up[..., 1, :]
            down = hidden @ _weight(self, "down", (c.mlp_width, c.width), ("mlp", "width"))
            if c.mlp_bias:
                down += _bias(self, "down_bias", (c.width,), ("width",))
            x = x + down
        return x, keys, values


def _weight(module: nn.Module, name: str, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> jax.Array:
    """A kernel of the module: its shape, logical axes and initialiser, the one place that says them."""
    return _param(module, name, nn.initializers.normal(0.02), shape, axes)


def _bias(module: nn.Module, name: str, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> jax.Array:
    return _param(module, name, nn.initializers.zeros, shape, axes)


def _scale(module: nn.Module, name: str, width: int) -> jax.Array:
    return _param(module, name, nn.initializers.ones, (width,), (None,))


def _param(module: nn.Module, name: str, init: Any, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> Any:
    return module.param(name, nn.with_logical_partitioning(init, axes), shape, module.dtype)


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
    tokens, start = jnp.zeros((1, 1), jnp.int32), jnp.zeros((1,), jnp.int32)
    cache = init_cache(config, 1, kv.BLOCK, dtype)
    return Decoder(config, dtype).init(key, tokens, start, cache)["params"]


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
    output: Any = Decoder(config, cache.keys[0].dtype).apply(
        {"params": params}, tokens, start, cache, taps, with_logits
    )
    return output
