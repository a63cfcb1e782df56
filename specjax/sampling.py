"""Logits -> the truncated distribution of a row, and drawing one token from weights.

The order is the same with and without speculation: temperature, then top-k, then top-p over what is left, then min-p.
Every cut is a threshold on the logits, found by bisection over the bit patterns of float32: exact, no sort, and one
number a row. Tokens whose logit equals the threshold are all kept.
"""

from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from specjax.config import GREEDY_TEMPERATURE

DRAW_BLOCK = 128
"""Vocabulary entries in a block of the two-level draw."""

PROPOSE, ACCEPT, RECOVER = 1, 2, 3
"""Random domains: what is proposed, what is accepted and what replaces a rejection never share random bits."""


@flax.struct.dataclass
class SamplingState:
    """Sampling parameters of each row.

    Attributes:
        temperature: float32[B]; below GREEDY_TEMPERATURE the row is greedy.
        top_k: int32[B]; 0 keeps all.
        top_p: float32[B]; 1 keeps all.
        min_p: float32[B]; 0 keeps all.
        key: jax.random key[B], from the row's seed alone.
    """

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    key: jax.Array

    @property
    def greedy(self) -> jax.Array:
        """bool[B]."""
        return self.temperature < GREEDY_TEMPERATURE


class Truncated(NamedTuple):
    """A truncated distribution per position that is never written out over the vocabulary.

    Attributes:
        logits: float32[B, T, V], divided by the temperature (as they came for greedy rows).
        best: int32[B, T], the first token with the largest logit.
        threshold: float32[B, T], the smallest logit that is kept.
        log_total: float32[B, T], log of the sum of exp(logits) kept.
        greedy: bool[B].
    """

    logits: jax.Array
    best: jax.Array
    threshold: jax.Array
    log_total: jax.Array
    greedy: jax.Array


def truncate(logits: jax.Array, sampling: SamplingState) -> Truncated:
    """Applies temperature, top-k, top-p and min-p to float32[B, T, V] logits."""
    greedy = sampling.greedy
    temperature = jnp.where(greedy, 1.0, sampling.temperature)[:, None, None]
    logits = logits / temperature
    peak = logits.max(axis=-1)
    cuts_mass = jnp.any(~greedy & ((sampling.top_k > 0) | (sampling.top_p < 1.0)))
    threshold = jax.lax.cond(
        cuts_mass,
        lambda: _rank_and_mass_threshold(logits, peak, sampling.top_k, sampling.top_p),
        lambda: jnp.full(peak.shape, -jnp.inf),
    )
    min_p = sampling.min_p[:, None]
    threshold = jnp.maximum(threshold, jnp.where(min_p > 0, peak + jnp.log(min_p), -jnp.inf))
    kept = jnp.where(logits >= threshold[..., None], jnp.exp(logits - peak[..., None]), 0.0)
    return Truncated(
        logits=logits,
        best=jnp.argmax(logits, axis=-1).astype(jnp.int32),
        threshold=threshold,
        log_total=peak + jnp.log(kept.sum(axis=-1)),
        greedy=greedy,
    )


def probability_of(law: Truncated, tokens: jax.Array) -> jax.Array:
    """float32[B, T]: the probability of int32[B, T] tokens; positions of the law beyond T are ignored."""
    num = tokens.shape[1]
    logit = jnp.take_along_axis(law.logits[:, :num], tokens[..., None], axis=-1)[..., 0]
    sampled = jnp.where(logit >= law.threshold[:, :num], jnp.exp(logit - law.log_total[:, :num]), 0.0)
    return jnp.where(law.greedy[:, None], (tokens == law.best[:, :num]).astype(jnp.float32), sampled)


def probabilities_at(law: Truncated, position: jax.Array) -> jax.Array:
    """float32[B, V]: the distribution at one position of each row, int32[B]."""

    rows = jnp.arange(position.shape[0])
    logits = law.logits[rows, position]
    kept = logits >= law.threshold[rows, position][:, None]
    sampled = jnp.where(kept, jnp.exp(logits - law.log_total[rows, position][:, None]), 0.0)
    best = jax.nn.one_hot(law.best[rows, position], logits.shape[-1])
    return jnp.where(law.greedy[:, None], best, sampled)


