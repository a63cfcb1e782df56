"""The operation in plain jax.numpy, without sorting and without probabilities for every position at once.

Positions are taken one after the other, and no more of them than the batch's luckiest row accepts. Cuts are thresholds
found by bisection. With `axis` every function runs under shard_map on a part of the vocabulary each: what crosses
devices is a few numbers a row, never logits.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.rejection_sampling.base import (
    CHUNK,
    DEPTH,
    LANES,
    MAX_BISECTIONS,
    NO_DRAFT,
    Axis,
    Truncation,
    Verdict,
    inverse,
    leading,
)


class Law(NamedTuple):
    """A truncated distribution, or several, that is never written out over the vocabulary.

    A token's log-probability is (logit - peak) / temperature - log_total. In this order nothing is lost at small
    temperatures: peak / temperature is too large to add anything to.

    Attributes:
        logits: float32[..., V], before temperature.
        peak: float32[...], the largest logit.
        inverse_temperature: float32[...]; 1 for greedy rows.
        best: int32[...], the first token with the largest logit.
        threshold: float32[...], at most the smallest logit that is kept, and above the next one.
        log_total: float32[...], log of the sum of exp((logits - peak) / temperature) kept.
        greedy: bool[...].
    """

    logits: jax.Array
    peak: jax.Array
    inverse_temperature: jax.Array
    best: jax.Array
    threshold: jax.Array
    log_total: jax.Array
    greedy: jax.Array

    def log_probabilities(self) -> jax.Array:
        """float32[..., V], sampled rows' only; -inf for tokens that are cut."""
        depth = (self.logits - self.peak[..., None]) * self.inverse_temperature[..., None]
        return jnp.where(self.logits >= self.threshold[..., None], depth - self.log_total[..., None], -jnp.inf)


@functools.partial(jax.jit, static_argnames="axis", inline=True)
def truncate(logits: jax.Array, rows: Truncation, axis: Axis = None) -> Law:
    """Applies temperature, top-k, top-p and min-p to logits[..., V]; the fields of rows have its leading shape."""
    greedy, inverse_temperature = rows.temperature <= 0, inverse(rows.temperature)
    logits = logits.astype(jnp.float32)
    peak = _all_max(logits.max(axis=-1), axis)
    cuts = ~greedy & ((rows.top_k > 0) | (rows.top_p < 1.0))
    threshold = jax.lax.cond(
        jnp.any(cuts),
        lambda: _rank_and_mass_threshold(logits, peak, cuts, rows, axis),
        lambda: jnp.full_like(peak, -jnp.inf),
    )
    least = peak + jnp.log(rows.min_p) / inverse_temperature
    threshold = jnp.maximum(threshold, jnp.where(rows.min_p > 0, least, -jnp.inf))
    kept = jnp.where(logits >= threshold[..., None], _weights(logits, peak, rows), 0.0)
    return Law(
        logits=logits,
        peak=peak,
        inverse_temperature=inverse_temperature,
        best=_first_index(logits == peak[..., None], axis),
        threshold=threshold,
        log_total=jnp.log(_all_sum(kept.sum(axis=-1), axis)),
        greedy=greedy,
    )


def probability_of(law: Law, tokens: jax.Array, axis: Axis = None) -> jax.Array:
    """float32[...]: the probability of one token each, int32[...]."""
    logit = entry(law.logits, tokens, axis, absent=-jnp.inf)
    sampled = jnp.exp((logit - law.peak) * law.inverse_temperature - law.log_total)
    sampled = jnp.where(logit >= law.threshold, sampled, 0.0)
    return jnp.where(law.greedy, (tokens == law.best).astype(jnp.float32), sampled)


def probabilities(law: Law, axis: Axis = None) -> jax.Array:
    """float32[..., V]: the distribution, on this device's part of the vocabulary."""
    one_hot = _one_hot(law.best, law.logits.shape[-1], axis)
    return jnp.where(law.greedy[..., None], one_hot, jnp.exp(law.log_probabilities()))


