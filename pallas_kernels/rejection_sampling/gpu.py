"""The operation as two Pallas kernels for GPUs, written for Triton.

A program of the first reads one position's logits piece by piece, as often as the bisection of its cuts asks for (a row
stays in the L2 cache), and leaves four numbers. From these jax.numpy decides what is accepted. The second reads the
logits of the positions to draw at once more. Probabilities are never written out.

Triton only: Mosaic GPU, jax's other backend for GPUs, has no masked load and no cumulative sum. The tests run the
kernels in interpret mode and lower them for cuda; they have not run on a GPU.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.rejection_sampling.base import (
    CHUNK,
    DEPTH,
    LANES,
    MAX_BISECTIONS,
    NO_DRAFT,
    Truncation,
    Verdict,
    inverse,
    leading,
)

PIECE = 4 * CHUNK
"""Tokens in one load: 16 a thread, as many as its 128 registers hold beside the sums."""

PARAMS = plgpu.CompilerParams(num_warps=16)


class _Law(NamedTuple):
    """The truncated distribution at each position.

    Attributes:
        best: int32[B, T], the first token with the largest logit.
        peak: float32[B, T], that logit.
        threshold: float32[B, T], at most the smallest logit that is kept, and above the next one.
        log_total: float32[B, T], log of the sum of exp((logits - peak) / temperature) kept.
        of_draft: float32[B, T], the draft's probability; any number where there is no draft.
    """

    best: jax.Array
    peak: jax.Array
    threshold: jax.Array
    log_total: jax.Array
    of_draft: jax.Array


def rejection_sample(
    logits: jax.Array,
    drafts: jax.Array,
    draft_probs: jax.Array | None,
    accept_uniforms: jax.Array,
    recover_uniforms: jax.Array,
    rows: Truncation,
    rule: str = "residual",
    interpret: bool = False,
) -> Verdict:
    """See api.rejection_sample."""
    B, T, _ = logits.shape
    everywhere = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    drafts = jnp.pad(drafts.astype(jnp.int32), ((0, 0), (0, 1)), constant_values=NO_DRAFT)
    law = _Law(*_call(_law_kernel, T, (jnp.int32, *[jnp.float32] * 4), (logits, drafts, rows), interpret))

    def draw(positions: jax.Array, drafts: jax.Array, probs: jax.Array | None, scale: jax.Array) -> list[jax.Array]:
        """int32[B, P], tokens at positions[B, P], and float32[B, P], the totals of the weights they were drawn from."""
        inputs = (logits, probs, drafts, scale, recover_uniforms, rows.temperature, law, positions)
        return _call(_draw_kernel, positions.shape[1], (jnp.int32, jnp.float32), inputs, interpret)

    target_prob = law.of_draft[:, :-1]
    draft_prob = jnp.ones_like(target_prob)
    draft_probs = draft_probs if T > 1 else None
    if draft_probs is not None:
        draft_prob = jnp.take_along_axis(draft_probs, jnp.maximum(drafts[:, :-1, None], 0), axis=-1)[..., 0]
    # A token that its own distribution rules out comes from a broken drafter (NaN), which may only cost speed.
    possible = (drafts[:, :-1] != NO_DRAFT) & (draft_prob > 0)
    if rule == "residual":
        num_accepted = leading(possible & (accept_uniforms * draft_prob < target_prob))
        tokens, _ = draw(num_accepted[:, None], drafts, draft_probs, jnp.ones((B, T)))
        return Verdict(num_accepted, tokens[:, 0])
    if rule == "matching":
        tokens, _ = draw(everywhere, jnp.full_like(drafts, NO_DRAFT), None, jnp.ones((B, T)))
        num_accepted = leading((tokens == drafts)[:, :-1])
    else:
        ratio = jnp.where(possible, target_prob / jnp.where(possible, draft_prob, 1.0), 0.0)
        scales = [jnp.ones(B)]
        for t in range(T - 1):
            scales.append(jnp.minimum(scales[-1] * ratio[:, t], 1.0))
        scale = jnp.stack(scales, axis=1)
        tokens, rest = draw(everywhere, drafts, draft_probs, scale)
        others = rest + 1.0 - scale
        limit = jnp.where(others > 0, rest / jnp.where(others > 0, others, 1.0), 1.0)
        passes = (jnp.pad(accept_uniforms, ((0, 0), (1, 0))) < limit) & (scale > 0)
        num_accepted = jnp.where(passes, everywhere, 0).max(axis=1)
    return Verdict(num_accepted, jnp.take_along_axis(tokens, num_accepted[:, None], axis=1)[:, 0])


def _call(kernel: Callable[..., None], P: int, dtypes: tuple, inputs: tuple, interpret: bool) -> list[jax.Array]:
    """[B, P] of each dtype, one number from each program, which gets its row of every input."""

    def row(x: jax.Array) -> pl.BlockSpec:
        return pl.BlockSpec((None, *x.shape[1:]), lambda b, _: (b,) + (0,) * (x.ndim - 1))

    B = inputs[0].shape[0]
    return pl.pallas_call(
        kernel,
        grid=(B, P),
        in_specs=jax.tree.map(row, inputs),
        out_specs=[pl.BlockSpec((None, None), lambda b, i: (b, i))] * len(dtypes),
        out_shape=[jax.ShapeDtypeStruct((B, P), dtype) for dtype in dtypes],
        compiler_params=PARAMS,
        interpret=interpret,
        name="rejection_sampling" + kernel.__name__,
    )(*inputs)


def _law_kernel(logits, drafts, rows, *law) -> None:
    """A position's numbers; logits: [T, V]."""
    position, V = pl.program_id(1), logits.shape[-1]
    greedy, scale = rows.temperature[...] <= 0, inverse(rows.temperature[...])
    zeros = jnp.zeros(PIECE)

    def over_pieces(step, start):
        """Lane by lane over all pieces, which leaves one reduction over threads to the end."""
        return jax.lax.fori_loop(0, pl.cdiv(V, PIECE), lambda i, carry: step(i * PIECE, carry), start)

    def load(start):
        return _load(logits, position, start, PIECE, other=-jnp.inf)

    def find_ends(start, carry):
        peak, best, lowest = carry
        x = load(start)
        best = jnp.where(x > peak, start + jnp.arange(PIECE), best)
        return jnp.where(x > peak, x, peak), best, jnp.where((x > -jnp.inf) & (x < lowest), x, lowest)

    peaks, firsts, lowest = over_pieces(find_ends, (zeros - jnp.inf, zeros.astype(jnp.int32), zeros + jnp.inf))
    peak, lowest = peaks.max(), lowest.min()
    best = jnp.where(peaks == peak, firsts, V - 1).min()

    def above(threshold):
        """A threshold, how many tokens lie at or above it (exact in float32), and their mass."""

        def add(start, carry):
            x = load(start)
            kept = x >= threshold
            return carry[0] + jnp.where(kept, 1.0, 0.0), carry[1] + jnp.where(kept, jnp.exp((x - peak) * scale), 0.0)

        count, mass = over_pieces(add, (zeros, zeros))
        return threshold, count.sum(), mass.sum()

    def bisect(enough, low, wanted):
        """As xla.bisect, from above() of one threshold to above() of another."""

        def unsettled(carry):
            steps, low, high = carry
            mid = low[0] + 0.5 * (high[0] - low[0])
            return wanted & (steps < MAX_BISECTIONS) & (low[1] - high[1] > 1) & (mid > low[0]) & (mid < high[0])

        def halve(carry):
            steps, low, high = carry
            mid = above(low[0] + 0.5 * (high[0] - low[0]))
            holds = enough(mid)
            low = [jnp.where(holds, new, old) for new, old in zip(mid, low, strict=True)]
            high = [jnp.where(holds, old, new) for new, old in zip(mid, high, strict=True)]
            return steps + 1, low, high

        high = [peak + (jnp.abs(peak) * 2.0**-20 + 1e-30), jnp.zeros_like(peak), jnp.zeros_like(peak)]
        return jax.lax.while_loop(unsettled, halve, (jnp.int32(0), list(low), high))[1]

    def truncate():
        top_k, top_p, min_p = rows.top_k[...].astype(jnp.float32), rows.top_p[...], rows.min_p[...]
        kept = above(jnp.maximum(lowest, peak - DEPTH / scale))
        kept = bisect(lambda at: at[1] >= top_k, kept, (top_k > 0) & (top_k < kept[1]))
        wanted = jnp.maximum(top_p * kept[2], jnp.finfo(jnp.float32).tiny)
        kept = tuple(bisect(lambda at: at[2] >= wanted, kept, top_p < 1.0))
        least = jnp.where(min_p > 0, peak + jnp.log(min_p) / scale, -jnp.inf)
        threshold, _, mass = jax.lax.cond(least > kept[0], lambda: above(least), lambda: kept)
        return threshold, jnp.log(mass)

    # Greedy rows use neither.
    threshold, log_total = jax.lax.cond(greedy, lambda: (peak, peak), truncate)
    draft = drafts[position]
    logit = logits[position, jnp.maximum(draft, 0)].astype(jnp.float32)
    sampled = jnp.where(logit >= threshold, jnp.exp((logit - peak) * scale - log_total), 0.0)
    of_draft = jnp.where(greedy, (draft == best).astype(jnp.float32), sampled)
    for ref, number in zip(law, _Law(best, peak, threshold, log_total, of_draft), strict=True):
        ref[...] = number


