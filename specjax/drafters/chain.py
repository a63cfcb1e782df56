"""What drafters that compute logits share: picking a token of each law, and where to stop."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.rejection_sampling import Truncation
from pallas_kernels.rejection_sampling.xla import best_probability, draw, entry, local_argmax, probabilities, truncate
from specjax.control import run_if
from specjax.drafters.base import NO_DRAFT, Proposal, draft_counts
from specjax.sampling import PROPOSE, SamplingState, uniforms_at
from specjax.sharding import per_device, vocab_axis

SCORED = 0.25
"""Of the threshold from which on another draft is made: the likelihood from which on one that is made is scored."""


class Choice(NamedTuple):
    """Drafts, one a row; stacked along a second axis, those of a round.

    Attributes:
        token: int32[B].
        probs: float32[B, V], what it was drawn from; None where it was chosen.
        logit: float32[B], its own.
        likelihood: float32[B], that it and the drafts before it are accepted, as the drafter sees it: the product of
            the largest probabilities of its laws up to here, at temperature 1.
    """

    token: jax.Array
    probs: jax.Array | None
    logit: jax.Array
    likelihood: jax.Array


def choose(
    logits: jax.Array, uniforms: jax.Array, sampling: SamplingState, sample: bool, likelihood: jax.Array | float
) -> Choice:
    """A token for each row.

    Args:
        logits: float32[B, V].
        uniforms: float32[B, 3].
        sample: draw from the law that the row's sampling parameters make of the logits; greedy rows take the best
            token all the same. False takes the best token for all rows.
        likelihood: float32[B], of the drafts before; 1 where there are none.
    """
    axis = vocab_axis(logits.shape[-1])

    def local(logits: jax.Array, uniforms: jax.Array, rows: Truncation) -> tuple[jax.Array | None, ...]:
        probs = None
        if sample:
            law = truncate(logits, rows, axis)
            probs = probabilities(law, axis)
            token = jnp.where(law.greedy, law.best, draw(probs, uniforms, axis))
        else:
            token = local_argmax(logits, axis)
        return token, probs, entry(logits, token, axis, absent=-jnp.inf), best_probability(logits, axis)

    law, row, num = ("batch", "vocab"), ("batch",), logits.shape[:1]
    inputs, outputs = (law, ("batch", None), row), ((row, num), (law, logits.shape), (row, num), (row, num))
    token, probs, logit, confidence = per_device(local, inputs, outputs, logits, uniforms, sampling.truncation)
    return Choice(token, probs, logit, likelihood * confidence)


def widen(choice: Choice, token_of: jax.Array, vocab_size: int) -> Choice:
    """A choice in a draft vocabulary as one in the target's: tokens outside have probability 0.

    Args:
        token_of: int32[V'], the target's token of each of the draft vocabulary's.
    """
    probs = choice.probs
    if probs is not None:
        probs = jnp.zeros((probs.shape[0], vocab_size), probs.dtype).at[:, token_of].set(probs)
    return choice._replace(token=token_of[choice.token], probs=probs)


def draft_if_likely(
    likelihood: jax.Array, threshold: float, draft: Callable[[Any], tuple[Any, Any]], carry: Any
) -> tuple[Any, Any]:
    """draft(carry), but zeros and the same carry where no row's drafts so far, float32[B], are likely enough."""
    return run_if((likelihood >= threshold).any(), draft, carry) if threshold else draft(carry)


def proposal(choices: Choice, threshold: float) -> Proposal:
    """A round's drafts, each row's up to the first whose likelihood is below the threshold, and with it: it is made,
    so scoring it is all that it costs. It stays out where it is too unlikely for that too.

    Whether a draft is proposed follows from its law and the laws of those before it, not from its token, so what is
    proposed was drawn from the law that it comes with.
    """
    if not threshold:
        return Proposal(choices.token, choices.probs, choices.logit)
    before = jnp.pad(choices.likelihood[:, :-1], ((0, 0), (1, 0)), constant_values=1.0)
    pays = (before >= threshold) & (choices.likelihood >= SCORED * threshold)
    return Proposal(jnp.where(pays, choices.token, NO_DRAFT), choices.probs, choices.logit)


def proposal_uniforms(sampling: SamplingState, length: jax.Array, num_speculative_tokens: int) -> jax.Array:
    """float32[B, G, 3], for drawing the drafts of the round that begins at these lengths."""
    return uniforms_at(sampling.key, length, PROPOSE, 3 * num_speculative_tokens).reshape(-1, num_speculative_tokens, 3)


def windows(num_speculative_tokens: int, limited: bool, threshold: float) -> tuple[int, ...]:
    """Drafter.widths of rounds of all drafts, or none where the context is limited, or any number with a threshold."""
    if threshold:
        return tuple(num + 1 for num in draft_counts(num_speculative_tokens))
    return (1, num_speculative_tokens + 1) if limited else (num_speculative_tokens + 1,)
