"""Prompt lookup on the device: what followed the text's last few tokens when they occurred before."""

import jax
import jax.numpy as jnp

from specjax.drafters.base import NO_DRAFT, Context, Drafter, Proposal, chain


def ngram(num_speculative_tokens: int, prompt_lookup_min: int, prompt_lookup_max: int) -> Drafter:
    """Proposes the continuation of the earliest occurrence of the longest suffix that occurred before.

    Suffixes of prompt_lookup_max down to prompt_lookup_min tokens are tried; a row without a match proposes nothing.
    Prompt and output are searched. Same choice as vLLM's ngram method.
    """

    def propose(params, state, context: Context) -> tuple[Proposal, tuple]:
        drafts = lookup(context.tokens, context.length, num_speculative_tokens, prompt_lookup_min, prompt_lookup_max)
        return Proposal(drafts), state

    return Drafter(
        name="ngram",
        parents=chain(num_speculative_tokens),
        widths=(1, num_speculative_tokens + 1),
        init=lambda params, batch, capacity: (),
        propose=propose,
    )


def lookup(tokens: jax.Array, length: jax.Array, num: int, shortest: int, longest: int) -> jax.Array:
    """The drafts of each row.

    Args:
        tokens: int32[B, S]; only the first length of a row count.
        length: int32[B].
        num: most drafts a row.
        shortest, longest: suffix lengths in tokens.

    Returns:
        int32[B, num], NO_DRAFT behind the last draft of a row.
    """
    B, S = tokens.shape
    ends = jnp.arange(S)
    alive = ends < length[:, None] - 1  # an occurrence has to be followed by a token of the text
    matched = jnp.zeros((B, S), jnp.int32)
    for back in range(longest):
        suffix = jnp.take_along_axis(tokens, jnp.maximum(length[:, None] - 1 - back, 0), axis=1)
        earlier = jnp.pad(tokens, ((0, 0), (back, 0)), constant_values=NO_DRAFT)[:, :S]
        alive &= (earlier == suffix) & (length[:, None] > back)
        matched += alive
    best = matched.max(axis=1)
    end = jnp.argmax(matched == best[:, None], axis=1)
    positions = end[:, None] + 1 + jnp.arange(num)
    drafts = jnp.take_along_axis(tokens, jnp.minimum(positions, S - 1), axis=1)
    return jnp.where((positions < length[:, None]) & (best >= shortest)[:, None], drafts, NO_DRAFT)
