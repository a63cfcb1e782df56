"""Drafters: what n-gram lookup proposes, and that the draft model proposes what it would decode itself."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import RowParams
from models import next_logits, random_target
from test_sampling import state_of

from specjax.checkpoints.heads import write_head
from specjax.config import SamplingParams, SpeculativeConfig
from specjax.drafters.base import NO_DRAFT, Context, Features
from specjax.drafters.draft_model import DraftWeights, draft_model
from specjax.drafters.ngram import lookup
from specjax.errors import ConfigError
from specjax.generate import SpeculativeDecoder
from specjax.heads import config as heads
from specjax.heads import network


def reference_lookup(text, num, shortest, longest):
    """Longest suffix first, then earliest occurrence; a plain loop."""
    for size in range(min(longest, len(text) - 1), shortest - 1, -1):
        suffix = text[len(text) - size :]
        for begin in range(len(text) - size):
            if text[begin : begin + size] == suffix:
                return text[begin + size : begin + size + num]
    return []


def found(text, num, shortest, longest, capacity=64):
    tokens = np.full((1, capacity), 9, np.int32)  # what stands behind the text must not matter
    tokens[0, : len(text)] = text
    drafts = lookup(jnp.asarray(tokens), jnp.array([len(text)]), num, shortest, longest)
    return [token for token in np.asarray(drafts)[0].tolist() if token != NO_DRAFT]


def test_ngram_proposes_what_followed_the_earliest_occurrence():
    assert found([1, 2, 9, 5, 1, 2, 7, 5, 1, 2], 2, 2, 2) == [9, 5]


def test_ngram_prefers_the_longest_suffix():
    assert found([1, 2, 3, 9, 2, 3, 8, 1, 2, 3], 1, 1, 3) == [9]
    assert found([2, 3, 8, 1, 2, 3, 9, 1, 2, 3], 1, 1, 3) == [9]


def test_ngram_proposes_nothing_without_a_match():
    assert found([1, 2, 3, 4, 5], 3, 1, 5) == []


def test_ngram_proposes_no_more_than_the_text_holds():
    assert found([4, 4], 5, 1, 1) == [4]


def test_ngram_of_one_token_of_text_proposes_nothing():
    assert found([4], 5, 1, 3) == []


@pytest.mark.parametrize(("shortest", "longest"), [(1, 1), (1, 4), (2, 3), (3, 5), (5, 5)])
def test_ngram_equals_a_plain_search_on_random_texts(shortest, longest):
    rng = np.random.RandomState(shortest * 10 + longest)
    for _ in range(60):
        text = rng.randint(0, 3, rng.randint(1, 40)).tolist()
        assert found(text, 4, shortest, longest) == reference_lookup(text, 4, shortest, longest), text


def test_ngram_rows_do_not_see_each_other():
    rows = [[1, 2, 1], [2, 2, 2, 2], [5]]
    tokens = np.zeros((3, 16), np.int32)
    for row, text in enumerate(rows):
        tokens[row, : len(text)] = text
    together = lookup(jnp.asarray(tokens), jnp.array([3, 4, 1]), 3, 1, 2)
    for row, text in enumerate(rows):
        assert [t for t in np.asarray(together)[row].tolist() if t != NO_DRAFT] == found(text, 3, 1, 2)


def proposal_after(draft, texts, num, sample, params, max_model_len=None, threshold=0.0):
    """What the draft model proposes behind texts whose prefill it has seen."""
    drafter = draft_model(draft.config, num, jnp.float32, sample, max_model_len, threshold)
    tokens = np.zeros((len(texts), 256), np.int32)
    for row, text in enumerate(texts):
        tokens[row, : len(text)] = text
    tokens, start = jnp.asarray(tokens), jnp.zeros(len(texts), jnp.int32)
    context = Context(tokens, jnp.array([len(text) for text in texts]), state_of(params))
    weights = DraftWeights(draft.params)
    cache = drafter.init(weights, len(texts), 256)
    cache = jax.jit(drafter.prefill)(
        weights, cache, context, Features(tokens[:, :32], start, (), tokens[:, :32, None]), context.length - 1
    )
    return jax.jit(drafter.propose)(weights, cache, context)[0]


def greedy_continuation(draft, text, num):
    text = list(text)
    for _ in range(num):
        text.append(int(np.argmax(next_logits(draft, text))))
    return text[-num:]


@pytest.mark.parametrize("sample", [True, False])
def test_greedy_rows_get_the_draft_models_own_greedy_continuation(sample):
    draft = random_target(1)
    texts = [[3], [5, 6], list(range(20))]
    proposal = proposal_after(draft, texts, 3, sample, [RowParams(0.0)] * 3)
    for row, text in enumerate(texts):
        assert proposal.tokens[row].tolist() == greedy_continuation(draft, text, 3)


def test_drafts_end_with_the_first_unlikely_one():
    draft, texts = random_target(1), [[3], [5, 6], list(range(20)), [1, 2] * 5, [9, 4, 7]]
    params = [RowParams(0.0)] * 3 + [RowParams()] * 2
    every = proposal_after(draft, texts, 3, True, params)
    rows = zip(texts, every.tokens.tolist(), strict=True)
    laws = [[next_logits(draft, text + drafts[:i]) for i in range(3)] for text, drafts in rows]
    likelihood = np.cumprod([[1 / np.exp(law - law.max()).sum() for law in row] for row in laws], axis=1)
    threshold = float(np.sort(likelihood, axis=None)[7:9].mean())
    some = proposal_after(draft, texts, 3, True, params, threshold=threshold)
    going_on = np.pad(likelihood[:, :-1], ((0, 0), (1, 0)), constant_values=1.0) > threshold
    assert 0 < going_on[:, 1:].sum() < going_on[:, 1:].size
    # A draft that is made is scored, unless it is much less likely still.
    scored = going_on & (likelihood > threshold / 4)
    assert 0 < scored.sum() < going_on.sum()
    np.testing.assert_array_equal(some.tokens, np.where(scored, every.tokens, NO_DRAFT))


def test_sampled_drafts_record_the_distribution_that_they_were_drawn_from():
    draft = random_target(1)
    params = [RowParams(1.0, top_k=5), RowParams(0.7)]
    proposal = proposal_after(draft, [[3, 4, 5], [7, 8]], 3, True, params)
    np.testing.assert_allclose(proposal.probs.sum(axis=-1), 1, atol=1e-5)
    assert ((np.asarray(proposal.probs) > 0).sum(axis=-1)[0] == 5).all()
    picked = jnp.take_along_axis(proposal.probs, proposal.tokens[..., None], axis=-1)
    assert (picked > 0).all()


def test_rows_beyond_max_model_len_get_no_drafts():
    proposal = proposal_after(random_target(1), [[3] * 20, [4] * 4], 3, True, [RowParams()] * 2, max_model_len=16)
    assert (proposal.tokens[0] == NO_DRAFT).all()
    assert (proposal.tokens[1] != NO_DRAFT).all()


def test_sampled_drafts_follow_the_row_and_not_the_batch():
    draft = random_target(2)
    texts, params = [[3, 4, 5], [7, 8]], [RowParams(1.0), RowParams(1.0)]
    together = proposal_after(draft, texts, 4, True, params)
    alone = proposal_after(draft, texts[:1], 4, True, params[:1])
    assert together.tokens[0].tolist() == alone.tokens[0].tolist()


def test_random_numbers_of_drafts_come_from_the_proposing_domain():
    """Changing the seed changes the drafts; two positions of a row never share a number."""
    draft = random_target(2)
    tokens = jnp.asarray(np.full((1, 256), 3, np.int32))
    drafter = draft_model(draft.config, 8, jnp.float32)
    propose, weights = jax.jit(drafter.propose), DraftWeights(draft.params)
    outcomes = set()
    for seed in range(5):
        context = Context(tokens, jnp.array([4]), state_of([RowParams(1.5)], seeds=[seed]))
        cache = drafter.init(weights, 1, 256)
        outcomes.add(tuple(jax.device_get(propose(weights, cache, context)[0].tokens)[0].tolist()))
    # Five sequences of 8 nearly uniform draws out of 97 tokens: odds of any two being equal are below 1e-12.
    assert len(outcomes) == 5


def test_an_early_exit_drafts_what_the_first_layers_would_decode():
    target = random_target(3)
    plain = SpeculativeDecoder(target)
    shallow = dataclasses.replace(
        target, config=dataclasses.replace(target.config, num_layers=1, sliding_windows=(None,))
    )
    config = SpeculativeConfig(assistant_early_exit=1, num_speculative_tokens=3)
    exiting = SpeculativeDecoder(target, config)
    drafted = SpeculativeDecoder(
        target, config.model_copy(update={"model": "m", "assistant_early_exit": None}), draft=shallow
    )
    params = SamplingParams(max_tokens=24)
    results = [decoder.generate([[5, 6, 7]], params) for decoder in (plain, exiting, drafted)]
    assert results[0].token_ids == results[1].token_ids == results[2].token_ids
    assert results[1].metrics.acceptance_counts.tolist() == results[2].metrics.acceptance_counts.tolist()


def test_an_early_exit_behind_the_last_layer_is_refused():
    with pytest.raises(ConfigError, match=r"assistant_early_exit=2: random-0 has 2 layers; expected fewer"):
        SpeculativeDecoder(random_target(0), SpeculativeConfig(assistant_early_exit=2))


FEW = [3, 5, 8, 13, 21, 34, 55, 89]


def token_map(folder, ids):
    (folder / "token_map.json").write_text(json.dumps(ids))
    return str(folder / "token_map.json")


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_only_tokens_of_the_map_are_drafted_and_the_text_is_the_targets_own(tmp_path, temperature):
    target = random_target(3)
    config = SpeculativeConfig(
        assistant_early_exit=1, num_speculative_tokens=3, speculative_token_map=token_map(tmp_path, FEW)
    )
    params = SamplingParams(max_tokens=24, temperature=temperature)
    found = SpeculativeDecoder(target, config).generate([[5, 6, 7], [9]], params, trace=True)
    drafts = {token for rounds in found.traces for one in rounds for token in one.drafts}
    assert drafts and drafts <= set(FEW)
    if not temperature:
        assert found.token_ids == SpeculativeDecoder(target).generate([[5, 6, 7], [9]], params).token_ids


def test_a_heads_map_is_found_beside_its_weights(tmp_path):
    target = random_target(3)
    config = heads.eagle(dataclasses.replace(target.config, num_layers=1, sliding_windows=(None,)), target.config.width)
    params = network.init(config, jax.random.key(0))
    write_head(tmp_path / "head", config, params, target.name, ["LlamaForCausalLM"], 3, None, jnp.dtype("float32"))
    token_map(tmp_path / "head", FEW)
    decoder = SpeculativeDecoder(target, SpeculativeConfig(model=str(tmp_path / "head")))
    assert decoder.params.drafter.shared.head.shape == (target.config.width, len(FEW))
    found = decoder.generate([[5, 6, 7]], SamplingParams(max_tokens=24), trace=True)
    assert {token for one in found.traces[0] for token in one.drafts} <= set(FEW)
    assert found.token_ids == SpeculativeDecoder(target).generate([[5, 6, 7]], SamplingParams(max_tokens=24)).token_ids


@pytest.mark.parametrize("ids", [[], [1, 1], [97], [-1], ["a"], {"a": 1}, [True]])
def test_a_wrong_token_map_is_refused(tmp_path, ids):
    config = SpeculativeConfig(assistant_early_exit=1, speculative_token_map=token_map(tmp_path, ids))
    with pytest.raises(
        ConfigError, match=r"token_map.json': expected a list of different token ids, each from 0 to 96"
    ):
        SpeculativeDecoder(random_target(3), config)


def test_a_token_map_that_is_not_there_is_refused(tmp_path):
    config = SpeculativeConfig(assistant_early_exit=1, speculative_token_map=str(tmp_path / "nowhere.json"))
    with pytest.raises(ConfigError, match=r"speculative_token_map=.*nowhere.json.*expected a JSON file"):
        SpeculativeDecoder(random_target(3), config)
