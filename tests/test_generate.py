"""Generation: the same text with and without speculation, alone and in a batch, whole and streamed."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from models import VOCAB, LetterTokenizer, decode_as_usual, next_logits, random_target

import specjax
from specjax import SamplingParams, SpeculativeConfig, SpeculativeDecoder, generate
from specjax.errors import ConfigError, SpecJAXError
from specjax.metrics import Metrics

PROMPTS = [np.random.RandomState(length).randint(0, VOCAB, length).tolist() for length in (1, 5, 40, 17, 3)]
MIXED = [
    SamplingParams(temperature=0.0, max_tokens=30),
    SamplingParams(temperature=1.0, max_tokens=24, seed=1),
    SamplingParams(temperature=0.8, top_k=10, max_tokens=28, seed=2),
    SamplingParams(temperature=1.2, top_p=0.8, max_tokens=20, seed=3),
    SamplingParams(temperature=1.0, min_p=0.1, max_tokens=30, seed=4),
]
NGRAM = SpeculativeConfig(method="ngram", num_speculative_tokens=4, prompt_lookup_min=1, prompt_lookup_max=3)


def draft_config(**fields):
    return SpeculativeConfig(**({"method": "draft_model", "model": "given", "num_speculative_tokens": 3} | fields))


@pytest.fixture(scope="module")
def target():
    return random_target(0)


@pytest.fixture(scope="module")
def plain(target):
    return SpeculativeDecoder(target)


@pytest.fixture(scope="module")
def drafted(target):
    return SpeculativeDecoder(target, draft_config(), draft=random_target(1))


@pytest.fixture(scope="module")
def self_drafted(target):
    """The target drafts for itself, which accepts everything."""
    return SpeculativeDecoder(target, draft_config(), draft=target)


@pytest.fixture(scope="module")
def copied(target):
    return SpeculativeDecoder(target, NGRAM)


@pytest.mark.filterwarnings("ignore::specjax.DraftWarning")  # two random models hardly ever agree
@pytest.mark.parametrize("system", ["drafted", "self_drafted", "copied"])
def test_greedy_speculation_equals_greedy_decoding(system, plain, request):
    params = SamplingParams(max_tokens=40)
    speculative = request.getfixturevalue(system).generate(PROMPTS, params)
    assert speculative.token_ids == plain.generate(PROMPTS, params).token_ids
    assert speculative.metrics.rounds < 40 * len(PROMPTS)


def test_greedy_decoding_equals_a_loop_without_a_cache(target, plain):
    text = list(PROMPTS[1])
    for _ in range(12):
        text.append(int(np.argmax(next_logits(target, text))))
    assert plain.generate([PROMPTS[1]], SamplingParams(max_tokens=12)).token_ids[0] == text[len(PROMPTS[1]) :]


@pytest.mark.parametrize("system", ["plain", "drafted", "copied"])
def test_a_row_does_not_depend_on_its_neighbours_or_the_batch_size(system, request):
    together = request.getfixturevalue(system).generate(PROMPTS, MIXED)
    for row, (prompt, params) in enumerate(zip(PROMPTS, MIXED, strict=True)):
        alone = request.getfixturevalue(system).generate([prompt], params)
        assert alone.token_ids[0] == together.token_ids[row]


def test_equal_seeds_give_equal_texts_and_other_seeds_others(drafted):
    def tokens(seed):
        return drafted.generate([PROMPTS[2]], SamplingParams(temperature=1.0, max_tokens=30, seed=seed)).token_ids

    assert tokens(5) == tokens(5)
    # 30 draws of a bit of entropy or more: odds of equality below 1e-9. 5 + 2**40 differs in the high half only.
    assert tokens(5) != tokens(6)
    assert tokens(5) != tokens(5 + 2**40)


def test_a_target_that_drafts_for_itself_has_every_draft_accepted(self_drafted):
    metrics = self_drafted.generate(PROMPTS[:2], SamplingParams(temperature=1.0, max_tokens=41)).metrics
    # 41 tokens are 10 rounds of 4 and a last one that is cut after one token.
    assert metrics.acceptance_counts.tolist() == [2, 0, 0, 20]


@pytest.mark.filterwarnings("ignore::specjax.DraftWarning")
def test_sampled_speculation_has_the_frequencies_of_the_target(target):
    """Second token of 2000 seeded rows against the exact law, with sampled drafts of an unrelated model."""
    system = SpeculativeDecoder(target, draft_config(), draft=random_target(1), max_batch_size=250)
    params = [SamplingParams(temperature=0.7, top_k=4, max_tokens=2, seed=seed) for seed in range(2000)]
    drawn = np.array(system.generate([PROMPTS[1]] * 2000, params).token_ids)
    expected = {}
    for first, mass in _law(target, PROMPTS[1], params[0]).items():
        for second, more in _law(target, [*PROMPTS[1], first], params[0]).items():
            expected[first, second] = mass * more
    observed = {pair: np.mean((drawn == pair).all(axis=1)) for pair in expected}
    assert sum(observed.values()) == pytest.approx(1)
    # A pair's frequency over 2000 draws has a standard deviation of at most 0.0112; six of them are exceeded by one of
    # the 16 pairs with odds below 4e-8. The seeds are fixed.
    assert max(abs(observed[pair] - expected[pair]) for pair in expected) < 6 * 0.0112


def _law(target, text, params):
    logits = next_logits(target, text).astype(np.float64) / params.temperature
    best = np.argsort(logits)[::-1][: params.top_k]
    weights = np.exp(logits[best] - logits[best].max())
    return dict(zip(best.tolist(), weights / weights.sum(), strict=True))


@pytest.mark.parametrize("system", ["plain", "self_drafted", "copied"])
def test_a_stop_token_ends_the_row_and_is_the_last_token(system, plain, request):
    whole = plain.generate([PROMPTS[2]], SamplingParams(max_tokens=30)).token_ids[0]
    stop = whole[9]
    result = request.getfixturevalue(system).generate(
        [PROMPTS[2], PROMPTS[0]], [SamplingParams(max_tokens=30, stop_token_ids=[stop]), SamplingParams(max_tokens=30)]
    )
    assert result.token_ids[0] == whole[: whole.index(stop) + 1]
    assert result.finish_reasons[0] == "stop"
    assert len(result.token_ids[1]) == 30 and result.finish_reasons[1] == "length"


def test_the_targets_own_stop_tokens_end_a_row_unless_ignored(target, plain):
    whole = plain.generate([PROMPTS[2]], SamplingParams(max_tokens=20)).token_ids[0]
    stopping = SpeculativeDecoder(dataclasses.replace(target, stop_token_ids=(whole[4],)), NGRAM)
    assert (
        stopping.generate([PROMPTS[2]], SamplingParams(max_tokens=20)).token_ids[0]
        == whole[: whole.index(whole[4]) + 1]
    )
    ignoring = stopping.generate([PROMPTS[2]], SamplingParams(max_tokens=20, ignore_eos=True))
    assert ignoring.token_ids[0] == whole


@pytest.mark.parametrize("max_tokens", [1, 2, 3, 4, 5])
def test_max_tokens_is_never_exceeded(self_drafted, max_tokens):
    result = self_drafted.generate(PROMPTS, SamplingParams(max_tokens=max_tokens))
    assert {len(tokens) for tokens in result.token_ids} == {max_tokens}
    assert set(result.finish_reasons) == {"length"}


def test_a_row_ends_where_the_targets_context_ends():
    small = random_target(0, max_position=32)
    system = SpeculativeDecoder(small, draft_config(), draft=small)
    result = system.generate([list(range(20))], SamplingParams(max_tokens=100))
    assert len(result.token_ids[0]) == 12 and result.finish_reasons == ["length"]


def test_a_prompt_longer_than_a_prefill_window_decodes_as_without_a_cache():
    target = random_target(0, max_position=2048)
    prompt = np.random.RandomState(3).randint(0, VOCAB, 1100).tolist()
    one = SpeculativeDecoder(target).generate([prompt, PROMPTS[0]], SamplingParams(max_tokens=5)).token_ids
    assert one[0][0] == int(np.argmax(next_logits(target, prompt, 2048)))
    assert one[1] == SpeculativeDecoder(target).generate([PROMPTS[0]], SamplingParams(max_tokens=5)).token_ids[0]


def test_prefill_windows_cover_every_position_once_and_in_order():
    for length in (0, 1, 16, 17, 511, 512, 513, 1500):
        windows = generate.prefill_windows(length)
        assert all(start == sum(size for _, size in windows[:i]) for i, (start, _) in enumerate(windows))
        covered = sum(size for _, size in windows)
        assert length <= covered < max(2 * length, length + 16) + 1


def test_a_second_call_in_the_same_bucket_compiles_nothing(target):
    system = SpeculativeDecoder(target, NGRAM)
    system.generate([PROMPTS[2]], SamplingParams(max_tokens=10))
    before = system.programs.num_compiled
    params = SamplingParams(max_tokens=33, temperature=0.5, top_k=3, seed=9)
    result = system.generate([PROMPTS[2][:-3]], params)
    assert system.programs.num_compiled == before
    assert result.metrics.compile_seconds == 0


def test_caches_are_updated_in_place(monkeypatch):
    """The decode program aliases its whole state and copies no cache."""
    decode_as_usual(monkeypatch)
    target = random_target(0)
    for config, draft in ((None, None), (NGRAM, None), (draft_config(), random_target(1))):
        system = SpeculativeDecoder(target, config, draft=draft)
        system.generate([PROMPTS[1]], SamplingParams(max_tokens=5), min_capacity=4096)
        compiled = [program for key, program in system.programs._compiled.items() if key[0] == "decode"]
        caches = (
            2 * 2 * 2 * 4096 * 8 * 4 * (2 if draft else 1)
        )  # K and V, layers, heads, capacity, width, bytes, models
        analysis = compiled[0].memory_analysis()
        assert analysis.alias_size_in_bytes >= caches
        assert analysis.temp_size_in_bytes < caches / 4


def test_more_prompts_than_the_batch_holds_are_decoded_in_groups(target, plain):
    small = SpeculativeDecoder(target, NGRAM, max_batch_size=2)
    assert small.generate(PROMPTS, MIXED).token_ids[0] == plain.generate(PROMPTS, MIXED).token_ids[0]
    assert len(small.generate(PROMPTS, MIXED).token_ids) == len(PROMPTS)


def test_eager_execution_gives_the_same_tokens(target, plain):
    eager = SpeculativeDecoder(target, NGRAM.model_copy(update={"enforce_eager": True}))
    params = SamplingParams(max_tokens=4)
    assert eager.generate([PROMPTS[1]], params).token_ids == plain.generate([PROMPTS[1]], params).token_ids
    assert eager.programs.num_compiled == 0


def test_the_greedy_rule_decodes_like_the_residual_rule(target, plain):
    system = SpeculativeDecoder(target, NGRAM.model_copy(update={"rejection_sampling_strategy": "greedy"}))
    params = SamplingParams(max_tokens=20)
    assert system.generate(PROMPTS, params).token_ids == plain.generate(PROMPTS, params).token_ids


def test_rejected_entries_leave_the_cache_as_a_fresh_prefill_would(target):
    """After rounds with rejections the next round's logits equal those of a fresh prefill of the same text."""
    system = SpeculativeDecoder(target, draft_config(), draft=random_target(1), max_batch_size=1)
    long = system.generate([PROMPTS[2]], SamplingParams(max_tokens=25)).token_ids[0]
    again = system.generate([PROMPTS[2] + long[:13]], SamplingParams(max_tokens=12)).token_ids[0]
    assert again == long[13:]


