"""Acceptance rules: how many drafts are kept, and which token comes after them. One function each, and their table.

A rule sees target logits, the proposal and uniform numbers, and nothing of how they were made.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from specjax.drafters.base import NO_DRAFT, Proposal
from specjax.sampling import (
    ACCEPT,
    RECOVER,
    SamplingState,
    draw,
    probabilities_at,
    probability_of,
    truncate,
    uniforms_at,
)


class Uniforms(NamedTuple):
    """The random numbers of one round, each in [0, 1).

    Attributes:
        accept: float32[B, G], one for each draft's verdict.
        recover: float32[B, 2], for the token that follows the accepted drafts.
    """

    accept: jax.Array
    recover: jax.Array


class Verdict(NamedTuple):
    """What a rule decides.

    Attributes:
        num_accepted: int32[B], 0..G, next_token not counted.
        next_token: int32[B], recovered after a rejection, a bonus after full acceptance.
    """

    num_accepted: jax.Array
    next_token: jax.Array


Rule = Callable[[jax.Array, Proposal, SamplingState, Uniforms], Verdict]


def greedy(logits: jax.Array, proposal: Proposal, sampling: SamplingState, uniforms: Uniforms) -> Verdict:
    """Accepts while the draft is the target's best token. Lossless at temperature 0, the only one it may be used at.

    Args:
        logits: float32[B, G + 1, V].
        proposal: drafts; their distribution plays no part.
    """
    del sampling, uniforms
    best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    num_accepted = _leading(best[:, :-1] == proposal.tokens)
    return Verdict(num_accepted, jnp.take_along_axis(best, num_accepted[:, None], axis=1)[:, 0])


def residual(logits: jax.Array, proposal: Proposal, sampling: SamplingState, uniforms: Uniforms) -> Verdict:
    """Speculative sampling (Leviathan et al. 2211.17192, algorithm 1; Chen et al. 2302.01318). Lossless.

    Draft d is accepted if u * draft_probs(d) < target_probs(d). The first rejected position draws from
    max(target_probs - draft_probs, 0), normalised; after full acceptance from target_probs. target_probs is the
    truncated distribution; greedy rows have it all on the best token, which makes this the greedy rule for them.

    Args:
        logits: float32[B, G + 1, V].
        proposal: drafts with the distribution that they were drawn from.
    """
    all_greedy = jnp.all(sampling.greedy)
    return jax.lax.cond(all_greedy, greedy, _residual, logits, proposal, sampling, uniforms)


def _residual(logits: jax.Array, proposal: Proposal, sampling: SamplingState, uniforms: Uniforms) -> Verdict:
    law = truncate(logits, sampling)
    drafted = proposal.tokens != NO_DRAFT
    drafts = jnp.where(drafted, proposal.tokens, 0)
    target_prob = probability_of(law, drafts)
    draft_prob = jnp.ones_like(target_prob)
    if proposal.probs is not None:
        draft_prob = jnp.take_along_axis(proposal.probs, drafts[..., None], axis=-1)[..., 0]
    # A token that its own distribution rules out comes from a broken drafter (NaN), which may only cost speed.
    possible = drafted & (draft_prob > 0)
    num_accepted = _leading(possible & (uniforms.accept * draft_prob < target_prob))
    target_probs = probabilities_at(law, num_accepted)
    weights = jnp.maximum(target_probs - _rejected_probs(proposal, num_accepted, target_probs.shape[-1]), 0.0)
    # Rounding can reject where target and draft agree and leave no residual: the target's own law is the limit.
    weights = jnp.where(weights.sum(axis=-1, keepdims=True) > 0, weights, target_probs)
    return Verdict(num_accepted, draw(weights, uniforms.recover))


def _rejected_probs(proposal: Proposal, num_accepted: jax.Array, vocab_size: int) -> jax.Array:
    """float32[B, V]: draft_probs at the first rejected position; zero for rows whose drafts were all accepted."""
    rows = jnp.arange(num_accepted.shape[0])
    rejected = jnp.pad(proposal.tokens, ((0, 0), (0, 1)), constant_values=NO_DRAFT)[rows, num_accepted]
    if proposal.probs is None:
        return jax.nn.one_hot(rejected, vocab_size)  # all zero for NO_DRAFT
    index = jnp.minimum(num_accepted, proposal.probs.shape[1] - 1)
    return jnp.where((rejected != NO_DRAFT)[:, None], proposal.probs[rows, index], 0.0)


def _leading(accepted: jax.Array) -> jax.Array:
    """int32[B]: how many of bool[B, G] hold before the first that does not."""
    return jnp.cumprod(accepted.astype(jnp.int32), axis=1).sum(axis=1)


def round_uniforms(sampling: SamplingState, length: jax.Array, num_speculative_tokens: int) -> Uniforms:
    """The uniforms of the round that begins at length, int32[B]."""
    return Uniforms(
        accept=uniforms_at(sampling.key, length, ACCEPT, num_speculative_tokens),
        recover=uniforms_at(sampling.key, length, RECOVER, 2),
    )


class RuleInfo(NamedTuple):
    """A row of the table of rules.

    Attributes:
        rule: the function.
        lossless: whether the output has exactly the target's (truncated) distribution.
        greedy_only: whether every row must have temperature 0.
    """

    rule: Rule
    lossless: bool
    greedy_only: bool = False


RULES: dict[str, RuleInfo] = {
    "greedy": RuleInfo(greedy, lossless=True, greedy_only=True),
    "residual": RuleInfo(residual, lossless=True),
}
