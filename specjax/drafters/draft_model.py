"""A smaller target as drafter, with a cache of its own."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from specjax.drafters.base import NO_DRAFT, Context, Drafter, Features, chain
from specjax.drafters.chain import Choice, choose, draft_if_likely, proposal, proposal_uniforms, widen, windows
from specjax.target import decoder
from specjax.target.families import ModelConfig
from specjax.target.layers import Kernel, project


class DraftWeights(NamedTuple):
    """What a draft model drafts with.

    Attributes:
        params: its weights.
        columns: a kernel dtype[D, V'], of its output head those of the only tokens to be drafted; None for all.
        token_of: int32[V'], the token of each of these columns; None for all.
    """

    params: Any
    columns: Kernel | None = None
    token_of: jax.Array | None = None


def draft_model(
    config: ModelConfig,
    num_speculative_tokens: int,
    dtype: jnp.dtype,
    sample: bool = True,
    max_model_len: int | None = None,
    confidence_threshold: float = 0.0,
) -> Drafter:
    """Drafts by decoding with another model of the same vocabulary.

    Args:
        config: the draft model's.
        dtype: of its cache.
        sample: draw drafts from the draft model's distribution, truncated by the row's own sampling parameters, and
            record it; greedy rows draft greedily all the same. False drafts greedily for all rows.
        max_model_len: rows whose drafts would reach beyond this many positions decode without drafts.
        confidence_threshold: a row's drafts end with the first that is less likely to be reached and accepted, by
            the draft model's own law.
    """
    G = num_speculative_tokens

    def run(weights: DraftWeights, cache, tokens, start):
        return decoder.apply(config, weights.params, tokens, start, cache, with_logits=False)

    def pick(weights: DraftWeights, final: jax.Array, uniforms: jax.Array, context: Context, likelihood) -> Choice:
        head = weights.params["head"] if weights.columns is None else weights.columns
        chosen = choose(project(final, head), uniforms, context.sampling, sample, likelihood)
        return chosen if weights.token_of is None else widen(chosen, weights.token_of, config.vocab_size)

    def propose(weights: DraftWeights, cache, context: Context):
        # After full acceptance the last draft has never been run through the draft model, so its position is run
        # again together with the last committed token. That is two rows of one pass, and never wrong.
        start = jnp.maximum(context.length - 2, 0)
        window = jnp.take_along_axis(context.tokens, start[:, None] + jnp.arange(2), axis=1)
        out = run(weights, cache, window, start)
        last = jnp.take_along_axis(out.final, (context.length - 1 - start)[:, None, None], axis=1)[:, 0]
        uniforms = proposal_uniforms(context.sampling, context.length, G)
        first = pick(weights, last, uniforms[:, 0], context, 1.0)

        def draft_next(carry, depth):
            token, likelihood, cache = carry

            def draft(cache):
                out = run(weights, cache, token[:, None], context.length + depth)
                return pick(weights, out.final[:, 0], uniforms[:, depth + 1], context, likelihood), out.cache

            chosen, cache = draft_if_likely(likelihood, confidence_threshold, draft, cache)
            return (chosen.token, chosen.likelihood, cache), chosen

        carry = first.token, first.likelihood, out.cache
        (_, _, cache), rest = jax.lax.scan(draft_next, carry, jnp.arange(G - 1))
        choices = jax.tree.map(
            lambda head, tail: jnp.concatenate([head[:, None], jnp.moveaxis(tail, 0, 1)], axis=1), first, rest
        )
        drafts = proposal(choices, confidence_threshold)
        if max_model_len is not None:
            tokens = jnp.where((context.length + G <= max_model_len)[:, None], drafts.tokens, NO_DRAFT)
            drafts = drafts._replace(tokens=tokens)
        return drafts, cache

    def prefill(weights: DraftWeights, cache, context: Context, features: Features, num_valid):
        out = run(weights, cache, features.tokens, features.start)
        return out.cache.keep(features.start, num_valid)

    return Drafter(
        name="draft_model",
        parents=chain(G),
        widths=windows(G, max_model_len is not None, confidence_threshold),
        init=lambda weights, batch, capacity: decoder.init_cache(config, batch, capacity, dtype),
        propose=propose,
        prefill=prefill,
        lag=1,
    )