def test_acceptance_equals_a_slow_reference(target, copied, plain):
    """Counts of the n-gram run against a plain loop over the plain output."""
    from test_drafters import reference_lookup

    tokens = plain.generate([PROMPTS[3]], SamplingParams(max_tokens=40)).token_ids[0]
    counts, done = [0] * 5, 0
    while done < len(tokens):
        drafts = reference_lookup(PROMPTS[3] + tokens[:done], 4, 1, 3)
        accepted = 0
        while accepted < len(drafts) and done + accepted < len(tokens) and drafts[accepted] == tokens[done + accepted]:
            accepted += 1
        committed = min(accepted + 1, len(tokens) - done)  # the limit may cut the last round
        counts[committed - 1] += 1
        done += committed
    metrics = copied.generate([PROMPTS[3]], SamplingParams(max_tokens=40)).metrics
    assert metrics.acceptance_counts.tolist() == counts


def test_nan_logits_stop_their_row_with_an_error_and_no_other(target):
    poisoned = jnp.asarray(target.params["embedding"]).at[7].set(jnp.nan)
    broken = dataclasses.replace(target, params=target.params | {"embedding": poisoned})
    result = SpeculativeDecoder(broken, NGRAM).generate([[7, 8], PROMPTS[1]], SamplingParams(max_tokens=6))
    assert result.finish_reasons[0] == "error" and result.token_ids[0] == []
    healthy = SpeculativeDecoder(target, NGRAM).generate([PROMPTS[1]], SamplingParams(max_tokens=6))
    assert result.token_ids[1] == healthy.token_ids[0]


