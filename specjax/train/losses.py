"""What heads are trained for: chains of drafts unrolled over true text, and the distance of laws."""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from specjax.heads import network
from specjax.heads.config import HeadConfig
from specjax.target.decoder import Attend, forward
from specjax.target.families import ModelConfig
from specjax.target.layers import HIDDEN, as_array, project, some_outputs

LossKind = Literal["soft_ce", "kl", "reverse_kl", "tv", "acceptance", "lk_hybrid"]


@dataclasses.dataclass(frozen=True)
class LossSettings:
    """Which loss.

    Attributes:
        kind: soft_ce: cross entropy to the target's law; kl: the same less the law's entropy; reverse_kl; tv: total
            variation, 1 - acceptance; acceptance: -log of the probability that a draft is accepted, sum min(p, q);
            lk_hybrid: kl where acceptance is low, tv where it is high, weighed by exp(-3 acceptance).
        step_decay: step s weighs step_decay^s.
        token_weight: of the loss of laws.
        feature_weight: of the smooth L1 distance between a step's output and the target's feature one position on.
        prompt_weight: of positions whose next token belongs to the prompt; those of the response weigh 1.
        feature_noise: half width of uniform noise added to the features that step 0 reads.
    """

    kind: LossKind = "kl"
    step_decay: float = 0.8
    token_weight: float = 1.0
    feature_weight: float = 0.0
    prompt_weight: float = 0.0
    feature_noise: float = 0.0


class Frozen(NamedTuple):
    """What does not learn.

    Attributes:
        shared: the target's embedding, and the columns of its head for the tokens that are compared.
        kept: int32[V'], those tokens, increasing: the draft vocabulary, or the tokens that the loss looks at.
        target_head: dtype[D_t, V'], the same columns, which the target's own laws are computed by.
        whole_head: dtype[D_t, V], all columns, where laws are to be the target's over its whole vocabulary; None for
            laws over the tokens that are compared, as training has them.
    """

    shared: network.Shared
    kept: jax.Array
    target_head: jax.Array
    whole_head: jax.Array | None = None


def freeze(target_params: Any, kept: jax.Array, dtype: Any, whole: bool = False) -> Frozen:
    """Frozen from the target's weights."""
    columns = as_array(some_outputs(target_params["head"], kept)).astype(dtype)
    whole_head = as_array(target_params["head"]).astype(dtype) if whole else None
    return Frozen(network.Shared(target_params["embedding"].astype(dtype), columns), kept, columns, whole_head)


def _target_law(frozen: Frozen, final: jax.Array) -> jax.Array:
    """Log-probabilities float32[R, T, V'] of the target for the tokens that are compared."""
    logits = project(final, frozen.target_head)
    everything = logits if frozen.whole_head is None else project(final, frozen.whole_head)
    total = jax.nn.logsumexp(everything, axis=-1, keepdims=True)
    return jax.lax.stop_gradient(logits - total)


