"""Heads as drafters: each round's proposal against a reference that keeps no cache, through the real step."""

import dataclasses
import functools

import head_reference as reference
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import RowParams, truncated
from models import next_logits, random_target
from test_drafters import reference_lookup
from test_heads import random_weights
from test_sampling import state_of

from specjax import generate, step, verify
from specjax.drafters.base import NO_DRAFT, Context, Features
from specjax.drafters.head import HeadWeights, head
from specjax.drafters.hybrid import hybrid
from specjax.heads import config as heads
from specjax.heads import network
from specjax.target import decoder

VOCAB, WIDTH, TAPS, CAPACITY, WINDOW = 8, 32, (0, 1, 2), 256, 8
TOKEN_OF = np.array([1, 2, 4, 5, 6, 7])
TARGET = random_target(0, VOCAB)
LAYER = dataclasses.replace(TARGET.config, num_layers=1, sliding_windows=(None,))
TWO = dataclasses.replace(LAYER, num_layers=2, sliding_windows=(None, None))

CASES = {
    "eagle": (heads.eagle(LAYER, WIDTH, joining_bias=True), 4, {"max_model_len": 32}),
    "eagle3": (heads.eagle3(TWO, WIDTH, TAPS, len(TOKEN_OF)), 3, {"sample": True}),
    "mtp": (heads.mtp(LAYER, WIDTH), 3, {}),
    "mtp of 2 blocks": (heads.mtp(LAYER, WIDTH, "glm4_moe", num_blocks=2), 5, {"threshold": 0.1}),
    "mtp of 3 blocks": (heads.mtp(LAYER, WIDTH, "mimo", num_blocks=3), 5, {"sample": True}),
    "hybrid": (heads.eagle(LAYER, WIDTH), 3, {"copies": (2, 3), "threshold": 0.2}),
}

LENGTHS = (1, 2, 3, 20)
COINS, COPIED = RowParams(0.0, top_p=0.5), RowParams(0.0)
"""Greedy rows with a top_p have their drafts accepted by coins, the others by the greedy rule."""


def coins_or_greedy(logits, proposal, sampling, uniforms, num):
    """One compiled rule for rows that accept whatever is drafted, most of the time, and rows that are lossless."""
    by_coins = verify.synthetic(
        logits, proposal, sampling, uniforms, conditional_rates=(0.85,) * num, best_follows=True
    )
    exact = verify.greedy(logits, proposal, sampling, uniforms)
    return jax.tree.map(lambda a, b: jnp.where(sampling.top_p < 1, a, b), by_coins, exact)


class Decoding:
    """A head and its target: prefill in windows of 8, then rounds of the real step, each compiled once."""

    def __init__(self, config, num, sample=False, max_model_len=None, copies=None, threshold=0.0):
        self.threshold = threshold
        self.config, self.num, self.sample, self.max_model_len, self.copies = config, num, sample, max_model_len, copies
        self.token_of = TOKEN_OF if config.reduced else np.arange(VOCAB)
        drafter = head(config, num, jnp.float32, sample, max_model_len, threshold)
        if copies:
            drafter = hybrid(drafter, VOCAB, *copies)
        rule = functools.partial(coins_or_greedy, num=num)
        system = step.System(functools.partial(decoder.apply, TARGET.config), drafter, rule)
        shared = network.Shared(TARGET.params["embedding"], TARGET.params["head"])
        weights = HeadWeights(random_weights(config, 2), shared, jnp.asarray(TOKEN_OF) if config.reduced else None)
        self.system, self.params, self.weights = system, step.Params(TARGET.params, weights), weights
        self.prefill = jax.jit(functools.partial(generate.prefill, system, size=WINDOW))
        self.known = reference.Weights(jax.tree.map(np.asarray, weights.head))

        def one_round(params, state):
            """step.speculative_step, and what it proposes and drafts with."""
            return *step.propose(system, params, state), step.speculative_step(system, params, state)

        self.round = jax.jit(one_round)

    def start(self, texts, params, seeds=None, max_length=200):
        """The state behind prefill."""
        rows = len(texts)
        tokens = np.zeros((rows, CAPACITY), np.int32)
        for row, text in enumerate(texts):
            tokens[row, : len(text)] = text
        state = step.DecodeState(
            tokens=jnp.asarray(tokens),
            logprobs=None,
            length=jnp.array([len(text) for text in texts], jnp.int32),
            max_length=jnp.full(rows, max_length, jnp.int32),
            stop_tokens=jnp.full((rows, 1), step.PAD),
            finish=jnp.zeros(rows, jnp.int32),
            sampling=state_of(params, seeds),
            cache=decoder.init_cache(TARGET.config, rows, CAPACITY, jnp.float32),
            drafter=self.system.drafter.init(self.weights, rows, CAPACITY),
            num_drafted=jnp.zeros(rows, jnp.int32),
            acceptance_counts=jnp.zeros((rows, self.num + 1), jnp.int32),
        )
        for begin in range(0, max(len(text) for text in texts) - 1, WINDOW):
            state = self.prefill(self.params, state, np.int32(begin))
        return state

    def chain(self, features, text, num):
        """The reference's logits float[num, V'] of a chain begun where the drafts begin behind the text."""
        last = len(text) - num - 2
        return reference.unrolled(self.config, self.known, self.weights.shared, features, text, last, num)[0]