@pytest.fixture(scope="module")
def lettered(target):
    return SpeculativeDecoder(dataclasses.replace(target, tokenizer=LetterTokenizer()), NGRAM)


def test_a_stop_string_is_cut_from_the_text_exactly(lettered):
    whole = lettered.generate([PROMPTS[2]], SamplingParams(max_tokens=40))
    stop = whole.texts[0][13:16]
    cut = whole.texts[0].index(stop)
    result = lettered.generate(
        [PROMPTS[2], PROMPTS[1]], [SamplingParams(max_tokens=40, stop=stop), SamplingParams(max_tokens=40)]
    )
    assert result.texts[0] == whole.texts[0][:cut]
    assert result.token_ids[0] == whole.token_ids[0][: cut + len(stop)]
    assert result.finish_reasons == ["stop", "length"]
    assert len(result.token_ids[1]) == 40


@pytest.mark.parametrize("begin", [4, 8, 10])
def test_of_two_stop_strings_the_one_that_is_complete_first_counts_in_every_method(begin, target, lettered):
    letters = dataclasses.replace(target, tokenizer=LetterTokenizer())
    whole = lettered.generate([PROMPTS[2]], SamplingParams(max_tokens=40)).texts[0]
    stops = [whole[begin : begin + 6], whole[begin + 2 : begin + 4]]
    params = SamplingParams(max_tokens=40, stop=stops)
    systems = [
        SpeculativeDecoder(letters),
        lettered,
        SpeculativeDecoder(letters, draft_config(), draft=letters),
    ]
    texts = {system.generate([PROMPTS[2]], params).texts[0] for system in systems}
    texts.add("".join(chunk.text for chunk in lettered.stream([PROMPTS[2]], params)))
    assert len(texts) == 1


