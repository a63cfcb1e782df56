"""What a round costs on this machine with each number of drafts: measured once for a batch size, for "auto"."""

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from specjax import processes
from specjax.drafters.paced import PacedParams
from specjax.step import PAD, RUNNING, DecodeState, Params

FEWEST, MOST = 3, 12
"""Times that all choices are measured, one after the other: no more as soon as of each the three fastest agree."""

AGREE = 0.03
"""How far apart times that agree may be: what else the machine does slows some of them down, and none is faster."""

ROUNDS = 2
"""Of each choice in a row, timed one by one: the faster counts."""

CONTEXT = 200
"""Most positions of the text that is decoded for it. Attention on CPU reads 64 or 256 positions at a time: with these
and those of the rounds it reads as many whatever the choice. A block more for some would decide between them.
"""

NUM_TOKENS = 100
"""Tokens that the text is made of."""

LEAST = 0.1
"""Of what a round's call takes, what the round counts as at least: with tiny models the call is nearly all of it."""


def round_seconds(programs: Any, params: Params, rows: dict[str, np.ndarray]) -> np.ndarray:
    """Seconds of a round with each of the drafter's choices, float32[choices], by decoding some rounds with each.

    Args:
        programs: of a system whose drafter is paced; those of this shape are compiled, and used again afterwards.
        params: with PacedParams.
        rows: inputs of a batch of this shape, as for programs.init; its sampling parameters are kept.
    """
    assert isinstance(params.drafter, PacedParams)
    num, (batch, capacity) = params.drafter.seconds.size, rows["tokens"].shape
    length = min(CONTEXT, capacity // 2)
    # Its last token stands nowhere else: nothing is copied, so a drafter that copies where it can, and runs a head
    # where it cannot, runs the head.
    text = np.arange(capacity, dtype=np.int32) % (NUM_TOKENS - 1)
    text[length - 1] = NUM_TOKENS - 1
    trial = rows | {
        "tokens": np.tile(text, (batch, 1)),
        "length": np.full(batch, length, np.int32),
        "max_length": np.full(batch, capacity, np.int32),
        "stop_tokens": np.full_like(rows["stop_tokens"], PAD),
        "finish": np.full(batch, RUNNING, np.int32),
    }
    measured: list[list[float]] = []
    call = np.inf
    while len(measured) < FEWEST or (len(measured) < MOST and not processes.of_first(_agree(measured))):
        measured.append([])
        for choice in range(num):
            state = programs.init(params, trial)
            state = state.replace(drafter=state.drafter.replace(forced=jnp.int32(choice)))
            state, seconds = _timed(programs, params, state, 0)
            call = min(call, seconds)
            fastest = np.inf
            for _ in range(ROUNDS):
                state, seconds = _timed(programs, params, state, 1)
                fastest = min(fastest, seconds)
            measured[-1].append(fastest)
    fastest_of_all = np.min(measured, axis=0).astype(np.float32)
    return np.maximum(fastest_of_all - call, LEAST * fastest_of_all)


def _agree(measured: list[list[float]]) -> bool:
    """Whether of each choice, a column, the three fastest are about the same."""
    first, _, third = np.sort(measured, axis=0)[:3]
    return bool((third <= (1.0 + AGREE) * first).all())


def _timed(programs: Any, params: Params, state: DecodeState, rounds: int) -> tuple[DecodeState, float]:
    """The state after so many rounds, and their seconds, with those of the call."""
    began = time.perf_counter()
    state = jax.block_until_ready(programs.decode(params, state, rounds))
    return state, time.perf_counter() - began