@functools.cache
def decoding(name):
    config, num, options = CASES[name]
    return Decoding(config, num, **options)


@functools.partial(jax.jit, static_argnums=1)
def _features(tokens, taps):
    rows, num = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(num), (rows, num))
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((num, num), bool)), (rows, num, num))
    tapped, final = decoder.forward(TARGET.config, TARGET.params, tokens, positions, mask, taps)
    return jnp.stack(tapped, axis=2), final[:, :, None]


def features_of(tokens, config):
    """The target's states for whole texts float[B, S, n, D_t], without a cache."""
    tapped, final = _features(tokens, TAPS)
    return np.asarray(tapped if config.taps else final)


def prompts():
    """Each length twice: rows that accept by coins, and rows that are lossless."""
    texts = [np.random.RandomState(length).randint(0, VOCAB, length).tolist() for length in LENGTHS]
    return texts * 2, [COINS] * len(LENGTHS) + [COPIED] * len(LENGTHS)


@pytest.mark.parametrize("name", CASES)
def test_every_rounds_drafts_are_those_of_a_head_that_keeps_no_cache(name):
    it = decoding(name)
    texts, params = prompts()
    if it.sample:
        params[1] = params[3] = RowParams(0.9, top_k=4, top_p=0.9)
    state = it.start(texts, params)
    copied_and_drafted, stopped = set(), set()
    for _ in range(7):
        before = jax.device_get((state.tokens, state.length))
        proposal, _, state = it.round(it.params, state)
        tokens, features = np.asarray(proposal.tokens), features_of(before[0], it.config)
        for row, length in enumerate(before[1]):
            text = before[0][row, :length].tolist()
            copies = reference_lookup(text, it.num, *it.copies) if it.copies else []
            if it.copies:
                copied_and_drafted.add((row, bool(copies)))
            if copies:
                assert tokens[row].tolist() == copies + [NO_DRAFT] * (it.num - len(copies))
                continue
            too_long = it.max_model_len is not None and length + it.num > it.max_model_len
            if length < max(2, it.config.num_blocks) or too_long:
                assert (tokens[row] == NO_DRAFT).all()
                continue
            drafts = tokens[row][tokens[row] != NO_DRAFT]
            logits = it.chain(features[row], text + np.maximum(tokens[row], 0).tolist(), it.num)
            likelihood = np.cumprod([1 / np.exp(law - law.max()).sum() for law in logits])
            assert (likelihood[: len(drafts) - 1] >= it.threshold - 1e-3).all()
            assert (likelihood[: len(drafts)] >= it.threshold / 4 - 1e-3).all()
            if len(drafts) < it.num:
                unlikely = len(drafts) and likelihood[len(drafts) - 1] < it.threshold + 1e-3
                assert unlikely or likelihood[len(drafts)] < it.threshold / 4 + 1e-3
            stopped.add(len(drafts))
            for index, token in enumerate(drafts):
                drafted = logits[index, list(it.token_of).index(token)]
                if proposal.logits is not None:
                    assert proposal.logits[row, index] == pytest.approx(drafted, abs=1e-3)
                if params[row].temperature == 0:
                    assert drafted >= logits[index].max() - 1e-3
                if it.sample:
                    law = np.zeros(VOCAB)
                    law[it.token_of] = truncated(logits[index], params[row])
                    np.testing.assert_allclose(proposal.probs[row, index], law, atol=2e-3)
    assert len(stopped) > 1 if it.threshold else stopped == {it.num}
    counts = np.asarray(state.acceptance_counts)[: len(LENGTHS)]
    assert it.copies or (counts[:, 1:-1].sum() > 0 and (counts[:, -1].sum() > 0 or it.threshold))
    if it.copies:
        # Some row has done both, so the head knows what was committed by copying.
        assert any({(row, True), (row, False)} <= copied_and_drafted for row in range(len(texts)))


@functools.cache
def plain_text(length, num):
    text = prompts()[0][LENGTHS.index(length)]
    for _ in range(num):
        text = [*text, int(np.argmax(next_logits(TARGET, text)))]
    return text


