"""Acceptance rules by their definitions: truth tables, golden numbers, exact laws, refusals, defects seen elsewhere."""

import dataclasses
import functools
import itertools
from pathlib import Path
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import RowParams, truncated
from models import VOCAB, LetterTokenizer, random_target
from test_generate import MIXED, NGRAM, PROMPTS, draft_config
from test_sampling import state_of
from test_verify import EDGE, TOP, NoCache, given_drafts, logits_for, table_target, uniforms

from pallas_kernels.rejection_sampling import NO_DRAFT, Truncation, rejection_sample
from specjax import SamplingParams, SpeculativeDecoder, step, verify
from specjax.config import RejectionSamplingStrategy
from specjax.drafters.base import Context, Proposal
from specjax.drafters.draft_model import DraftWeights, draft_model
from specjax.sampling import PROPOSE, ThinkingPhase, uniforms_at
from specjax.verify import RULES, Uniforms

P, Q = (0.5, 0.3, 0.2), (0.2, 0.3, 0.5)
"""The pair of laws that every rule is judged on; total variation distance 0.3."""

LOSSLESS = [name for name, info in RULES.items() if info.lossless and not info.greedy_only]
WIDTH, PIECE = 32, 512
"""The vocabulary and batch that small cases are padded to."""

LOSSY = [name for name, info in RULES.items() if not info.lossless]


def config_of(name, num=1, **fields):
    """A config with a rule; half of the drafts are accepted if it is 'synthetic'."""
    if name == "synthetic" and not fields:
        fields["synthetic_acceptance_rate"] = 0.5
    return draft_config(rejection_sampling_strategy=name, num_speculative_tokens=num, **fields)


@functools.cache
def compiled(rule):
    return jax.jit(rule, compiler_options={"xla_backend_optimization_level": 0})


@functools.cache
def built(name, num=1, **fields):
    """A rule as the decoder runs it, compiled."""
    if name not in ("synthetic", "relaxed", "medusa-typical"):
        num = 1  # the same function for every number of drafts
    used, rule = verify.build_rule(config_of(name, num, **fields))
    assert used == name
    return compiled(rule)


def decide(rule, logits, drafts, rows, given, probs=None, own=None, phases=None):
    """num_accepted and next_token as lists; of rows in pieces of one shape, so that a rule is compiled once for each G.

    Args:
        rule: a name, a function of verify or a compiled rule.
        logits: [B, G + 1, V], at most WIDTH tokens.
        rows: B RowParams.
        given: coins [B, G], and draws [B] or [B, G + 1].
        probs: [B, G, V], own: [B, G]; what the proposal says besides its drafts.
        phases: [B], whether rows think; None where none does.
    """
    B, T, V = np.shape(logits)
    if rule in RULES:
        if RULES[rule].needs != "the laws of sampled drafts" and rule != "synthetic":
            probs = np.full((B, T - 1, V), np.nan)  # which these must not look at
        rule = built(rule, T - 1)
    coins, draws = given
    logits = np.pad(logits, ((0, 0), (0, 0), (0, WIDTH - V)), constant_values=-np.inf)
    columns = [
        logits.astype(np.float32),
        np.array(drafts, np.int32),
        np.zeros((B, T - 1), np.float32) if own is None else np.asarray(own, np.float32),
        np.asarray(coins, np.float32).reshape(B, T - 1),
        np.broadcast_to(np.reshape(draws, (B, -1)), (B, T)).astype(np.float32),
        np.array([False] * B if phases is None else phases),
    ]
    if probs is not None:
        columns.append(np.pad(probs, ((0, 0), (0, 0), (0, WIDTH - V))).astype(np.float32))
    found = []
    for first in range(0, B, PIECE):
        piece = np.minimum(np.arange(first, first + PIECE), B - 1)
        logits, drafts, own, coins, draws, phases, *laws = (column[piece] for column in columns)
        recover = np.stack([np.zeros_like(draws)] * 2 + [draws], axis=-1)
        state = thinking([rows[row] for row in piece], phases)
        verdict = rule(logits, Proposal(drafts, laws[0] if laws else None, own), state, Uniforms(coins, recover))
        found += zip(*(np.asarray(x).tolist() for x in verdict), strict=True)
    return tuple(list(x) for x in zip(*found[:B], strict=True))


def thinking(rows, phases):
    """Rows that are in their thinking phase or not."""
    token = np.int32(0)
    return state_of(rows, [0] * len(rows)).replace(phase=ThinkingPhase(np.asarray(phases), token, token))


def log_of(probs):
    with np.errstate(divide="ignore"):
        return np.log(np.asarray(probs, np.float64)).astype(np.float32)


def shallow_target(seed):
    """The first layer of a random target: it compiles faster than two."""
    target = random_target(seed)
    config = dataclasses.replace(target.config, num_layers=1, sliding_windows=(None,))
    params = {part: weights for part, weights in target.params.items() if part != "layer_1"}
    return dataclasses.replace(target, config=config, params=params)


@pytest.fixture(scope="module")
def target():
    return shallow_target(0)


@pytest.fixture(scope="module")
def plain(target):
    return SpeculativeDecoder(target)


# Golden numbers


def limits_of_coins(rule, target, draft, drafts):
    """float64[G]: the coins below which the test of each draft passes, from the papers."""
    ratios = [p[d] / q[d] for p, q, d in zip(target, draft, drafts, strict=True)]
    if rule is verify.residual:
        return np.minimum(1, ratios)
    scales = list(itertools.accumulate(ratios, lambda scale, ratio: min(scale * ratio, 1.0), initial=1.0))
    limits = []
    for scale, p, q in zip(scales[1:-1], target[1:], draft[1:], strict=True):
        rest = np.maximum(scale * p - q, 0).sum()
        limits.append(rest / (rest + 1 - scale) if rest + 1 - scale > 0 else 1.0)
    return np.array([*limits, scales[-1]])


