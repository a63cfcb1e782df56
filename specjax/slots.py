"""Many prompts through one batch: a row that finishes gives its place to the next prompt (continuous batching)."""

import collections
import contextlib
import dataclasses
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from specjax import cache as kv
from specjax.config import SamplingParams
from specjax.errors import ConfigError
from specjax.generate import FINISH_REASONS, Request, SpeculativeDecoder, batch_rows, prefill_windows
from specjax.sharding import fetch
from specjax.step import RUNNING, DecodeState

REFILL_ROWS = 8
"""Most prompts that are prefilled together before they take their rows."""

REFILL_SHARE = 4
"""A fourth of the rows waits to be refilled together: so a prefill fills the hardware, and few rows are idle."""

PREFILL_WINDOW = 128
"""Positions that are prefilled at once: so many rows fill the hardware with few, and prompts are padded less."""


@dataclasses.dataclass(frozen=True)
class Completion:
    """The output of one prompt.

    Attributes:
        index: of the prompt.
        token_ids: its output, a stop token included.
        finish_reason: "stop", "length" or "error".
        acceptance_counts: int[G + 1], see Metrics.
        drafted: drafts proposed.
    """

    index: int
    token_ids: list[int]
    finish_reason: str
    acceptance_counts: np.ndarray
    drafted: int


class Completions:
    """An iterator of Completion; its times cover what has been decoded so far.

    Attributes:
        prefill_seconds: computing prompts and putting them in their rows.
        decode_seconds: all rounds.
        compile_seconds: compiling; not in the others.
    """

    def __init__(self, decoder: SpeculativeDecoder, requests: Sequence[Request], rounds: int):
        self.prefill_seconds = 0.0
        self.decode_seconds = 0.0
        self.compile_seconds = 0.0
        self._decoder = decoder
        self._rounds = rounds
        self._requests = requests
        self._calls = self._decode_all()
        self._finished: collections.deque[Completion] = collections.deque()

    def __iter__(self) -> "Completions":
        return self

    def __next__(self) -> Completion:
        while not self._finished:
            self._finished.extend(next(self._calls))
        return self._finished.popleft()

    def advance(self) -> list[Completion] | None:
        """The prompts that finished in the next rounds, as many as lie between two looks; None where all had before.

        For what takes turns with something else. Iterating goes on with the prompts that were not returned here.
        """
        return next(self._calls, None)

    def _decode_all(self) -> Iterator[list[Completion]]:
        by_capacity: dict[int, list[Request]] = collections.defaultdict(list)
        for request in sorted(self._requests, key=lambda request: len(request.tokens)):
            windows = prefill_windows(len(request.tokens) - 1, PREFILL_WINDOW)
            prefilled = sum(windows[-1]) if windows else 0
            by_capacity[kv.round_capacity(max(request.longest(self._decoder), prefilled))].append(request)
        for capacity, group in sorted(by_capacity.items()):
            yield from self._decode_group(group, capacity)

    def _decode_group(self, group: Sequence[Request], capacity: int) -> Iterator[list[Completion]]:
        decoder = self._decoder
        programs, batch = decoder.programs, decoder.max_batch_size
        together = min(REFILL_ROWS, max(1, batch // REFILL_SHARE))
        waiting = collections.deque(group)
        held: dict[int, Request] = {}
        rows = batch_rows(decoder, (), batch, capacity, self._requests)
        params = decoder.params_for(rows)
        state = programs.init(params, rows)
        while waiting or held:
            free = [row for row in range(batch) if row not in held]
            while waiting and len(free) >= (num := min(together, len(waiting))):
                newcomers, places = [waiting.popleft() for _ in range(num)], free[:num]
                free = free[num:]
                with self._timed("prefill_seconds"):
                    state = self._place(params, state, newcomers, places, together)
                held.update(zip(places, newcomers, strict=True))
            with self._timed("decode_seconds"):
                state = programs.decode(params, state, self._rounds)
                names = ("tokens", "length", "finish", "acceptance_counts", "num_drafted")
                look = dict(zip(names, fetch([getattr(state, name) for name in names]), strict=True))
            finished = []
            for row in [row for row in held if look["finish"][row] != RUNNING]:
                request = held.pop(row)
                output = look["tokens"][row, len(request.tokens) : look["length"][row]].tolist()
                reason = FINISH_REASONS[int(look["finish"][row])]
                counts, drafted = look["acceptance_counts"][row], int(look["num_drafted"][row])
                finished.append(Completion(request.index, output, reason, counts, drafted))
            yield finished

    def _place(
        self, params: Any, state: DecodeState, newcomers: Sequence[Request], rows: Sequence[int], together: int
    ) -> DecodeState:
        """Prefills newcomers in a state of their own and moves them to their rows."""
        decoder = self._decoder
        capacity = state.tokens.shape[1]
        fresh = decoder.programs.init(params, batch_rows(decoder, newcomers, together, capacity, self._requests))
        longest = max(len(request.tokens) for request in newcomers)
        for start, size in prefill_windows(longest - 1, PREFILL_WINDOW):
            fresh = decoder.programs.prefill(params, fresh, start, size)
        nowhere = decoder.max_batch_size
        slots = np.full(together, nowhere, np.int32)
        slots[: len(rows)] = rows
        return jax.block_until_ready(decoder.programs.place(state, fresh, slots))

    @contextlib.contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        programs = self._decoder.programs
        began, before = time.perf_counter(), programs.compile_seconds
        yield
        compiled = programs.compile_seconds - before
        self.compile_seconds += compiled
        setattr(self, name, getattr(self, name) + time.perf_counter() - began - compiled)


def completions(
    decoder: SpeculativeDecoder,
    prompts: Sequence[Any],
    sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    chat: bool = True,
    rounds: int = 16,
) -> Completions:
    """Decodes any number of prompts in max_batch_size rows, in the order in which they finish.

    Prompts that need caches of one capacity decode together, the shortest first, so rows that share a batch read
    about equally much of it. A prompt's output is that of generate, up to rounding, which varies with shapes.

    Args:
        prompts, sampling_params, chat: as in SpeculativeDecoder.generate, without stop strings.
        rounds: decoded between two looks at the device.

    Raises:
        SpecJAXError: a prompt or parameter is wrong; names the prompt.
    """
    requests = decoder.requests(prompts, sampling_params, chat)
    stops = next((request for request in requests if request.params.stop), None)
    if stops is not None:
        raise ConfigError(
            f"prompts[{stops.index}]: stop={stops.params.stop}; expected stop_token_ids, or use generate."
        )
    return Completions(decoder, requests, rounds)
