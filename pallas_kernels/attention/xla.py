"""The operation in jax.numpy for any platform: block by block with an online softmax (1805.02867).

Only blocks that some row can see are read: the trip count follows the longest live context, not the capacity.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.attention.base import HIDDEN, depths, within


def attention(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    start: jax.Array,
    mask: jax.Array | None = None,
    sliding_window: int | None = None,
    size: int = 256,
    keys_first: bool = False,
) -> jax.Array:
    """See api.attention.

    Args:
        size: slots of a block; divides S.
        keys_first: turn the product of queries and keys around, and keep the compiler from turning it back: with few
            queries XLA on CPU runs that three times faster.
    """
    B, T, K, Q, H = queries.shape
    positions = start[:, None] + (jnp.arange(T) if mask is None else depths(mask))
    stacked = queries.transpose(0, 2, 3, 1, 4).reshape(B, K, Q * T, H)

    def visible(slots: jax.Array) -> jax.Array:
        """bool[B, T, size]."""
        distance = positions[:, :, None] - slots[None, None, :]
        seen = distance >= 0
        if sliding_window is not None:
            seen &= distance < sliding_window
        if mask is None:
            return seen
        own = jnp.broadcast_to((slots - start[:, None])[:, None], (B, T, slots.size))
        allowed = jnp.take_along_axis(within(mask, sliding_window), jnp.clip(own, 0, T - 1), axis=2)
        return jnp.where(own < 0, seen, allowed & (own < T))

    def block(index: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        peak, total, mixed = carry
        offset = index * size
        block_keys = jax.lax.dynamic_slice_in_dim(keys, offset, size, axis=2)
        block_values = jax.lax.dynamic_slice_in_dim(values, offset, size, axis=2)
        if keys_first:
            logits = jnp.einsum("bksh,bkqh->bksq", block_keys, stacked, preferred_element_type=jnp.float32)
            logits = jax.lax.optimization_barrier(logits).swapaxes(2, 3)
        else:
            logits = jnp.einsum("bkqh,bksh->bkqs", stacked, block_keys, preferred_element_type=jnp.float32)
        seen = visible(offset + jnp.arange(size))
        seen = jnp.broadcast_to(seen[:, None, None], (B, 1, Q, T, size)).reshape(B, 1, Q * T, size)
        logits = jnp.where(seen, logits, HIDDEN)
        new_peak = jnp.maximum(peak, logits.max(axis=-1))
        # A block that a query sees nothing of weighs exp(0) each until the first visible slot, whose decay is then 0.
        weights = jnp.exp(logits - new_peak[..., None])
        decay = jnp.exp(peak - new_peak)
        update = jnp.einsum(
            "bkqs,bksh->bkqh", weights.astype(values.dtype), block_values, preferred_element_type=jnp.float32
        )
        return new_peak, total * decay + weights.sum(axis=-1), mixed * decay[..., None] + update

    first = 0 if sliding_window is None else jnp.maximum(jnp.min(start) - sliding_window + 1, 0) // size
    last = (jnp.max(start) + T + size - 1) // size
    empty = jnp.full((B, K, Q * T), HIDDEN), jnp.zeros((B, K, Q * T)), jnp.zeros((B, K, Q * T, H))
    _, total, mixed = jax.lax.fori_loop(first, last, block, empty)
    out = (mixed / total[..., None]).astype(queries.dtype)
    return out.reshape(B, K, Q, T, H).transpose(0, 3, 1, 2, 4)


def write_and_attend(
    queries: jax.Array,
    k: jax.Array,
    v: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    start: jax.Array,
    mask: jax.Array | None = None,
    sliding_window: int | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See api.write_and_attend."""

    def written(cache: jax.Array, entries: jax.Array) -> jax.Array:
        entries = entries.swapaxes(1, 2).astype(cache.dtype)
        for row in range(len(entries)):
            cache = jax.lax.dynamic_update_slice(cache, entries[row : row + 1], (row, 0, start[row], 0))
        return cache

    keys, values = written(keys, k), written(values, v)
    return attention(queries, keys, values, start, mask, sliding_window), keys, values