def draw(weights: jax.Array, uniforms: jax.Array, axis: Axis = None) -> jax.Array:
    """Draws one token a row in proportion to weights, by inversion on three levels: chunk, block, token.

    Args:
        weights: float32[B, V], not negative, not all zero, any total.
        uniforms: float32[B, 3] in [0, 1).

    Returns:
        int32[B], a token of positive weight.
    """
    B, V = weights.shape
    chunks = jnp.pad(weights, ((0, 0), (0, -V % CHUNK))).reshape(B, -1, CHUNK // LANES, LANES)
    sums = chunks.sum(axis=(2, 3))
    if axis is not None:
        sums = jax.lax.all_gather(sums, axis, axis=1, tiled=True)
    chosen = _invert(sums, uniforms[:, 0]) - _index(axis) * chunks.shape[1]
    here = (chosen >= 0) & (chosen < chunks.shape[1])
    chosen = jnp.where(here, chosen, 0)
    chunk = jnp.take_along_axis(chunks, chosen[:, None, None, None], axis=1)[:, 0]
    block = _invert(chunk.sum(axis=-1), uniforms[:, 1])
    token = _invert(jnp.take_along_axis(chunk, block[:, None, None], axis=1)[:, 0], uniforms[:, 2])
    # Only a row of NaN leads behind the vocabulary.
    token = _index(axis) * V + jnp.minimum(chosen * CHUNK + block * LANES + token, V - 1)
    return _all_max(jnp.where(here, token, -1), axis) if axis is not None else token


def local_argmax(logits: jax.Array, axis: Axis = None) -> jax.Array:
    """int32[...]: the first token with the largest of logits[..., V]; two numbers a device and token cross devices."""
    return _first_index(logits == _all_max(logits.max(axis=-1), axis)[..., None], axis)


def best_probability(logits: jax.Array, axis: Axis = None) -> jax.Array:
    """float32[...]: the probability of the best token in the softmax of logits[..., V]."""
    peak = _all_max(logits.max(axis=-1), axis)[..., None]
    return 1.0 / _all_sum(jnp.exp(logits - peak).sum(axis=-1), axis)


class _Round(NamedTuple):
    """What is known after the positions before `position`.

    Attributes:
        position: int32[], the next to look at.
        alive: bool[B], rows for which it can still matter.
        num_accepted: int32[B].
        token: int32[B], the one that follows num_accepted drafts.
        scale: float32[B], block verification's running product; 1 in the other rules.
    """

    position: jax.Array
    alive: jax.Array
    num_accepted: jax.Array
    token: jax.Array
    scale: jax.Array


def rejection_sample(
    logits: jax.Array,
    drafts: jax.Array,
    draft_probs: jax.Array | None,
    accept_uniforms: jax.Array,
    recover_uniforms: jax.Array,
    rows: Truncation,
    rule: str = "residual",
    axis: Axis = None,
) -> Verdict:
    """See api.rejection_sample."""
    B, T, V = logits.shape
    padded = jnp.pad(drafts, ((0, 0), (0, 1)), constant_values=NO_DRAFT)
    coins = jnp.pad(accept_uniforms, ((0, 0), (0, 1)))
    decide = {"residual": _residual, "matching": _matching, "block": _block}[rule]

    def unfinished(state: _Round) -> jax.Array:
        return (state.position < T) & state.alive.any()

    def one_position(state: _Round) -> _Round:
        t = state.position
        draft = _at(padded, t)
        here = _Position(
            law=truncate(_at(logits, t), rows, axis),
            draft=draft,
            draft_probs=_draft_probs(draft_probs, draft, t, V, axis),
            recover=_at(recover_uniforms, t),
            axis=axis,
        )
        return decide(state, here, coins)

    def sampled() -> Verdict:
        zeros = jnp.zeros(B, jnp.int32)
        start = _Round(jnp.int32(0), jnp.ones(B, bool), zeros, zeros, jnp.ones(B))
        end = jax.lax.while_loop(unfinished, one_position, start)
        return Verdict(end.num_accepted, end.token)

    def greedy() -> Verdict:
        best = local_argmax(logits.astype(jnp.float32), axis)
        num_accepted = leading(best[:, :-1] == drafts)
        return Verdict(num_accepted, jnp.take_along_axis(best, num_accepted[:, None], axis=1)[:, 0])

    return jax.lax.cond(jnp.all(rows.temperature <= 0), greedy, sampled)


class _Position(NamedTuple):
    """One position of every row: its law, its draft (int32[B]), that draft's law float32[B, V] and float32[B, 3]."""

    law: Law
    draft: jax.Array
    draft_probs: jax.Array
    recover: jax.Array
    axis: Axis


def _residual(state: _Round, here: _Position, coins: jax.Array) -> _Round:
    """Leviathan et al. 2211.17192, algorithm 1: accept if u * draft_prob < target_prob, else draw from the rest."""
    target_prob, draft_prob, possible = _drafted(here)
    accepted = possible & (_at(coins, state.position) * draft_prob < target_prob)
    ends = state.alive & ~accepted
    token = jax.lax.cond(ends.any(), lambda: _draw(here, _rest(here, state.scale)), lambda: state.token)
    return state._replace(
        position=state.position + 1,
        alive=state.alive & accepted,
        num_accepted=state.num_accepted + (state.alive & accepted),
        token=jnp.where(ends, token, state.token),
    )


def _matching(state: _Round, here: _Position, coins: jax.Array) -> _Round:
    """The target draws at every position; a draft is accepted when it is what the target drew."""
    del coins
    drawn = draw(probabilities(here.law, here.axis), here.recover, here.axis)
    token = jnp.where(here.law.greedy, here.law.best, drawn)
    accepted = state.alive & (token == here.draft)
    return state._replace(
        position=state.position + 1,
        alive=accepted,
        num_accepted=state.num_accepted + accepted,
        token=jnp.where(state.alive, token, state.token),
    )


def _block(state: _Round, here: _Position, coins: jax.Array) -> _Round:
    """Sun et al. 2403.10444: keep the longest prefix whose own test passes, also behind one that fails.

    The tests are of prefixes: that of the first t drafts needs the target's law behind them, so it is made here.
    """
    t, scale = state.position, state.scale
    weights = _rest(here, scale)
    rest = _all_sum(weights.sum(axis=-1), here.axis)
    others = rest + 1.0 - scale
    limit = jnp.where(others > 0, rest / jnp.where(others > 0, others, 1.0), 1.0)
    longest = state.alive & ((t == 0) | (_at(coins, jnp.maximum(t - 1, 0)) < limit))
    token = jax.lax.cond(longest.any(), lambda: _draw(here, weights), lambda: state.token)
    target_prob, draft_prob, possible = _drafted(here)
    scale = jnp.minimum(jnp.where(possible, scale * target_prob / jnp.where(possible, draft_prob, 1.0), 0.0), 1.0)
    return _Round(
        position=t + 1,
        alive=state.alive & (scale > 0),
        num_accepted=jnp.where(longest, t, state.num_accepted),
        token=jnp.where(longest, token, state.token),
        scale=scale,
    )


def _drafted(here: _Position) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What the target and the drafter give to the draft, float32[B] each, and whether it can be accepted, bool[B]."""
    draft = jnp.maximum(here.draft, 0)
    draft_prob = entry(here.draft_probs, draft, here.axis)
    # A token that its own distribution rules out comes from a broken drafter (NaN), which may only cost speed.
    possible = (here.draft != NO_DRAFT) & (draft_prob > 0)
    return probability_of(here.law, draft, here.axis), draft_prob, possible


def _rest(here: _Position, scale: jax.Array) -> jax.Array:
    """float32[B, V]: max(scale * target_probs - draft_probs, 0)."""
    return jnp.maximum(scale[:, None] * probabilities(here.law, here.axis) - here.draft_probs, 0.0)


def _draw(here: _Position, rest: jax.Array) -> jax.Array:
    """int32[B]: a token in proportion to float32[B, V]."""
    # Rounding can reject where target and draft agree and leave no residual: the target's own law is the limit.
    left = _all_sum(rest.sum(axis=-1, keepdims=True), here.axis) > 0
    return draw(jnp.where(left, rest, probabilities(here.law, here.axis)), here.recover, here.axis)


def _draft_probs(probs: jax.Array | None, draft: jax.Array, t: jax.Array, V: int, axis: Axis) -> jax.Array:
    """float32[B, V]: the law of a position's drafts; all zero where there is none."""
    if probs is None or probs.shape[1] == 0:
        return _one_hot(draft, V, axis)
    return jnp.where((draft != NO_DRAFT)[:, None], _at(probs, jnp.minimum(t, probs.shape[1] - 1)), 0.0)


def _rank_and_mass_threshold(
    logits: jax.Array, peak: jax.Array, cuts: jax.Array, rows: Truncation, axis: Axis
) -> jax.Array:
    """float32[...]: a threshold that keeps the k best tokens, and of these the fewest that hold p of their mass."""
    lowest = -_all_max(jnp.where(logits > -jnp.inf, -logits, -jnp.inf).max(axis=-1), axis)
    lowest = jnp.maximum(lowest, peak - DEPTH / inverse(rows.temperature))

    def count(threshold: jax.Array) -> jax.Array:
        return _all_sum((logits >= threshold[..., None]).sum(axis=-1), axis)

    def enough_tokens(threshold: jax.Array) -> tuple[jax.Array, jax.Array]:
        num = count(threshold)
        return num >= rows.top_k, num

    num_possible = count(lowest)
    ranked = cuts & (rows.top_k > 0) & (rows.top_k < num_possible)
    rank = bisect(enough_tokens, lowest, peak, num_possible, ranked)
    weights = jnp.where(logits >= rank[..., None], _weights(logits, peak, rows), 0.0)
    # A top_p that rounds to zero still wants something.
    wanted = jnp.maximum(rows.top_p * _all_sum(weights.sum(axis=-1), axis), jnp.finfo(jnp.float32).tiny)

    def enough_mass(threshold: jax.Array) -> tuple[jax.Array, jax.Array]:
        mass = jnp.where(logits >= threshold[..., None], weights, 0.0).sum(axis=-1)
        return _all_sum(mass, axis) >= wanted, count(threshold)

    return bisect(enough_mass, rank, peak, count(rank), cuts & (rows.top_p < 1.0))


def _weights(logits: jax.Array, peak: jax.Array, rows: Truncation) -> jax.Array:
    """float32[..., V]: the probabilities before any cut, times a number."""
    return jnp.exp((logits - peak[..., None]) * inverse(rows.temperature)[..., None])


def bisect(enough, low: jax.Array, peak: jax.Array, count_low: jax.Array, wanted: jax.Array) -> jax.Array:
    """A threshold above which there is just enough: {logits >= low} is, {logits >= result} is with no token to spare.

    Args:
        enough: threshold -> (whether what lies at or above it is enough, how many tokens that is).
        low: where it is; the result in rows that want no cut.
        peak: the largest logit; nothing lies above it, and that is not enough.
        count_low: tokens at or above low.
        wanted: bool, rows that want a cut.
    """

    def middle(low: jax.Array, high: jax.Array) -> jax.Array:
        return low + 0.5 * (high - low)

    def unsettled(low, high, count_low, count_high):
        mid = middle(low, high)
        return wanted & (count_low - count_high > 1) & (mid > low) & (mid < high)

    def going_on(carry):
        steps, *bracket = carry
        return (steps < MAX_BISECTIONS) & unsettled(*bracket).any()

    def halve(carry):
        steps, low, high, count_low, count_high = carry
        mid = middle(low, high)
        holds, num = enough(mid)
        moves = unsettled(low, high, count_low, count_high)
        up, down = moves & holds, moves & ~holds
        low, count_low = jnp.where(up, mid, low), jnp.where(up, num, count_low)
        high, count_high = jnp.where(down, mid, high), jnp.where(down, num, count_high)
        return steps + 1, low, high, count_low, count_high

    above = peak + (jnp.abs(peak) * 2.0**-20 + 1e-30)
    start = (jnp.int32(0), low, above, count_low, jnp.zeros_like(count_low))
    return jax.lax.while_loop(going_on, halve, start)[1]


def _invert(weights: jax.Array, uniform: jax.Array) -> jax.Array:
    """int32[B]: the first index whose cumulative weight exceeds uniform * total, never one of zero weight."""
    cumulative = jnp.cumsum(weights, axis=-1)
    # A parallel sum may rise by a rounding error where the weight is zero.
    reached = (weights > 0) & (cumulative > uniform[:, None] * cumulative[:, -1:])
    # Rounding can leave nothing above the mark; the mark then belongs to the last index that has any weight.
    last = weights.shape[-1] - 1 - jnp.argmax((weights > 0)[:, ::-1], axis=-1)
    return jnp.minimum(jnp.where(reached.any(axis=-1), jnp.argmax(reached, axis=-1), last), last).astype(jnp.int32)


def _at(x: jax.Array, t: jax.Array) -> jax.Array:
    """x[:, t]."""
    return jax.lax.dynamic_index_in_dim(x, t, axis=1, keepdims=False)


def _index(axis: Axis) -> jax.Array | int:
    """Which part of the vocabulary this device has."""
    return 0 if axis is None else jax.lax.axis_index(axis)


def _all_sum(x: jax.Array, axis: Axis) -> jax.Array:
    return x if axis is None else jax.lax.psum(x, axis)


def _all_max(x: jax.Array, axis: Axis) -> jax.Array:
    return x if axis is None else jax.lax.pmax(x, axis)


def _first_index(found: jax.Array, axis: Axis) -> jax.Array:
    """int32[...]: the first token for which bool[..., V] holds; the last token where it holds for none."""
    V = found.shape[-1]
    tokens = _index(axis) * V + jnp.arange(V, dtype=jnp.int32)
    size = 1 if axis is None else jax.lax.axis_size(axis)
    first = jnp.where(found, tokens, size * V - 1).min(axis=-1)
    return first if axis is None else jax.lax.pmin(first, axis)


def entry(values: jax.Array, tokens: jax.Array, axis: Axis, absent: float = 0.0) -> jax.Array:
    """float32[...]: values[..., token]; with axis, absent is below all values, or the least of them."""
    V = values.shape[-1]
    index = tokens - _index(axis) * V
    here = (index >= 0) & (index < V)
    entry = jnp.take_along_axis(values, jnp.where(here, index, 0)[..., None], axis=-1)[..., 0]
    return entry if axis is None else _all_max(jnp.where(here, entry, absent), axis)


def _one_hot(tokens: jax.Array, V: int, axis: Axis) -> jax.Array:
    """float32[..., V]; all zero for NO_DRAFT."""
    return (tokens[..., None] == _index(axis) * V + jnp.arange(V)).astype(jnp.float32)
