"""Packing, the input's order and its checkpoint, the split, the draft vocabulary, and features against the target."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import VOCAB, next_logits, random_target

from specjax.errors import ConfigError
from specjax.target import decoder
from specjax.train import data, features
from specjax.train.responses import Response

TAPS = (0, 1, 2)


def responses(num: int, seed: int = 0) -> list[Response]:
    random = np.random.RandomState(seed)

    def tokens() -> list[int]:
        return random.randint(1, VOCAB, random.randint(3, 30)).tolist()

    return [Response(f"prompt-{i // 2}#{i % 2}", "any", tokens(), tokens(), "stop") for i in range(num)]


@pytest.fixture(scope="module")
def target():
    return random_target(0)


@pytest.fixture(scope="module")
def cached(target, tmp_path_factory):
    """Ten responses and the folder of their features."""
    directory = tmp_path_factory.mktemp("features")
    found = responses(10)
    features.write(directory, found, target, TAPS)
    return found, directory


def test_rows_hold_every_sequence_once_and_no_more_than_their_length():
    lengths = np.random.RandomState(1).randint(1, 40, 200)
    rows = data.pack(lengths, range(200), 48, seed=3)
    assert sorted(index for row in rows for index in row) == list(range(200))
    assert max(lengths[row].sum() for row in rows) <= 48
    assert len(rows) <= 1.1 * lengths.sum() / 48


def test_packing_follows_its_seed():
    lengths = np.random.RandomState(1).randint(1, 40, 50)
    assert data.pack(lengths, range(50), 48, 0) == data.pack(lengths, range(50), 48, 0)
    assert data.pack(lengths, range(50), 48, 0) != data.pack(lengths, range(50), 48, 1)


def test_a_row_lists_its_sequences_as_segments_with_their_own_positions():
    found = responses(6)
    rows = data.Rows(features.TokenStore(found), range(6), 64, seed=0)
    texts = {tuple(response.prompt + response.response): response for response in found}
    seen = 0
    for index in range(len(rows)):
        row = rows[index]
        assert row.tokens.shape == (64,) and row.best is None and row.final is None and row.taps is None
        for segment in range(1, row.segments.max() + 1):
            chosen = row.segments == segment
            response = texts[tuple(row.tokens[chosen].tolist())]
            assert row.positions[chosen].tolist() == list(range(chosen.sum()))
            assert row.loss_mask[chosen].sum() == len(response.response)
            assert row.loss_mask[chosen][len(response.prompt) :].all()
            seen += 1
        assert not row.loss_mask[row.segments == 0].any()
    assert seen == 6


def test_of_a_sequence_longer_than_a_row_the_target_reads_the_first_tokens():
    long = Response("long#0", "any", list(range(10, 40)), list(range(50, 90)), "stop")
    row = data.Rows(features.TokenStore([long]), [0], 48, seed=0)[0]
    assert row.tokens.tolist() == [*range(10, 40), *range(50, 68)]
    assert row.positions.tolist() == list(range(48))
    assert row.loss_mask.tolist() == [False] * 30 + [True] * 18


def test_a_restored_iterator_gives_the_batches_of_one_that_never_stopped():
    rows = data.Rows(features.TokenStore(responses(30)), range(30), 64, seed=0)
    first = iter(data.batches(rows, 3, seed=7))
    for _ in range(5):
        next(first)
    state = first.get_state()
    second = iter(data.batches(rows, 3, seed=7))
    second.set_state(state)
    for _ in range(2 * len(rows) // 3):
        np.testing.assert_array_equal(next(first).tokens, next(second).tokens)


def test_each_pass_has_every_row_once_in_another_order():
    rows = data.Rows(features.TokenStore(responses(24)), range(24), 64, seed=0)
    stream = iter(data.batches(rows, 1, seed=7))
    passes = [[next(stream).tokens.tobytes() for _ in range(len(rows))] for _ in range(2)]
    assert sorted(passes[0]) == sorted(passes[1]) == sorted(rows[i].tokens.tobytes() for i in range(len(rows)))
    assert passes[0] != passes[1]


def test_a_batch_larger_than_the_data_is_refused():
    rows = data.Rows(features.TokenStore(responses(3)), range(3), 64, seed=0)
    with pytest.raises(ConfigError, match="rows=9"):
        data.batches(rows, 9, seed=0)


def test_the_last_held_out_batch_is_filled_with_empty_rows():
    rows = data.Rows(features.TokenStore(responses(10)), range(10), 64, seed=0)
    found = data.in_order(rows, len(rows) - 1, 5)
    assert len(found) == 2 and {batch.tokens.shape for batch in found} == {(len(rows) - 1, 64)}
    assert found[1].segments[0].any() and not found[1].segments[1:].any()


def test_all_turns_of_a_prompt_are_on_one_side_and_more_data_moves_none():
    names = [f"prompt-{i // 2}#{i % 2}" for i in range(400)]
    trained, held_out = data.split(names, 10)
    assert sorted(trained + held_out) == list(range(400))
    assert 10 < len(held_out) < 80
    assert {names[i].split("#")[0] for i in trained}.isdisjoint(names[i].split("#")[0] for i in held_out)
    assert data.split(names[:200], 10)[1] == [i for i in held_out if i < 200]
    assert data.split(names, 0) == (list(range(400)), [])


def test_the_vocabulary_keeps_the_most_frequent_tokens_in_order():
    counts = np.array([0, 5, 1, 5, 9, 1])
    kept = data.choose_vocabulary(counts, 4)
    assert kept.tolist() == [1, 2, 3, 4] and kept.dtype == np.int32
    assert data.coverage(kept, counts) == 20 / 21
    with pytest.raises(ConfigError, match="draft_vocab_size=7"):
        data.choose_vocabulary(counts, 7)


def test_only_tokens_of_responses_are_counted():
    found = [Response("a#0", "", [1, 2, 3], [4, 4, 5], "stop"), Response("b#0", "", [7], [5], "stop")]
    counts = data.count_tokens(features.TokenStore(found), [0, 1], 8)
    assert counts.tolist() == [0, 0, 0, 0, 2, 2, 0, 0]


def test_cached_features_are_what_the_target_computes(target, cached):
    found, directory = cached
    store = features.FeatureCache(directory, found, target, TAPS)
    for index, response in enumerate(found[:3]):
        part = store.read(index, 1000)
        tokens = response.prompt + response.response
        assert part["tokens"].tolist() == tokens
        cache = decoder.init_cache(target.config, 1, 256, jnp.float32)
        start = jnp.zeros(1, jnp.int32)
        run = jax.jit(decoder.apply, static_argnums=(0, 5))
        whole = np.zeros((1, 64), np.int32)
        whole[0, : len(tokens)] = tokens
        output = run(target.config, target.params, whole, start, cache, TAPS)
        assert part["best"].tolist() == np.argmax(output.logits[0, : len(tokens)], axis=-1).tolist()
        assert int(part["best"][-1]) == int(np.argmax(next_logits(target, tokens)))
        # One rounding to bfloat16, and the order of sums.
        for tap in TAPS:
            close = np.float32(output.taps[tap][0, : len(tokens)])
            np.testing.assert_allclose(np.float32(part["taps"][:, tap]), close, rtol=0.01, atol=0.01)
        close = np.float32(output.final[0, : len(tokens)])
        np.testing.assert_allclose(np.float32(part["final"]), close, rtol=0.01, atol=0.01)


def test_packed_features_equal_those_of_each_sequence_alone(target):
    lengths = 10, 20, 18
    tokens = np.random.RandomState(0).randint(1, VOCAB, (1, 48)).astype(np.int32)
    positions = np.concatenate([np.arange(length) for length in lengths])[None].astype(np.int32)
    segments = np.repeat([1, 2, 3], lengths)[None].astype(np.int32)
    run = jax.jit(features.target_features, static_argnums=(0, 5))
    packed = run(target.config, target.params, tokens, positions, segments, TAPS)
    first = 0
    for length in lengths:
        part = slice(first, first + length)
        alone = np.zeros((1, 48), np.int32)
        alone[:, :length] = tokens[:, part]
        own = (np.arange(48) < length)[None].astype(np.int32)
        expected = run(target.config, target.params, alone, np.arange(48)[None].astype(np.int32), own, TAPS)
        for found, wanted in zip(packed, expected, strict=True):
            np.testing.assert_allclose(found[:, part], wanted[:, :length], rtol=1e-4, atol=1e-4)
        first += length


def test_features_are_added_for_new_responses_only(target, cached, tmp_path, capsys):
    found, _ = cached
    features.write(tmp_path, found[:4], target, TAPS)
    before = (tmp_path / "00000" / "final.npy").stat().st_mtime_ns
    (tmp_path / "00001.4194999.partial").mkdir()  # what a kill leaves
    features.write(tmp_path, found[:6], target, TAPS)
    features.write(tmp_path, found[:6], target, TAPS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000", "00001", "meta.json"]
    assert (tmp_path / "00000" / "final.npy").stat().st_mtime_ns == before
    store = features.FeatureCache(tmp_path, found[:6], target, TAPS)
    texts = [response.prompt + response.response for response in found[:6]]
    assert [store.read(index, 1000)["tokens"].tolist() for index in range(6)] == texts


def test_a_head_may_read_some_of_the_stored_taps_or_none(target, cached):
    found, directory = cached
    all_taps = features.FeatureCache(directory, found, target, TAPS).read(0, 5)
    chosen = features.FeatureCache(directory, found, target, (2, 0)).read(0, 5)
    np.testing.assert_array_equal(chosen["taps"], all_taps["taps"][:, [2, 0]])
    assert "taps" not in features.FeatureCache(directory, found, target, ()).read(0, 5)


def test_a_cache_that_does_not_fit_is_refused_by_name(target, cached):
    found, directory = cached
    tapless = dataclasses.replace(target, config=dataclasses.replace(target.config, num_layers=3))
    with pytest.raises(ConfigError, match=r"num_layers=2.*num_layers=3"):
        features.FeatureCache(directory, found, tapless, TAPS)
    with pytest.raises(ConfigError, match=r"taps=\[0, 1, 2\].*taps=\[5\]"):
        features.FeatureCache(directory, found, target, (5,))
    with pytest.raises(ConfigError, match=r"lacks 2 of 12 responses, such as 'prompt-5#0'"):
        features.FeatureCache(directory, responses(12), target, TAPS)


def test_plain_text_is_cut_into_sequences_with_loss_on_all_tokens():
    parts = list(features.texts_as_responses(lambda text: {"input_ids": [ord(c) for c in text]}, [("t", "abcde")], 2))
    assert [part.response for part in parts] == [[97, 98], [99, 100], [101]]
    assert features.token_arrays(parts[0])["loss_mask"].all()