@pytest.mark.parametrize("name", CASES)
def test_greedy_speculation_with_a_head_equals_greedy_decoding(name):
    it = decoding(name)
    texts, _ = prompts()
    state = it.start(texts, [COPIED] * len(texts), max_length=len(texts[3]) + 8)
    while not bool(state.done.all()):
        _, _, state = it.round(it.params, state)
    for row, text in enumerate(texts):
        assert state.tokens[row, : state.length[row]].tolist() == plain_text(len(text), 28 - len(text))
    assert np.asarray(state.acceptance_counts)[:, 1:].sum() > 0


def test_sampled_drafts_come_from_the_law_that_they_record():
    it = decoding("eagle3")
    params = [RowParams(), RowParams(0.7), RowParams(1.0, top_k=3), RowParams(1.0, top_p=0.6)] * 2
    state = it.start(prompts()[0], params)
    for _ in range(3):
        length = np.asarray(state.length)
        proposal, _, state = it.round(it.params, state)
        probs, tokens = np.asarray(proposal.probs), np.asarray(proposal.tokens)
        np.testing.assert_allclose(probs.sum(axis=-1), 1, atol=1e-5)
        assert (np.delete(probs, TOKEN_OF, axis=-1) == 0).all()
        assert ((probs[2::4] > 0).sum(axis=-1) == 3).all()
        able = length >= 2
        picked = np.take_along_axis(probs, np.maximum(tokens, 0)[..., None], axis=-1)[..., 0]
        assert (picked[able] > 0).all() and (tokens[~able] == NO_DRAFT).all()


@pytest.mark.parametrize("name", ["eagle3", "mtp of 3 blocks"])
def test_a_rows_drafts_do_not_depend_on_who_shares_the_batch(name):
    it = decoding(name)
    texts, _ = prompts()
    params = [RowParams(1.0, top_p=0.9)] * len(texts)

    def run(order, seeds):
        state = it.start([texts[row] for row in order], params, seeds)
        rounds = []
        for _ in range(3):
            proposal, _, state = it.round(it.params, state)
            rounds.append(np.asarray(proposal.tokens))
        return np.stack(rounds, axis=1), np.asarray(state.tokens)

    drafts, tokens = run(range(8), range(8))
    others, other_tokens = run((3, 3, 0, 2, 2, 1, 3, 3), (3, 20, 21, 22, 2, 1, 23, 24))
    for here, there in ((3, 0), (2, 4), (1, 5)):
        np.testing.assert_array_equal(drafts[here], others[there])
        np.testing.assert_array_equal(tokens[here], other_tokens[there])


def test_a_head_beside_copies_drafts_only_where_some_row_does_not_copy():
    it = decoding("hybrid")
    repeating, fresh = [5, 6, 7] * 4, [0, 1, 2, 3, 4, 5, 6, 7]

    def changed(texts):
        """For each row, whether drafting wrote behind its text."""
        state = it.start(texts, [COPIED] * 8)
        proposal, drafted, _ = it.round(it.params, state)
        keys = [np.asarray(side.other.caches[0].keys[0]) for side in (state.drafter, drafted)]
        return (keys[0] != keys[1]).any(axis=(1, 2, 3)), np.asarray(proposal.tokens)

    written, drafts = changed([repeating] * 7 + [[1]])
    assert not written.any()
    assert (drafts[:7] == [5, 6, 7]).all() and (drafts[7] == NO_DRAFT).all()
    written, drafts = changed([repeating] * 7 + [fresh])
    assert written.all()
    assert (drafts[:7] == [5, 6, 7]).all() and (drafts[7] != NO_DRAFT).all()


def test_a_prompt_as_wide_as_the_cache_fills_every_block():
    """The windows of later blocks begin before the text, and must not be pushed out of place at its end."""
    it = decoding("mtp of 3 blocks")
    text = np.random.RandomState(5).randint(0, VOCAB, CAPACITY - 8).tolist()
    tokens = np.zeros((1, CAPACITY), np.int32)
    tokens[0, : len(text)] = text
    context = Context(jnp.asarray(tokens), jnp.array([len(text)]), state_of([COPIED]))
    features = features_of(tokens, it.config)

    @jax.jit
    def run(weights, context, final):
        drafter = it.system.drafter
        seen = Features(context.tokens, jnp.zeros(1, jnp.int32), (), final)
        state = drafter.init(weights, 1, CAPACITY)
        state = drafter.prefill(weights, state, context, seen, context.length - 1)
        return drafter.propose(weights, state, context)[0]

    proposal = run(it.weights, context, jnp.asarray(features[:, :, 0]))
    logits = it.chain(features[0], text + proposal.tokens[0].tolist(), it.num)
    np.testing.assert_allclose(proposal.logits[0], logits.max(axis=-1), atol=1e-3)
