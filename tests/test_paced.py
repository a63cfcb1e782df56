"""As many drafts as pay: what the drafter knows after rounds without drafts, what is chosen, and that texts stay."""

import dataclasses
import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import VOCAB, random_target
from test_heads import random_weights

import specjax
from specjax import generate, pacing, step, verify
from specjax.drafters.base import NO_DRAFT, draft_counts
from specjax.drafters.draft_model import DraftWeights, draft_model
from specjax.drafters.head import HeadWeights, head
from specjax.drafters.hybrid import hybrid
from specjax.drafters.ngram import ngram
from specjax.drafters.paced import PacedParams, paced
from specjax.heads import config as heads
from specjax.heads import network
from specjax.target import decoder

pacing_drafter = importlib.import_module("specjax.drafters.paced")  # the package has a function of this name

TARGET = random_target(0)
OTHER = random_target(1)
LAYER = dataclasses.replace(TARGET.config, num_layers=1, sliding_windows=(None,))
MOST = 3
TOKEN_OF = np.arange(5, VOCAB, 3)


def weights_of(config):
    shared = network.Shared(TARGET.params["embedding"], TARGET.params["head"])
    return HeadWeights(random_weights(config, 2), shared, jnp.asarray(TOKEN_OF) if config.reduced else None)


EAGLE3 = heads.eagle3(LAYER, TARGET.config.width, (0, 1, 2), len(TOKEN_OF))
MTP = heads.mtp(LAYER, TARGET.config.width, "glm4_moe", num_blocks=2)
METHODS = {
    "ngram": (lambda num: ngram(num, 1, 2), ()),
    "draft_model": (lambda num: draft_model(OTHER.config, num, jnp.float32, sample=False), DraftWeights(OTHER.params)),
    "mtp of 2 blocks": (lambda num: head(MTP, num, jnp.float32), weights_of(MTP)),
    "hybrid": (lambda num: hybrid(head(EAGLE3, num, jnp.float32), VOCAB, 2, 3), weights_of(EAGLE3)),
}


def coins(num):
    """A rule that accepts most drafts, whatever they are, so that random models move by several tokens a round."""
    return functools.partial(verify.synthetic, conditional_rates=(0.7,) * num, best_follows=True)


def rows_of(texts, capacity=512):
    tokens = np.zeros((len(texts), capacity), np.int32)
    for row, text in enumerate(texts):
        tokens[row, : len(text)] = text
    num = len(texts)
    ones = np.ones(num, np.float32)
    return {
        "tokens": tokens,
        "length": np.array([len(text) for text in texts], np.int32),
        "max_length": np.full(num, 400, np.int32),
        "stop_tokens": np.full((num, 8), step.PAD, np.int32),
        "finish": np.zeros(num, np.int32),
        "temperature": 0 * ones,
        "top_k": np.zeros(num, np.int32),
        "top_p": ones,
        "min_p": 0 * ones,
        "seed_low": np.arange(num, dtype=np.uint32),
        "seed_high": np.zeros(num, np.uint32),
    }


class Decoding:
    """A system's programs, and one round whose proposal can be looked at."""

    def __init__(self, drafter, params):
        system = step.System(functools.partial(decoder.apply, TARGET.config), drafter, coins(MOST))
        cache = functools.partial(decoder.init_cache, TARGET.config, dtype=jnp.dtype("float32"))
        self.programs = generate.Programs(system, cache)
        self.params = step.Params(TARGET.params, params)

        def one_round(params, state):
            return step.propose(system, params, state)[0].tokens, step.speculative_step(system, params, state)

        self.round = jax.jit(one_round)
        self.propose = jax.jit(lambda params, state: step.propose(system, params, state)[0].tokens)

    def start(self, texts):
        state = self.programs.init(self.params, rows_of(texts))
        for begin, size in generate.prefill_windows(max(map(len, texts)) - 1):
            state = self.programs.prefill(self.params, state, begin, size)
        return state


