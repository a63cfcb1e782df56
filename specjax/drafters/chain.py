"""What drafters that compute logits share: picking a token of each law."""

import jax
import jax.numpy as jnp

from pallas_kernels.rejection_sampling import Truncation
from pallas_kernels.rejection_sampling.xla import draw, entry, local_argmax, probabilities, truncate
from specjax.sampling import PROPOSE, SamplingState, uniforms_at
from specjax.sharding import per_device, vocab_axis

Choice = tuple[jax.Array, jax.Array | None, jax.Array]
"""Tokens int32[B], what they were drawn from float32[B, V] or None, and their logits float32[B]."""


def choose(logits: jax.Array, uniforms: jax.Array, sampling: SamplingState, sample: bool) -> Choice:
    """A token for each row.

    Args:
        logits: float32[B, V].
        uniforms: float32[B, 3].
        sample: draw from the law that the row's sampling parameters make of the logits; greedy rows take the best
            token all the same. False takes the best token for all rows.
    """
    axis = vocab_axis(logits.shape[-1])

    def local(logits: jax.Array, uniforms: jax.Array, rows: Truncation) -> Choice:
        probs = None
        if sample:
            law = truncate(logits, rows, axis)
            probs = probabilities(law, axis)
            token = jnp.where(law.greedy, law.best, draw(probs, uniforms, axis))
        else:
            token = local_argmax(logits, axis)
        return token, probs, entry(logits, token, axis, absent=-jnp.inf)

    law, row, num = ("batch", "vocab"), ("batch",), logits.shape[:1]
    inputs, outputs = (law, ("batch", None), row), ((row, num), (law, logits.shape), (row, num))
    return per_device(local, inputs, outputs, logits, uniforms, sampling.truncation)


def widen(choice: Choice, token_of: jax.Array, vocab_size: int) -> Choice:
    """A choice in a draft vocabulary as one in the target's: tokens outside have probability 0.

    Args:
        token_of: int32[V'], the target's token of each of the draft vocabulary's.
    """
    token, probs, logit = choice
    if probs is not None:
        probs = jnp.zeros((probs.shape[0], vocab_size), probs.dtype).at[:, token_of].set(probs)
    return token_of[token], probs, logit


def proposal_uniforms(sampling: SamplingState, length: jax.Array, num_speculative_tokens: int) -> jax.Array:
    """float32[B, G, 3], for drawing the drafts of the round that begins at these lengths."""
    return uniforms_at(sampling.key, length, PROPOSE, 3 * num_speculative_tokens).reshape(-1, num_speculative_tokens, 3)
