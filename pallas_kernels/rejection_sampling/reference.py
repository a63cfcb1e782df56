"""The operation written straight from the papers: sorts the vocabulary, keeps every probability, no trick.

It is the independent twin that the other implementations are compared with, and what most systems run: the benchmark
measures against it.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.rejection_sampling.base import CHUNK, LANES, NO_DRAFT, Truncation, Verdict


def truncated_probs(logits: jax.Array, rows: Truncation) -> jax.Array:
    """float32[B, T, V]: softmax after temperature, top-k, top-p, min-p, each on the renormalised rest."""
    V = logits.shape[-1]
    temperature, top_k, top_p, min_p = (field[:, None, None] for field in rows)
    greedy = temperature <= 0
    probs = jax.nn.softmax(logits.astype(jnp.float32) / jnp.where(greedy, 1.0, temperature), axis=-1)

    def keep(probs, smallest):
        kept = jnp.where(probs >= smallest, probs, 0.0)
        return kept / kept.sum(axis=-1, keepdims=True)

    ranked = jnp.sort(probs, axis=-1, descending=True)
    k = jnp.where(top_k > 0, jnp.minimum(top_k, V), V)
    smallest = jnp.take_along_axis(ranked, jnp.broadcast_to(k - 1, (*probs.shape[:2], 1)), axis=-1)
    probs = keep(probs, smallest)

    ranked = jnp.sort(probs, axis=-1, descending=True)
    before = jnp.cumsum(ranked, axis=-1) - ranked
    smallest = jnp.where((before < top_p) & (ranked > 0), ranked, jnp.inf).min(axis=-1, keepdims=True)
    probs = jnp.where(top_p < 1, keep(probs, smallest), probs)

    probs = keep(probs, min_p * probs.max(axis=-1, keepdims=True))
    return jnp.where(greedy, jax.nn.one_hot(jnp.argmax(logits, axis=-1), V), probs)


def rejection_sample(
    logits: jax.Array,
    drafts: jax.Array,
    draft_probs: jax.Array | None,
    accept_uniforms: jax.Array,
    recover_uniforms: jax.Array,
    rows: Truncation,
    rule: str = "residual",
) -> Verdict:
    """See api.rejection_sample."""
    B, T, V = logits.shape
    target = truncated_probs(logits, rows)
    drafts = jnp.pad(drafts, ((0, 0), (0, 1)), constant_values=NO_DRAFT)
    drafted = drafts != NO_DRAFT
    if draft_probs is None:
        proposal = jax.nn.one_hot(drafts, V)
    else:
        proposal = jnp.where(drafted[..., None], jnp.pad(draft_probs, ((0, 0), (0, 1), (0, 0))), 0.0)
    token = jnp.maximum(drafts, 0)[..., None]
    target_prob = jnp.take_along_axis(target, token, axis=-1)[:, :-1, 0]
    draft_prob = jnp.take_along_axis(proposal, token, axis=-1)[:, :-1, 0]
    possible = drafted[:, :-1] & (draft_prob > 0)
    scale = jnp.ones((B, T))

    if rule == "residual":
        passes = possible & (accept_uniforms * draft_prob < target_prob)
        num_accepted = jnp.cumprod(passes, axis=1).sum(axis=1)
    elif rule == "matching":
        everywhere = jax.vmap(draw, in_axes=1, out_axes=1)(target, recover_uniforms)
        num_accepted = jnp.cumprod((everywhere == drafts)[:, :-1], axis=1).sum(axis=1)
        proposal = jnp.zeros_like(proposal)
    else:
        scales = [jnp.ones(B)]
        for i in range(T - 1):
            ratio = jnp.where(possible[:, i], target_prob[:, i] / jnp.where(possible[:, i], draft_prob[:, i], 1.0), 0.0)
            scales.append(jnp.minimum(scales[-1] * ratio, 1.0))
        scale = jnp.stack(scales, axis=1)
        rest = jnp.maximum(scale[..., None] * target - proposal, 0.0).sum(axis=-1)
        limit = jnp.where(rest + 1 - scale > 0, rest / (rest + 1 - scale), 1.0)
        passes = (jnp.pad(accept_uniforms, ((0, 0), (1, 0))) < limit) & (scale > 0)
        passes = passes.at[:, 0].set(True)
        num_accepted = jnp.where(passes, jnp.arange(T), 0).max(axis=1)

    def chosen(x):
        return x[jnp.arange(B), num_accepted]

    weights = jnp.maximum(chosen(scale)[:, None] * chosen(target) - chosen(proposal), 0.0)
    weights = jnp.where(weights.sum(axis=-1, keepdims=True) > 0, weights, chosen(target))
    return Verdict(num_accepted.astype(jnp.int32), draw(weights, chosen(recover_uniforms)))


def draw(weights: jax.Array, uniforms: jax.Array) -> jax.Array:
    """int32[B]: a token of float32[B, V] in proportion to its weight: its chunk, its block, itself; three uniforms."""

    def index(weights, uniform):
        """The first index of positive weight whose mark lies above the uniform's; the last where rounding left none."""
        marks = jnp.cumsum(weights, axis=-1)
        order = jnp.arange(weights.shape[-1])
        above = (weights > 0) & (marks > uniform[:, None] * marks[:, -1:])
        first = jnp.where(above, order, weights.shape[-1]).min(axis=-1)
        return jnp.minimum(first, jnp.where(weights > 0, order, 0).max(axis=-1))

    B, V = weights.shape
    blocks = jnp.pad(weights, ((0, 0), (0, -V % CHUNK))).reshape(B, -1, CHUNK // LANES, LANES)
    rows = jnp.arange(B)
    chunk = index(blocks.sum(axis=(2, 3)), uniforms[:, 0])
    block = index(blocks[rows, chunk].sum(axis=-1), uniforms[:, 1])
    lane = index(blocks[rows, chunk, block], uniforms[:, 2])
    return (chunk * CHUNK + block * LANES + lane).astype(jnp.int32)
