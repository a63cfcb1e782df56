"""EAGLE, EAGLE-3 and MTP heads as drafters: a chain of drafts from what the target computed."""

import functools
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from specjax import cache as kv
from specjax.drafters.base import NO_DRAFT, Context, Drafter, Features, Proposal, chain
from specjax.drafters.chain import Choice, choose, draft_if_likely, proposal, proposal_uniforms, widen, windows
from specjax.heads import network
from specjax.heads.config import HeadConfig
from specjax.target import layers
from specjax.target.decoder import AttendToCache


class HeadWeights(NamedTuple):
    """What a head drafts with.

    Attributes:
        head: its own weights.
        shared: the target's embedding and head.
        token_of: int32[draft_vocab_size], the target's token of each token it can propose; None where they are the
            same.
    """

    head: network.Params
    shared: network.Shared
    token_of: jax.Array | None = None


class HeadState(flax.struct.PyTreeNode):
    """Invariant: block b's cache holds positions [0, length - 1 - b), the pairs of a feature and a later token that are
    committed. The drafting of a round writes behind them, and what it wrote there is never read again.

    Attributes:
        caches: one for each block.
        hidden: dtype[B, D], what the first draft's logits are read from.
        recycled: for each block dtype[B, D], its output at its last position.
    """

    caches: tuple[kv.KVCache, ...]
    hidden: jax.Array
    recycled: tuple[jax.Array, ...]