def mean_accepted(rule, target, draft):
    """float64[N]: the exact E[n] of laws [N, G, V] that depend on the position alone.

    All drafts and all boxes of coins are enumerated; the rule is asked close to both ends of every box.
    """
    num_laws, G, V = target.shape
    found = []
    for law, drafts, passes in itertools.product(
        range(num_laws), itertools.product(range(V), repeat=G), itertools.product((True, False), repeat=G)
    ):
        limits = limits_of_coins(rule, target[law], draft[law], drafts)
        low, high = np.where(passes, 0, limits), np.where(passes, limits, 1)
        weight = np.prod(draft[law, range(G), drafts]) * np.prod(high - low)
        if weight > 1e-12:
            found.append((law, drafts, low, high, weight))
    owner, drafts, low, high, weight = (np.array(column) for column in zip(*found, strict=True))
    logits = np.pad(log_of(target), ((0, 0), (0, 1), (0, 0)))[owner]
    margin = np.minimum(EDGE, (high - low) / 4)
    means = []
    for coins in (low + margin, high - margin):
        given = coins, [0.5] * len(found)
        num_accepted, _ = decide(compiled(rule), logits, drafts, [RowParams()] * len(found), given, draft[owner])
        means.append(np.bincount(owner, weight * np.array(num_accepted), num_laws))
    np.testing.assert_allclose(*means, atol=1e-9)
    return means[0]


@pytest.mark.exact
@pytest.mark.parametrize(("num", "expected"), [(1, 0.5), (2, 0.85), (3, 1.09), (4, 1.2655)])
def test_golden_mean_of_drafts_accepted_by_block_verification(num, expected):
    target, draft = (np.tile(law, (1, num, 1)) for law in ([0.7, 0.2, 0.1], [0.2, 0.5, 0.3]))
    assert mean_accepted(verify.block, target, draft)[0] == pytest.approx(expected, abs=1e-6)


@pytest.mark.exact
@pytest.mark.parametrize(("rule", "expected"), [(verify.block, 11 / 9), (verify.residual, 10 / 9)])
def test_golden_mean_of_the_papers_own_example(rule, expected):
    target, draft = np.tile([1 / 3, 2 / 3], (1, 2, 1)), np.tile([2 / 3, 1 / 3], (1, 2, 1))
    assert mean_accepted(rule, target, draft)[0] == pytest.approx(expected, abs=1e-6)


@pytest.mark.exact
def test_block_verification_never_accepts_fewer_drafts_than_the_residual_rule():
    rng = np.random.RandomState(0)
    target, draft = rng.dirichlet(np.ones(3), (40, 2)), rng.dirichlet(np.ones(3), (40, 2))
    more = mean_accepted(verify.block, target, draft) - mean_accepted(verify.residual, target, draft)
    assert more.min() > -1e-6
    assert more.max() > 0.05


@pytest.mark.parametrize(
    ("rate", "num", "base"),
    [(0.7, 3, 0.831967), (0.5, 2, 0.618034), (0.6, 4, 0.805809), (0.3, 5, 0.623501), (0.8, 7, 0.944185)],
)
def test_geometric_rates_have_the_golden_base_and_the_mean_that_was_asked_for(rate, num, base):
    rates = verify.geometric_rates(rate, num)
    np.testing.assert_allclose(rates, [base**i for i in range(1, num + 1)], atol=5e-6)
    assert np.mean(rates) == pytest.approx(rate, abs=1e-9)


@pytest.mark.parametrize("num", [1, 4])
def test_geometric_rates_of_nothing_and_of_everything_are_exact(num):
    np.testing.assert_allclose(verify.geometric_rates(0.0, num), 0, atol=1e-9)
    assert verify.geometric_rates(1.0, num) == (1.0,) * num


@pytest.mark.parametrize(
    ("length", "num", "rates"),
    [(2.6, 4, [1, 0.6, 0, 0]), (1.875, 3, [0.875, 0, 0]), (5, 4, [1, 1, 1, 1]), (1, 3, [0, 0, 0])],
)
def test_minimum_variance_rates_are_golden_and_sum_to_the_drafts_that_pass(length, num, rates):
    found = verify.minimum_variance_rates(length, num)
    assert found == pytest.approx(rates)
    assert 1 + sum(found) == pytest.approx(length)


@pytest.mark.parametrize(
    ("rates", "conditional"),
    [((0.9, 0.45, 0.45), (0.9, 0.5, 1)), ((1.0, 0.6, 0.0, 0.0), (1, 0.6, 0, 0)), ((0.0,), (0.0,))],
)
def test_conditional_rates_are_golden_also_behind_a_rate_of_zero(rates, conditional):
    assert verify.conditional_rates(rates) == pytest.approx(conditional)


# Token matching


@pytest.mark.exact
@pytest.mark.parametrize("name", ["typical-acceptance", "strict"])
def test_what_a_row_commits_is_what_the_target_drew_whatever_is_drafted(name):
    """p = (.5, .3, .2); the uniforms .1, .6, .9, .4 draw 0, 1, 2, 0. All 64 drafts, with and without placeholders."""
    drawn = [0, 1, 2, 0]
    drafts = list(itertools.product((NO_DRAFT, 0, 1, 2), repeat=3))
    given = np.full((64, 3), 0.9), np.tile([0.1, 0.6, 0.9, 0.4], (64, 1))
    num_accepted, next_token = decide(name, np.tile(log_of(P), (64, 4, 1)), drafts, [RowParams()] * 64, given)
    for draft, num, token in zip(drafts, num_accepted, next_token, strict=True):
        assert num == next((i for i in range(3) if draft[i] != drawn[i]), 3)
        assert [*draft[:num], token] == drawn[: num + 1]


