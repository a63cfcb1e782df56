"""Training losses: the unrolled chain against explicit chains, packing, padding, and every distance in numpy."""

import dataclasses
import functools

import head_reference as reference
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import random_target
from test_heads import random_weights

from specjax.heads import config as heads
from specjax.target import layers
from specjax.train import losses
from specjax.train.data import Batch
from specjax.train.losses import LossSettings

VOCAB, WIDTH, ROW, UNROLLED, DECAY = 7, 32, 16, 3, 0.7
KEPT = np.array([0, 2, 3, 5, 6])
LAYER = dataclasses.replace(random_target(0, VOCAB).config, num_layers=1, sliding_windows=(None,))
TWO = dataclasses.replace(LAYER, num_layers=2, sliding_windows=(None, None))
CASES = {
    "eagle3": (heads.eagle3(TWO, WIDTH, (0, 1, 2), len(KEPT)), {"kind": "kl"}),
    "eagle": (heads.eagle(LAYER, WIDTH), {"kind": "soft_ce", "token_weight": 0.1, "feature_weight": 1.0}),
    "mtp": (heads.mtp(LAYER, WIDTH), {"kind": "lk_hybrid", "prompt_weight": 0.25}),
    "mtp of 2 blocks": (heads.mtp(LAYER, WIDTH, "glm4_moe", num_blocks=2), {"kind": "tv"}),
}
LENGTHS = ((9, 5), (2, 11))
"""Of the sequences in each row; what is left is padding."""


def distance(kind, p, q):
    """Of two laws float64[V], by its definition."""
    accepted = np.minimum(p, q).sum()
    kl = (p * np.log(p / q)).sum()
    return {
        "soft_ce": -(p * np.log(q)).sum(),
        "kl": kl,
        "reverse_kl": (q * np.log(q / p)).sum(),
        "tv": np.abs(p - q).sum() / 2,
        "acceptance": -np.log(accepted),
        "lk_hybrid": np.exp(-3 * accepted) * kl + (1 - np.exp(-3 * accepted)) * (1 - accepted),
    }[kind]


@functools.cache
def example(name):
    """Config, settings, weights, frozen parts and a packed batch."""
    config, options = CASES[name]
    rng = np.random.RandomState(3)
    target = {"embedding": rng.randn(VOCAB, WIDTH), "head": rng.randn(WIDTH, VOCAB) * 0.3}
    target = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), target)
    kept = KEPT if config.reduced else np.arange(VOCAB)
    rows = len(LENGTHS)
    segments, positions = np.zeros((rows, ROW), np.int32), np.zeros((rows, ROW), np.int32)
    for row, lengths in enumerate(LENGTHS):
        begin = 0
        for number, length in enumerate(lengths, 1):
            segments[row, begin : begin + length] = number
            positions[row, begin : begin + length] = np.arange(length)
            begin += length
    batch = Batch(
        tokens=rng.randint(0, VOCAB, (rows, ROW)).astype(np.int32),
        positions=positions,
        segments=segments,
        loss_mask=(rng.rand(rows, ROW) < 0.7) & (segments > 0),
        final=rng.randn(rows, ROW, WIDTH).astype(np.float32),
        taps=rng.randn(rows, ROW, 3, WIDTH).astype(np.float32),
    )
    batch = batch._replace(best=np.argmax(batch.final @ np.asarray(target["head"]), axis=-1).astype(np.int32))
    settings = LossSettings(step_decay=DECAY, **options)
    frozen = losses.freeze(target, jnp.asarray(kept), jnp.float32)
    return config, settings, random_weights(config, 1), frozen, batch


@functools.cache
def compiled(name):
    config, settings, *_ = example(name)

    def run(params, frozen, batch):
        return losses.loss_fn(config, settings, params, frozen, batch, UNROLLED)

    return jax.jit(jax.value_and_grad(run, has_aux=True))


def expected(name):
    """Loss and metrics by plain loops: a chain is drafted for each position of each sequence, cut out of its row."""
    config, settings, params, frozen, batch = example(name)
    weights = reference.Weights(params)
    kept, target_head = np.asarray(frozen.kept), np.asarray(frozen.target_head, np.float64)
    sums = {key: np.zeros((UNROLLED, 2)) for key in ("law", "feature", "accuracy", "acceptance", "chain")}

    def add(key, step, value, weight):
        sums[key][step] += np.array([value * weight, weight])

    for row in range(len(LENGTHS)):
        for number in (1, 2):
            at = np.flatnonzero(batch.segments[row] == number)
            tokens, responds, best = (x[row, at] for x in (batch.tokens, batch.loss_mask, batch.best))
            final = batch.final[row, at].astype(np.float64)
            features = batch.taps[row, at] if config.taps else final[:, None]
            for last in range(len(at) - 1):
                steps = min(UNROLLED, len(at) - 1 - last)
                logits, recycled = reference.unrolled(config, weights, frozen.shared, features, tokens, last, steps)
                survives = True
                for step in range(steps):
                    paired = last + 1 + step  # the position whose state the chain stands for
                    weight = 1.0 if responds[paired] else settings.prompt_weight
                    error = np.abs(recycled[step] - final[paired])
                    add("feature", step, np.where(error < 1, error**2 / 2, error - 0.5).mean(), weight)
                    if paired + 1 == len(at):
                        continue
                    p, q = reference.softmax(final[paired] @ target_head), reference.softmax(logits[step])
                    inside = best[paired] in kept
                    weight = 1.0 if responds[paired + 1] else settings.prompt_weight
                    add("law", step, distance(settings.kind, p, q), weight * inside)
                    counted = float(responds[paired + 1])
                    correct = kept[np.argmax(q)] == best[paired]
                    add("accuracy", step, correct, counted)
                    add("acceptance", step, np.minimum(p, q).sum(), counted)
                    survives = survives and correct
                    # All steps of a chain count for the same positions, those whose whole chain lies in the text.
                    whole = last + 1 + UNROLLED < len(at)
                    add("chain", step, survives, float(whole and responds[last + 1 + UNROLLED]))
    means = {key: sums[key][:, 0] / np.maximum(sums[key][:, 1], 1e-6) for key in sums}
    by_step = settings.token_weight * means["law"] + settings.feature_weight * means["feature"]
    decays = DECAY ** np.arange(UNROLLED)
    return (by_step * decays).sum() / decays.sum(), {
        "accuracy": means["accuracy"],
        "acceptance": means["acceptance"],
        "expected_acceptance_length": 1 + means["chain"].sum(),
        "loss_by_step": by_step,
    }


