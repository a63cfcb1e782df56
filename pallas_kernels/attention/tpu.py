"""The operation as one Pallas kernel for TPUs, for windows of a few tokens: decoding and verification.

A grid step takes a row. Its queries of one KV head, all tokens together, are one [T * Q, H] operand of the MXU. What is
read of the cache is the row's blocks of slots that the window can see, up to start and no further, and the few slots
around the window itself. Blocks come in by a queue of copies that runs ahead across rows, so that neither a short row
nor the end of one leaves HBM idle; blocks beyond a row's length, or before its sliding window, are never copied. The
softmax starts with the window's own slots, of which every token sees itself, and goes on block by block.

Written entries go the other way: the slots around the window are completed in VMEM and copied back in place.

Head widths that fill lanes (multiples of 128) have slots along sublanes. Others have slots along lanes, which is how
XLA lays out such arrays on TPUs: neither memory nor bandwidth is lost to padding, and turning them moves nothing.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.attention.base import HIDDEN, LANES, SUBLANES, depths, misfit, within

BLOCKS = (2048, 1024, 512, 256)
"""Slots of a block: with few heads many, since a block takes some 600 cycles of waiting for results in any case."""

BLOCK_BYTES, QUEUE_BYTES = 2**19, 2**22
"""Most bytes of a block of keys, and of the blocks under way: enough that HBM's latency is hidden."""

ROOM = 2**18
"""Bytes of the logits of a block that are worked on at once, a few heads': what the registers hold."""


def attention(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    start: jax.Array,
    mask: jax.Array | None = None,
    sliding_window: int | None = None,
    **options: Any,
) -> jax.Array:
    """See api.attention; options are those of _run."""
    return _run(queries, None, keys, values, start, mask, sliding_window, **options)[0]