# Logit comparison


@pytest.mark.parametrize(
    ("excess", "drafts", "num_accepted"),
    [
        ([-1, -1], [0, 1], 2),
        ([0, 0], [0, 1], 2),
        ([0.8e-5, 0.8e-5], [0, 1], 2),
        ([1.2e-5, -1], [0, 1], 0),
        ([-1, 1.2e-5], [0, 1], 1),
        ([5, 5], [0, 1], 0),
        ([-1, -9], [0, NO_DRAFT], 1),
        ([-9, -9], [NO_DRAFT, NO_DRAFT], 0),
    ],
)
def test_logit_comparison_accepts_up_to_the_first_draft_whose_own_logit_is_larger(excess, drafts, num_accepted):
    """Raw logits: temperature 0.1 and top-k change only what is drawn, which here is token 2 of (.5, .3, .2)."""
    logits = np.tile(log_of(P), (3, 3, 1))
    own = logits[:, :2, [0, 1]][:, [0, 1], [0, 1]] + np.array(excess, np.float32)
    rows = [RowParams(), RowParams(0.1), RowParams(top_k=1)]
    found = decide("logit-comparison", logits, [drafts] * 3, rows, ([[0.9] * 2] * 3, [0.9] * 3), None, own)
    assert found == ([num_accepted] * 3, [2, 0, 0])


def test_logit_comparison_without_the_drafters_logits_is_refused():
    with pytest.raises(ValueError, match="proposal.logits"):
        verify.logit_comparison(
            logits_for([[1, 2]]), Proposal(jnp.array([[1]])), state_of([RowParams()]), uniforms([[0.5]], [0.5])
        )


# Medusa's typical acceptance


def medusas_limit(probs, threshold=0.09, alpha=0.3):
    """The formula of the paper in float64."""
    positive = probs[probs > 0]
    return min(threshold, alpha * np.exp(positive @ np.log(positive)))


@pytest.mark.exact
def test_medusa_accepts_by_the_formula_and_draws_among_the_plausible():
    """Random laws from sure to flat, truncated and not; no probability lies within 1e-4 of its limit."""
    rng = np.random.RandomState(3)
    params = [RowParams(), RowParams(0.7), RowParams(1.3, top_k=6), RowParams(top_p=0.9)]
    tables = [(rng.randn(12).astype(np.float32) * scale, row) for scale in (0.2, 1.0, 3.0) for row in params]
    logits, drafts, rows, expected, draws = [], [], [], [], []
    for table, row in tables:
        probs = truncated(table, row)
        limit = medusas_limit(probs)
        kept = probs > limit
        assert np.abs(probs - limit).min() > 1e-4
        marks = np.cumsum(np.where(kept, probs, 0)) / probs[kept].sum()
        for token, draft in itertools.product(np.flatnonzero(kept), range(NO_DRAFT, 12)):
            begin, end = marks[token] - probs[token] / probs[kept].sum(), marks[token]
            for uniform in (max(begin, 0) + EDGE, end - EDGE):
                logits.append([table, table])
                drafts.append([draft])
                rows.append(row)
                draws.append(uniform)
                expected.append((int(draft >= 0 and kept[draft]), token))
    given = ([[TOP]] * len(rows), draws)
    found = decide("medusa-typical", np.array(logits), drafts, rows, given)
    assert list(zip(*found, strict=True)) == expected


def test_of_medusas_two_limits_the_smaller_one_counts():
    """(.9, .06, .04) has .203 by entropy, so .09 counts; .08 and 31 times .0297 has .0096, which counts."""
    sure = np.pad([0.9, 0.06, 0.04], (0, 29))
    flat = np.array([0.08, *[0.92 / 31] * 31])
    logits = log_of([[sure, sure], [sure, sure], [flat, flat], [flat, flat]])
    given = ([[0.5]] * 4, [0.0] * 4)
    found = decide("medusa-typical", logits, [[0], [1], [0], [1]], [RowParams()] * 4, given)
    assert found[0] == [1, 0, 1, 1]


def test_the_best_token_is_always_possible_for_medusa_even_where_none_is_plausible():
    rule = jax.jit(functools.partial(verify.medusa_typical, posterior_threshold=1.0, posterior_alpha=100.0))
    draws = np.linspace(0, TOP, 9)
    logits = np.tile(log_of([0.3, 0.4, 0.3]), (9, 2, 1))
    found = decide(rule, logits, [[1]] * 9, [RowParams()] * 9, ([[0.0]] * 9, draws))
    assert found == ([0] * 9, [1] * 9)


# Relaxed acceptance

FOUR = (0.5, 0.3, 0.15, 0.05)
"""Differences to the best: 0, .2, .35, .45 in probability; 0, .51, 1.20, 2.30 in nats."""


@functools.cache
def relaxed_by(kind):
    """The rule with its parameters as arguments, so that it is compiled once for each of the two kinds of delta."""
    return jax.jit(lambda *given, topk, delta: verify.relaxed(*given, topk=topk, **{kind: delta}))


