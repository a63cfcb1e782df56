"""The operation as one sentence of the definition each: every slot is looked at, in float32.

It is the independent twin that the other implementations are compared with.
"""

import jax
import jax.numpy as jnp


def attention(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    start: jax.Array,
    mask: jax.Array | None = None,
    sliding_window: int | None = None,
) -> jax.Array:
    """See api.attention."""
    B, T = queries.shape[:2]
    S = keys.shape[2]
    if mask is None:
        mask = jnp.broadcast_to(jnp.tri(T, dtype=bool), (B, T, T))

    def row(queries, keys, values, start, mask):
        own = jnp.arange(S) - start  # which of the window's tokens a slot holds, if any
        slots = start + mask.sum(axis=1) - 1  # a token stands behind its ancestors
        position = jnp.where(own < 0, jnp.arange(S), slots[jnp.clip(own, 0, T - 1)])
        seen = (own < 0) | ((own < T) & mask[:, jnp.clip(own, 0, T - 1)])
        if sliding_window is not None:
            seen &= slots[:, None] - position < sliding_window
        logits = jnp.einsum("tkqh,ksh->kqts", *(x.astype(jnp.float32) for x in (queries, keys)))
        weights = jax.nn.softmax(jnp.where(seen, logits, -jnp.inf), axis=-1)
        values = jnp.where(seen.any(axis=0)[:, None], values.astype(jnp.float32), 0.0)
        return jnp.einsum("kqts,ksh->tkqh", weights, values)

    return jax.vmap(row)(queries, keys, values, start, mask).astype(queries.dtype)


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
    B, T = queries.shape[:2]
    slots = start[:, None] + jnp.arange(T)

    def written(cache, entries):
        # Row and slot come first in the result of such indices: [B, T, K, H].
        return cache.at[jnp.arange(B)[:, None], :, slots].set(entries.astype(cache.dtype))

    keys, values = written(keys, k), written(values, v)
    return attention(queries, keys, values, start, mask, sliding_window), keys, values
