"""What the implementations share.

Dimensions: B rows of a batch, T tokens of a window, K KV heads, Q queries of each, H head width, S slots of the cache.
"""

from typing import Any

import jax.numpy as jnp

HIDDEN = -1e30
"""Logit of a slot that a query may not see; finite, so that a fully hidden block stays free of NaN."""

LANES = 128

SUBLANES = 16
"""Rows of a bfloat16 register tile; copies of slots along sublanes start at a multiple of it."""

MAX_TOKENS = 64
"""Of a window: what the slots around it and the mask of it leave room for in the lanes of a register."""

MAX_QUERIES = 512
"""Queries of a KV head, tokens times Q, that have their logits of a block in VMEM at once."""


def depths(mask: Any) -> Any:
    """int32[B, T]: how far behind start each token stands, of bool[B, T, T], its ancestors and itself."""
    return mask.sum(axis=-1, dtype=jnp.int32) - 1


def within(mask: Any, sliding_window: int | None) -> Any:
    """bool[B, T, T]: the same mask, narrowed by a sliding window."""
    if sliding_window is None:
        return mask
    depth = depths(mask)
    return mask & (depth[:, :, None] - depth[:, None, :] < sliding_window)


def suits(queries: Any, keys: Any) -> bool:
    """Whether the kernel takes these arrays, dtype[B, T, K, Q, H] and dtype[B, K, S, H], or their shapes."""
    return misfit(queries, keys) is None


def misfit(queries: Any, keys: Any) -> str | None:
    """What the kernel does not take."""
    T, Q, H = queries.shape[1], queries.shape[3], queries.shape[4]
    S = keys.shape[2]
    if keys.dtype not in (jnp.bfloat16, jnp.float32):
        return f"keys: has dtype {keys.dtype}; the TPU kernel takes bfloat16 and float32."
    if T > MAX_TOKENS or T * Q > MAX_QUERIES:
        return (
            f"queries: {T} tokens with {Q} queries a KV head; the TPU kernel takes at most {MAX_TOKENS} tokens and "
            f"{MAX_QUERIES} queries."
        )
    if H % SUBLANES or S % (2 * LANES):
        return f"keys: heads of width {H}, {S} slots; the TPU kernel takes multiples of {SUBLANES} and {2 * LANES}."
    return None
