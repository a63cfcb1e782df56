"""What a decoder layer is made of: norm, rotary positions, attention over the cache."""

import functools
import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import attention
from pallas_kernels.platforms import on_tpu_or_elsewhere
from specjax import cache as kv
from specjax.target import few_rows
from specjax.target.families import ModelConfig

HIDDEN = attention.HIDDEN
"""Logit of a slot that a query may not see; finite, so that a fully hidden block stays free of NaN."""


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """x / rms(x) * scale over the last axis, computed in float32 (1910.07467)."""
    wide = x.astype(jnp.float32)
    normalised = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return normalised.astype(x.dtype) * scale.astype(x.dtype)


class RowsFirst(flax.struct.PyTreeNode):
    """A kernel [I, *O] as CPUs read it fastest: for each output a row of what the inputs are multiplied by.

    Checkpoints are read into it for decoding in float32 on one CPU. All functions below take either form.

    Attributes:
        rows: float32[prod(O), I], or bfloat16 where that holds the same numbers: half as much to read.
        outputs: O.
    """

    rows: jax.Array
    outputs: tuple[int, ...] = flax.struct.field(pytree_node=False)

    @classmethod
    def of(cls, kernel: jax.Array, num_inputs: int = 1) -> "RowsFirst":
        """From a kernel float32[*I, *O], of whose axes the first num_inputs are inputs."""
        inputs, outputs = kernel.shape[:num_inputs], kernel.shape[num_inputs:]
        rows = kernel.reshape(math.prod(inputs), -1).T
        narrow = rows.astype(jnp.bfloat16)
        return cls(narrow if bool((narrow.astype(rows.dtype) == rows).all()) else rows, outputs)

    def times(self, x: jax.Array) -> jax.Array:
        """float32[..., *O] from activations float32[..., I]."""
        flat = x.reshape(-1, x.shape[-1])
        if few_rows.suits(len(flat), len(self.rows)):
            out = few_rows.times(flat, self.rows)
        else:
            out = _dot(flat, self.rows.astype(flat.dtype), (1,), (1,))
        return out.reshape(*x.shape[:-1], *self.outputs)


Kernel = jax.Array | RowsFirst


def as_array(kernel: Kernel) -> jax.Array:
    """A kernel dtype[I, *O]."""
    if isinstance(kernel, RowsFirst):
        return kernel.rows.T.reshape(-1, *kernel.outputs).astype(jnp.float32)
    return kernel


def some_outputs(kernel: Kernel, chosen: Any) -> Kernel:
    """A kernel [I, O] with only the outputs int[O'], in the form that it has."""
    if isinstance(kernel, RowsFirst):
        return RowsFirst(kernel.rows[chosen], (len(chosen),))
    return kernel[:, chosen]


def with_one_input(kernel: Kernel, num_outputs: int) -> Kernel:
    """A kernel [*I, O] as [prod(I), O]."""
    return kernel if isinstance(kernel, RowsFirst) else kernel.reshape(-1, num_outputs)


def product(x: jax.Array, kernel: Kernel) -> jax.Array:
    """Activations [..., I] times a kernel [I, *O], summed in float32 and rounded once to the activations' dtype."""
    return project(x, kernel).astype(x.dtype)


def take_slots(x: jax.Array, slots: jax.Array) -> jax.Array:
    """x[b, slots[b, i]] of dtype[B, T, ...]; a slot beyond the end is the last."""
    slots = jnp.minimum(slots, x.shape[1] - 1)
    return jnp.take_along_axis(x, slots.reshape(*slots.shape, *(1,) * (x.ndim - 2)), axis=1)


def project(x: jax.Array, kernel: Kernel) -> jax.Array:
    """Activations [..., I] times a kernel [I, *O], multiplied in the kernel's dtype and summed in float32."""
    if isinstance(kernel, RowsFirst):
        return kernel.times(x.astype(jnp.float32))
    return _project(x, kernel)


