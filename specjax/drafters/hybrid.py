"""Copies where the text repeats itself, and a head where it does not."""

import jax
import jax.numpy as jnp

from specjax.control import switch_in_place
from specjax.drafters.base import NO_DRAFT, Context, Drafter, Proposal
from specjax.drafters.ngram import lookup


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

    def propose(params, state, context: Context):
        copies = lookup(context.tokens, context.length, G, prompt_lookup_min, prompt_lookup_max)
        copied = copies[:, 0] != NO_DRAFT
        # A row of one token, such as those that fill up a batch, has no drafts from anybody.
        unneeded = (copied | (context.length < 2)).all()

        def draft(carry):
            _, state = carry
            proposal, state = other.propose(params, state, context)
            return proposal._replace(logits=None), state

        nothing, _ = jax.eval_shape(draft, (None, state))
        empty = jax.tree.map(lambda x: jnp.full(x.shape, NO_DRAFT, x.dtype), nothing)
        drafts, state = switch_in_place(unneeded.astype(jnp.int32), (draft, lambda carry: carry), (empty, state))
        tokens = jnp.where(copied[:, None], copies, drafts.tokens)
        if drafts.probs is None:
            return Proposal(tokens), state
        certain = copies[:, :, None] == jnp.arange(vocab_size)
        return Proposal(tokens, jnp.where(copied[:, None, None], certain, drafts.probs)), state

    return other._replace(name="hybrid", propose=propose)
