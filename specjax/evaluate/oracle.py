"""Is a greedy output that differs from plain decoding wrong, or a tie that rounding broke the other way?"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from specjax import cache as kv
from specjax.checkpoints.load import Target
from specjax.generate import prefill_windows
from specjax.sharding import fetch, placed_state
from specjax.target import decoder

NOISE_MARGIN = 4.0
"""A gap counts as rounding noise up to this many times the largest difference seen between two ways to compute it."""


class Comparison(NamedTuple):
    """How an output relates to the plain one.

    Attributes:
        kind: "identical"; "near_tie" if both tokens' logits lie within noise of the largest; else "mismatch".
        at: index in the output of the first token that differs; None if none does.
        gap: logits, from the largest to the lower of the two tokens'; None where one output merely ends before.
        noise: logits, the gap up to which it is a near tie; None with the gap.
    """

    kind: str
    at: int | None = None
    gap: float | None = None
    noise: float | None = None


def compare_greedy(
    target: Target, prompt: Sequence[int], plain: Sequence[int], speculative: Sequence[int]
) -> Comparison:
    """How a speculative greedy output relates to the plain one.

    Products over one row and over several round differently, so near ties between the two best tokens may flip. At the
    first difference the logits are computed anew, in windows of 1, 2, 3, 5 and 8 tokens; the largest difference among
    these is the rounding noise there.

    Args:
        prompt, plain, speculative: token ids.
    """
    if list(plain) == list(speculative):
        return Comparison("identical")
    shorter = min(len(plain), len(speculative))
    at = next((i for i in range(shorter) if plain[i] != speculative[i]), shorter)
    if at == shorter:
        return Comparison("mismatch", at)
    context = [*prompt, *plain[:at]]
    logits = np.stack([_next_logits(target, context, width) for width in (1, 2, 3, 5, 8) if width <= len(context)])
    noise = NOISE_MARGIN * np.ptp(logits, axis=0).max()
    mean = logits.mean(axis=0)
    gap = mean.max() - min(mean[plain[at]], mean[speculative[at]])
    return Comparison("near_tie" if gap <= noise else "mismatch", at, float(gap), float(noise))


def prefilled_cache(target: Target, tokens: Sequence[int], rows: int = 1, room: int = 0) -> kv.KVCache:
    """A cache that holds some tokens in each row, with room for more behind them.

    Args:
        tokens: token ids of every row.
        rows: B.
        room: positions behind the tokens that the cache holds at least.
    """
    windows = prefill_windows(len(tokens))
    capacity = kv.round_capacity(max(sum(windows[-1]) if windows else 0, len(tokens) + room))
    padded = np.zeros((rows, capacity), np.int32)
    padded[:, : len(tokens)] = tokens
    cache = placed_state(decoder.init_cache(target.config, rows, capacity, target.dtype), target.mesh)
    for start, size in windows:
        window = padded[:, start : start + size]
        cache = _forward(target.config, False)(target.params, window, row_starts(rows, start), cache).cache
    return cache


def row_starts(rows: int, start: int) -> jax.Array:
    """int32[B]: all rows at one position."""
    return jnp.full((rows,), start, jnp.int32)


def _next_logits(target: Target, context: list[int], width: int) -> np.ndarray:
    """float32[V]: logits behind the context, its last width tokens run as one window and the rest as prefill."""
    split = len(context) - width
    cache = prefilled_cache(target, context[:split], room=width)
    window = np.array([context[split:]], np.int32)
    out = _forward(target.config, True)(target.params, window, row_starts(1, split), cache)
    return fetch(out.logits)[0, -1]


@functools.cache
def _forward(config: Any, with_logits: bool) -> Any:
    return jax.jit(functools.partial(decoder.apply, config, with_logits=with_logits), donate_argnums=3)