@jax.custom_vjp
def _project(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """project. Its gradient does the same, so that all three products of a training step run where the hardware
    multiplies that dtype (XLA on CPU uses its matrix unit, AMX, for bfloat16 with float32 results).
    """
    return _dot(x.astype(kernel.dtype), kernel, (x.ndim - 1,), (0,))


def _dot(x: jax.Array, y: jax.Array, over_x: tuple[int, ...], over_y: tuple[int, ...]) -> jax.Array:
    return jax.lax.dot_general(x, y, ((over_x, over_y), ((), ())), preferred_element_type=jnp.float32)


def _project_forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
    return _project(x, kernel), (x.astype(kernel.dtype), kernel, jnp.zeros((), x.dtype))


def _project_backward(saved: tuple[jax.Array, ...], gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel, like = saved
    gradient = gradient.astype(kernel.dtype)
    lead = x.ndim - 1
    dx = _dot(gradient, kernel, tuple(range(lead, gradient.ndim)), tuple(range(1, kernel.ndim)))
    dk = _dot(x, gradient, tuple(range(lead)), tuple(range(lead)))
    return dx.astype(like.dtype), dk.astype(kernel.dtype)


_project.defvjp(_project_forward, _project_backward)


def rope_frequencies(config: ModelConfig) -> tuple[np.ndarray, float]:
    """Radians per position of each rotated pair, float32[H / 2], and what cos and sin are multiplied by."""
    half = np.arange(0, config.head_dim, 2, dtype=np.float64)
    frequencies = config.rope_theta ** (-half / config.head_dim)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies.astype(np.float32), 1.0
    if scaling.kind == "linear":
        return (frequencies / scaling.factor).astype(np.float32), 1.0
    if scaling.kind == "llama3":
        rotations = scaling.original_max_position * frequencies / (2 * math.pi)
        band = (rotations - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        kept = np.clip(band, 0.0, 1.0)
        return (frequencies * (kept + (1 - kept) / scaling.factor)).astype(np.float32), 1.0

    def pair_turning(rotations: float) -> float:
        wavelength = scaling.original_max_position / (rotations * 2 * math.pi)
        return config.head_dim * math.log(wavelength) / (2 * math.log(config.rope_theta))

    low, high = pair_turning(scaling.beta_fast), pair_turning(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.head_dim - 1)
    ramp = (np.arange(config.head_dim // 2) - low) / max(high - low, 0.001)
    kept = 1.0 - np.clip(ramp, 0.0, 1.0)
    return (frequencies * (kept + (1 - kept) / scaling.factor)).astype(np.float32), scaling.attention_factor


def rope(config: ModelConfig, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos and sin of every rotated pair, float32[B, T, 1, H / 2] each, for int32[B, T] positions."""
    frequencies, factor = rope_frequencies(config)
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def rotate(x: jax.Array, cos_sin: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates pairs (i, i + H/2) of the last axis of dtype[B, T, heads, H] (2104.09864)."""
    cos, sin = cos_sin
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def write_and_attend(
    queries: jax.Array,
    k: jax.Array,
    v: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    start: jax.Array,
    sliding_window: int | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Writes a window's entries into one layer's cache and attends to it.

    What is compiled for a TPU does both in one kernel, for windows that are short enough for it.

    Args:
        queries: dtype[B, T, K, N / K, H], already scaled by 1 / sqrt(H).
        k, v: dtype[B, T, K, H].
        keys, values: dtype[B, K, S, H].
        start: int32[B], position of the window's first token.
        sliding_window: None, or how many positions back a query sees.

    Returns:
        dtype[B, T, N * H], and keys and values with the entries.
    """
    B, T, K, Q, H = queries.shape

    def apart(queries: Any, k: Any, v: Any, keys: Any, values: Any, start: Any) -> tuple[Any, Any, Any]:
        keys, values = kv.write(keys, k, start), kv.write(values, v, start)
        return attend(queries, keys, values, start, sliding_window), keys, values

    def together(*arrays: Any) -> tuple[Any, Any, Any]:
        mixed, keys, values = attention.write_and_attend(*arrays, sliding_window=sliding_window, implementation="tpu")
        return mixed.reshape(B, T, K * Q * H), keys, values

    arrays = queries, k, v, keys, values, start
    if not attention.suits(queries, keys):
        return apart(*arrays)
    like = jax.ShapeDtypeStruct((B, T, K * Q * H), queries.dtype), keys, values
    mixed, keys, values = on_tpu_or_elsewhere(together, apart, like, *arrays)
    return mixed, keys, values


def attend(
    queries: jax.Array, keys: jax.Array, values: jax.Array, start: jax.Array, sliding_window: int | None
) -> jax.Array:
    """Attention of a window over the cache that already holds it, in jax.numpy. Arguments as above.

    Returns:
        dtype[B, T, N * H].
    """
    B, T, K, Q, H = queries.shape
    in_blocks = functools.partial(attention.attention, sliding_window=sliding_window, implementation="xla")
    on_cpu = functools.partial(in_blocks, size=kv.cpu_block(B, T), keys_first=T <= kv.FEW_QUERIES)
    elsewhere = functools.partial(in_blocks, size=kv.BLOCK)
    attended: jax.Array = jax.lax.platform_dependent(queries, keys, values, start, cpu=on_cpu, default=elsewhere)
    return attended.reshape(B, T, K * Q * H)


def attend_within(queries: jax.Array, keys: jax.Array, values: jax.Array, mask: jax.Array) -> jax.Array:
    """Attention of whole sequences to themselves.

    Args:
        queries: dtype[B, T, K, N / K, H], already scaled by 1 / sqrt(H).
        keys, values: dtype[B, T, K, H].
        mask: bool[B, T, T]; a token that may attend to nothing gets the mean of all values.

    Returns:
        dtype[B, T, N * H].
    """
    B, T, K, Q, H = queries.shape
    logits = jnp.einsum("btkqh,bskh->bkqts", queries, keys, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(jnp.where(mask[:, None, None], logits, HIDDEN), axis=-1).astype(values.dtype)
    mixed = jnp.einsum("bkqts,bskh->btkqh", weights, values, preferred_element_type=jnp.float32)
    return mixed.reshape(B, T, K * Q * H).astype(queries.dtype)
