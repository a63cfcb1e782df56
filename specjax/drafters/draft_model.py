"""A smaller target as drafter, with a cache of its own."""

import jax
import jax.numpy as jnp

from specjax.drafters.base import NO_DRAFT, Context, Drafter, Features, Proposal, chain
from specjax.drafters.chain import choose, proposal_uniforms
from specjax.target import decoder
from specjax.target.families import ModelConfig


def draft_model(
    config: ModelConfig,
    num_speculative_tokens: int,
    dtype: jnp.dtype,
    sample: bool = True,
    max_model_len: int | None = None,
) -> Drafter:
    """Drafts by decoding with another model of the same vocabulary.

    Args:
        config: the draft model's.
        dtype: of its cache.
        sample: draw drafts from the draft model's distribution, truncated by the row's own sampling parameters, and
            record it; greedy rows draft greedily all the same. False drafts greedily for all rows.
        max_model_len: rows whose drafts would reach beyond this many positions decode without drafts.
    """
    G = num_speculative_tokens

    def propose(params, cache, context: Context):
        # After full acceptance the last draft has never been run through the draft model, so its position is run
        # again together with the last committed token. That is two rows of one pass, and never wrong.
        start = jnp.maximum(context.length - 2, 0)
        window = jnp.take_along_axis(context.tokens, start[:, None] + jnp.arange(2), axis=1)
        out = decoder.apply(config, params, window, start, cache)
        last = jnp.take_along_axis(out.logits, (context.length - 1 - start)[:, None, None], axis=1)[:, 0]
        uniforms = proposal_uniforms(context.sampling, context.length, G)
        first = choose(last, uniforms[:, 0], context.sampling, sample)

        def draft_next(carry, depth):
            token, cache = carry
            position = context.length + depth
            out = decoder.apply(config, params, token[:, None], position, cache)
            chosen = choose(out.logits[:, 0], uniforms[:, depth + 1], context.sampling, sample)
            return (chosen[0], out.cache), chosen

        (_, cache), rest = jax.lax.scan(draft_next, (first[0], out.cache), jnp.arange(G - 1))
        tokens, probs, logits = jax.tree.map(
            lambda head, tail: jnp.concatenate([head[:, None], jnp.moveaxis(tail, 0, 1)], axis=1), first, rest
        )
        if max_model_len is not None:
            tokens = jnp.where((context.length + G <= max_model_len)[:, None], tokens, NO_DRAFT)
        return Proposal(tokens, probs, logits), cache

    def prefill(params, cache, context: Context, features: Features, num_valid):
        out = decoder.apply(config, params, features.tokens, features.start, cache, with_logits=False)
        return out.cache.keep(features.start, num_valid)

    return Drafter(
        name="draft_model",
        parents=chain(G),
        widths=(G + 1,) if max_model_len is None else (1, G + 1),
        init=lambda params, batch, capacity: decoder.init_cache(config, batch, capacity, dtype),
        propose=propose,
        prefill=prefill,
        lag=1,
    )