@pytest.mark.parametrize("name", METHODS)
def test_after_rounds_without_drafts_the_drafter_knows_what_it_would_have_known(name):
    with_drafts, weights = METHODS[name]
    counts = draft_counts(MOST)
    always = Decoding(with_drafts(MOST), weights)
    drafters = [with_drafts(num) for num in counts if num]
    pacer = Decoding(paced(drafters, TARGET.config.width, jnp.float32), PacedParams(weights, jnp.ones(len(counts))))
    texts = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 1, 4, 1], [2, 7, 2, 7, 2], [8, 2, 8]]
    state = pacer.start(texts)
    compared = 0
    long = pacing_drafter.KEPT + 5  # more than is kept
    for choice in (3, 0, 2, 0, 0, 1, *(0,) * 6, 3, *(0,) * long, 2, *(0,) * 4, 3, 3, 0, 2):
        seconds = jnp.ones(len(counts)).at[choice].set(1e-3)
        params = pacer.params._replace(drafter=PacedParams(weights, seconds))
        known = [np.asarray(state.tokens[row, : state.length[row]]).tolist() for row in range(len(texts))]
        drafts, state = pacer.round(params, state)
        drafts, num = np.asarray(drafts), counts[choice]
        assert (drafts[:, num:] == NO_DRAFT).all()
        if num:
            expected = np.asarray(always.propose(always.params, always.start(known)))[:, :num]
            np.testing.assert_array_equal(drafts[:, :num], expected, err_msg=f"{name}: {known}")
            compared += (expected != NO_DRAFT).sum()
        else:
            assert (state.length - np.array([len(text) for text in known]) == 1).all()
    assert compared > 20


def choice_of(passed, seconds, running=None, rounds=0):
    drafter = paced([ngram(num, 1, 2) for num in (1, 2, 4)], 8, jnp.float32)
    passed = jnp.asarray(passed, jnp.float32)
    state = drafter.init(PacedParams((), jnp.ones(4)), len(passed), 512)
    running = jnp.ones(len(passed), bool) if running is None else jnp.asarray(running)
    state = state.replace(passed=passed, running=running, rounds=jnp.int32(rounds))
    texts = [[1, 2, 1, 2, 1, 2, 1]] * len(passed)
    system = step.System(None, drafter, None)
    rows = rows_of(texts)
    programs = generate.Programs(system, lambda batch, capacity: ())
    decode_state = programs.init(step.Params((), PacedParams((), jnp.ones(4))), rows)
    params = PacedParams((), jnp.asarray(seconds, jnp.float32))
    proposal, _ = drafter.propose(params, state, decode_state.context)
    return int(proposal.num_drafts.max())


def test_the_choice_gives_the_most_tokens_a_second():
    # 1, 1 + .5, 1 + .5 + .25 and 1 + .5 + .25 + .125 + .0625 tokens for 0, 1, 2 and 4 drafts.
    half = [[0.5] * 4]
    assert choice_of(half, [1.0, 1.6, 2.0, 2.5]) == 0
    assert choice_of(half, [1.0, 1.2, 1.5, 2.0]) == 1
    assert choice_of(half, [1.0, 1.3, 1.35, 2.0]) == 2
    assert choice_of(half, [1.0, 1.3, 1.5, 1.51]) == 4


def test_drafts_must_promise_more_than_they_cost():
    """By 0.05 tokens and 30 % of what a window costs: where it costs much, more is at stake."""
    one = [[0.5, 0.0, 0.0, 0.0]]
    dear = 9.0
    assert choice_of(one, [1.0, 1.0 + 0.44 / 1.3, dear, dear]) == 1
    assert choice_of(one, [1.0, 1.0 + 0.46 / 1.3, dear, dear]) == 0
    assert choice_of([[0.06, 0.0, 0.0, 0.0]], [1.0, 1.0, dear, dear]) == 1
    assert choice_of([[0.04, 0.0, 0.0, 0.0]], [1.0, 1.001, dear, dear]) == 0
    # Of several that pay enough it is the one with the most tokens a second.
    assert choice_of([[0.9, 0.9, 0.0, 0.0]], [1.0, 1.5, 2.0, dear]) == 2


def test_the_choice_is_for_the_rows_that_run():
    rows = [[0.9] * 4, [0.0] * 4]
    seconds = [1.0, 1.3, 1.7, 2.4]
    assert choice_of(rows, seconds, running=[True, False]) == 4
    assert choice_of(rows, seconds, running=[False, True]) == 0
    assert choice_of(rows, seconds) == 1  # 1, 1.45, 1.855 and 2.55 tokens


def test_now_and_then_more_drafts_are_tried():
    hopeless = [[0.0] * 4]
    # A round with a draft takes 0.3 plain ones more: 0.75 % of 40.
    assert choice_of(hopeless, [1.0, 1.3, 1.6, 2.2], rounds=39) == 0
    assert choice_of(hopeless, [1.0, 1.3, 1.6, 2.2], rounds=41) == 1
    # One with 4 instead of 2 drafts, where 2 are best: 0.48 of 1.2, 0.75 % of 53 of these.
    half = [[0.9, 0.9, 0.0, 0.0]]
    assert choice_of(half, [1.0, 1.1, 1.2, 1.68], rounds=53) == 2
    assert choice_of(half, [1.0, 1.1, 1.2, 1.68], rounds=54) == 4


