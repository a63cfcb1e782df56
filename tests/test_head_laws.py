"""The output law of sampling with heads: every draft that a real head can draw, integrated over the rule's uniforms."""

import dataclasses
import functools
import importlib
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import EDGE, RowParams, block_cells, evaluated, residual_cells, truncated
from models import random_target
from test_drafters import reference_lookup
from test_heads import random_weights
from test_sampling import state_of

from specjax import verify
from specjax.drafters.base import NO_DRAFT, Context, Features, Proposal
from specjax.drafters.head import HeadWeights, head
from specjax.drafters.hybrid import hybrid
from specjax.heads import config as heads
from specjax.heads import network
from specjax.target import decoder

VOCAB, DRAFTS, TAPS, CAPACITY, PREFIX, AHEAD = 6, 2, (0, 1, 2), 256, (0, 3, 1, 3, 5), 3
TOKEN_OF = np.array([1, 2, 3, 5])
LIKELY = 0.5
CELLS = {verify.residual: residual_cells, verify.block: block_cells}
PARAMS = [RowParams(), RowParams(0.8, top_k=4, top_p=0.9)]
HISTORIES = [PREFIX + more for num in range(AHEAD) for more in itertools.product(range(VOCAB), repeat=num)]
"""Where rounds can begin that matter for the next three tokens."""


@functools.cache
def target_states():
    """For each text of the longest length: logits float32[texts, T, V] and taps, by one pass over all of them."""
    target = random_target(4, VOCAB)
    texts = np.array([PREFIX + more for more in itertools.product(range(VOCAB), repeat=AHEAD + DRAFTS - 1)], np.int32)
    rows, num = texts.shape
    positions = jnp.broadcast_to(jnp.arange(num), (rows, num))
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((num, num), bool)), (rows, num, num))
    taps, final = jax.jit(functools.partial(decoder.forward, target.config, taps=TAPS))(
        target.params, jnp.asarray(texts), positions, mask
    )
    logits = np.asarray(final) @ np.asarray(target.params["head"])
    return target, {tuple(text): row for row, text in enumerate(texts.tolist())}, logits, [np.asarray(x) for x in taps]


def row_of(text):
    """A row of target_states whose text begins with this one."""
    return target_states()[1][tuple(text) + (0,) * (len(PREFIX) + AHEAD + DRAFTS - 1 - len(text))]


def logits_behind(text):
    return target_states()[2][row_of(text), len(text) - 1]


@functools.cache
def drafts_of(copies, threshold):
    """For each start (params, history): its drafts, their laws [G, V] and their probability, as the head draws them.

    The head proposes for all starts at once; the numbers that it draws by are chosen so that each possible draft comes.
    """
    target, _, _, taps = target_states()
    layer = dataclasses.replace(target.config, num_layers=1, sliding_windows=(None,))
    config = heads.eagle3(layer, target.config.width, TAPS, len(TOKEN_OF))
    drafter = head(config, DRAFTS, jnp.float32, sample=True, confidence_threshold=threshold)
    if copies:
        drafter = hybrid(drafter, VOCAB, 1, 2)
    shared = network.Shared(target.params["embedding"], target.params["head"])
    weights = HeadWeights(random_weights(config, 5), shared, jnp.asarray(TOKEN_OF))

    starts = list(itertools.product(range(len(PARAMS)), HISTORIES))
    wanted = [(*start, *drafts) for start in starts for drafts in itertools.product(TOKEN_OF, repeat=DRAFTS)]
    rows = len(wanted)
    tokens = np.zeros((rows, CAPACITY), np.int32)
    features = [np.zeros((rows, 8, target.config.width), np.float32) for _ in TAPS]
    for row, (_, history, *_) in enumerate(wanted):
        tokens[row, : len(history)] = history
        for seen, states in zip(features, taps, strict=True):
            seen[row, : len(history) - 1] = states[row_of(history), : len(history) - 1]
    lengths = jnp.array([len(history) for _, history, *_ in wanted], jnp.int32)
    context = Context(jnp.asarray(tokens), lengths, state_of([PARAMS[which] for which, *_ in wanted], [0] * rows))

    @jax.jit
    def propose(weights, context, features, uniforms):
        state = drafter.init(weights, rows, CAPACITY)
        seen = Features(context.tokens[:, :8], jnp.zeros(rows, jnp.int32), tuple(features), features[0])
        state = drafter.prefill(weights, state, context, seen, context.length - 1)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(importlib.import_module("specjax.drafters.head"), "proposal_uniforms", lambda *_: uniforms)
            return drafter.propose(weights, state, context)[0]

    uniforms = np.zeros((rows, DRAFTS, 3), np.float32)
    for step in range(DRAFTS):
        # The law of draft `step` follows from those before it, which are drawn as wanted by now.
        law = np.asarray(propose(weights, context, features, uniforms).probs, np.float64)[:, step]
        for row, choice in enumerate(wanted):
            marks = np.concatenate([[0], np.cumsum(law[row])]) / max(law[row].sum(), 0.5)
            uniforms[row, step, 2] = (marks[choice[2 + step]] + marks[choice[2 + step] + 1]) / 2
    proposal = jax.device_get(propose(weights, context, features, uniforms))
    found = {start: {} for start in starts}
    for row, (which, history, *drafts) in enumerate(wanted):
        probs, tokens = proposal.probs[row].astype(np.float64), proposal.tokens[row]
        copied = copies and bool(reference_lookup(list(history), DRAFTS, 1, 2))
        drawn = 0 if copied else (tokens != NO_DRAFT).sum()
        chances = [probs[i, draft] if i < drawn else 1.0 for i, draft in enumerate(drafts)]
        # An interval of less than a float32's rounding cannot be aimed at; what is left out shows in the sum.
        if min(chances) > 1e-6:
            assert tokens[:drawn].tolist() == drafts[:drawn]
            found[which, history][tuple(tokens.tolist())] = (proposal.probs[row], np.prod(chances))
    for options in found.values():
        assert sum(mass for _, mass in options.values()) == pytest.approx(1, abs=1e-5)
    return found