def test_padding_never_poisons_a_row_beside_a_longer_prompt():
    """Token 0 pads prompts in prefill; a target that gives NaN for it must not hurt rows that never hold it."""
    target = random_target(0)
    poisoned = target.params["embedding"].at[0].set(jnp.nan)
    broken = dataclasses.replace(target, params=target.params | {"embedding": poisoned})
    system = SpeculativeDecoder(broken, None)
    short, long = [1 + token % 90 for token in range(17)], [1 + token % 90 for token in range(33)]
    alone = system.generate([short], SamplingParams(max_tokens=3))
    together = system.generate([short, long], SamplingParams(max_tokens=3))
    assert together.token_ids[0] == alone.token_ids[0] and together.finish_reasons[0] == alone.finish_reasons[0]


def test_a_stop_token_outside_the_vocabulary_is_refused(plain):
    with pytest.raises(ConfigError, match="stop_token_ids"):
        plain.generate([[1]], SamplingParams(stop_token_ids=[2**40]))


def test_a_top_k_beyond_the_vocabulary_keeps_all(plain):
    huge = SamplingParams(temperature=1.0, top_k=2**40, max_tokens=8, seed=3)
    every = SamplingParams(temperature=1.0, max_tokens=8, seed=3)
    assert plain.generate([PROMPTS[1]], huge).token_ids == plain.generate([PROMPTS[1]], every).token_ids