def head(
    config: HeadConfig,
    num_speculative_tokens: int,
    dtype: jnp.dtype,
    sample: bool = False,
    max_model_len: int | None = None,
    confidence_threshold: float = 0.0,
) -> Drafter:
    """Drafts by a head that reads the target's hidden states.

    As soon as the target has scored a round, the head runs over the tokens that were committed with their true
    features, so its cache never lags. Its own output takes the feature's place from the second draft on.

    Args:
        config: the head's.
        dtype: of its cache.
        sample: draw drafts from the head's law, truncated by the row's own sampling parameters, and record it.
        max_model_len: rows whose drafts would reach beyond this many positions decode without drafts.
        confidence_threshold: a row's drafts end with the first that is less likely to be reached and accepted, by
            the head's own law; see chain.proposal.
    """
    G, layer, num_blocks = num_speculative_tokens, config.layer, config.num_blocks

    def run(weights: HeadWeights, cache: kv.KVCache, block: int, tokens, feature, start, wanted=None):
        """One block over a window of int32[B, T] tokens and dtype[B, T, D] features from int32[B] start on."""
        entries = zip(cache.keys, cache.values, layer.sliding_windows, strict=True)
        attends = [AttendToCache(keys, values, start, window) for keys, values, window in entries]
        positions = start[:, None] + jnp.arange(tokens.shape[1])
        out = network.run(config, weights.head, weights.shared, tokens, feature, positions, attends, block, wanted)
        keys, values = zip(*out.memories, strict=True)
        return out, kv.KVCache(keys, values)

    def learn(weights: HeadWeights, state: HeadState, context: Context, features: Features, num_valid) -> HeadState:
        """Runs every block over the true features of a window, of which the first num_valid positions are committed.

        Block b pairs position t with token t + 1 + b, so what it can learn lies b positions further back.
        """
        seen = jnp.stack(features.taps or (features.final,), axis=2)
        feature = network.fuse(config, weights.head, seen)
        end = features.start + num_valid - 1
        caches, recycled, hidden = [], [], state.hidden
        for block in range(num_blocks):
            # A block's window begins where the last one's did, less one, but never before the text.
            if block:
                feature = jnp.concatenate([state.recycled[block - 1][:, None], feature], axis=1)
            start = jnp.maximum(features.start - block, 0)
            skipped = start - (features.start - block)
            # What a prompt's first window was moved by falls off its end, so it never outgrows the cache.
            window = jnp.arange(min(feature.shape[1], state.caches[block].capacity))
            before = jnp.arange(feature.shape[1]) - skipped[:, None]
            feature = layers.take_slots(feature, skipped[:, None] + window)
            ahead = jnp.minimum(start[:, None] + window + 1 + block, context.tokens.shape[1] - 1)
            tokens = jnp.maximum(jnp.take_along_axis(context.tokens, ahead, axis=1), 0)
            last = jnp.maximum(end - block - start, 0)[:, None]
            # Drafts go on from the last slot; the next block reads this one's outputs by position, not by slot of a
            # window that was moved.
            slots = last if block + 1 == num_blocks else jnp.hstack([last, jnp.maximum(before, 0)])
            out, cache = run(weights, state.caches[block], block, tokens, feature, start, slots)
            fresh = (num_valid > 0)[:, None]
            if block == 0:
                hidden = jnp.where(fresh, out.hidden[:, 0], hidden)
            recycled.append(jnp.where(fresh, out.recycled[:, 0], state.recycled[block]))
            caches.append(cache.keep(start, last[:, 0] + 1))
            feature = out.recycled[:, 1:]
        return HeadState(tuple(caches), hidden, tuple(recycled))

    def propose(weights: HeadWeights, state: HeadState, context: Context) -> tuple[Proposal, HeadState]:
        uniforms = proposal_uniforms(context.sampling, context.length, G)
        choices: list[Choice] = []

        def pick(hidden: jax.Array) -> Choice:
            logits = network.logits(config, weights.head, weights.shared, hidden)
            before = choices[-1].likelihood if choices else 1.0
            choice = choose(logits, uniforms[:, len(choices)], context.sampling, sample, before)
            return choice if weights.token_of is None else widen(choice, weights.token_of, layer.vocab_size)

        def draft_next(feature: jax.Array, caches):
            # The first time that a block runs, it catches up with the positions whose tokens are drafts; later it
            # goes on from what the step before gave.
            lap, block = divmod(len(choices), num_blocks)
            width = len(choices) if lap == 0 else 1
            tokens = jnp.stack([choice.token for choice in choices[-width:]], axis=1)
            start = jnp.maximum(context.length - 1 - width + lap, 0)
            out, cache = run(weights, caches[block], block, tokens, feature[:, -width:], start)
            feature = out.recycled
            if block + 1 < num_blocks and lap == 0:
                feature = jnp.concatenate([state.recycled[block][:, None], feature], axis=1)
            return (pick(out.hidden[:, -1]), feature), (*caches[:block], cache, *caches[block + 1 :])

        choices.append(pick(state.hidden))
        feature, caches = state.recycled[0][:, None], state.caches
        while len(choices) < G:
            draft = functools.partial(draft_next, feature)
            (choice, feature), caches = draft_if_likely(choices[-1].likelihood, confidence_threshold, draft, caches)
            choices.append(choice)
        drafts = proposal(jax.tree.map(lambda *rows: jnp.stack(rows, axis=1), *choices), confidence_threshold)
        able = context.length >= max(2, num_blocks)  # the last block's pairs begin num_blocks tokens back
        if max_model_len is not None:
            able &= context.length + G <= max_model_len
        tokens = jnp.where(able[:, None], drafts.tokens, NO_DRAFT)
        return drafts._replace(tokens=tokens), state.replace(caches=caches)

    def init(weights: HeadWeights, batch: int, capacity: int) -> HeadState:
        caches = tuple(
            kv.init_cache(layer.num_layers, batch, layer.num_kv_heads, capacity, layer.head_dim, dtype)
            for _ in range(num_blocks)
        )
        nothing = jnp.zeros((batch, layer.width), dtype)
        return HeadState(caches, nothing, (nothing,) * num_blocks)

    return Drafter(
        name=config.method,
        parents=chain(G),
        widths=windows(G, max_model_len is not None, confidence_threshold),
        init=init,
        propose=propose,
        prefill=learn,
        observe=learn,
        taps=config.taps,
    )
