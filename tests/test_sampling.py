"""Truncation and drawing against sorts and exact integrals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import RowParams, truncated

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
        key=jnp.stack([jax.random.key(seed) for seed in seeds]),
    )


def all_probabilities(logits, rows):
    law = sampling.truncate(jnp.asarray(logits, jnp.float32), state_of(rows))
    positions = range(logits.shape[1])
    at = [sampling.probabilities_at(law, jnp.full(len(rows), position)) for position in positions]
    return np.stack(at, axis=1)


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
    law = sampling.truncate(jnp.asarray(logits), state_of(PARAMS))
    whole = all_probabilities(logits, PARAMS)
    picked = np.take_along_axis(whole[:, :3], np.asarray(tokens)[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(sampling.probability_of(law, tokens), picked, atol=1e-7)


@pytest.mark.exact
@pytest.mark.parametrize("vocab_size", [3, 127, 128, 129, 1000])
def test_the_interval_of_uniforms_that_draws_a_token_is_as_long_as_its_probability(vocab_size):
    """Both uniforms are integrated exactly: every boundary of the very function is found by bisection."""
    rng = np.random.RandomState(vocab_size)
    weights = np.where(rng.rand(vocab_size) < 0.3, 0.0, rng.rand(vocab_size)).astype(np.float32)
    weights[rng.randint(vocab_size)] = 1.0
    blocks = -(-vocab_size // sampling.DRAW_BLOCK)

    def drawn(first, second):
        uniforms = jnp.stack([jnp.asarray(first, jnp.float32), jnp.asarray(second, jnp.float32)], axis=1)
        return np.asarray(sampling.draw(jnp.broadcast_to(jnp.asarray(weights), (len(first), vocab_size)), uniforms))

    def boundaries(below, num):
        """For i = 0 .. num - 1 the smallest u at which the value exceeds i."""
        low, high = np.zeros(num), np.ones(num)
        for _ in range(26):
            middle = (low + high) / 2
            inside = below(middle)
            low, high = np.where(inside, middle, low), np.where(inside, high, middle)
        return low

    block_of = np.arange(blocks)
    edges = boundaries(lambda u: drawn(u, np.zeros(blocks)) // sampling.DRAW_BLOCK <= block_of, blocks)
    block_mass = np.diff(edges, prepend=0)
    law = np.zeros(vocab_size)
    for block in range(blocks):
        if block_mass[block] < 1e-6:
            continue
        first = edges[block] - block_mass[block] / 2
        tokens = np.arange(block * sampling.DRAW_BLOCK, min((block + 1) * sampling.DRAW_BLOCK, vocab_size))
        inner = boundaries(lambda u, f=first, t=tokens: drawn(np.full(t.size, f), u) <= t, tokens.size)
        law[tokens] = np.diff(inner, prepend=0) * block_mass[block]
    np.testing.assert_allclose(law, weights / weights.sum(), atol=2e-6)


def test_a_top_p_that_rounds_to_zero_keeps_the_best_token():
    probs = all_probabilities(np.array([[[1.0, 2.0, 0.0]]]), [RowParams(top_p=1e-46)])[0, 0]
    assert probs.tolist() == [0, 1, 0]


def test_no_token_of_zero_weight_is_drawn_where_a_parallel_sum_rounds():
    rng = np.random.RandomState(0)
    weights = jnp.asarray(np.where(rng.rand(8, 1188) < 0.8, 0, rng.rand(8, 1188)).astype(np.float32))
    cumulative = np.cumsum(np.asarray(weights, np.float64), axis=1)
    marks = (cumulative / cumulative[:, -1:])[:, ::3]  # uniforms next to the boundaries, where rounding decides
    for shift in (-1e-7, 0.0, 1e-7):
        for column in range(0, marks.shape[1], 9):
            uniform = jnp.asarray(np.clip(marks[:, column] + shift, 0, 1 - 1e-7).astype(np.float32))
            index = sampling._invert(weights, uniform)
            assert (weights[jnp.arange(8), index] > 0).all()


def test_the_largest_uniform_never_draws_a_token_of_no_weight():
    weights = jnp.array([[0.0, 1e-30, 1.0, 1e-30, 0.0, 0.0]])
    top = jnp.full((1, 2), np.nextafter(np.float32(1), np.float32(0)))
    assert int(sampling.draw(weights, top)[0]) in (1, 2, 3)
    assert int(sampling.draw(weights, jnp.zeros((1, 2)))[0]) == 1


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