@pytest.mark.parametrize(
    ("kind", "delta", "topk", "accepted"),
    [
        ("probability_delta", 0.36, 4, [1, 1, 1, 0]),
        ("log_delta", 0.36, 4, [1, 0, 0, 0]),
        ("probability_delta", 0.25, 4, [1, 1, 0, 0]),
        ("log_delta", 1.25, 4, [1, 1, 1, 0]),
        ("probability_delta", 0.0, 4, [1, 0, 0, 0]),
        ("log_delta", 0.0, 4, [1, 0, 0, 0]),
        ("probability_delta", 1.0, 2, [1, 1, 0, 0]),
        ("log_delta", 9.0, 3, [1, 1, 1, 0]),
        ("log_delta", 9.0, 10, [1, 1, 1, 1]),
    ],
)
def test_relaxed_acceptance_takes_what_is_near_enough_the_best_before_temperature(kind, delta, topk, accepted):
    """Rows 0..3 at temperature 1, rows 4..7 at 0.1 with top-k 1: the same. A rejection gives the best token."""
    logits = np.tile(log_of(FOUR), (8, 2, 1))
    rows = [RowParams()] * 4 + [RowParams(0.1, top_k=1)] * 4
    rule = functools.partial(relaxed_by(kind), topk=topk, delta=delta)
    found = decide(rule, logits, [[0], [1], [2], [3]] * 2, rows, ([[TOP]] * 8, [0.9] * 8), phases=[True] * 8)
    # Behind full acceptance .9 draws token 2 of FOUR, and 0 where top-k keeps only that.
    assert found == (accepted * 2, [2 if yes else 0 for yes in accepted] + [0] * 4)


def test_relaxed_acceptance_changes_no_row_that_is_greedy_or_does_not_think():
    rng = np.random.RandomState(5)
    logits, drafts = rng.randn(40, 3, 6) * 0.5, rng.randint(0, 6, (40, 2))
    rows = [RowParams(0.0) if row % 2 else RowParams(0.8, top_k=5) for row in range(40)]
    phases = [row % 4 in (1, 2) for row in range(40)]  # of each kind a half thinks
    given = rng.rand(40, 2), rng.rand(40)
    found = zip(*decide("relaxed", logits, drafts, rows, given, phases=phases), strict=True)
    strict = zip(*decide("strict", logits, drafts, rows, given), strict=True)
    differ = [row for row, (a, b) in enumerate(zip(found, strict, strict=True)) if a != b]
    assert differ and all(row % 4 == 2 for row in differ)


def test_relaxed_rows_that_propose_fewer_drafts_are_fully_accepted_by_those():
    """Then the next token is drawn, not the best: .9 draws token 2."""
    found = decide(
        "relaxed",
        np.tile(log_of(FOUR), (3, 3, 1)),
        [[1, NO_DRAFT], [NO_DRAFT, NO_DRAFT], [0, 1]],
        [RowParams()] * 3,
        ([[0.5] * 2] * 3, [0.9] * 3),
        phases=[True] * 3,
    )
    assert found == ([1, 0, 2], [2, 2, 2])


# Synthetic acceptance


@pytest.mark.parametrize(
    ("rate", "coin", "num_accepted"),
    [
        (1.0, TOP, 3),
        (1.0, 0.0, 3),
        (0.0, 0.0, 0),
    ],
)
def test_synthetic_rates_of_nothing_and_of_everything_leave_nothing_to_chance(rate, coin, num_accepted):
    rule = built("synthetic", 3, synthetic_acceptance_rate=rate)
    logits = logits_for([[1, 2, 3, 4]])
    found = decide(rule, logits, [[5, 5, 5]], [RowParams()], ([[coin] * 3], [0.5]))
    assert found == ([num_accepted], [1 + num_accepted])


def test_synthetic_acceptance_tosses_coins_at_conditional_rates_and_accepts_no_placeholder():
    """Rates (.9, .45, .45) are .9, .5 and 1 given the draft before."""
    rule = built("synthetic", 3, synthetic_acceptance_rates=(0.9, 0.45, 0.45))
    coins = [[0.89, 0.49, TOP], [0.91, 0, 0], [0, 0.51, 0], [0, 0, 0], [0, 0, 0]]
    drafts = [[5, 5, 5]] * 3 + [[5, NO_DRAFT, NO_DRAFT], [NO_DRAFT] * 3]
    found = decide(rule, np.tile(logits_for([[1, 2, 3, 4]]), (5, 1, 1)), drafts, [RowParams()] * 5, (coins, [0.5] * 5))
    assert found == ([3, 0, 1, 1, 0], [4, 1, 2, 2, 1])


def test_behind_synthetic_acceptance_max_takes_the_best_token_and_vllm_what_is_left():
    """Rows reject token 2, accept it, have none, and are greedy; p = (.5, .3, .2), q = (.2, .3, .5), uniform .9."""
    rows = [RowParams()] * 3 + [RowParams(0.0)]
    args = np.tile(log_of(P), (4, 2, 1)), [[2], [2], [NO_DRAFT], [2]], rows
    given = ([[0.9], [0.1], [0.1], [0.9]], [0.9] * 4)
    probs = np.tile(Q, (4, 1, 1))
    best = built("synthetic", 1, synthetic_acceptance_rate=0.5)
    left = built("synthetic", 1, synthetic_acceptance_length=1.5)
    assert decide(best, *args, given, probs) == ([0, 1, 0, 0], [0, 0, 0, 0])
    # What q leaves of p is all token 0, what a one-hot draft leaves is (.625, .375, 0); a bonus is drawn from p.
    assert decide(left, *args, given, probs) == ([0, 1, 0, 0], [0, 2, 2, 0])
    assert decide(left, *args, given) == ([0, 1, 0, 0], [1, 2, 2, 0])


# Lossless and lossy


def marks_of(p, q):
    """Every uniform at which some rule changes its mind about laws p and q, for coins and for draws."""
    coins, draws = [0.5, *p, *(p / q)], [np.cumsum(p)]
    rests = [np.maximum(p - q, 0), *(np.where(np.arange(p.size) == token, 0, p) for token in range(p.size))]
    draws += [np.cumsum(rest) / rest.sum() for rest in rests if rest.sum() > 0]
    return coins, np.concatenate(draws)


def between(marks):
    """float64[N, 2]: the intervals into which marks cut [0, 1]."""
    edges = np.unique(np.clip([0, 1, *marks], 0, 1))
    edges = edges[np.append(True, np.diff(edges) > 1e-9)]
    return np.stack([edges[:-1], edges[1:]], axis=1)


