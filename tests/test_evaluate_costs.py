"""Costs, predictions and spread: on numbers that can be worked out by hand, and on a tiny model."""

import jax
import numpy as np
import pytest
from models import random_target

from specjax import SamplingParams, SpeculativeConfig, SpeculativeDecoder
from specjax.errors import ConfigError
from specjax.evaluate import costs
from specjax.evaluate.statistics import bootstrap_interval, median_and_range
from specjax.evaluate.summary import fastest, repeat_rates
from specjax.metrics import Metrics

NGRAM = SpeculativeConfig(method="ngram", num_speculative_tokens=2, prompt_lookup_min=1, prompt_lookup_max=2)
TOKENS = (np.arange(20) % 5 + 10).tolist()


def metrics(num_tokens=0, decode_seconds=1.0, counts=(0, 0), drafted=0):
    return Metrics(np.array(counts), drafted, num_tokens, 0.0, decode_seconds, 0.0, 0.0)


def test_predicted_speedups_by_hand():
    """K = 2: 1 + 0.8 + 0.5 tokens at a cost of 13 + 4 + 1, against one at 10 + 1."""
    predicted = costs.predicted_speedups((0.8, 0.5), score=(10.0, 11.0, 13.0), draft=(2.0, 4.0), rest=1.0)
    assert predicted == pytest.approx([1.0, 1.8 * 11 / 14, 2.3 * 11 / 18])


def test_rounds_without_drafts_score_one_token():
    """In a fourth of the rounds scoring costs 30, in the others 10."""
    predicted = costs.predicted_speedups((0.2,), score=(10.0, 30.0), draft=(0.0,), rest=0.0, share=0.25)
    assert predicted == pytest.approx([1.0, 1.2 * 10 / 15])


def test_free_drafts_that_are_all_accepted_bring_one_token_each():
    predicted = costs.predicted_speedups((1.0,) * 4, score=(7.0,) * 5, draft=(0.0,) * 4, rest=0.0)
    assert predicted == pytest.approx([1, 2, 3, 4, 5])


def test_the_share_of_drafting_rounds_grows_with_the_batch():
    """Half of the rounds have drafts: 5 rounds of 10, 2 drafts each; three rows have none at once in an eighth."""
    total = metrics(counts=(6, 2, 2), drafted=10)
    assert costs.drafting_share(total, 1) == pytest.approx(0.5)
    assert costs.drafting_share(total, 3) == pytest.approx(7 / 8)


def test_predictions_use_the_batch_that_was_run():
    measured = {
        "batch": [1, 4],
        "score_ms": [[1.0, 1.0], [10.0, 30.0]],
        "rest_ms": 0.0,
        "draft_ms": {"head": {"K": [1], "ms": [10.0], "idle": False}, "ngram": {"K": [1], "ms": [0.0], "idle": True}},
    }
    total = metrics(counts=(5, 5), drafted=0)
    predicted = costs.predict(measured, {"head": total, "ngram": total}, batch=4)
    assert predicted["head"] == {"K": [0, 1], "speedup": pytest.approx([1.0, 1.5 * 10 / 40])}
    assert predicted["ngram"]["speedup"] == pytest.approx([1.0, 1.5])  # drafts nothing, so scoring costs no more


def test_the_parts_of_the_step_commit_the_tokens_of_the_whole():
    owner = SpeculativeDecoder(random_target(3), NGRAM, max_batch_size=2)
    system, sampling = owner.programs.system, SamplingParams()
    params, state = costs._running_state(owner, TOKENS, sampling)
    seconds, by_parts = costs._timed_rounds(costs._parts(system), system.drafter.widths, params, state)
    params, state = costs._running_state(owner, TOKENS, sampling)
    whole = owner.programs.decode(params, state, costs.ROUNDS)
    np.testing.assert_array_equal(by_parts.tokens, whole.tokens)
    np.testing.assert_array_equal(by_parts.acceptance_counts, whole.acceptance_counts)
    assert int(whole.acceptance_counts[:, 1:].sum()) > 0 and not jax.device_get(whole.done).any()
    assert set(seconds) == set(costs.PHASES) and all(value > 0 for value in seconds.values())