@pytest.mark.exact
@pytest.mark.parametrize("name", CASES)
def test_the_unrolled_loss_equals_that_of_explicit_chains(name):
    _, _, params, frozen, batch = example(name)
    (loss, metrics), gradients = compiled(name)(params, frozen, batch)
    expected_loss, expected_metrics = expected(name)
    assert float(loss) == pytest.approx(expected_loss, rel=1e-4)
    assert metrics.keys() == expected_metrics.keys()
    for key, value in expected_metrics.items():
        np.testing.assert_allclose(metrics[key], value, rtol=1e-4, atol=1e-5, err_msg=key)
    assert metrics["expected_acceptance_length"] > 1
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
        assert jnp.isfinite(gradient).all() and (gradient != 0).any(), path


@pytest.mark.parametrize("name", CASES)
def test_what_stands_in_padding_counts_nothing(name):
    _, _, params, frozen, batch = example(name)
    padding = batch.segments == 0
    other = batch._replace(
        tokens=np.where(padding, 3, batch.tokens),
        loss_mask=batch.loss_mask | padding,
        best=np.where(padding, 5, batch.best),
        final=np.where(padding[..., None], 9.0, batch.final).astype(np.float32),
        taps=np.where(padding[..., None, None], 9.0, batch.taps).astype(np.float32),
    )
    here, there = (compiled(name)(params, frozen, given) for given in (batch, other))
    for a, b in zip(jax.tree.leaves(here), jax.tree.leaves(there), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["eagle3", "mtp of 2 blocks"])
def test_a_sequence_does_not_see_what_it_is_packed_with(name):
    """The second sequence alone counts, whatever the first one is."""
    _, _, params, frozen, batch = example(name)
    first = batch.segments == 1
    batch = batch._replace(loss_mask=batch.loss_mask & ~first)
    other = batch._replace(
        tokens=np.where(first, 1, batch.tokens),
        best=np.where(first, 2, batch.best),
        final=np.where(first[..., None], -1.0, batch.final).astype(np.float32),
        taps=np.where(first[..., None, None], -1.0, batch.taps).astype(np.float32),
    )
    here, there = (compiled(name)(params, frozen, given) for given in (batch, other))
    for a, b in zip(jax.tree.leaves(here), jax.tree.leaves(there), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.exact
@pytest.mark.parametrize("kind", ["soft_ce", "kl", "reverse_kl", "tv", "acceptance", "lk_hybrid"])
def test_every_distance_equals_its_definition(kind):
    p, q = np.random.RandomState(0).dirichlet(np.ones(6), (2, 4))
    found, acceptance = losses._distance(kind, jnp.log(p), jnp.log(q))
    np.testing.assert_allclose(found, [distance(kind, *laws) for laws in zip(p, q, strict=True)], rtol=1e-5)
    np.testing.assert_allclose(acceptance, np.minimum(p, q).sum(axis=-1), rtol=1e-5)


@pytest.mark.parametrize("kind", ["soft_ce", "kl", "reverse_kl", "tv", "acceptance", "lk_hybrid"])
def test_laws_that_do_not_overlap_give_finite_gradients(kind):
    p, q = jnp.array([[0.0, -200.0]]), jnp.array([[-200.0, 0.0]])
    value, gradient = jax.value_and_grad(lambda q: losses._distance(kind, p, jax.nn.log_softmax(q))[0].sum())(q)
    assert jnp.isfinite(value) and jnp.isfinite(gradient).all()


def test_noise_changes_what_step_0_reads_and_nothing_else():
    config, settings, params, frozen, batch = example("eagle")

    @jax.jit
    def run(key, noise):
        noisy = dataclasses.replace(settings, feature_noise=1.0)
        batch_of = batch._replace(final=batch.final + 0 * noise)
        return losses.loss_fn(config, noisy, params, frozen, batch_of, 1, key)[0]

    assert run(jax.random.key(0), 0.0) != run(jax.random.key(1), 0.0)
    assert run(jax.random.key(0), 0.0) == run(jax.random.key(0), 0.0)


@pytest.mark.exact
@pytest.mark.parametrize("shape", [(5, 4), (5, 2, 3, 4)])
def test_the_gradient_of_project_equals_jaxs_own(shape):
    rng = np.random.RandomState(0)
    x, kernel = (jnp.asarray(rng.randn(*s), jnp.float32) for s in ((2, 3, 5), shape))
    pull = jnp.asarray(rng.randn(2, 3, *shape[1:]), jnp.float32)
    plain = functools.partial(jnp.tensordot, axes=1)
    found, expected = (
        jax.jit(jax.grad(lambda x, kernel, f=f: (f(x, kernel) * pull).sum(), argnums=(0, 1)))(x, kernel)
        for f in (layers.project, plain)
    )
    np.testing.assert_allclose(layers.project(x, kernel), plain(x, kernel), rtol=1e-5, atol=1e-6)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