def test_what_is_learnt_from_a_round():
    before, often = jnp.full((4, 3), 0.5), jnp.full((4, 3), 1000)
    # All of 2 drafts passed; the first failed; the second failed; a row that is done.
    round_ = jnp.array([3, 1, 2, 0]), jnp.int32(2)
    for num_seen, rate in ((often, pacing_drafter.RATE), (jnp.full((4, 3), 2), 1 / (3 + pacing_drafter.PRIOR_ROUNDS))):
        after, seen = pacing_drafter._update(before, num_seen, *round_)
        up, down = 0.5 + rate * 0.5, 0.5 - rate * 0.5
        np.testing.assert_allclose(after, [[up, up, 0.5], [down, 0.5, 0.5], [up, down, 0.5], [0.5] * 3], rtol=1e-6)
        np.testing.assert_array_equal(seen - num_seen, [[1, 1, 0], [1, 0, 0], [1, 1, 0], [0, 0, 0]])
    unchanged = pacing_drafter._update(before, often, jnp.array([1] * 4), jnp.int32(0))
    jax.tree.map(np.testing.assert_array_equal, unchanged, (before, often))


def test_drafts_of_rows_that_are_done_say_nothing_about_the_others():
    """A row that repeats itself but is done; one that runs, and has no drafts, so that no window was paid for."""
    drafter = paced([ngram(num, 1, 2) for num in (1, 2, MOST)], TARGET.config.width, jnp.float32)
    decoding = Decoding(drafter, PacedParams((), jnp.array([1.0, 1e-3, 1.0, 1.0])))
    state = decoding.start([[1, 2, 1, 2, 1, 2, 1], [10, 11, 12, 13]])
    state = state.replace(finish=jnp.array([step.STOP, step.RUNNING]))
    for running, seen in (([True, True], [0, 1]), ([False, True], [0, 0])):
        paced_state = state.drafter.replace(running=jnp.array(running))
        drafts, after = decoding.round(decoding.params, state.replace(drafter=paced_state))
        assert (np.asarray(drafts) == NO_DRAFT).all()
        np.testing.assert_array_equal(after.drafter.num_seen[:, 0], seen)


def test_costs_are_measured_until_the_fastest_three_of_each_choice_agree(monkeypatch):
    """Rounds take 1, 2, ... seconds and calls 0.5; what else the machine does slows some repeats down."""
    drafters = [ngram(num, 1, 2) for num in (1, 2)]
    decoding = Decoding(paced(drafters, TARGET.config.width, jnp.float32), PacedParams((), jnp.ones(3)))

    def found(slow):
        repeats = []

        def timed(programs, params, state, rounds):
            choice = int(state.drafter.forced)
            if not rounds and choice == 0:
                repeats.append(len(repeats))
            return state, 0.5 + rounds * (choice + 1.0) * (2.0 + repeats[-1] / 10 if slow(repeats[-1], choice) else 1.0)

        monkeypatch.setattr(pacing, "_timed", timed)
        return pacing.round_seconds(decoding.programs, decoding.params, rows_of([[1]])).tolist(), len(repeats)

    assert found(lambda repeat, choice: False) == ([1, 2, 3], pacing.FEWEST)
    assert found(lambda repeat, choice: choice == 0 and repeat < 5 and repeat != 1) == ([1, 2, 3], 7)
    assert found(lambda repeat, choice: choice == 0 and repeat != 7) == ([1, 2, 3], pacing.MOST)


PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 1, 4, 1], [2, 7, 2, 7, 2], [8], [5, 5, 5, 5, 5, 5, 5]]


@pytest.fixture
def measured(monkeypatch):
    """Costs as a test wants them, instead of this machine's."""
    costs = {}

    def seconds(programs, params, rows):
        found = pacing.round_seconds(programs, params, rows)
        assert found.shape == params.drafter.seconds.shape and (found > 0).all() and np.isfinite(found).all()
        return np.asarray(costs["seconds"], np.float32) if "seconds" in costs else found

    monkeypatch.setattr(generate, "round_seconds", seconds)
    return costs