def laws_of_two_tokens(rule, pairs, chosen, claimed, temperature=1.0, think=False):
    """Exact laws [N, V], [N, V, V] of the next token and of the next two, for pairs (p, q) that hold at every position.

    Args:
        chosen: (p, q) -> the law that drafts are drawn from.
        claimed: (p, q) -> the law that the rule is told; None for one-hot.
    """
    cells = []
    for pair, (p, q) in enumerate(pairs):
        coins, draws = (between(marks) for marks in marks_of(p, q))
        for draft in np.flatnonzero(chosen(p, q)):
            for box in itertools.product(coins, draws, draws):
                cells.append((pair, draft, np.array(box), chosen(p, q)[draft]))
    owner, drafts, boxes, weights = (np.array(column) for column in zip(*cells, strict=True))
    volumes = weights * np.prod(boxes[..., 1] - boxes[..., 0], axis=1)
    margin = np.minimum(EDGE, (boxes[..., 1] - boxes[..., 0]) / 4)[..., None] * [1, -1]
    ends = np.moveaxis(boxes + margin, -1, 0).reshape(-1, 3)  # all low ends, then all high ones
    twice = np.tile(owner, 2)
    given = ends[:, :1], ends[:, 1:]
    target = np.array([p for p, _ in pairs])
    probs = None if claimed is None else np.array([claimed(p, q) for p, q in pairs])[twice][:, None]
    rows, phases = [RowParams(temperature)] * len(ends), [think] * len(ends)
    logits = np.repeat(log_of(target)[twice][:, None], 2, axis=1)
    own = log_of([q for _, q in pairs])[twice, np.tile(drafts, 2)][:, None]
    verdict = decide(rule, logits, np.tile(drafts, 2)[:, None], rows, given, probs, own, phases)
    num_accepted, tokens = (np.array(x).reshape(2, -1) for x in verdict)
    ends_agree = (num_accepted[0] == num_accepted[1]) & (tokens[0] == tokens[1])
    assert volumes[~ends_agree].sum() < EDGE

    V = target.shape[1]
    two, ended = np.zeros((len(pairs), V, V)), np.zeros((len(pairs), V))
    yes = num_accepted[0] == 1
    np.add.at(two, (owner[yes], drafts[yes], tokens[0][yes]), volumes[yes])
    np.add.at(ended, (owner[~yes], tokens[0][~yes]), volumes[~yes])
    one = two.sum(axis=2) + ended
    return one, two + ended[:, :, None] * one[:, None]


def distance(found, expected):
    """Total variation."""
    return 0.5 * np.abs(found - expected).sum()


PAIR = [(np.array(P), np.array(Q))]
DRAFTING = {
    "sampled": {"chosen": lambda p, q: q, "claimed": lambda p, q: q},
    "argmax": {"chosen": lambda p, q: np.eye(q.size)[np.argmax(q)], "claimed": None},
}


@pytest.mark.exact
@pytest.mark.parametrize("drafting", DRAFTING)
@pytest.mark.parametrize("name", LOSSLESS)
def test_rules_that_are_called_lossless_keep_the_law_of_the_next_two_tokens(name, drafting):
    one, two = laws_of_two_tokens(name, PAIR, **DRAFTING[drafting])
    assert distance(one[0], np.array(P)) < 1e-5
    assert distance(two[0], np.outer(P, P)) < 1e-5


@pytest.mark.exact
@pytest.mark.parametrize("drafting", DRAFTING)
def test_the_greedy_rule_keeps_the_law_of_greedy_rows(drafting):
    one, two = laws_of_two_tokens("greedy", PAIR, temperature=0.0, **DRAFTING[drafting])
    assert one[0].tolist() == pytest.approx([1, 0, 0]) and two[0, 0, 0] == pytest.approx(1)


BIAS = {
    ("logit-comparison", "sampled"): 0.150,
    ("medusa-typical", "sampled"): 0.300,
    ("medusa-typical", "argmax"): 0.800,
    ("relaxed", "argmax"): 0.800,
    ("synthetic", "sampled"): 0.150,
    ("synthetic", "argmax"): 0.300,
}
"""How far each lossy rule, with its default parameters (synthetic_acceptance_rate .5), takes the next token from p."""


@pytest.mark.exact
@pytest.mark.parametrize(("name", "drafting"), BIAS)
def test_rules_that_are_called_lossy_change_the_law_by_a_known_distance(name, drafting):
    one, _ = laws_of_two_tokens(name, PAIR, think=name == "relaxed", **DRAFTING[drafting])
    assert one[0].sum() == pytest.approx(1)
    assert distance(one[0], np.array(P)) == pytest.approx(BIAS[name, drafting], abs=5e-4)


def test_every_lossy_rule_has_its_distance_stated():
    assert {name for name, _ in BIAS} == set(LOSSY) and min(BIAS.values()) > 0.01


# Defects of other systems


@pytest.mark.exact
@pytest.mark.parametrize("rule", [verify.residual, verify.block], ids=lambda rule: rule.__name__)
def test_the_law_in_the_test_is_the_law_in_the_residual(rule):
    """Were they two (as after rounding one of them), the output would be off by what they differ in."""
    rng = np.random.RandomState(11)
    pairs = [tuple(rng.dirichlet(np.ones(3), 2)) for _ in range(3)]
    one, _ = laws_of_two_tokens(compiled(rule), pairs, **DRAFTING["sampled"])
    assert max(distance(found, p) for found, (p, _) in zip(one, pairs, strict=True)) < 1e-5