@pytest.mark.parametrize("stop", [None, "inside"])
def test_streamed_pieces_add_up_to_the_whole(lettered, stop):
    whole = lettered.generate(PROMPTS[:3], SamplingParams(max_tokens=40))
    params = SamplingParams(max_tokens=40, stop=whole.texts[0][13:17] if stop else None)
    stream = lettered.stream(PROMPTS[:3], params)
    texts, reasons = [""] * 3, [None] * 3
    for chunk in stream:
        assert reasons[chunk.index] is None
        texts[chunk.index] += chunk.text
        reasons[chunk.index] = chunk.finish_reason
    expected = lettered.generate(PROMPTS[:3], params)
    assert (texts, reasons) == (expected.texts, expected.finish_reasons)
    assert stream.result.token_ids == expected.token_ids


def test_streaming_compiles_no_program_of_its_own(lettered):
    lettered.generate(PROMPTS[:2], SamplingParams(max_tokens=20))
    before = lettered.programs.num_compiled
    assert list(lettered.stream(PROMPTS[:2], SamplingParams(max_tokens=20)))
    assert lettered.programs.num_compiled == before


@pytest.mark.parametrize(
    ("prompts", "params", "named"),
    [
        ([], None, "prompts=[]"),
        ([[]], None, "prompts[0]"),
        ([[1, 2], [VOCAB]], None, "prompts[1]"),
        ([[-1]], None, "prompts[0]"),
        ([[1] * 512], None, "at most 511"),
        (["text"], None, "tokenizer"),
        ([[1]], [SamplingParams()] * 2, "sampling_params"),
        ([[1]], SamplingParams(stop="x"), "SamplingParams.stop"),
    ],
)
def test_bad_requests_are_refused_before_anything_runs(plain, prompts, params, named):
    with pytest.raises(SpecJAXError) as error:
        plain.generate(prompts, params)
    assert named in str(error.value)


def test_the_greedy_rule_refuses_to_sample(target):
    system = SpeculativeDecoder(target, NGRAM.model_copy(update={"rejection_sampling_strategy": "greedy"}))
    with pytest.raises(ConfigError, match="temperature"):
        system.generate([[1]], SamplingParams(temperature=0.5))


def test_a_draft_of_another_vocabulary_is_refused(target):
    with pytest.raises(ConfigError, match="vocabulary has 50"):
        SpeculativeDecoder(target, draft_config(), draft=random_target(1, vocab_size=50))


def test_a_draft_of_equal_size_but_another_tokenizer_is_refused(target):
    ours = dataclasses.replace(target, tokenizer=LetterTokenizer())
    theirs = dataclasses.replace(random_target(1), tokenizer=LetterTokenizer(first=40))
    with pytest.raises(ConfigError, match="tokenizer differs"):
        SpeculativeDecoder(ours, draft_config(), draft=theirs)


def test_a_draft_context_longer_than_the_models_is_refused(target):
    with pytest.raises(ConfigError, match="max_model_len=600"):
        SpeculativeDecoder(target, draft_config(max_model_len=600), draft=random_target(1))


def test_speculation_goes_on_without_drafts_beyond_the_drafts_context(target, plain):
    system = SpeculativeDecoder(target, draft_config(), draft=random_target(0, max_position=64))
    params = SamplingParams(max_tokens=60)
    result = system.generate([PROMPTS[2]], params)
    assert result.token_ids == plain.generate([PROMPTS[2]], params).token_ids
    assert result.metrics.acceptance_counts[0] > 30


def test_metrics_derive_from_counts():
    metrics = Metrics(np.array([2, 1, 1]), 6, 7, 0.5, 2.0, 0.25, 9.0)
    assert (metrics.rounds, metrics.accepted) == (4, 3)
    assert metrics.acceptance_length == 1.75
    assert metrics.acceptance_rate == 0.5
    assert metrics.acceptance_rate_by_position == (0.5, 0.25)
    assert metrics.tokens_per_second == 3.5
    assert metrics.time_to_first_token == 0.75
    assert (metrics + metrics).acceptance_length == 1.75


def test_public_names_are_importable():
    assert all(hasattr(specjax, name) for name in specjax.__all__)
