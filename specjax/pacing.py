"""What a round costs on this machine with each number of drafts: measured once for a batch size, for "auto"."""

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from specjax.drafters.paced import PacedParams
from specjax.step import PAD, RUNNING, Params

ROUNDS = 3
"""Rounds that are timed together."""

REPEATS = 2
"""Times that each choice is measured, one after the other; the fastest counts."""

CONTEXT = 256
"""Most positions of the text that is decoded for it."""


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
    text = np.broadcast_to(np.arange(capacity, dtype=np.int32) % 100, (batch, capacity))
    trial = rows | {
        "tokens": np.ascontiguousarray(text),
        "length": np.full(batch, length, np.int32),
        "max_length": np.full(batch, capacity, np.int32),
        "stop_tokens": np.full_like(rows["stop_tokens"], PAD),
        "finish": np.full(batch, RUNNING, np.int32),
    }
    fastest = np.full(num, np.inf, np.float32)
    for _ in range(REPEATS):
        for choice in range(num):
            state = programs.init(params, trial)
            state = state.replace(drafter=state.drafter.replace(forced=jnp.int32(choice)))
            state = jax.block_until_ready(programs.decode(params, state, 1))
            began = time.perf_counter()
            jax.block_until_ready(programs.decode(params, state, ROUNDS))
            fastest[choice] = min(fastest[choice], (time.perf_counter() - began) / ROUNDS)
    return fastest