@pytest.mark.exact
@pytest.mark.parametrize("rule", [verify.residual, verify.block], ids=lambda rule: rule.__name__)
def test_an_argmax_draft_under_the_softmaxs_law_would_be_biased_by_three_tenths(rule):
    """Token 2 is always drafted and passes with .2 / .5; a rejection gives what q leaves of p, token 0: (.6, 0, .4)."""
    one, _ = laws_of_two_tokens(compiled(rule), PAIR, DRAFTING["argmax"]["chosen"], DRAFTING["sampled"]["claimed"])
    np.testing.assert_allclose(one[0], [0.6, 0, 0.4], atol=1e-5)


@pytest.mark.parametrize("sample", [True, False])
def test_a_draft_model_claims_a_law_only_where_it_draws(sample, target):
    drafter = draft_model(target.config, 2, jnp.float32, sample=sample)
    context = Context(jnp.zeros((2, 256), jnp.int32), jnp.array([3, 4]), state_of([RowParams(), RowParams(0.0)]))
    weights = DraftWeights(target.params)
    cache = drafter.init(weights, 2, 256)
    proposal, _ = jax.eval_shape(drafter.propose, weights, cache, context)
    assert (proposal.probs is not None) == sample


@pytest.mark.parametrize("name", [*LOSSLESS, "medusa-typical", "relaxed"])
def test_greedy_rows_between_sampled_rows_decide_as_the_greedy_rule_does(name):
    rng = np.random.RandomState(2)
    logits = rng.randn(24, 3, 9)
    drafts = np.where(rng.rand(24, 2) < 0.7, logits.argmax(axis=-1)[:, :2], rng.randint(0, 9, (24, 2)))
    rows = [RowParams(0.0), RowParams(), RowParams(1e-6), RowParams(0.5, top_k=2)] * 6
    given = rng.rand(24, 2), rng.rand(24)
    probs = rng.dirichlet(np.ones(9), (24, 2))
    mixed = decide(name, logits, drafts, rows, given, probs, phases=[True] * 24)
    alone = decide("greedy", logits, drafts, rows, given, probs)
    for found, expected in zip(mixed, alone, strict=True):
        assert found[::2] == expected[::2]


@pytest.mark.parametrize("name", LOSSLESS)
def test_every_rule_cuts_top_p_after_the_temperature(name):
    """At temperature 5 top-p .6 keeps tokens 0 and 1 of (.5, .3, .2), at .2 only token 0; uncut it would be 0 and 1."""
    rows = [RowParams(5.0, top_p=0.6), RowParams(0.2, top_p=0.6)] * 3
    draws = [0.0, 0.0, 0.5, 0.5, TOP, TOP]
    found = decide(name, np.tile(log_of(P), (6, 1, 1))[:, [0, 0]], [[NO_DRAFT]] * 6, rows, ([[0.5]] * 6, draws))
    assert found[1][0::2] == [0, 0, 1] and found[1][1::2] == [0, 0, 0]


@pytest.mark.exact
@pytest.mark.parametrize("name", [*LOSSLESS, "logit-comparison", "medusa-typical", "relaxed"])
def test_the_bonus_token_is_drawn_and_honours_top_k(name):
    """All drafts are sure; behind them (.5, .3, .2) with top-k 2 is (.625, .375), not its best token."""
    ends = np.array([EDGE, 0.625 - EDGE, 0.625 + EDGE, TOP])
    logits = np.tile([log_of([1, 0, 0]), log_of([1, 0, 0]), log_of(P)], (4, 1, 1))
    given = ([[TOP] * 2] * 4, ends)
    rows, probs = [RowParams(top_k=2)] * 4, np.tile([1.0, 0, 0], (4, 2, 1))
    found = decide(name, logits, [[0, 0]] * 4, rows, given, probs, np.full((4, 2), -9.0), [True] * 4)
    assert found == ([2] * 4, [0, 0, 1, 1])


@pytest.mark.parametrize("cut", [RowParams(top_k=2), RowParams(top_p=0.7), RowParams(min_p=0.5)])
@pytest.mark.parametrize("drafting", ["sampled", "argmax"])
@pytest.mark.parametrize("name", LOSSLESS)
def test_a_draft_that_the_cut_rules_out_is_never_accepted_nor_drawn(name, cut, drafting):
    """Token 2 of (.5, .3, .2), with the kindest coin."""
    draws = np.linspace(0, TOP, 8)
    probs = np.tile([0.3, 0.1, 0.6], (8, 1, 1)) if drafting == "sampled" else None
    found = decide(name, np.tile(log_of(P), (8, 2, 1)), [[2]] * 8, [cut] * 8, ([[0.0]] * 8, draws), probs)
    assert found[0] == [0] * 8 and set(found[1]) <= {0, 1}


@pytest.mark.parametrize("name", RULES)
def test_a_placeholder_is_never_accepted(name):
    """Not even where the token after it, or the target's last one (which index -1 would be), is sure."""
    logits = np.tile(log_of([0, 0, 1]), (3, 3, 1))
    drafts = [[NO_DRAFT, NO_DRAFT], [2, NO_DRAFT], [NO_DRAFT, 2]]
    rows = [RowParams(0.0 if name == "greedy" else 1.0)] * 3
    own = np.full((3, 2), -50.0)
    probs = np.tile([0, 0, 1.0], (3, 2, 1))
    found = decide(name, logits, drafts, rows, ([[0.0] * 2] * 3, [0.5] * 3), probs, own, [True] * 3)
    assert found == ([0, 1, 0], [2, 2, 2])


