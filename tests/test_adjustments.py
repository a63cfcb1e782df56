"""Bias, penalties, thinking phase and log-probabilities, against decoding token by token without a cache."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from laws import RowParams
from models import LetterTokenizer, next_logits
from test_generate import NGRAM, PROMPTS, draft_config
from test_rules import shallow_target
from test_sampling import state_of

from specjax import SamplingParams, SpeculativeDecoder, generate
from specjax.drafters.base import NO_DRAFT
from specjax.errors import ConfigError
from specjax.sampling import Adjustment, ThinkingPhase, adjust
from specjax.tokenizer import think_tokens

NUM = 24
OFTEN = 61
"""A token that the random target likes to repeat."""

CASES = {
    "none": {},
    "repetition": {"repetition_penalty": 1.3},
    "frequency": {"frequency_penalty": 0.3},
    "repeats wanted": {"frequency_penalty": -0.5},
    "presence": {"presence_penalty": 1.5},
    "forced": {"logit_bias": {7: 100}},
    "banned": {"logit_bias": {OFTEN: -100}},
    "all": {
        "logit_bias": {OFTEN: 2.0, 30: -3.0},
        "repetition_penalty": 1.2,
        "frequency_penalty": 0.25,
        "presence_penalty": 0.4,
    },
}
ASKING = [name not in ("none", "forced") for name in CASES]
SYSTEMS = ["plain", "copied", "drafted"]


def requests(**fields):
    """The parameters of a batch, one row for each of CASES."""
    return [
        SamplingParams(max_tokens=NUM, logprobs=asks, seed=row, **case, **fields)
        for row, (case, asks) in enumerate(zip(CASES.values(), ASKING, strict=True))
    ]


@pytest.fixture(scope="module")
def target():
    return dataclasses.replace(shallow_target(0), tokenizer=LetterTokenizer())


@pytest.fixture(scope="module")
def systems(target):
    """Plain decoding, n-grams, and the target as its own drafter, which knows nothing of bias and penalties."""
    return {
        "plain": SpeculativeDecoder(target),
        "copied": SpeculativeDecoder(target, NGRAM),
        "drafted": SpeculativeDecoder(target, draft_config(), draft=target),
    }


@pytest.fixture(scope="module")
def greedy(systems):
    """What each system makes of every case at temperature 0."""
    return {name: system.generate([PROMPTS[1]] * len(CASES), requests()) for name, system in systems.items()}


@pytest.fixture(scope="module")
def sampled(systems):
    """The same at temperature 1."""
    return {
        name: system.generate([PROMPTS[1]] * len(CASES), requests(temperature=1.0)) for name, system in systems.items()
    }


def adjusted(logits, params, prompt, output):
    """float64[V]: bias, repetition, frequency and presence penalty, token by token."""
    logits = np.array(logits, np.float64)
    for token, bias in params.logit_bias:
        logits[token] += bias
    for token in {*prompt, *output}:
        factor = params.repetition_penalty
        logits[token] = logits[token] / factor if logits[token] > 0 else logits[token] * factor
    for token in set(output):
        logits[token] -= params.frequency_penalty * output.count(token) + params.presence_penalty
    return logits


@pytest.fixture(scope="module")
def expected(target):
    """Greedy decoding of every case in float64, one pass over the whole text for each token."""
    texts = []
    for params in requests():
        output = []
        while len(output) < NUM:
            logits = adjusted(next_logits(target, [*PROMPTS[1], *output]), params, PROMPTS[1], output)
            best, second = np.sort(logits)[::-1][:2]
            assert best - second > 1e-4  # rounding cannot decide
            output.append(int(np.argmax(logits)))
        texts.append(output)
    return dict(zip(CASES, texts, strict=True))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("system", SYSTEMS)
def test_every_system_decodes_with_bias_and_penalties_as_without_a_cache(system, case, greedy, expected):
    """The case "none" is a row that is left as it is beside rows that are not."""
    assert greedy[system].token_ids[list(CASES).index(case)] == expected[case]


def test_the_cases_change_the_text_and_have_drafts_accepted(greedy, expected):
    assert len({tuple(text) for text in expected.values()}) == len(CASES)
    assert set(expected["forced"]) == {7}
    assert OFTEN in expected["none"] and OFTEN not in expected["banned"]
    assert greedy["copied"].metrics.accepted > 20 and greedy["drafted"].metrics.accepted > 20


def test_a_bias_outside_the_vocabulary_is_refused(systems):
    with pytest.raises(ConfigError, match="SamplingParams.logit_bias: 97"):
        systems["plain"].generate([[1]], SamplingParams(logit_bias={97: 1.0}))


# The function itself


def adjustment_of(counts, **fields):
    """One row over four tokens that changes nothing; token 0 is in the prompt."""
    one = jnp.ones(1)
    given = {"bias": jnp.zeros((1, 4)), "repetition_penalty": one, "frequency_penalty": 0 * one}
    given |= {"presence_penalty": 0 * one, "in_prompt": jnp.array([[True, False, False, False]])}
    return Adjustment(**given | {k: jnp.asarray(v) for k, v in fields.items()}, counts=jnp.array([counts]))


def adjusted_by(adjustment, drafts):
    logits = jnp.tile(jnp.array([2.0, -1.0, 4.0, 0.5]), (1, 3, 1))
    return adjust(logits, state_of([RowParams()]).replace(adjustment=adjustment), jnp.array([drafts]))[0].tolist()


ALL = {
    "bias": [[0.0, 0.0, 0.0, 1.0]],
    "repetition_penalty": [2.0],
    "frequency_penalty": [0.5],
    "presence_penalty": [0.25],
}


def test_adjusted_logits_are_those_by_hand_and_see_the_rounds_earlier_drafts():
    """Token 0 is in the prompt, 1 in the output, 2 is drafted twice, 3 has a bias."""
    found = adjusted_by(adjustment_of([0, 1, 0, 0], **ALL), [2, 2])
    # 4 -> 4 / 2 - .5 - .25 behind one draft of token 2, and .5 less behind two.
    assert found == [[1.0, -2.75, 4.0, 1.5], [1.0, -2.75, 1.25, 1.5], [1.0, -2.75, 0.75, 1.5]]


def test_placeholders_are_no_output():
    adjustment = adjustment_of([0, 1, 0, 0], **ALL)
    assert adjusted_by(adjustment, [NO_DRAFT, NO_DRAFT]) == [[1.0, -2.75, 4.0, 1.5]] * 3


@pytest.mark.parametrize(
    ("fields", "first"),
    [
        ({"repetition_penalty": [2.0]}, 1.0),
        ({"frequency_penalty": [2.0]}, 2.0),
        ({"presence_penalty": [2.0]}, 2.0),
    ],
)
def test_a_token_of_the_prompt_counts_for_the_repetition_penalty_alone(fields, first):
    assert adjusted_by(adjustment_of([0, 0, 0, 0], **fields), [3, 3])[0] == [first, -1.0, 4.0, 0.5]


def test_the_bias_comes_before_the_repetition_penalty():
    """-1 + 3 is positive and so divided: 1. The other order would give -2 + 3."""
    found = adjusted_by(adjustment_of([0, 5, 0, 0], bias=[[0.0, 2.5, 0.0, 0.0]], repetition_penalty=[3.0]), [3, 3])
    assert found[0][1] == pytest.approx(0.5)


def test_without_an_adjustment_logits_are_left_alone():
    logits = jnp.ones((1, 3, 4))
    assert adjust(logits, state_of([RowParams()]), jnp.zeros((1, 2), jnp.int32)) is logits


def test_only_committed_tokens_are_counted_as_output():
    after = adjustment_of([0, 1, 0, 0]).observe(jnp.array([[1, 3, 3, 2]]), jnp.array([3]))
    assert after.counts.tolist() == [[0, 2, 0, 2]]
    assert after.observe(jnp.array([[1, 1, 1, 1]]), jnp.array([0])).counts.tolist() == [[0, 2, 0, 2]]


# The thinking phase

START, END = 8, 9


@pytest.mark.parametrize(
    ("tokens", "num_new", "phases"),
    [
        ([1, 2, 3], 3, (False, True)),
        ([1, START, 3], 3, (True, True)),
        ([1, END, 3], 3, (False, False)),
        ([START, 2, END], 3, (False, False)),
        ([END, 2, START], 3, (True, True)),
        ([START, END, START], 3, (True, True)),
        ([1, 2, START], 2, (False, True)),
        ([1, END, START], 2, (False, False)),
        ([START, END, 1], 1, (True, True)),
        ([END, START, END], 0, (False, True)),
    ],
)
def test_the_last_of_the_two_tokens_that_were_committed_decides_the_phase(tokens, num_new, phases):
    """phases: behind the tokens, for a row that did not think before and for one that did."""
    before = ThinkingPhase(jnp.array([False, True]), jnp.int32(START), jnp.int32(END))
    after = before.observe(jnp.array([tokens] * 2), jnp.array([num_new] * 2))
    assert tuple(after.thinking.tolist()) == phases


@pytest.mark.parametrize(
    ("prompt", "thinks"),
    [([1, 2], True), ([START, 1], True), ([START, 1, END], False), ([END, START], True), ([START, END, 2], False)],
)
@pytest.mark.parametrize("ids", [(START, END), (0, END), (START, 0)])
def test_the_prompt_decides_the_first_phase_and_its_padding_does_not(prompt, thinks, ids):
    """Prompts are padded with token 0, which may be one of the two."""
    swap = {START: ids[0], END: ids[1]}
    tokens = np.zeros((1, 16), np.int32)
    tokens[0, : len(prompt)] = [swap.get(token, token) for token in prompt]
    rows = {"tokens": tokens, "length": np.array([len(prompt)]), "think_tokens": np.array(ids, np.int32)}
    assert generate._phase(rows).thinking.tolist() == [thinks]


def test_rows_have_no_phase_where_no_rule_asks():
    assert generate._phase({"tokens": np.zeros((1, 16), np.int32), "length": np.array([1])}) is None


class Vocabulary:
    """A tokenizer of which only the vocabulary is known."""

    def __init__(self, *tokens):
        self.tokens = tokens

    def get_vocab(self):
        return {token: index for index, token in enumerate(self.tokens)}


@pytest.mark.parametrize(
    ("tokenizer", "found"),
    [
        (Vocabulary("a", "<think>", "</think>"), (1, 2)),
        (Vocabulary("[/THINK]", "[THINK]"), (1, 0)),
        (Vocabulary("<think>", "[THINK]", "</think>"), (0, 2)),
        (Vocabulary("<think>", "a"), None),
        (Vocabulary("<think>", "[/THINK]"), None),
        (None, None),
    ],
)
def test_think_tokens_are_a_pair_or_none(tokenizer, found):
    assert think_tokens(tokenizer) == found


@pytest.mark.parametrize("tokenizer", [None, LetterTokenizer()])
def test_relaxed_acceptance_of_a_model_that_does_not_reason_is_refused(tokenizer, target):
    config = NGRAM.model_copy(update={"rejection_sampling_strategy": "relaxed"})
    with pytest.raises(ConfigError, match="SpeculativeConfig.rejection_sampling_strategy='relaxed'"):
        SpeculativeDecoder(dataclasses.replace(target, tokenizer=tokenizer), config)


# Log-probabilities


def log_probabilities(target, tokens):
    """Of each token behind PROMPTS[1], by the target's own logits, in float64."""
    found = []
    for index, token in enumerate(tokens):
        logits = next_logits(target, [*PROMPTS[1], *tokens[:index]]).astype(np.float64)
        found.append(logits[token] - logits.max() - np.log(np.exp(logits - logits.max()).sum()))
    return found


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("system", SYSTEMS)
def test_logprobs_are_the_targets_own_before_adjustment_and_temperature(system, temperature, target, greedy, sampled):
    result = (sampled if temperature else greedy)[system]
    for asks, tokens, logprobs in zip(ASKING, result.token_ids, result.logprobs, strict=True):
        if asks:
            np.testing.assert_allclose(logprobs, log_probabilities(target, tokens), atol=1e-4)
        else:
            assert logprobs is None


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_text_cut_at_a_stop_string_has_as_many_logprobs_as_tokens_also_when_streamed(system, systems, greedy):
    params = [dataclass.model_copy(update={"stop": greedy[system].texts[1][9:12]}) for dataclass in requests()]
    result = systems[system].generate([PROMPTS[1]] * len(CASES), params)
    assert result.finish_reasons[1] == "stop" and len(result.token_ids[1]) < NUM
    for row, (tokens, logprobs) in enumerate(zip(result.token_ids, result.logprobs, strict=True)):
        if ASKING[row]:
            np.testing.assert_allclose(logprobs, greedy[system].logprobs[row][: len(tokens)], atol=1e-6)
        else:
            assert logprobs is None
    stream = systems[system].stream([PROMPTS[1]] * len(CASES), params)
    assert list(stream)
    assert stream.result.token_ids == result.token_ids
    assert stream.result.logprobs == result.logprobs