def loss_fn(
    config: HeadConfig,
    settings: LossSettings,
    params: network.Params,
    frozen: Frozen,
    batch: Any,
    num_unrolled: int,
    key: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss of a batch, and what it says about decoding.

    In step s, position t reads token t + 1 + s and what step s - 1 gave at t, and predicts token t + 2 + s, as a draft
    chain begun at t does on text that it guessed right. It attends to step 0 of positions up to t, the true history,
    and to its own chain (training-time test, 2503.01840, section 3.2).

    Args:
        params: of the head, in the dtype to compute in.
        batch: specjax.train.data.Batch of [R, T].
        num_unrolled: U, steps.
        key: for the noise; None adds none.

    Returns:
        The loss float32[], and metrics: accuracy float32[U], how often a step's best token is the target's; acceptance
        float32[U], mean of sum min(p, q), p the target's law over the tokens compared, or with whole_head over all;
        expected_acceptance_length float32[], 1 + the mean length of the chains of U best tokens that are the target's
        (of greedy decoding, where the text is the target's own greedy answer); loss_by_step float32[U].
    """
    target_law = _target_law(frozen, batch.final)
    rank = jnp.full(config.layer.vocab_size, -1, jnp.int32).at[frozen.kept].set(jnp.arange(frozen.kept.size))
    best = rank[batch.best]
    attention = _causal(batch)
    dtype = jax.tree.leaves(params)[0].dtype

    features = batch.taps if config.taps else batch.final[:, :, None]
    if key is not None and settings.feature_noise:
        noise = jax.random.uniform(key, features.shape, features.dtype, -1.0, 1.0)
        features = features + settings.feature_noise * noise
    feature = network.fuse(config, params, features)

    memories: dict[int, list[list[Any]]] = {}
    losses, accuracies, acceptances = [], [], []
    chain, survived = jnp.ones(batch.tokens.shape, bool), jnp.zeros(())
    for step in range(num_unrolled):
        block, lap = step % config.num_blocks, step // config.num_blocks
        earlier = memories.setdefault(block, [[] for _ in range(config.layer.num_layers)])
        attends = [_attend_to_chain(attention, layer, dtype) for layer in earlier]
        tokens = _shift(batch.tokens, 1 + step)
        output = network.run(config, params, frozen.shared, tokens, feature, batch.positions + lap, attends, block)
        for layer, memory in zip(earlier, output.memories, strict=True):
            layer.append(memory)
        feature = output.recycled

        weights = _weights(batch, 2 + step, settings.prompt_weight)
        counted = _weights(batch, 2 + step, 0.0)
        logits = network.logits(config, params, frozen.shared, output.hidden)
        law, label = jax.nn.log_softmax(logits), _shift(best, 1 + step)
        teacher = _shift(target_law, 1 + step)
        covered = weights * (label >= 0)
        distance, acceptance = _distance(settings.kind, teacher, law)
        loss = settings.token_weight * _mean(distance, covered)
        if settings.feature_weight:
            error = _smooth_l1(output.recycled, _shift(batch.final, 1 + step))
            loss += settings.feature_weight * _mean(error, _weights(batch, 1 + step, settings.prompt_weight))
        correct = _is_best(logits, label)
        chain &= correct
        survived += _mean(chain, _weights(batch, 1 + num_unrolled, 0.0))
        losses.append(loss)
        accuracies.append(_mean(correct, counted))
        acceptances.append(_mean(acceptance, counted))
    decays = settings.step_decay ** jnp.arange(num_unrolled)
    total = (jnp.stack(losses) * decays).sum() / decays.sum()
    metrics: dict[str, jax.Array] = {
        "accuracy": jnp.stack(accuracies),
        "acceptance": jnp.stack(acceptances),
        "expected_acceptance_length": 1.0 + survived,
        "loss_by_step": jnp.stack(losses),
    }
    return total, jax.lax.stop_gradient(metrics)


def draft_model_loss(
    config: ModelConfig, settings: LossSettings, params: Any, frozen: Frozen, batch: Any
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss of a small language model with a tied head, which reads text alone: at t it predicts token t + 1.

    Args:
        params: of the decoder without its head, in the dtype to compute in.

    Returns:
        As loss_fn, for one step.
    """
    params = params | {"head": params["embedding"].T}
    causal = _causal(batch)
    _, hidden = forward(config, params, batch.tokens, batch.positions, causal, (), jnp.float32)
    logits = project(hidden, params["head"][:, frozen.kept])
    teacher = _target_law(frozen, batch.final)
    rank = jnp.full(config.vocab_size, -1, jnp.int32).at[frozen.kept].set(jnp.arange(frozen.kept.size))
    label = rank[batch.best]
    distance, acceptance = _distance(settings.kind, teacher, jax.nn.log_softmax(logits))
    loss = settings.token_weight * _mean(distance, _weights(batch, 1, settings.prompt_weight) * (label >= 0))
    counted = _weights(batch, 1, 0.0)
    accuracy = _mean(_is_best(logits, label), counted)
    metrics = {
        "accuracy": accuracy[None],
        "acceptance": _mean(acceptance, counted)[None],
        "expected_acceptance_length": 1.0 + accuracy,
        "loss_by_step": loss[None],
    }
    return loss, jax.lax.stop_gradient(metrics)


def _is_best(logits: jax.Array, label: jax.Array) -> jax.Array:
    """Whether no token has a larger logit than the label (-1: none), bool[R, T]; faster than argmax on CPUs."""
    own = jnp.take_along_axis(logits, jnp.maximum(label, 0)[..., None], axis=-1)[..., 0]
    return (label >= 0) & (own >= logits.max(axis=-1))


def _shift(x: jax.Array, by: int) -> jax.Array:
    """x[:, t + by] at t, zeros beyond the end."""
    return jnp.pad(x[:, by:], ((0, 0), (0, min(by, x.shape[1])), *((0, 0),) * (x.ndim - 2)))


def _weights(batch: Any, ahead: int, prompt_weight: float) -> jax.Array:
    """float32[R, T]: what a prediction of the token so many positions ahead of t counts."""
    inside = (_shift(batch.segments, ahead) == batch.segments) & (batch.segments > 0)
    return jnp.where(inside, jnp.where(_shift(batch.loss_mask, ahead), 1.0, prompt_weight), 0.0)


def _mean(x: jax.Array, weights: jax.Array) -> jax.Array:
    return (x * weights).sum() / jnp.maximum(weights.sum(), 1e-6)


def _causal(batch: Any) -> jax.Array:
    """bool[R, T, T]: the token and those before it in its segment."""
    same = batch.segments[:, :, None] == batch.segments[:, None, :]
    return same & (batch.positions[:, :, None] >= batch.positions[:, None, :])


def _attend_to_chain(mask: jax.Array, earlier: list[Any], dtype: Any) -> Attend:
    """Attention to a block's first pass up to t, and to its later passes at t only.

    Args:
        mask: bool[R, T, T] for the first pass.
        earlier: keys and values of earlier passes, each dtype[R, T, K, H].
        dtype: of what is multiplied.
    """

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, Any]:
        out_dtype = q.dtype
        q, k, v = (x.astype(dtype) for x in (q, k, v))
        passes = [*earlier, (k, v)]
        (first_keys, first_values), own = passes[0], passes[1:]
        logits = jnp.einsum("btkqh,bskh->bkqts", q, first_keys, preferred_element_type=jnp.float32)
        logits = jnp.where(mask[:, None, None], logits, HIDDEN)
        if own:
            keys = jnp.stack([keys for keys, _ in own], axis=3)  # [R, T, K, passes, H]
            chain = jnp.einsum("btkqh,btkph->bkqtp", q, keys, preferred_element_type=jnp.float32)
            logits = jnp.concatenate([logits, chain], axis=-1)
        weights = jax.nn.softmax(logits, axis=-1).astype(q.dtype)
        num = mask.shape[-1]
        mixed = jnp.einsum("bkqts,bskh->btkqh", weights[..., :num], first_values, preferred_element_type=jnp.float32)
        if own:
            values = jnp.stack([values for _, values in own], axis=3)
            mixed += jnp.einsum("bkqtp,btkph->btkqh", weights[..., num:], values, preferred_element_type=jnp.float32)
        return mixed.reshape(*mixed.shape[:2], -1).astype(out_dtype), (k, v)

    return attend


def _distance(kind: LossKind, target: jax.Array, draft: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The loss and the acceptance probability, float32[R, T] each, of log laws float32[R, T, V']."""
    p, q = jnp.exp(target), jnp.exp(draft)
    acceptance = jnp.minimum(p, q).sum(axis=-1)
    if kind == "soft_ce":
        return -(p * draft).sum(axis=-1), acceptance
    kl = (p * (target - draft)).sum(axis=-1)
    if kind == "kl":
        return kl, acceptance
    if kind == "reverse_kl":
        return (q * (draft - target)).sum(axis=-1), acceptance
    if kind == "tv":
        return 1.0 - acceptance, acceptance
    if kind == "acceptance":
        return -jnp.log(jnp.maximum(acceptance, 1e-6)), acceptance
    share = jax.lax.stop_gradient(jnp.exp(-3.0 * acceptance))
    return share * kl + (1.0 - share) * (1.0 - acceptance), acceptance


def _smooth_l1(x: jax.Array, y: jax.Array) -> jax.Array:
    """float32[R, T], mean over the last axis (Huber, threshold 1)."""
    error = jnp.abs(x.astype(jnp.float32) - y.astype(jnp.float32))
    return jnp.where(error < 1.0, 0.5 * error * error, error - 0.5).mean(axis=-1)
