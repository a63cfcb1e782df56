"""The operation as one Pallas kernel for TPUs: logits are read from HBM once, and no probabilities are written to it.

A grid step takes a tile of eight rows, one to a sublane, with all of their vocabulary in VMEM: the same position of
eight sequences or, where there is only one sequence, eight positions of it. Position-major logits are what XLA lets the
model's last matmul write, so nothing is transposed. What a sequence hands from one position to the next (whether it is
still alive, or block verification's scale) goes from grid step to grid step, or down the sublanes.

Within a tile the algorithm is that of xla.py, with a loop over chunks of the vocabulary for each of its sums. Drafts'
laws are copied row by row from HBM, and tokens drawn, only where a row of the tile asks for it.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.rejection_sampling.base import CHUNK, DEPTH, LANES, NO_DRAFT, Truncation, Verdict, inverse
from pallas_kernels.rejection_sampling.xla import bisect

TILE = 8
"""Rows that a grid step takes: the sublanes of a vector register."""

MAX_VOCAB = CHUNK * LANES
"""The draw keeps one number for each chunk of the vocabulary in the lanes of a register."""

SMALLEST, TINY = float(np.finfo(np.float32).min), float(np.finfo(np.float32).tiny)


class _Row(NamedTuple):
    """What the kernel is told about each row of a tile, float32[TILE, 1] each; ids below MAX_VOCAB are exact in it."""

    starts: jax.Array
    inverse_temperature: jax.Array
    greedy: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    log_min_p: jax.Array
    draft: jax.Array
    accept_uniform: jax.Array
    chunk_uniform: jax.Array
    block_uniform: jax.Array
    lane_uniform: jax.Array


@functools.partial(jax.jit, static_argnames=("rule", "interpret"))
def rejection_sample(
    logits: jax.Array,
    drafts: jax.Array,
    draft_probs: jax.Array | None,
    accept_uniforms: jax.Array,
    recover_uniforms: jax.Array,
    rows: Truncation,
    rule: str = "residual",
    interpret: Any = False,
) -> Verdict:
    """See api.rejection_sample; V is at most 262144."""
    B, T, V = logits.shape
    if V > MAX_VOCAB:
        raise NotImplementedError(f"logits: a vocabulary of {V} tokens; the TPU kernel takes at most {MAX_VOCAB}.")
    if logits.dtype not in (jnp.float32, jnp.bfloat16):
        logits = logits.astype(jnp.float32)
    if rule == "matching" or T == 1:
        draft_probs = None
    stacked = B == 1
    if stacked:
        grid, index = (1, pl.cdiv(T, TILE)), lambda i, j: (0, j, 0)
    else:
        grid, index = (pl.cdiv(B, TILE), T), lambda i, j: (j, i, 0)
        logits = jnp.swapaxes(logits, 0, 1)

    def tiled(x, fill):
        x = x if stacked else jnp.swapaxes(x, 0, 1)
        return jnp.pad(x, ((0, 0), (0, -x.shape[1] % TILE), (0, 0)), constant_values=fill)

    table = tiled(_table(drafts, accept_uniforms, recover_uniforms, rows, rule, V), 0)
    padded = pl.cdiv(V, CHUNK) * CHUNK
    operands = [table, logits]
    in_specs = [pl.BlockSpec((1, TILE, LANES), index), pl.BlockSpec((1, TILE, padded), index)]
    scratch = [pltpu.VMEM((TILE, padded), jnp.float32), pltpu.VMEM((TILE, LANES), jnp.float32)]
    if draft_probs is not None:
        # A row is copied in whole registers.
        draft_probs = jnp.pad(draft_probs.astype(jnp.float32), ((0, 0), (0, 0), (0, -V % LANES)))
        # Without the constraint XLA fetches all of it into VMEM where there is room.
        operands.append(draft_probs if interpret else pltpu.with_memory_space_constraint(draft_probs, pltpu.HBM))
        in_specs.append(pl.BlockSpec(memory_space=pltpu.HBM))
        # Also as scalars: they say what to copy.
        scalars = jnp.pad(drafts, ((0, 0), (0, 1)), constant_values=NO_DRAFT)[..., None]
        operands.append(tiled(scalars.astype(jnp.int32), NO_DRAFT).reshape(-1))
        in_specs.append(pl.BlockSpec(memory_space=pltpu.SMEM))
        scratch += [pltpu.VMEM((TILE, padded), jnp.float32), pltpu.VMEM((TILE, LANES), jnp.float32)]
        scratch.append(pltpu.SemaphoreType.DMA)
    # Two buffers of the logits, their scaled copy and the drafts' laws.
    vmem_bytes = 4 * (4 * TILE * padded) + 8 * 2**20
    out = pl.pallas_call(
        functools.partial(_kernel, rule=rule, V=V, sampled=draft_probs is not None, stacked=stacked),
        out_shape=jax.ShapeDtypeStruct(table.shape, jnp.int32),
        grid=grid,
        in_specs=in_specs,
        out_specs=pl.BlockSpec((1, TILE, LANES), index),
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=vmem_bytes
        ),
        interpret=interpret,
        name=f"rejection_sample_{rule}",
    )(*operands)
    out = out[:, :T] if stacked else jnp.swapaxes(out, 0, 1)[:B]
    ends, tokens = out[..., 0], out[..., 1]
    # Only block verification marks several positions of a sequence: the longest prefix that passed counts.
    num_accepted = jnp.where(ends > 0, jnp.arange(T, dtype=jnp.int32), 0).max(axis=1)
    return Verdict(num_accepted, jnp.take_along_axis(tokens, num_accepted[:, None], axis=1)[:, 0])


def _table(
    drafts: jax.Array,
    accept_uniforms: jax.Array,
    recover_uniforms: jax.Array,
    rows: Truncation,
    rule: str,
    V: int,
) -> jax.Array:
    """float32[B, T, LANES]: _Row's fields in the first lanes."""
    B, G = drafts.shape
    greedy = rows.temperature <= 0
    behind = ((0, 0), (0, 1))
    fields = _Row(
        starts=jnp.arange(G + 1)[None] == 0,
        inverse_temperature=inverse(rows.temperature)[:, None],
        greedy=greedy[:, None],
        top_k=jnp.minimum(rows.top_k, V)[:, None],
        top_p=rows.top_p[:, None],
        log_min_p=jnp.log(rows.min_p)[:, None],
        draft=jnp.pad(drafts, behind, constant_values=NO_DRAFT),
        # Block verification tests the prefix that ends before a position.
        accept_uniform=jnp.pad(accept_uniforms, ((0, 0), (1, 0)) if rule == "block" else behind),
        chunk_uniform=recover_uniforms[..., 0],
        block_uniform=recover_uniforms[..., 1],
        lane_uniform=recover_uniforms[..., 2],
    )
    columns = [jnp.broadcast_to(field.astype(jnp.float32), (B, G + 1)) for field in fields]
    return jnp.pad(jnp.stack(columns, axis=-1), ((0, 0), (0, 0), (0, LANES - len(columns))))


