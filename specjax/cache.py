"""The KV cache: arrays indexed by row and position; knows no model."""

import flax.struct
import jax
import jax.numpy as jnp

UNROLLED_ROWS = 16
"""Up to so many rows a write is unrolled; beyond, a loop keeps the program small."""

FEW_QUERIES = 8
"""Up to so many queries a row, attention is bound by memory; beyond, by arithmetic."""

BLOCK = 256
"""Most positions that attention reads at a time; capacities are multiples of it."""


def cpu_block(rows: int, queries: int) -> int:
    """Positions that attention on CPU reads at a time: what many rows or queries make of them should stay in a core's
    cache."""
    return BLOCK if rows <= UNROLLED_ROWS and queries <= FEW_QUERIES else BLOCK // 4


@flax.struct.dataclass
class KVCache:
    """Keys and values of every layer, one array per layer so that no step ever slices or copies a stack of them.

    Slot s of a row holds the entry of position s. Nothing is erased: slots at or beyond a row's live length hold
    stale values that the mask hides and later writes replace. Rolling back is therefore arithmetic on the length.

    Attributes:
        keys: L arrays dtype[B, K, S, H], rotated.
        values: L arrays dtype[B, K, S, H].
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]

    @property
    def capacity(self) -> int:
        """S, in positions."""
        return self.keys[0].shape[2]

    def keep(self, start: jax.Array, num_kept: jax.Array) -> "KVCache":
        """Keeps the first num_kept entries written at start and drops the rest.

        Every cache has this method and the step calls it without knowing which cache it holds. For a chain of drafts
        the kept entries are already where they belong, so a KV cache has nothing to move.

        Args:
            start: int32[B], position of the first entry of the round.
            num_kept: int32[B], entries to keep from there.
        """
        del start, num_kept
        return self


def init_cache(
    num_layers: int, batch: int, num_kv_heads: int, capacity: int, head_dim: int, dtype: jnp.dtype
) -> KVCache:
    """An empty cache. capacity is in positions and a multiple of BLOCK."""
    if capacity % BLOCK:
        raise ValueError(f"capacity={capacity}: expected a multiple of {BLOCK}; round_capacity() rounds up.")
    shape = (batch, num_kv_heads, capacity, head_dim)
    return KVCache(
        keys=tuple(jnp.zeros(shape, dtype) for _ in range(num_layers)),
        values=tuple(jnp.zeros(shape, dtype) for _ in range(num_layers)),
    )


def round_capacity(positions: int) -> int:
    """The smallest capacity bucket that holds so many positions: 512, then doubling, so that few shapes compile."""
    capacity = 2 * BLOCK
    while capacity < positions:
        capacity *= 2
    return capacity


def write(slots: jax.Array, entries: jax.Array, start: jax.Array) -> jax.Array:
    """Writes a window of entries into one layer's array, each row at its own offset.

    One dynamic_update_slice a row: XLA updates it in place, where the equivalent scatter copies the whole array.

    Args:
        slots: dtype[B, K, S, H].
        entries: dtype[B, T, K, H]; start + T must not exceed S.
        start: int32[B].
    """
    entries = entries.swapaxes(1, 2).astype(slots.dtype)

    def write_row(row: jax.Array | int, slots: jax.Array) -> jax.Array:
        entry = jax.lax.dynamic_slice_in_dim(entries, row, 1, axis=0)
        return jax.lax.dynamic_update_slice(slots, entry, (row, 0, start[row], 0))

    num_rows = slots.shape[0]
    return jax.lax.fori_loop(0, num_rows, write_row, slots, unroll=num_rows <= UNROLLED_ROWS)
