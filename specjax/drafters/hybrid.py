"""Copies where the text repeats itself, and a head where it does not."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from specjax.control import run_if
from specjax.drafters.base import NO_DRAFT, Context, Drafter, Proposal
from specjax.drafters.ngram import lookup


class HybridState(NamedTuple):
    """What a hybrid carries.

    Attributes:
        other: state of the other drafter.
        idle: bool[B], rows that committed nothing in the last round, because they are done.
    """

    other: Any
    idle: jax.Array


def hybrid(other: Drafter, vocab_size: int, prompt_lookup_min: int, prompt_lookup_max: int) -> Drafter:
    """Drafts of n-gram lookup in rows where the text's last tokens occurred before, of another drafter elsewhere.

    Which of them drafts depends on committed text only, and a copied draft is certain (one-hot) where drafts are
    drawn, so the output's law stays the target's. Where every row copies, the other drafter does not draft at all; it
    still learns what is committed.

    Args:
        other: drafts in chains, from a second token on, and learns by observing, not by drafting: a head.
        prompt_lookup_min, prompt_lookup_max: suffix lengths in tokens, as in ngram.
    """
    G = other.num_speculative_tokens

    def propose(params, state: HybridState, context: Context):
        copies = lookup(context.tokens, context.length, G, prompt_lookup_min, prompt_lookup_max)
        copied = copies[:, 0] != NO_DRAFT
        # A row of one token, such as those that fill up a batch, has no drafts from anybody.
        unneeded = (copied | state.idle | (context.length < 2)).all()
        drafts, inner = run_if(~unneeded, lambda inner: other.propose(params, inner, context), state.other)
        state = state._replace(other=inner)
        tokens = jnp.where((copied | unneeded)[:, None], copies, drafts.tokens)
        if drafts.probs is None:
            return Proposal(tokens), state
        certain = copies[:, :, None] == jnp.arange(vocab_size)
        return Proposal(tokens, jnp.where(copied[:, None, None], certain, drafts.probs)), state

    def prefill(params, state: HybridState, context, features, num_valid) -> HybridState:
        return state._replace(other=other.prefill(params, state.other, context, features, num_valid))

    def observe(params, state: HybridState, context, features, num_new) -> HybridState:
        return HybridState(other.observe(params, state.other, context, features, num_new), num_new == 0)

    def init(params, batch: int, capacity: int) -> HybridState:
        return HybridState(other.init(params, batch, capacity), jnp.zeros(batch, bool))

    return other._replace(name="hybrid", init=init, propose=propose, prefill=prefill, observe=observe)
