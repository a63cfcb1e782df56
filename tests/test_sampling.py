"""Truncation and drawing against sorts and exact integrals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import RowParams, truncated

from pallas_kernels.rejection_sampling import xla
from pallas_kernels.rejection_sampling.base import CHUNK, LANES
from specjax import sampling
from specjax.sampling import SamplingState

PARAMS = [
    RowParams(),
    RowParams(0.0),
    RowParams(0.7),
    RowParams(1.0, top_k=3),
    RowParams(1.3, top_p=0.8),
    RowParams(0.9, min_p=0.1),
    RowParams(1.1, top_k=7, top_p=0.6),
    RowParams(2.0, top_k=20, top_p=0.95, min_p=0.05),
    RowParams(1.0, top_k=10_000),
    RowParams(1.0, top_p=1e-6),
]


def state_of(rows, seeds=None):
    seeds = range(len(rows)) if seeds is None else seeds
    return SamplingState(
        temperature=jnp.array([row.temperature for row in rows], jnp.float32),
        top_k=jnp.array([row.top_k for row in rows], jnp.int32),
        top_p=jnp.array([row.top_p for row in rows], jnp.float32),
        min_p=jnp.array([row.min_p for row in rows], jnp.float32),
        key=jax.vmap(jax.random.key)(jnp.array(list(seeds))),
    )


def all_probabilities(logits, rows):
    return np.asarray(sampling.probabilities(sampling.truncate(jnp.asarray(logits, jnp.float32), state_of(rows))))


@pytest.mark.exact
@pytest.mark.parametrize("vocab_size", [5, 97, 300])
def test_truncation_without_sorting_equals_sorting_for_mixed_rows(vocab_size):
    logits = np.random.RandomState(vocab_size).randn(len(PARAMS), 3, vocab_size).astype(np.float32) * 3
    found = all_probabilities(logits, PARAMS)
    for row, params in enumerate(PARAMS):
        for position in range(3):
            np.testing.assert_allclose(found[row, position], truncated(logits[row, position], params), atol=2e-6)


@pytest.mark.exact
def test_a_row_is_truncated_the_same_whoever_shares_its_batch():
    logits = np.random.RandomState(0).randn(len(PARAMS), 1, 50).astype(np.float32)
    together = all_probabilities(logits, PARAMS)
    for row, params in enumerate(PARAMS):
        np.testing.assert_array_equal(together[row], all_probabilities(logits[row : row + 1], [params])[0])


@pytest.mark.exact
@pytest.mark.parametrize("temperature", [1e-4, 1e-3, 0.03, 1e3])
def test_probabilities_add_up_to_one_at_every_temperature(temperature):
    logits = np.random.RandomState(0).randn(2, 3, 400).astype(np.float32) * 3 + 600
    rows = [RowParams(temperature), RowParams(temperature, top_k=30, top_p=0.9)]
    found = all_probabilities(logits, rows)
    np.testing.assert_allclose(found.sum(axis=-1), 1, atol=1e-6)
    np.testing.assert_allclose(found[1, 0], truncated(logits[1, 0], rows[1]), atol=1e-5)


@pytest.mark.exact
@pytest.mark.parametrize("mask", [-1e9, -1e30, float(np.finfo(np.float32).min), -np.inf])
def test_tokens_masked_by_a_large_number_change_no_cut(mask):
    logits = np.array([[[3.0, 2.0, 1.0, 0.0, -1.0, mask, mask]]] * 3)
    rows = [RowParams(top_k=2), RowParams(top_p=0.5), RowParams(2.0, top_k=6, top_p=0.99)]
    found = all_probabilities(logits, rows)
    for row, params in enumerate(rows):
        np.testing.assert_allclose(found[row, 0], truncated(logits[row, 0], params), atol=1e-6)


def test_top_p_cuts_after_temperature_and_not_before():
    logits = np.log(np.array([[[0.5, 0.3, 0.2]]], np.float32))
    hot = all_probabilities(logits, [RowParams(temperature=5.0, top_p=0.6)])[0, 0]
    # At temperature 5 the best two hold 0.70 of the mass and the best one 0.37; untempered they hold 0.8 and 0.5.
    assert (hot > 0).tolist() == [True, True, False]
    cold = all_probabilities(logits, [RowParams(temperature=0.2, top_p=0.6)])[0, 0]
    assert (cold > 0).tolist() == [True, False, False]


def test_tokens_tied_at_the_top_k_threshold_are_all_kept():
    probs = all_probabilities(np.array([[[1.0, 2.0, 2.0, 0.0]]]), [RowParams(top_k=1)])[0, 0]
    np.testing.assert_allclose(probs, [0, 0.5, 0.5, 0], atol=1e-6)


def test_minus_infinity_logits_have_no_probability_under_any_cut():
    logits = np.array([[[0.0, -np.inf, 1.0, -np.inf]]] * 3)
    rows = [RowParams(), RowParams(top_k=3), RowParams(top_p=0.999)]
    found = all_probabilities(logits, rows)
    assert (found[..., [1, 3]] == 0).all()
    np.testing.assert_allclose(found.sum(axis=-1), 1, atol=1e-6)


def test_probability_of_a_token_is_its_entry_in_the_distribution():
    logits = np.random.RandomState(1).randn(len(PARAMS), 4, 30).astype(np.float32)
    tokens = jnp.asarray(np.random.RandomState(2).randint(0, 30, (len(PARAMS), 3)))
    law = sampling.truncate(jnp.asarray(logits[:, :3]), state_of(PARAMS))
    whole = all_probabilities(logits, PARAMS)
    picked = np.take_along_axis(whole[:, :3], np.asarray(tokens)[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(sampling.probability_of(law, tokens), picked, atol=1e-7)


@pytest.mark.exact
@pytest.mark.parametrize("vocab_size", [3, 129, 2049, 5000])
def test_the_box_of_uniforms_that_draws_a_token_is_as_large_as_its_probability(vocab_size):
    """The three uniforms are integrated exactly: every boundary of the very function is found by bisection."""
    rng = np.random.RandomState(vocab_size)
    weights = np.where(rng.rand(vocab_size) < 0.3, 0.0, rng.rand(vocab_size)).astype(np.float32)
    weights[rng.randint(vocab_size)] = 1.0
    one_row = jax.vmap(lambda uniforms: sampling.draw(jnp.asarray(weights)[None], uniforms[None])[0])
    draw = jax.jit(lambda uniforms: jax.lax.map(one_row, uniforms[:, None])[:, 0])

    def shares(prefix, size, num):
        """For i < num the share of the next uniform that leads to the i-th piece of so many tokens, and its middle."""
        pieces = np.arange(num)

        def beyond(uniform):
            rest = np.zeros((num, 2 - len(prefix)))
            uniforms = np.concatenate([np.tile(prefix, (num, 1)), uniform[:, None], rest], axis=1)
            return np.asarray(draw(uniforms.astype(np.float32))) // size % num > pieces

        low, high = np.zeros(num), np.ones(num)
        for _ in range(25):
            middle = (low + high) / 2
            above = beyond(middle)
            low, high = np.where(above, low, middle), np.where(above, middle, high)
        edges = np.concatenate([[0], low])
        return np.diff(edges), (edges[1:] + edges[:-1]) / 2

    expected = np.zeros(-(-vocab_size // CHUNK) * CHUNK)
    expected[:vocab_size] = weights / weights.sum(dtype=np.float64)
    for chunk, (mass, middle) in enumerate(zip(*shares([], CHUNK, expected.size // CHUNK), strict=True)):
        begin = chunk * CHUNK
        parts, within = shares([middle], LANES, CHUNK // LANES)
        by_block = expected[begin : begin + CHUNK].reshape(-1, LANES)
        np.testing.assert_allclose(mass * parts, by_block.sum(axis=1), atol=2e-6)
        block = np.flatnonzero(by_block.sum(axis=1))[-1]  # the last one that has any token, and perhaps not 128
        lanes = shares([middle, within[block]], 1, LANES)[0]
        np.testing.assert_allclose(mass * parts[block] * lanes, by_block[block], atol=2e-6)


def test_a_top_p_that_rounds_to_zero_keeps_the_best_token():
    probs = all_probabilities(np.array([[[1.0, 2.0, 0.0], [2.0, 1.0, 2.0]]]), [RowParams(top_p=1e-46)])[0]
    assert probs.tolist() == [[0, 1, 0], [0.5, 0, 0.5]]


def test_no_token_of_zero_weight_is_drawn_where_a_parallel_sum_rounds():
    rng = np.random.RandomState(0)
    weights = jnp.asarray(np.where(rng.rand(8, 1188) < 0.8, 0, rng.rand(8, 1188)).astype(np.float32))
    cumulative = np.cumsum(np.asarray(weights, np.float64), axis=1)
    marks = (cumulative / cumulative[:, -1:])[:, ::3]  # uniforms next to the boundaries, where rounding decides
    for shift in (-1e-7, 0.0, 1e-7):
        for column in range(0, marks.shape[1], 9):
            uniform = jnp.asarray(np.clip(marks[:, column] + shift, 0, 1 - 1e-7).astype(np.float32))
            index = xla._invert(weights, uniform)
            assert (weights[jnp.arange(8), index] > 0).all()


def test_the_largest_uniform_never_draws_a_token_of_no_weight():
    weights = jnp.array([[0.0, 1e-30, 1.0, 1e-30, 0.0, 0.0]])
    top = jnp.full((1, 3), np.nextafter(np.float32(1), np.float32(0)))
    assert int(sampling.draw(weights, top)[0]) in (1, 2, 3)
    assert int(sampling.draw(weights, jnp.zeros((1, 3)))[0]) == 1


def test_uniforms_depend_on_key_length_and_domain_alone():
    keys = jnp.stack([jax.random.key(3), jax.random.key(4)])
    alone = sampling.uniforms_at(keys[:1], jnp.array([7]), sampling.ACCEPT, 3)
    together = sampling.uniforms_at(keys, jnp.array([7, 7]), sampling.ACCEPT, 3)
    np.testing.assert_array_equal(alone[0], together[0])
    assert len(np.unique(together)) == 6


def test_proposing_accepting_and_recovering_share_no_random_number():
    keys = jnp.stack([jax.random.key(seed) for seed in range(50) for _ in range(10)])
    lengths = jnp.tile(jnp.arange(10), 50)
    domains = sampling.PROPOSE, sampling.ACCEPT, sampling.RECOVER
    drawn = np.stack([np.asarray(sampling.uniforms_at(keys, lengths, domain, 4)) for domain in domains])
    correlations = np.corrcoef(drawn.reshape(3, -1))[np.triu_indices(3, 1)]
    # 2000 independent pairs: |r| > 0.1 has odds below 1e-5 for each of the three pairs; the seeds are fixed.
    assert np.abs(correlations).max() < 0.1
    assert len(np.unique(drawn)) > 0.99 * drawn.size
