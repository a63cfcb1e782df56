"""Many prompts through one batch: a row that finishes gives its place to the next prompt (continuous batching)."""

import collections
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from specjax import cache as kv
from specjax.config import SamplingParams
from specjax.errors import ConfigError
from specjax.generate import FINISH_REASONS, Request, SpeculativeDecoder, batch_rows, prefill_windows
from specjax.step import RUNNING, DecodeState

REFILL_ROWS = 8
"""Prompts that are prefilled together before they take their rows: a row that is free waits for others."""

PREFILL_WINDOW = 128
"""Positions that are prefilled at once: so many rows fill the hardware with few, and prompts are padded less."""


@dataclasses.dataclass(frozen=True)
class Completion:
    """The output of one prompt.

    Attributes:
        index: of the prompt.
        token_ids: its output, a stop token included.
        finish_reason: "stop", "length" or "error".
    """

    index: int
    token_ids: list[int]
    finish_reason: str


def completions(
    decoder: SpeculativeDecoder,
    prompts: Sequence[Any],
    sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    chat: bool = True,
    rounds: int = 16,
) -> Iterator[Completion]:
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
    by_capacity: dict[int, list[Request]] = collections.defaultdict(list)
    for request in sorted(requests, key=lambda request: len(request.tokens)):
        prefilled = max(
            (start + size for start, size in prefill_windows(len(request.tokens) - 1, PREFILL_WINDOW)), default=0
        )
        by_capacity[kv.round_capacity(max(request.longest(decoder), prefilled))].append(request)
    for capacity, group in sorted(by_capacity.items()):
        yield from _decode_group(decoder, group, capacity, requests, rounds)


def _decode_group(
    decoder: SpeculativeDecoder, group: Sequence[Request], capacity: int, peers: Sequence[Request], rounds: int
) -> Iterator[Completion]:
    programs, params, batch = decoder.programs, decoder.params, decoder.max_batch_size
    waiting = collections.deque(group)
    held: dict[int, Request] = {}
    state = programs.init(params, batch_rows(decoder, (), batch, capacity, peers))
    while waiting or held:
        free = [row for row in range(batch) if row not in held]
        while waiting and len(free) >= (num := min(REFILL_ROWS, batch, len(waiting))):
            newcomers, rows = [waiting.popleft() for _ in range(num)], free[:num]
            free = free[num:]
            state = _place(decoder, state, newcomers, rows, capacity, peers)
            held.update(zip(rows, newcomers, strict=True))
        state = programs.decode(params, state, rounds)
        tokens, length, finish = jax.device_get((state.tokens, state.length, state.finish))
        for row in [row for row in held if finish[row] != RUNNING]:
            request = held.pop(row)
            output = tokens[row, len(request.tokens) : length[row]].tolist()
            yield Completion(request.index, output, FINISH_REASONS[int(finish[row])])


def _place(
    decoder: SpeculativeDecoder,
    state: DecodeState,
    newcomers: Sequence[Request],
    rows: Sequence[int],
    capacity: int,
    peers: Sequence[Request],
) -> DecodeState:
    """Prefills newcomers in a state of their own and moves them to their rows."""
    programs, params = decoder.programs, decoder.params
    fresh = programs.init(params, batch_rows(decoder, newcomers, REFILL_ROWS, capacity, peers))
    longest = max(len(request.tokens) for request in newcomers)
    for start, size in prefill_windows(longest - 1, PREFILL_WINDOW):
        fresh = programs.prefill(params, fresh, start, size)
    nowhere = decoder.max_batch_size
    slots = np.full(REFILL_ROWS, nowhere, np.int32)
    slots[: len(rows)] = rows
    return programs.place(state, fresh, slots)