def test_placeholders_are_not_counted_as_drafts():
    """Rows with 0, 1 and 2 drafts, and one that is done."""
    drafts = jnp.array([[NO_DRAFT, NO_DRAFT], [1, NO_DRAFT], [1, 2], [1, 2]], jnp.int32)
    state = step.DecodeState(
        tokens=jnp.zeros((4, 16), jnp.int32),
        logprobs=None,
        length=jnp.full(4, 3),
        max_length=jnp.full(4, 16),
        stop_tokens=jnp.full((4, 1), step.PAD),
        finish=jnp.array([step.RUNNING] * 3 + [step.STOP]),
        sampling=state_of([RowParams(0.0)] * 4),
        cache=NoCache(),
        drafter=drafts,
        num_drafted=jnp.zeros(4, jnp.int32),
        acceptance_counts=jnp.zeros((4, 3), jnp.int32),
    )
    system = step.System(table_target(np.zeros((1, 4, 4))), given_drafts(None), verify.greedy)
    after = jax.jit(lambda state: step.speculative_step(system, step.Params((), ()), state))(state)
    assert after.num_drafted.tolist() == [0, 1, 2, 0]
    assert after.acceptance_counts.sum(axis=1).tolist() == [1, 1, 1, 0]


def test_no_random_number_has_two_uses():
    """Of a row's first 16 rounds, at every length: 249 numbers of 2**23 values meet by chance with odds below 0.4 %."""
    lengths, rows = jnp.arange(16), state_of([RowParams()] * 16, seeds=[5] * 16)
    numbers_of = jax.jit(
        lambda rows, at: (*verify.round_uniforms(rows, at, 3), uniforms_at(rows.key, at, PROPOSE, 9)),
    )
    accept, recover, propose = (np.asarray(x) for x in numbers_of(rows, lengths))
    by_position = np.concatenate([recover[:, 0], recover[-1, 1:]])
    # Numbers that draw belong to a position, and later rounds meet them there again.
    for ahead in (1, 2, 3):
        np.testing.assert_array_equal(recover[:-ahead, ahead], recover[ahead:, 0])
    numbers = np.concatenate([np.ravel(x) for x in (propose, accept, by_position)])
    assert len(np.unique(numbers)) == numbers.size == 16 * 9 + 16 * 3 + 19 * 3


# Bad input


def good_input():
    """Arguments of rejection_sample: B = 2, G = 1, V = 3."""
    return {
        "logits": np.tile(log_of(P), (2, 2, 1)),
        "drafts": np.array([[0], [NO_DRAFT]], np.int32),
        "draft_probs": np.tile(np.array(Q, np.float32), (2, 1, 1)),
        "accept_uniforms": np.full((2, 1), 0.5, np.float32),
        "recover_uniforms": np.full((2, 2, 3), 0.5, np.float32),
        "temperature": np.ones(2, np.float32),
        "top_k": np.zeros(2, np.int32),
        "top_p": np.ones(2, np.float32),
        "min_p": np.zeros(2, np.float32),
    }


def with_entry(name, index, value):
    array = good_input()[name].copy()
    array[index] = value
    return name, array


def sample_with(changes, **options):
    given = {name: jnp.asarray(value) for name, value in (good_input() | changes).items()}
    rows = Truncation(*(given.pop(name) for name in Truncation._fields))
    return rejection_sample(*given.values(), rows, **options)


BAD = [
    with_entry("draft_probs", (0, 0, 0), 0.5),
    with_entry("draft_probs", (0, 0), (-0.5, 0.5, 1.0)),
    with_entry("draft_probs", (0, 0), np.nan),
    with_entry("temperature", 1, -1.0),
    with_entry("temperature", 1, np.inf),
    with_entry("temperature", 1, np.nan),
    with_entry("top_k", 0, -1),
    with_entry("top_p", 0, 0.0),
    with_entry("top_p", 0, 1.5),
    with_entry("top_p", 0, np.nan),
    with_entry("min_p", 0, 2.0),
    with_entry("min_p", 0, -0.1),
    with_entry("drafts", (0, 0), 3),
    with_entry("drafts", (0, 0), -2),
    with_entry("logits", (1, 0, 0), np.nan),
    with_entry("logits", (1, 0, 0), np.inf),
    with_entry("logits", (1, 1), -np.inf),
    ("logits", np.zeros((0, 2, 3), np.float32)),
    ("logits", np.zeros((2, 0, 3), np.float32)),
    ("logits", np.zeros((2, 2, 0), np.float32)),
    ("logits", np.zeros((2, 3), np.float32)),
    ("logits", np.zeros((2, 2, 3), np.int32)),
    ("drafts", np.zeros((2, 2), np.int32)),
    ("drafts", np.zeros((2, 1), np.float32)),
    ("drafts", np.zeros((2, 1), np.uint32)),
    ("draft_probs", np.full((2, 1, 4), 0.25, np.float32)),
    ("draft_probs", np.array([[[0, 1, 0]], [[0, 1, 0]]], np.int32)),
    ("accept_uniforms", np.zeros((2, 2), np.float32)),
    ("recover_uniforms", np.zeros((2, 1, 3), np.float32)),
    ("recover_uniforms", np.zeros((2, 2, 1), np.float32)),
    *((name, np.ones((2, 1), np.float32)) for name in Truncation._fields),
    *((name, np.ones(3, np.float32)) for name in Truncation._fields),
]


def test_good_input_is_taken():
    assert sample_with({}).num_accepted.tolist() == [1, 0]


@pytest.mark.parametrize(("name", "value"), BAD, ids=lambda value: value if isinstance(value, str) else "")
def test_an_argument_that_can_not_be_is_refused_by_its_name(name, value):
    with pytest.raises(ValueError, match=f"^{name}"):
        sample_with({name: value})


@pytest.mark.parametrize("name", ["draft_probs", "draft_probs.sum"])
def test_what_stands_at_a_placeholder_is_not_judged(name):
    """Row 1 has no draft, and so no law."""
    changes = dict([with_entry("draft_probs", (1, 0), np.nan if name == "draft_probs" else 0.0)])
    assert sample_with(changes).num_accepted.tolist() == [1, 0]


