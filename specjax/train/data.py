"""Training rows: sequences packed into rows of one length, read in an order that a checkpoint can go on with."""

import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import grain
import numpy as np

from specjax.errors import ConfigError

PASSES = 1_000_000
"""Over the data, more than any training makes."""


class Batch(NamedTuple):
    """Rows of a training step; a row holds several sequences one after the other, each a segment.

    Attributes:
        tokens: ids; 0 in padding.
        positions: of a token in its sequence.
        segments: 1, 2, ... for the sequences of a row, 0 for padding.
        loss_mask: whether a token is one that the target wrote.
        best: the target's most probable token behind a token; None where the target runs in the step.
        final: the target's states after the final norm; None likewise.
        taps: the residual streams entering the tapped layers; None likewise.
    """

    tokens: Any  # int32[R, T]
    positions: Any  # int32[R, T]
    segments: Any  # int32[R, T]
    loss_mask: Any  # bool[R, T]
    best: Any = None  # int32[R, T]
    final: Any = None  # bfloat16[R, T, D]
    taps: Any = None  # bfloat16[R, T, n, D]


class Store(Protocol):
    """Sequences by index: FeatureCache or TokenStore."""

    lengths: np.ndarray
    names: list[str]

    def __len__(self) -> int: ...

    def read(self, index: int, length: int) -> dict[str, np.ndarray]: ...


def split(names: Sequence[str], held_out_every: int) -> tuple[list[int], list[int]]:
    """Indices to train on and to validate on; all turns of a prompt go to one side, whatever else is in the data.

    Args:
        names: ids of responses, such as "prompt-7#0".
        held_out_every: about one prompt of so many is held out; 0 holds out none.
    """
    sides: tuple[list[int], list[int]] = [], []
    for index, name in enumerate(names):
        prompt = name.rsplit("#", 1)[0]
        sides[held_out_every > 0 and zlib.crc32(prompt.encode()) % held_out_every == 0].append(index)
    return sides


def pack(lengths: np.ndarray, indices: Sequence[int], length: int, seed: int) -> list[list[int]]:
    """First fit in shuffled order: the sequences of each row of `length` tokens. Longer ones count as `length`."""
    rows: list[list[int]] = []
    space = np.zeros(len(indices), np.int64)
    for index in np.random.default_rng(seed).permutation(np.asarray(indices, np.int64)).tolist():
        size = min(int(lengths[index]), length)
        if not size:
            continue
        row = int(np.argmax(space[: len(rows)] >= size)) if rows else 0
        if not rows or space[row] < size:
            row = len(rows)
            rows.append([])
            space[row] = length
        rows[row].append(index)
        space[row] -= size
    return rows


class Rows:
    """Packed rows by index, a source for grain."""

    def __init__(self, store: Store, indices: Sequence[int], length: int, seed: int):
        self._store, self._length = store, length
        self._rows = pack(store.lengths, indices, length, seed)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Batch:
        """One row: Batch's arrays without the first axis."""
        parts = [self._store.read(sequence, self._length) for sequence in self._rows[index]]
        for number, part in enumerate(parts, 1):
            part["segments"] = np.full(len(part["tokens"]), number, np.int32)
        used = sum(len(part["tokens"]) for part in parts)
        row = {}
        for name in parts[0]:
            array = np.concatenate([part[name] for part in parts])
            row[name] = np.pad(array, [(0, self._length - used)] + [(0, 0)] * (array.ndim - 1))
        return Batch(**row)


def stack(rows: Sequence[Batch]) -> Batch:
    """Rows as one batch."""
    return Batch(*(None if column[0] is None else np.stack(column) for column in zip(*rows, strict=True)))


def batches(rows: Rows, num_rows: int, seed: int) -> Any:
    """Batches without end, each pass in a new order; get_state and set_state of its iterator carry on exactly.

    Raises:
        ConfigError: there are fewer rows than a batch holds.
    """
    if len(rows) < num_rows:
        raise ConfigError(
            f"rows={num_rows}: but the training data fill only {len(rows)}; expected at most as many. Give more "
            "responses, or lower data.rows or data.length."
        )
    # Without a number of passes, grain 0.2 counts beyond an index where a batch is one row.
    dataset = grain.MapDataset.source(rows).shuffle(seed=seed).repeat(PASSES).batch(num_rows, batch_fn=stack)
    return dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4))


def in_order(rows: Rows, num_rows: int, num_batches: int) -> list[Batch]:
    """The first num_batches batches in order, fewer where rows end; a last batch is filled up with empty rows."""
    found = []
    for first in range(0, min(len(rows), num_rows * num_batches), num_rows):
        chosen = [rows[index] for index in range(first, min(first + num_rows, len(rows)))]
        empty = Batch(*(None if array is None else np.zeros_like(array) for array in chosen[0]))
        found.append(stack(chosen + [empty] * (num_rows - len(chosen))))
    return found


def count_tokens(store: Store, indices: Sequence[int], vocab_size: int) -> np.ndarray:
    """How often each token occurs among those that the target wrote, int64[V]."""
    counts = np.zeros(vocab_size, np.int64)
    for index in indices:
        part = store.read(index, int(store.lengths[index]))
        counts += np.bincount(part["tokens"][part["loss_mask"]], minlength=vocab_size)
    return counts


def choose_vocabulary(counts: np.ndarray, size: int) -> np.ndarray:
    """The ids of the `size` most frequent tokens, sorted, int32[size]; of equally frequent ones the lower id.

    Raises:
        ConfigError: the size is not in 1 .. V.
    """
    if not 1 <= size <= len(counts):
        raise ConfigError(f"draft_vocab_size={size}: expected 1 to {len(counts)}, the target's vocabulary.")
    return np.sort(np.argsort(-counts, kind="stable")[:size]).astype(np.int32)


def coverage(kept: np.ndarray, counts: np.ndarray) -> float:
    """The share of counted tokens that the kept ids stand for; NaN where nothing was counted."""
    total = int(counts.sum())
    return float(counts[kept].sum() / total) if total else float("nan")