def draw(weights: jax.Array, uniforms: jax.Array) -> jax.Array:
    """Draws one token a row in proportion to weights, by inversion: first a block of the vocabulary, then in it.

    A float32 uniform has 23 bits, too few to reach the tail of a large vocabulary; two of them reach it.

    Args:
        weights: float32[B, V], not negative, not all zero, any total.
        uniforms: float32[B, 2] in [0, 1).

    Returns:
        int32[B], a token of positive weight.
    """
    B, V = weights.shape
    blocks = jnp.pad(weights, ((0, 0), (0, -V % DRAW_BLOCK))).reshape(B, -1, DRAW_BLOCK)
    chosen = _invert(blocks.sum(axis=-1), uniforms[:, 0])
    within = jnp.take_along_axis(blocks, chosen[:, None, None], axis=1)[:, 0]
    return chosen * DRAW_BLOCK + _invert(within, uniforms[:, 1])


def _invert(weights: jax.Array, uniform: jax.Array) -> jax.Array:
    """int32[B]: the first index whose cumulative weight exceeds uniform * total, never one of zero weight."""
    cumulative = jnp.cumsum(weights, axis=-1)
    # A parallel sum may rise by a rounding error where the weight is zero.
    reached = (weights > 0) & (cumulative > uniform[:, None] * cumulative[:, -1:])
    # Rounding can leave nothing above the mark; the mark then belongs to the last index that has any weight.
    last = weights.shape[-1] - 1 - jnp.argmax((weights > 0)[:, ::-1], axis=-1)
    return jnp.minimum(jnp.where(reached.any(axis=-1), jnp.argmax(reached, axis=-1), last), last).astype(jnp.int32)


def uniforms_at(keys: jax.Array, length: jax.Array, domain: int, num: int) -> jax.Array:
    """float32[B, num] in [0, 1): the random numbers of a row's round in one domain.

    A round is named by the row's length when it begins, int32[B]. Lengths only grow, so no two rounds share a number,
    also where a rejected draft and a later one stand at the same position: rules that look behind the first rejection
    need that. The row's batch plays no part.
    """

    def of_row(key, length):
        return jax.random.uniform(jax.random.fold_in(jax.random.fold_in(key, length), domain), (num,))

    return jax.vmap(of_row)(keys, length)


def _rank_and_mass_threshold(logits: jax.Array, peak: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
    """float32[B, T]: the largest logit t such that at least k tokens, and p of their mass, lie at or above it."""
    ordered = _to_ordered(logits)
    wanted = jnp.where(top_k > 0, jnp.minimum(top_k, logits.shape[-1]), logits.shape[-1])[:, None]
    rank = _largest(lambda t: (ordered >= t[..., None]).sum(axis=-1) >= wanted, peak.shape)
    mass = jnp.where(ordered >= rank[..., None], jnp.exp(logits - peak[..., None]), 0.0)
    target = top_p[:, None] * mass.sum(axis=-1)
    nucleus = _largest(lambda t: jnp.where(ordered >= t[..., None], mass, 0.0).sum(axis=-1) >= target, peak.shape)
    nucleus = jnp.minimum(nucleus, _to_ordered(peak))  # a top_p that rounds to zero still keeps the best token
    cut_p = jnp.where(top_p[:, None] < 1.0, _from_ordered(nucleus), -jnp.inf)
    cut_k = jnp.where(top_k[:, None] > 0, _from_ordered(rank), -jnp.inf)
    return jnp.maximum(cut_k, cut_p)


def _largest(holds, shape: tuple[int, ...]) -> jax.Array:
    """The largest uint32 for which a predicate that holds up to some point still holds; bit by bit from the top."""

    def body(index, found):
        candidate = found | (jnp.uint32(1) << (31 - index).astype(jnp.uint32))
        return jnp.where(holds(candidate), candidate, found)

    return jax.lax.fori_loop(0, 32, body, jnp.zeros(shape, jnp.uint32))


def _to_ordered(x: jax.Array) -> jax.Array:
    """float32 -> uint32 of the same order (negative numbers have their bits reversed)."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _from_ordered(ordered: jax.Array) -> jax.Array:
    bits = jnp.where(ordered >> 31 == 1, ordered & jnp.uint32((1 << 31) - 1), ~ordered)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)