def _draw_kernel(logits, draft_probs, drafts, scales, uniforms, temperature, law, positions, token, total) -> None:
    """A token from max(scale * target's law - draft's law, 0) and that weight's total; logits: [T, V]."""
    position, V = positions[pl.program_id(1)], logits.shape[-1]
    draft, scale, temperature = drafts[position], scales[position], temperature[...]
    best, peak = law.best[position], law.peak[position]
    threshold, log_total = law.threshold[position], law.log_total[position]

    def target(start, size):
        x = _load(logits, position, start, size, other=-jnp.inf)
        sampled = jnp.where(x >= threshold, jnp.exp((x - peak) * inverse(temperature) - log_total), 0.0)
        return jnp.where(temperature <= 0, (start + jnp.arange(size) == best).astype(jnp.float32), sampled)

    def residual(start, size):
        if draft_probs is None:
            drafter = (start + jnp.arange(size) == draft).astype(jnp.float32)
        else:
            row = jnp.minimum(position, draft_probs.shape[0] - 1)
            drafter = _load(draft_probs, row, start, size, other=0.0, wanted=draft != NO_DRAFT)
        weights = scale * target(start, size) - drafter
        # NaN stays NaN, whatever a platform's maximum does with it, and leads to the target's own law.
        return jnp.where(weights <= 0, 0.0, weights)

    def chunk_sums(weights):
        """float32[chunks]; each piece's sums become a row of a table, as registers can't be written at an index."""
        table = jnp.zeros((pl.next_power_of_2(pl.cdiv(V, PIECE)), PIECE // CHUNK))
        rows = jax.lax.broadcasted_iota(jnp.int32, table.shape, 0)

        def add(i, table):
            return jnp.where(rows == i, weights(i * PIECE, PIECE).reshape(-1, CHUNK).sum(axis=1)[None], table)

        return jax.lax.fori_loop(0, pl.cdiv(V, PIECE), add, table).reshape(-1)

    sums = chunk_sums(residual)
    total[...] = sums.sum()
    # Rounding can reject where target and draft agree and leave no residual: the target's own law is the limit.
    left = sums.sum() > 0
    sums = jax.lax.cond(left, lambda: sums, lambda: chunk_sums(target))

    def weights(start, size):
        return jnp.where(left, residual(start, size), target(start, size))

    start = _invert(sums, uniforms[position, 0]) * CHUNK
    start += _invert(weights(start, CHUNK).reshape(-1, LANES).sum(axis=1), uniforms[position, 1]) * LANES
    # In rows of NaN no token has any weight, and the last lane may lie behind the last token.
    token[...] = jnp.minimum(start + _invert(weights(start, LANES), uniforms[position, 2]), V - 1)


def _invert(weights: jax.Array, uniform: jax.Array) -> jax.Array:
    """int32[]: the first index of float32[N] whose cumulative weight exceeds uniform * total; see xla._invert."""
    order, marks = jnp.arange(weights.shape[0]), jnp.cumsum(weights)
    first = jnp.where((weights > 0) & (marks > uniform * marks.max()), order, weights.shape[0]).min()
    return jnp.minimum(first, jnp.where(weights > 0, order, 0).max())


def _load(ref, row: jax.Array, start: jax.Array, size: int, other: float, wanted: jax.Array | bool = True) -> jax.Array:
    """float32[size]: a part of ref[row]; other behind its end, and everywhere if it is not wanted."""
    inside = (start + jnp.arange(size) < ref.shape[-1]) & wanted
    return plgpu.load(ref.at[row, pl.ds(start, size)], mask=inside, other=other).astype(jnp.float32)