def write_and_attend(
    queries: jax.Array,
    k: jax.Array,
    v: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    start: jax.Array,
    mask: jax.Array | None = None,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See api.write_and_attend; options are those of _run."""
    mixed, *cache = _run(queries, (k, v), keys, values, start, mask, sliding_window, **options)
    return mixed, *cache


def block_size(K: int, rows: int, H: int, S: int, width: int) -> int:
    """Slots of a block, of K heads with so many queries each and numbers of so many bytes."""
    sizes = [size for size in BLOCKS if S % size == 0 and size * max(K * H * width, 2 * rows) <= BLOCK_BYTES]
    return sizes[0] if sizes else BLOCKS[-1]


def piece_size(block: int) -> int:
    """Slots of a copy. Of a row's last block, and of the first in its sliding window, only live pieces are copied."""
    return max(block // 4, LANES)


def _padded(size: int, multiple: int) -> int:
    return pl.cdiv(size, multiple) * multiple


@functools.partial(jax.jit, static_argnames=("sliding_window", "block", "depth", "interpret"))
def _run(
    queries: jax.Array,
    entries: tuple[jax.Array, jax.Array] | None,
    keys: jax.Array,
    values: jax.Array,
    start: jax.Array,
    mask: jax.Array | None,
    sliding_window: int | None,
    block: int | None = None,
    depth: int | None = None,
    interpret: Any = False,
) -> list[jax.Array]:
    """What the queries mix and, if there are entries to write, keys and values with them.

    Args:
        block: slots of a block, None for the best; divides S.
        depth: blocks in the queue, a power of 2, None for the best.
        interpret: runs the kernel on any platform.
    """
    reason = misfit(queries, keys)
    if reason:
        raise NotImplementedError(reason)
    B, T, K, Q, H = queries.shape
    S, width = keys.shape[2], keys.dtype.itemsize
    rows = T * Q
    block = block or block_size(K, rows, H, S, width)
    depth = depth or next(n for n in (8, 4, 2) if n == 2 or n * 2 * K * block * H * width <= QUEUE_BYTES)
    along_lanes = H % LANES != 0
    unit = LANES if along_lanes else SUBLANES
    around = _padded(T + unit - 1, unit)
    # Without a mask a constant, which numpy makes: jax may not compute while it compiles for devices that are absent.
    numpy: Any = np if mask is None else jnp
    allowed = np.tri(T, dtype=bool)[None] if mask is None else mask
    # How many of the window a query sees says where it stands: kept in the mask itself.
    seen = numpy.where(within(allowed, sliding_window), depths(allowed)[:, :, None] + 1, 0).astype(np.int32)
    seen = numpy.pad(numpy.repeat(seen, Q, axis=1), ((0, 0), (0, 0), (0, _padded(around, LANES) - T)))
    stacked = queries.astype(keys.dtype).astype(jnp.float32).transpose(2, 1, 3, 0, 4).reshape(K, rows, B, H)
    tile = min(B, 8)
    tiled = pl.BlockSpec((K, rows, tile, H), lambda b, start: (0, 0, jax.lax.div(b, tile), 0))

    def turned(x):
        return x.swapaxes(2, 3) if along_lanes else x

    def slots(*lead, size):
        return (*lead, H, size) if along_lanes else (*lead, size, H)

    def one(*shape):
        return pl.BlockSpec((1, *shape), lambda b, start: (b,) + (0,) * len(shape))

    everywhere = pl.BlockSpec(memory_space=pltpu.HBM)
    operands = [seen, stacked]
    in_specs = [pl.BlockSpec((1, *seen.shape[1:]), lambda b, start: (b if len(seen) > 1 else 0, 0, 0)), tiled]
    out_shapes, out_specs, aliases = [jax.ShapeDtypeStruct(stacked.shape, stacked.dtype)], [tiled], {}
    if entries is not None:
        for x in entries:
            operands.append(turned(x.swapaxes(1, 2).astype(keys.dtype)))
            in_specs.append(one(*slots(K, size=T)))
        aliases = {len(operands) + 1 + i: 1 + i for i in range(2)}
        out_shapes += [jax.ShapeDtypeStruct(slots(B, K, size=S), keys.dtype)] * 2
        out_specs += [everywhere] * 2
    operands += [turned(keys), turned(values)]
    in_specs += [everywhere] * 2
    scratch = [
        pltpu.VMEM(slots(depth, 2, K, size=block), keys.dtype),
        pltpu.VMEM(slots(2, 2, K, size=around), keys.dtype),
        pltpu.VMEM(slots(2, K, size=around), jnp.float32),
        pltpu.VMEM((K, rows, H), keys.dtype),
        pltpu.VMEM((K, rows, LANES), jnp.float32),
        pltpu.VMEM((K, rows, LANES), jnp.float32),
        pltpu.VMEM((K, rows, H), jnp.float32),
        pltpu.SMEM((4,), jnp.int32),
        pltpu.SemaphoreType.DMA((depth,)),
        pltpu.SemaphoreType.DMA((2,)),
        pltpu.SemaphoreType.DMA,
    ]
    most = max(ROOM // (_padded(rows, 8) * block * 4), 1)
    group = next(n for n in range(min(K, most), 0, -1) if K % n == 0)
    buffers = 2 * depth * K * block * H * width
    found = pl.pallas_call(
        functools.partial(
            _kernel,
            T=T,
            S=S,
            block=block,
            group=group,
            piece=piece_size(block),
            around=around,
            unit=unit,
            sliding_window=sliding_window,
            writes=bool(aliases),
        ),
        out_shape=out_shapes,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1, grid=(B,), in_specs=in_specs, out_specs=out_specs, scratch_shapes=scratch
        ),
        input_output_aliases=aliases,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",), vmem_limit_bytes=buffers + 24 * 2**20, disable_bounds_checks=True
        ),
        interpret=interpret,
        name="write_and_attend" if aliases else "attention",
    )(start.astype(jnp.int32), *operands)
    mixed = found[0].reshape(K, T, Q, B, H).transpose(3, 1, 0, 2, 4)
    return [mixed.astype(queries.dtype), *map(turned, found[1:])]


def _kernel(
    start_ref,
    seen_ref,
    queries_ref,
    *refs,
    T: int,
    S: int,
    block: int,
    piece: int,
    group: int,
    around: int,
    unit: int,
    sliding_window: int | None,
    writes: bool,
) -> None:
    """Attends for a row.

    Refs, where cache arrays are [B, K, S, H] or, with slots along lanes, [B, K, H, S]:
        start_ref: int32[B] in SMEM.
        seen_ref: int32[1, R, lanes]: at the tokens that a query sees their number, else 0. R = T * Q, by token.
        queries_ref: float32[K, R, tile, H], of this row and its neighbours.
        two more: with writes, the entries to write, slots from 0 on.
        keys and values in HBM, then the output, as queries_ref, and with writes keys and values as they become.
        blocks_ref: [depth, 2, K, block, H], the queue.
        around_ref: [2, 2, K, around, H], the slots around the windows of this row and the next.
        new_ref: float32[2, K, around, H], entries on their way.
        own_ref: [K, R, H], the row's queries.
        peak_ref, total_ref: float32[K, R, LANES], the largest logit, in all lanes, and sums of weights, to be summed.
        mixed_ref: float32[K, R, H].
        queue_ref: int32[4] in SMEM: row and block to copy next, copies begun, copies used.
        semaphores: one for each place of the queue, for each row around whose window is copied, and for writing.
    """
    (*new_refs, keys_ref, values_ref, out_ref) = refs[: 5 if writes else 3]
    rest = list(refs[len(new_refs) + 3 :])
    if writes:
        keys_ref, values_ref, *rest = rest
    (
        blocks_ref,
        around_ref,
        new_ref,
        own_ref,
        peak_ref,
        total_ref,
        mixed_ref,
        queue_ref,
        arrived,
        around_arrived,
        written,
    ) = rest
    caches = keys_ref, values_ref
    row, num_rows = pl.program_id(0), pl.num_programs(0)
    depth, _, K = blocks_ref.shape[:3]
    rows, tile, H = queries_ref.shape[1:]
    along_lanes = unit == LANES

    def start_of(row):
        # Beyond the capacity nothing is written either: as dynamic_update_slice does.
        return jnp.minimum(start_ref[row], S - T)

    def first_block(row):
        return 0 if sliding_window is None else jax.lax.div(jnp.maximum(start_of(row) - (sliding_window - 1), 0), block)

    def end_block(row):
        """At least one block a row, so that the queue needs no case for none."""
        return jnp.maximum(jax.lax.div(start_of(row) + (block - 1), block), first_block(row) + 1)

    def place_around(row):
        return jnp.minimum(start_of(row) & -unit, S - around)

    def part(ref, row, offset, size, multiple):
        where = pl.ds(pl.multiple_of(offset, multiple), size)
        return ref.at[row, :, :, where] if along_lanes else ref.at[row, :, where]

    def copies_around(row):
        which = row & 1
        return [
            pltpu.make_async_copy(
                part(cache, row, place_around(row), around, unit), around_ref.at[which, i], around_arrived.at[which]
            )
            for i, cache in enumerate(caches)
        ]

    def copies_of_block(row, index, place):
        """(whether it holds anything that is seen, its copy) for each piece of keys and of values."""
        found = []
        for first in range(0, block, piece):
            offset = index * block + first
            live = offset < start_of(row)
            if sliding_window is not None:
                live &= offset + piece > start_of(row) + 1 - sliding_window
            for i, cache in enumerate(caches):
                place_ref = (
                    blocks_ref.at[place, i, :, :, pl.ds(first, piece)]
                    if along_lanes
                    else (blocks_ref.at[place, i, :, pl.ds(first, piece)])
                )
                source = part(cache, row, offset, piece, piece)
                found.append((live, pltpu.make_async_copy(source, place_ref, arrived.at[place])))
        return found

    def advance() -> None:
        """Begins to copy the next block, if any is left."""
        next_row, index, begun = queue_ref[0], queue_ref[1], queue_ref[2]

        @pl.when(next_row < num_rows)
        def begin():
            for live, copy in copies_of_block(next_row, index, begun & (depth - 1)):
                pl.when(live)(copy.start)
            after = jnp.minimum(next_row + 1, num_rows - 1)
            is_last = index + 1 >= end_block(next_row)
            queue_ref[0] = jnp.where(is_last, next_row + 1, next_row)
            queue_ref[1] = jnp.where(is_last, first_block(after), index + 1)
            queue_ref[2] = begun + 1

    @pl.when(row == 0)
    def begin_queue():
        for copy in copies_around(row):
            copy.start()

        # Places are not filled to the end, and a weight of 0 makes nothing of any number but NaN.
        @pl.loop(0, depth)
        def clear(place):
            blocks_ref[place, 1] = jnp.zeros(blocks_ref.shape[2:], blocks_ref.dtype)

        queue_ref[0], queue_ref[1], queue_ref[2], queue_ref[3] = 0, first_block(0), 0, 0
        pl.loop(0, depth - 1)(lambda _: advance())

    @pl.when(row + 1 < num_rows)
    def begin_next():
        for copy in copies_around(row + 1):
            copy.start()

    which = row & 1
    offset = start_of(row) - place_around(row)
    for copy in copies_around(row):
        copy.wait()
    backs = []
    if writes:
        axis = 2 if along_lanes else 1
        shape = around_ref.shape[2:]
        own = jax.lax.broadcasted_iota(jnp.int32, shape, axis) - offset
        for i, entries_ref in enumerate(new_refs):
            first = (slice(None), slice(None), slice(0, T)) if along_lanes else (slice(None), slice(0, T))
            new_ref[(i, *first)] = entries_ref[0].astype(jnp.float32)
            # Registers of 32 bits only can be rotated by a number that is not known before.
            new = pltpu.roll(new_ref[i], offset, axis).astype(around_ref.dtype)
            around_ref[which, i] = jnp.where((own >= 0) & (own < T), new, around_ref[which, i])
        for i, cache in enumerate(caches):
            to = part(cache, row, place_around(row), around, unit)
            backs.append(pltpu.make_async_copy(around_ref.at[which, i], to, written))
            backs[-1].start()

    own_ref[...] = queries_ref[:, :, jax.lax.rem(row, tile)].astype(own_ref.dtype)

    def logits_of(heads, keys):
        over = ((2,), (1 if along_lanes else 2,)), ((0,), (0,))
        return jax.lax.dot_general(own_ref[heads], keys, over, preferred_element_type=jnp.float32)

    def mix(weights, values):
        over = ((2,), (2 if along_lanes else 1,)), ((0,), (0,))
        return jax.lax.dot_general(weights.astype(values.dtype), values, over, preferred_element_type=jnp.float32)

    def attend(heads, place_ref, visible, first):
        """Adds some heads' slots to what is known of them; first: nothing is."""
        logits = jnp.where(visible, logits_of(heads, place_ref[0, heads]), HIDDEN)
        peak = jnp.broadcast_to(jnp.max(logits, axis=2, keepdims=True), peak_ref[heads].shape)
        peak = peak if first else jnp.maximum(peak_ref[heads], peak)
        weights = jnp.exp(logits - _across(peak, logits.shape[2]))
        total, mixed = _folded(weights), mix(weights, place_ref[1, heads])
        if not first:
            decay = jnp.exp(peak_ref[heads] - peak)
            total, mixed = total_ref[heads] * decay + total, mixed_ref[heads] * _across(decay, H) + mixed
        peak_ref[heads], total_ref[heads], mixed_ref[heads] = peak, total, mixed

    def each_group(body):
        jax.lax.fori_loop(0, K // group, lambda i, _: body(pl.ds(i * group, group)), None, unroll=K // group <= 4)

    seen = pltpu.roll(seen_ref[0], offset, 1)[:, :around] > 0
    each_group(lambda heads: attend(heads, around_ref.at[which], seen, first=True))
    oldest = None
    if sliding_window is not None:
        oldest = start_of(row) + jnp.max(seen_ref[0], axis=1, keepdims=True) - sliding_window

    @pl.loop(first_block(row), end_block(row))
    def go_on(index):
        advance()
        used = queue_ref[3]
        queue_ref[3] = used + 1
        place = used & (depth - 1)
        for live, copy in copies_of_block(row, index, place):
            pl.when(live)(copy.wait)
        slot = index * block + jax.lax.broadcasted_iota(jnp.int32, (rows, block), 1)
        visible = slot < start_of(row)
        if oldest is not None:
            visible &= slot >= oldest
        each_group(lambda heads: attend(heads, blocks_ref.at[place], visible, first=False))

    for head in range(K):
        total = jnp.sum(total_ref[head], axis=1, keepdims=True)
        out_ref[head, :, jax.lax.rem(row, tile)] = mixed_ref[head] / total
    for copy in backs:
        copy.wait()


def _across(x: jax.Array, width: int) -> jax.Array:
    """[..., width], of an array whose LANES entries are all the same."""
    return jnp.tile(x, (1,) * (x.ndim - 1) + (pl.cdiv(width, LANES),))[..., :width]


def _folded(x: jax.Array) -> jax.Array:
    """[..., LANES]: sums over every LANES-th entry."""
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % LANES)])
    return sum(jnp.split(x, x.shape[-1] // LANES, axis=-1)[1:], x[..., :LANES])
