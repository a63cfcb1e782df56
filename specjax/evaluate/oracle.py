"""Is a greedy output that differs from plain decoding wrong, or a tie that rounding broke the other way?"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from specjax import cache as kv
from specjax.checkpoints.load import Target
from specjax.generate import prefill_windows
from specjax.target import decoder

NOISE_MARGIN = 4.0
"""A gap counts as rounding noise up to this many times the largest difference seen between two ways to compute it."""


def compare_greedy(target: Target, prompt: Sequence[int], plain: Sequence[int], speculative: Sequence[int]) -> str:
    """How a speculative greedy output relates to the plain one.

    Products over one row and over several round differently, so near ties between the two best tokens may flip. At the
    first difference the logits are computed anew, in windows of 1, 2, 3, 5 and 8 tokens; the largest difference among
    these is the rounding noise there.

    Args:
        prompt, plain, speculative: token ids.

    Returns:
        "identical"; "near_tie" if both tokens' logits lie within noise of the largest; else "mismatch".
    """
    if list(plain) == list(speculative):
        return "identical"
    shorter = min(len(plain), len(speculative))
    at = next((i for i in range(shorter) if plain[i] != speculative[i]), shorter)
    if at == shorter:
        return "mismatch"
    context = [*prompt, *plain[:at]]
    logits = np.stack([_next_logits(target, context, width) for width in (1, 2, 3, 5, 8) if width <= len(context)])
    noise = NOISE_MARGIN * np.ptp(logits, axis=0).max()
    mean = logits.mean(axis=0)
    gap = mean.max() - min(mean[plain[at]], mean[speculative[at]])
    return "near_tie" if gap <= noise else "mismatch"


def _next_logits(target: Target, context: list[int], width: int) -> np.ndarray:
    """float32[V]: logits behind the context, its last width tokens run as one window and the rest as prefill."""
    split = len(context) - width
    windows = prefill_windows(split)
    padded = max(sum(windows[-1]) if windows else 0, len(context))
    tokens = np.zeros((1, kv.round_capacity(padded)), np.int32)
    tokens[0, : len(context)] = context
    cache = decoder.init_cache(target.config, 1, tokens.shape[1], target.dtype)
    for start, size in windows:
        cache = _forward(target.config, False)(target.params, tokens[:, start : start + size], _row(start), cache).cache
    out = _forward(target.config, True)(target.params, tokens[:, split : len(context)], _row(split), cache)
    return np.asarray(out.logits[0, -1])


def _row(start: int) -> jax.Array:
    return jnp.full((1,), start, jnp.int32)


@functools.cache
def _forward(config, with_logits):
    return jax.jit(functools.partial(decoder.apply, config, with_logits=with_logits), donate_argnums=3)