def _kernel(table_ref, logits_ref, *refs, rule: str, V: int, sampled: bool, stacked: bool) -> None:
    """Decides a tile: lane 0 of its output says where a sequence may end, lane 1 which token it then gets.

    Rows behind the last sequence, or behind its last position, are never reached: nothing of theirs is looked at.
    """
    if sampled:
        probs_ref, drafts_ref, out_ref, x_ref, carry_ref, q_ref, near_ref, semaphore = refs
    else:
        (out_ref, x_ref, carry_ref), q_ref = refs, None
    tile, step = pl.program_id(0), pl.program_id(1)
    row = _Row(*(table_ref[0, :, i : i + 1] for i in range(len(_Row._fields))))
    entering = jnp.where(row.starts > 0, 1.0, jnp.where(step == 0, 0.0, carry_ref[:, :1]))
    out_ref[...] = jnp.zeros_like(out_ref)
    carry_ref[...] = jnp.zeros_like(carry_ref)

    def hand_on(factor: jax.Array) -> jax.Array:
        """float32[TILE, 1]: what reaches each row when rows hand on min(what reached them * factor, 1)."""
        reaching = entering
        if stacked:
            first = _iota((TILE, 1), 0) == 0

            def down(_, reaching):
                return jnp.where(first, entering, pltpu.roll(jnp.minimum(reaching * factor, 1.0), 1, 0))

            reaching = jax.lax.fori_loop(0, TILE - 1, down, reaching)
        leaving = jnp.minimum(reaching * factor, 1.0)
        carry_ref[...] = jnp.broadcast_to(pltpu.roll(leaving, 1, 0) if stacked else leaving, carry_ref.shape)
        return reaching

    def copied(i, width, start, target_ref):
        """The copy of width numbers of the law of row i's draft, from a start on, to the row of a buffer."""
        sequence, position = (0, step * TILE + i) if stacked else (tile * TILE + i, step)
        source = probs_ref.at[sequence, pl.ds(position, 1), pl.ds(start, width)]
        return pltpu.make_async_copy(source, target_ref.at[pl.ds(i, 1), pl.ds(0, width)], semaphore)

    def draft_block(act):
        """Starts or awaits the copies of the drafts' blocks of their laws."""

        @pl.loop(0, TILE)
        def _(i):
            draft = drafts_ref[(step * pl.num_programs(0) + tile) * TILE + i]
            start = pl.multiple_of(jax.lax.div(jnp.maximum(draft, 0), LANES) * LANES, LANES)
            pl.when(draft >= 0)(lambda: act(copied(i, LANES, start, near_ref)))

    def fetch_draft_laws(wanted: jax.Array) -> None:
        """Copies the rows in which a draft's law is wanted from HBM."""
        if not sampled:
            return
        bits = jnp.sum(jnp.where(wanted & (row.draft >= 0), 1 << _iota((TILE, 1), 0), 0))

        def law(act):
            @pl.loop(0, TILE)
            def _(i):
                pl.when(((bits >> i) & 1) > 0)(lambda: act(copied(i, probs_ref.shape[2], 0, q_ref)))

        law(lambda copy: copy.start())
        law(lambda copy: copy.wait())

    @pl.when(jnp.max(entering) > 0)
    def _():
        greedy = row.greedy > 0
        if sampled:
            draft_block(lambda copy: copy.start())
        best, threshold, log_total, target_prob = _truncate(logits_ref, x_ref, row, V)
        draft_prob = jnp.ones_like(entering)
        if sampled:
            draft_block(lambda copy: copy.wait())
            draft_prob = _at_draft(near_ref[...], row)
        # A token that its own distribution rules out comes from a broken drafter (NaN), which may only cost speed.
        possible = (row.draft >= 0) & (draft_prob > 0)
        ones = jnp.ones_like(entering)
        rest = _Rest(x_ref, q_ref, row.draft, threshold, log_total, ones, ones * (row.draft >= 0))

        def token_from(draws, rest, sums):
            drawn = jax.lax.cond(_any(draws), lambda: _draw(rest, row, sums(), draws), lambda: best)
            return jnp.where(greedy, best, drawn)

        if rule == "matching":
            rest = rest._replace(minus=0 * ones)
            token = token_from(~greedy, rest, lambda: _chunk_sums(rest))
            accepted = token == row.draft.astype(jnp.int32)
            ends = (hand_on(ones * accepted) > 0) & ~accepted
        elif rule == "residual":
            accepted = possible & (row.accept_uniform * draft_prob < target_prob)
            ends = (hand_on(ones * accepted) > 0) & ~accepted
            fetch_draft_laws(ends & ~greedy)
            token = token_from(ends & ~greedy, rest, lambda: _chunk_sums(rest))
        else:
            scale = hand_on(jnp.where(possible, target_prob / jnp.where(possible, draft_prob, 1.0), 0.0))
            fetch_draft_laws(scale > 0)
            rest = rest._replace(scale=scale)
            sums = _chunk_sums(rest)
            others = _total(sums) + 1.0 - scale
            limit = jnp.where(others > 0, _total(sums) / jnp.where(others > 0, others, 1.0), 1.0)
            ends = (scale > 0) & ((row.starts > 0) | (row.accept_uniform < limit))
            token = token_from(ends & ~greedy, rest, lambda: sums)
        lane = _iota((TILE, LANES), 1)
        token = jnp.clip(token, 0, V - 1)
        out_ref[0] = jnp.where(lane == 0, ends.astype(jnp.int32), jnp.where(lane == 1, token, 0))