@pytest.mark.parametrize("option", ["rule", "implementation"])
def test_an_unknown_name_is_refused_with_the_known_ones(option):
    with pytest.raises(ValueError, match=f"^{option}='best': expected one of "):
        sample_with({}, **{option: "best"})


def test_only_the_jax_numpy_implementation_has_a_sharded_form():
    with pytest.raises(NotImplementedError, match="^implementation='tpu'"):
        sample_with({}, axis="x", implementation="tpu")


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize(
    ("bad", "named"), [("drafts", "drafts"), ("wide", "drafts"), ("logits", "logits"), ("top_p", "top_p")]
)
def test_every_rule_refuses_bad_input_outside_jit(name, bad, named):
    _, rule = verify.build_rule(config_of(name))
    logits = jnp.asarray(log_of([[P, P]]))
    drafts = {"drafts": jnp.array([[3]]), "wide": jnp.array([[0, 0]])}.get(bad, jnp.array([[0]]))
    if bad == "logits":
        logits = logits.at[0, 0, 0].set(jnp.nan)
    rows = state_of([RowParams(top_p=1.5 if bad == "top_p" else 1.0)])
    proposal = Proposal(drafts, None, jnp.zeros(drafts.shape))
    with pytest.raises(ValueError, match=f"^{named}"):
        rule(logits, proposal, rows, uniforms([[0.5]], [0.5]))


@pytest.mark.parametrize("name", RULES)
def test_a_row_of_nan_disturbs_no_other_row_inside_jit(name):
    rng = np.random.RandomState(8)
    logits, probs = rng.randn(6, 3, 5), rng.dirichlet(np.ones(5), (6, 2))
    drafts = rng.randint(0, 5, (6, 2))
    sampled = [RowParams(), RowParams(0.7, top_k=3), RowParams(0.0), RowParams(top_p=0.8), RowParams(min_p=0.2)]
    rows = [RowParams(0.0)] * 6 if name == "greedy" else [*sampled, RowParams()]
    given = rng.rand(6, 2) * 0.5, rng.rand(6)
    whole = decide(name, logits, drafts, rows, given, probs, phases=[True, False] * 3)
    logits[3], probs[3] = np.nan, np.nan
    spoilt = decide(name, logits, drafts, rows, given, probs, phases=[True, False] * 3)
    for before, after in zip(whole, spoilt, strict=True):
        assert [x for row, x in enumerate(before) if row != 3] == [x for row, x in enumerate(after) if row != 3]
    assert 0 <= spoilt[1][3] < WIDTH


# The table, and whole systems


def test_the_table_has_a_rule_for_every_strategy_of_the_config():
    assert set(RULES) == set(get_args(RejectionSamplingStrategy))


def test_without_a_config_the_rule_draws_from_the_target():
    assert verify.build_rule(None) == ("residual", verify.residual)


class ThinkingTokenizer(LetterTokenizer):
    """A stand-in for a reasoning model's tokenizer, whose last two tokens open and close the reasoning."""

    def get_vocab(self):
        return super().get_vocab() | {"<think>": VOCAB - 2, "</think>": VOCAB - 1}


@pytest.mark.parametrize("name", ["block", *LOSSY])
def test_a_result_says_whether_its_rule_is_lossless(name, target):
    """The other lossless rules decode elsewhere in these tests."""
    target = dataclasses.replace(target, tokenizer=ThinkingTokenizer())
    if name == "logit-comparison":
        system = SpeculativeDecoder(target, config_of(name), draft=target)
    else:
        fields = {"synthetic_acceptance_rate": 0.5} if name == "synthetic" else {}
        config = NGRAM.model_copy(update={"rejection_sampling_strategy": name, "num_speculative_tokens": 1} | fields)
        system = SpeculativeDecoder(target, config)
    result = system.generate([PROMPTS[1]], SamplingParams(max_tokens=4, temperature=1.0))
    assert result.lossless == RULES[name].lossless
    assert len(result.token_ids[0]) == 4 and result.finish_reasons == ["length"]


@pytest.mark.filterwarnings("ignore::specjax.DraftWarning")  # two random models hardly ever agree
@pytest.mark.parametrize("system", ["ngram", "draft model"])
def test_under_the_strict_rule_a_seed_gives_the_text_of_plain_decoding(system, target, plain):
    """Rounding moves the marks of a draw by about 1e-6: of 132 draws one meets its uniform with odds below 2 %."""
    if system == "ngram":
        strict = SpeculativeDecoder(target, NGRAM.model_copy(update={"rejection_sampling_strategy": "strict"}))
    else:
        strict = SpeculativeDecoder(target, draft_config(rejection_sampling_strategy="strict"), draft=shallow_target(1))
    result = strict.generate(PROMPTS, MIXED)
    expected = plain.generate(PROMPTS, MIXED)
    assert result.token_ids == expected.token_ids
    assert result.lossless and expected.lossless
    assert result.metrics.drafted > 0


def test_the_readme_lists_every_rule_with_its_label_and_needs():
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    rows = [line.split("|")[1:4] + [line] for line in readme.splitlines() if line.startswith("| `")]
    for name, info in verify.RULES.items():
        label, line = next((row[1].strip(), row[3]) for row in rows if f"`{name}`" in row[0])
        assert label == ("at temperature 0" if info.greedy_only else "yes" if info.lossless else "no")
        assert info.needs == "nothing" or info.needs in line


def test_a_rule_refuses_a_negative_temperature_outside_jit():
    with pytest.raises(ValueError, match=r"temperature\[0\]=-1.0: expected a finite number >= 0"):
        verify.residual(
            logits_for([[1, 2]]), Proposal(jnp.array([[1]])), state_of([RowParams(-1.0)]), uniforms([[0.5]], [0.5])
        )