@pytest.mark.exact
@pytest.mark.parametrize("rule", CELLS, ids=lambda rule: rule.__name__)
@pytest.mark.parametrize(("copies", "threshold"), [(False, 0.0), (True, LIKELY)], ids=["head", "hybrid that stops"])
def test_the_joint_law_of_the_next_three_tokens_is_the_targets(rule, copies, threshold):
    cells, owner, logits, probs = [], [], [], []
    found = drafts_of(copies, threshold)
    lengths = {sum(draft != NO_DRAFT for draft in drafts) for options in found.values() for drafts in options}
    assert lengths == ({1, 2} if threshold else {DRAFTS})
    for (which, history), options in found.items():
        for drafts, (law, mass) in options.items():
            real = [draft for draft in drafts if draft != NO_DRAFT]
            views = [logits_behind(history + tuple(real[:i])) for i in range(len(real) + 1)]
            target = [truncated(view, PARAMS[which]) for view in views]
            draft = [*law[: len(real)].astype(np.float64), np.zeros(VOCAB)]
            for coins, draws in CELLS[rule](target, draft, real):
                volume = np.prod([high - low for low, high in [*coins, draws[0]]])
                missing = DRAFTS - len(real)
                cells.append((coins + [(0.0, 1.0)] * missing, [draws[0]] * (DRAFTS + 1), mass * volume))
                owner.append((which, history, drafts))
                logits.append(views + [np.zeros(VOCAB)] * missing)
                probs.append(law)
    proposal = Proposal(jnp.array([drafts for *_, drafts in owner], jnp.int32), jnp.asarray(np.array(probs)))
    sampling = state_of([PARAMS[which] for which, *_ in owner], [0] * len(owner))
    given, run = jnp.asarray(np.array(logits, np.float32)), jax.jit(rule)
    for side in (0, 1):
        uniforms = verify.Uniforms(*map(jnp.asarray, evaluated([cell[:2] for cell in cells], side)))
        verdict = jax.device_get(run(given, proposal, sampling, uniforms))
        rounds = {start: {} for start in found}
        for (which, history, drafts), cell, num, token in zip(owner, cells, *verdict, strict=True):
            committed = (*drafts[:num], int(token))
            law = rounds[which, history]
            law[committed] = law.get(committed, 0.0) + cell[2]

        def law_of(which, history, num, rounds=rounds):
            """The law of the next num tokens, put together from rounds."""
            law = {}
            for committed, mass in rounds[which, history].items():
                kept = committed[:num]
                tails = law_of(which, history + kept, num - len(kept)) if len(kept) < num else {(): 1.0}
                for tail, tail_mass in tails.items():
                    law[kept + tail] = law.get(kept + tail, 0.0) + mass * tail_mass
            return law

        for which, params in enumerate(PARAMS):
            law = law_of(which, PREFIX, AHEAD)
            assert sum(law.values()) == pytest.approx(1, abs=1e-5)
            for sequence in itertools.product(range(VOCAB), repeat=AHEAD):
                expected = 1.0
                for i, token in enumerate(sequence):
                    expected *= truncated(logits_behind(PREFIX + sequence[:i]), params)[token]
                assert law.get(sequence, 0.0) == pytest.approx(expected, abs=EDGE), (params, sequence)
    accepted = verdict.num_accepted
    assert {0, 1, 2} <= set(accepted.tolist())