@pytest.mark.parametrize(("method", "temperature"), [("ngram", 1.0), ("draft_model", 0.0)])
def test_texts_are_those_of_plain_decoding(method, temperature, measured, monkeypatch):
    monkeypatch.setattr(pacing_drafter, "LOOKS", 30.0)
    config = specjax.SpeculativeConfig(
        method=method,
        num_speculative_tokens="auto",
        rejection_sampling_strategy="typical-acceptance",
        **({"prompt_lookup_min": 1, "prompt_lookup_max": 2} if method == "ngram" else {"model": "unused"}),
    )
    # Such costs that nothing pays: rounds without drafts, and a try in every third.
    measured["seconds"] = [1.0, 50.0, 60.0, 70.0, 80.0, 90.0]
    draft = OTHER if method == "draft_model" else None
    decoder_ = specjax.SpeculativeDecoder(TARGET, config, draft=draft, max_batch_size=4)
    params = [specjax.SamplingParams(max_tokens=40, temperature=temperature, seed=seed) for seed in range(4)]
    plain = specjax.SpeculativeDecoder(TARGET, max_batch_size=4).generate(PROMPTS, params)
    result = decoder_.generate(PROMPTS, params)
    assert result.token_ids == plain.token_ids
    assert 0 < result.metrics.drafted < 6 * plain.metrics.num_tokens / 3


def test_drafts_that_always_pass_are_made_and_others_given_up(measured):
    config = specjax.SpeculativeConfig(method="draft_model", model="unused", num_speculative_tokens="auto")
    measured["seconds"] = [1.0, 1.2, 1.3, 1.4, 1.5, 1.6]
    perfect = specjax.SpeculativeDecoder(TARGET, config, draft=TARGET, max_batch_size=1)
    result = perfect.generate([PROMPTS[0]], specjax.SamplingParams(max_tokens=128))
    assert result.metrics.acceptance_length > 5.0
    measured["seconds"] = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    hopeless = specjax.SpeculativeDecoder(TARGET, config, draft=OTHER, max_batch_size=1)
    result = hopeless.generate([PROMPTS[0]], specjax.SamplingParams(max_tokens=128))
    # The prior is given up within a few rounds, and not tried again for 133.
    assert result.metrics.drafted < 40


def test_there_is_room_for_all_that_is_learnt_at_once():
    config = specjax.SpeculativeConfig(method="draft_model", model="unused", num_speculative_tokens="auto")
    decoder_ = specjax.SpeculativeDecoder(TARGET, config, draft=OTHER, max_batch_size=1)
    [request] = decoder_.requests([[1] * 200], specjax.SamplingParams(max_tokens=100))
    assert request.longest(decoder_) >= 300 + pacing_drafter.KEPT


def test_costs_of_a_hybrid_are_those_of_its_head_and_of_as_many_blocks_of_the_cache(monkeypatch):
    """What is measured is a text with nothing to copy, whose rounds all end in one block of the cache."""
    started = []
    with_drafts, weights = METHODS["hybrid"]
    drafters = [with_drafts(num) for num in draft_counts(MOST) if num]
    decoding = Decoding(paced(drafters, TARGET.config.width, jnp.float32), PacedParams(weights, jnp.ones(4)))
    init = decoding.programs.init

    def watched(params, rows):
        started.append(rows)
        return init(params, rows)

    monkeypatch.setattr(decoding.programs, "init", watched)
    pacing.round_seconds(decoding.programs, decoding.params, rows_of([[1]] * 2))
    assert started
    for rows in started:
        length = int(rows["length"][0])
        text = rows["tokens"][0, :length]
        assert (text[:-1] != text[-1]).all()
        assert length % 64 and length // 64 == (length + pacing.ROUNDS * (MOST + 1) + MOST + 1) // 64


def test_costs_are_measured_once_for_a_batch_size(measured):
    config = specjax.SpeculativeConfig(method="ngram", num_speculative_tokens="auto", prompt_lookup_min=1)
    decoder_ = specjax.SpeculativeDecoder(TARGET, config, max_batch_size=4)
    for prompts in (PROMPTS[:1], PROMPTS[:1], PROMPTS, PROMPTS):
        decoder_.generate(prompts, specjax.SamplingParams(max_tokens=4))
    assert sorted(decoder_._round_seconds) == [1, 4]


def test_draft_counts():
    assert draft_counts(1) == (0, 1)
    assert draft_counts(4) == (0, 1, 2, 3, 4)
    assert draft_counts(5) == (0, 1, 2, 3, 4, 5)
    assert draft_counts(10) == (0, 1, 2, 3, 4, 6, 8, 10)