def _truncate(logits_ref, x_ref, row: _Row, V: int) -> tuple[jax.Array, ...]:
    """Applies temperature, top-k, top-p and min-p.

    Fills x_ref, float32[TILE, padded V], with (logits - largest) / temperature: -inf behind V and, in greedy rows,
    everywhere but at the best token. In this order nothing is lost at small temperatures.

    Returns:
        int32[TILE, 1], the first token with the largest logit.
        float32[TILE, 1], the threshold in x_ref from which on tokens are kept; finite.
        float32[TILE, 1], log of the sum of exp(x_ref) kept.
        float32[TILE, 1], the draft's probability.
    """

    def fill(c, carry):
        high, where = carry
        x = logits_ref[0, :, _chunk(c)].astype(jnp.float32)
        # What lies behind the vocabulary is whatever the memory held.
        x = jnp.where(_ids(c) < V, x, -jnp.inf)
        x_ref[:, _chunk(c)] = x
        return jnp.where(x > high, x, high), jnp.where(x > high, c, where)

    high, where = _sweep(x_ref, fill, (_wide(-jnp.inf), _wide(0)))
    peak = jnp.max(high, axis=1, keepdims=True)
    best = jnp.min(jnp.where(high == peak, _ids(where), V - 1), axis=1, keepdims=True)
    greedy = row.greedy > 0
    largest, factor, only = _wide(peak), _wide(row.inverse_temperature), _wide(jnp.where(greedy, best, -1))

    @pl.loop(0, x_ref.shape[1] // CHUNK)
    def _(c):
        x = (x_ref[:, _chunk(c)] - largest) * factor
        x_ref[:, _chunk(c)] = jnp.where((only < 0) | (_ids(c) == only), x, -jnp.inf)

    cuts = ~greedy & ((row.top_k > 0) | (row.top_p < 1.0))
    threshold = jax.lax.cond(
        _any(cuts),
        lambda: _rank_and_mass_threshold(x_ref, cuts, row),
        lambda: jnp.full_like(peak, SMALLEST),
    )
    # Above -inf, so that neither forbidden tokens nor what lies behind the vocabulary are kept.
    threshold = jnp.maximum(jnp.maximum(threshold, row.log_min_p), SMALLEST)
    smallest = _wide(threshold)

    def add(c, total):
        x = x_ref[:, _chunk(c)]
        return _plus(total, jnp.where(x >= smallest, jnp.exp(x), 0.0))

    log_total = jnp.log(_total(_sweep(x_ref, add, _zero())))
    block = jax.lax.div(jnp.maximum(row.draft.astype(jnp.int32), 0), LANES)
    at_draft = _at_draft(_part(x_ref, block, LANES), row)
    target_prob = jnp.where(at_draft >= threshold, jnp.exp(at_draft - log_total), 0.0)
    return best, threshold, log_total, target_prob


def _at_draft(block: jax.Array, row: _Row) -> jax.Array:
    """float32[TILE, 1]: the entry at the draft, of the float32[TILE, LANES] that holds it; any where there is none."""
    lane = jax.lax.rem(row.draft.astype(jnp.int32), LANES)
    return jnp.max(jnp.where(_iota(block.shape, 1) == lane, block, -jnp.inf), axis=1, keepdims=True)


def _rank_and_mass_threshold(x_ref, cuts: jax.Array, row: _Row) -> jax.Array:
    """float32[TILE, 1]: a threshold that keeps the k best tokens, and of these the fewest that hold p of their mass."""

    def look(c, lowest):
        x = x_ref[:, _chunk(c)]
        return jnp.minimum(lowest, jnp.where(x > -jnp.inf, x, jnp.inf))

    lowest = jnp.min(_sweep(x_ref, look, _wide(jnp.inf)), axis=1, keepdims=True)
    lowest = jnp.maximum(lowest, -DEPTH)
    peak = jnp.zeros_like(lowest)

    def count(threshold):
        threshold = _wide(threshold)
        return _total(_sweep(x_ref, lambda c, num: _plus(num, x_ref[:, _chunk(c)] >= threshold), _zero()))

    def enough_tokens(threshold):
        num = count(threshold)
        return num >= row.top_k, num

    def mass_above(threshold):
        threshold = _wide(threshold)

        def add(c, carry):
            mass, num = carry
            x = x_ref[:, _chunk(c)]
            above = x >= threshold
            return _plus(mass, jnp.where(above, jnp.exp(x), 0.0)), _plus(num, above)

        mass, num = _sweep(x_ref, add, (_zero(), _zero()))
        return _total(mass), _total(num)

    num_possible = count(lowest)
    ranked = cuts & (row.top_k > 0) & (row.top_k < num_possible)
    rank = bisect(enough_tokens, lowest, peak, num_possible, ranked)
    mass, num_kept = mass_above(rank)

    def enough_mass(threshold):
        above, num = mass_above(threshold)
        # A top_p that rounds to zero still wants something.
        return above >= jnp.maximum(row.top_p * mass, TINY), num

    return bisect(enough_mass, rank, peak, num_kept, cuts & (row.top_p < 1.0))


class _Rest(NamedTuple):
    """The weights max(scale * target's law - draft's law, 0) of a tile's rows, never written out.

    Attributes:
        x_ref: float32[TILE, padded V] in VMEM, as _truncate leaves it.
        q_ref: float32[TILE, padded V] in VMEM, drafts' laws in rows that matter; None where each is all on its draft.
        draft: the other fields are float32[TILE, 1].
        threshold: as _truncate returns it.
        log_total: as _truncate returns it.
        scale: what the target's law is multiplied by.
        minus: 1 where the draft's law is taken off, 0 where it is not.
    """

    x_ref: Any
    q_ref: Any
    draft: jax.Array
    threshold: jax.Array
    log_total: jax.Array
    scale: jax.Array
    minus: jax.Array

    def weights(self, x: jax.Array, q: jax.Array | None, ids: jax.Array) -> jax.Array:
        """float32[TILE, CHUNK], given a chunk of the logits and of the drafts' laws, and its ids."""
        q = (ids == self.draft.astype(jnp.int32)).astype(jnp.float32) if q is None else q
        rest = self.scale * jnp.exp(x - self.log_total) - jnp.where(self.minus > 0, q, 0.0)
        return jnp.where(x >= self.threshold, jnp.maximum(rest, 0.0), 0.0)


def _chunk_sums(rest: _Rest) -> jax.Array:
    """float32[TILE, LANES]: the weight of each chunk, in the lane of its number."""
    rest = _Rest(rest.x_ref, rest.q_ref, *map(_wide, rest[2:]))

    def add(c, sums):
        q = None if rest.q_ref is None else rest.q_ref[:, _chunk(c)]
        total = _total(rest.weights(rest.x_ref[:, _chunk(c)], q, _ids(c)))
        return jnp.where(_iota(sums.shape, 1) == c, total, sums)

    # Unrolled, so that the sums over lanes of several chunks are under way at once.
    return _sweep(rest.x_ref, add, jnp.zeros((TILE, LANES), jnp.float32), unroll=4)


def _draw(rest: _Rest, row: _Row, sums: jax.Array, wanted: jax.Array) -> jax.Array:
    """int32[TILE, 1]: a token in proportion to the weights, in the rows that want one. sums are those of the chunks."""
    # Rounding can reject where target and draft agree and leave no residual: the target's own law is the limit.
    left = _total(sums) > 0
    rest = rest._replace(minus=jnp.where(left, rest.minus, 0.0), scale=jnp.where(left, rest.scale, 1.0))
    sums = jax.lax.cond(_any(wanted & ~left), lambda: _chunk_sums(rest), lambda: sums)
    chunk = _invert(sums, row.chunk_uniform)
    q = None if rest.q_ref is None else _part(rest.q_ref, chunk, CHUNK)
    weights = rest.weights(_part(rest.x_ref, chunk, CHUNK), q, _ids(chunk))
    blocks = jnp.split(weights, CHUNK // LANES, axis=1)
    sums = jnp.zeros((TILE, LANES), jnp.float32)
    for i, weights in enumerate(blocks):
        sums = jnp.where(_iota(sums.shape, 1) == i, _total(weights), sums)
    block = _invert(sums, row.block_uniform)
    chosen = blocks[0]
    for i, weights in enumerate(blocks):
        chosen = jnp.where(block == i, weights, chosen)
    return chunk * CHUNK + block * LANES + _invert(chosen, row.lane_uniform)


def _invert(weights: jax.Array, uniform: jax.Array) -> jax.Array:
    """int32[TILE, 1]: the first lane whose cumulative weight exceeds uniform * total, never one of zero weight."""
    lane = _iota(weights.shape, 1)
    cumulative = weights
    for power in range(LANES.bit_length() - 1):
        cumulative += jnp.where(lane >= 2**power, pltpu.roll(cumulative, 2**power, 1), 0.0)
    # A parallel sum may rise by a rounding error where the weight is zero.
    reached = (weights > 0) & (cumulative > uniform * cumulative[:, LANES - 1 :])
    # Rounding can leave nothing above the mark; the mark then belongs to the last lane that has any weight.
    last = jnp.max(jnp.where(weights > 0, lane, 0), axis=1, keepdims=True)
    return jnp.minimum(jnp.min(jnp.where(reached, lane, LANES), axis=1, keepdims=True), last)


def _part(ref, index: jax.Array, width: int) -> jax.Array:
    """float32[TILE, width]: of each row of ref the part of that width that int32[TILE, 1] numbers."""
    part = jnp.zeros((TILE, width), ref.dtype)
    for i in range(TILE):
        lanes = pl.ds(pl.multiple_of(index[i, 0] * width, width), width)
        part = jnp.where(_iota((TILE, 1), 0) == i, ref[:, lanes], part)
    return part


def _sweep(x_ref, body, carry, unroll=1):
    """Folds body(chunk's number, carry) over the chunks of the vocabulary."""
    return jax.lax.fori_loop(0, x_ref.shape[1] // CHUNK, body, carry, unroll=unroll)


def _chunk(c):
    """Where a chunk lies."""
    return pl.ds(pl.multiple_of(c * CHUNK, CHUNK), CHUNK)


def _ids(c) -> jax.Array:
    """int32[TILE, CHUNK]: the token ids of chunk c, of each row's own or of each lane's own."""
    return c * CHUNK + _iota((TILE, CHUNK), 1)


def _wide(column) -> jax.Array:
    """[TILE, CHUNK], of [TILE, 1] or a number. Done outside loops, which would do it again each time."""
    return jnp.broadcast_to(column, (TILE, CHUNK))


def _zero() -> jax.Array:
    """The start of a sum over chunks: as many partial sums as stay in registers."""
    return jnp.zeros((TILE, CHUNK // 4), jnp.float32)


def _plus(partial: jax.Array, x: jax.Array) -> jax.Array:
    """Adds [TILE, CHUNK] to partial sums."""
    first, second, third, fourth = jnp.split(x.astype(jnp.float32), 4, axis=1)
    return partial + ((first + second) + (third + fourth))


def _total(partial: jax.Array) -> jax.Array:
    """float32[TILE, 1]."""
    return jnp.sum(partial, axis=1, keepdims=True)


def _iota(shape: tuple[int, ...], axis: int) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def _any(found: jax.Array) -> jax.Array:
    """bool[], of bool[TILE, 1]."""
    return jnp.max(found.astype(jnp.float32)) > 0