def test_measured_costs_have_a_number_for_every_batch_width_and_count(monkeypatch):
    monkeypatch.setattr(costs, "REPEATS", 1)
    target = random_target(3)
    methods = {"plain": None, "ngram": NGRAM}
    decoders = {name: SpeculativeDecoder(target, method, max_batch_size=2) for name, method in methods.items()}
    phases = {name: dict.fromkeys((*costs.PHASES, "round"), 0.5) for name in decoders}
    phases["plain"]["round"], phases["ngram"]["round"] = 1.5, 8.5
    found = costs.measure_costs(decoders, phases, TOKENS, SamplingParams(), [1, 2])
    assert (found["context"], found["batch"], found["widths"]) == (20, [1, 2], [1, 2, 3])
    assert np.shape(found["score_ms"]) == (2, 3) and np.min(found["score_ms"]) > 0
    assert found["draft_ms"]["ngram"]["K"] == [1, 2] and len(found["draft_ms"]["ngram"]["ms"]) == 2
    assert found["draft_ms"]["ngram"]["ms"][1] == 7.0 and found["rest_ms"] == 1.0  # what was measured already
    assert found["draft_ms"]["ngram"]["idle"]


def test_a_context_without_room_for_the_rounds_is_refused():
    owner = SpeculativeDecoder(random_target(0, max_position=64), NGRAM, max_batch_size=1)
    with pytest.raises(ConfigError, match="step_context=20.*of 64"):
        costs.phase_milliseconds(owner, TOKENS, SamplingParams())


def test_measurements_take_turns_and_the_fastest_counts():
    order = []
    times = {"a": iter([3.0, 1.0, 2.0]), "b": iter([5.0, 6.0, 4.0])}

    def run(name):
        order.append(name)
        return next(times[name])

    assert costs.fastest_seconds({name: lambda name=name: run(name) for name in times}, 3) == {"a": 1.0, "b": 4.0}
    assert order == ["a", "b"] * 3


def test_the_interval_of_two_prompts_is_their_range():
    """Both draws are the same prompt in a fourth of the resamples each, which is more than 2.5 %."""
    sums = np.array([[1.0, 1.0], [3.0, 1.0]])
    assert bootstrap_interval(sums, lambda totals: totals[:, 0] / totals[:, 1]) == (1.0, 3.0)


def test_the_interval_of_many_prompts_is_that_of_the_normal_law():
    """400 zeros and ones in equal numbers: the mean's standard error is 0.5 / 20. Seeded, so it never varies."""
    sums = np.stack([np.arange(400) % 2, np.ones(400)], axis=1)
    low, high = bootstrap_interval(sums, lambda totals: totals[:, 0] / totals[:, 1])
    assert (low, high) == pytest.approx((0.5 - 1.96 * 0.025, 0.5 + 1.96 * 0.025), abs=0.004)
    assert bootstrap_interval(sums, lambda totals: totals[:, 0] / totals[:, 1]) == (low, high)


def test_an_interval_needs_two_prompts_and_a_number():
    ratio = lambda totals: totals[:, 0] / totals[:, 1]  # noqa: E731
    assert bootstrap_interval(np.ones((1, 2)), ratio) is None
    assert bootstrap_interval(np.zeros((3, 2)), ratio) is None


def test_median_and_range_of_repeats():
    assert median_and_range([3.0, 1.0, 2.0, 10.0]) == (2.5, (1.0, 10.0))
    assert median_and_range([]) == (None, None)


def test_of_repeats_the_fastest_counts_and_each_has_its_rate():
    """Group "b" lacks its second repeat, so rates of repeats are those of "a"."""
    measured = {"a": {0: metrics(10, 2.0), 1: metrics(10, 1.0)}, "b": {0: metrics(6, 3.0)}}
    total = fastest(measured, measured)
    assert (total.num_tokens, total.decode_seconds) == (16, 4.0)
    assert repeat_rates(measured, measured, 2) == [5.0, 10.0]
    assert fastest(measured, []) is None and repeat_rates(measured, ["b"], 2) == []
