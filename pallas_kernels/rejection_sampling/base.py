"""What goes into the operation and comes out of it, the same for every implementation.

Dimensions: B rows of a batch, G drafts, T = G + 1 positions, V vocabulary.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

Axis = str | tuple[str, ...] | None
"""The mesh axis, or axes, over which a vocabulary is split inside shard_map; None where it is whole."""

NO_DRAFT = -1
"""A draft that is none: always rejected, and what follows it in its row is never looked at."""

LANES = 128
"""Tokens in the smallest block of the draw."""

CHUNK = 16 * LANES
"""Tokens in the largest block of the draw: first a chunk is drawn, then 128 tokens of it, then one of them.

A float32 uniform has 23 bits, too few to reach the tail of a large vocabulary in one go; one for each level reaches it.
"""


MAX_BISECTIONS = 64
"""Steps that the search for a threshold may take: they narrow it down to 2**-64 of DEPTH temperatures."""

DEPTH = 110.0
"""How far below the best token, in temperatures, the search for thresholds begins: exp(-DEPTH) is 0 in float32."""


class Truncation(NamedTuple):
    """How each row truncates the target's distribution: temperature, then top-k, then top-p, then min-p.

    A cut is a threshold on the logits; tokens at the threshold are all kept.

    Attributes:
        temperature: float32[B]; 0 makes the row greedy.
        top_k: int32[B]; 0 keeps all.
        top_p: float32[B] in (0, 1]; 1 keeps all.
        min_p: float32[B] in [0, 1]; 0 keeps all.
    """

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array


class Verdict(NamedTuple):
    """What is decided about a round's drafts.

    Attributes:
        num_accepted: int32[B], 0..G, next_token not counted.
        next_token: int32[B], recovered after a rejection, a bonus after full acceptance.
    """

    num_accepted: jax.Array
    next_token: jax.Array


def inverse(temperature: jax.Array) -> jax.Array:
    """1 / temperature; 1 for greedy rows. Stays where float32 numbers do."""
    return 1 / jnp.where(temperature <= 0, 1.0, jnp.clip(temperature, 1e-30, 1e30))


def leading(accepted: jax.Array) -> jax.Array:
    """int32[B]: how many of bool[B, G] hold before the first that does not."""
    return jnp.cumprod(accepted.astype(jnp.int32), axis=1).sum(axis=1, dtype=jnp.int32)
