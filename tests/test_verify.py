"""Acceptance rules: truth tables, golden numbers and exact output laws, by integration over the uniforms."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import EDGE, RowParams, block_cells, evaluated, joint, matching_cells, residual_cells, truncated
from test_sampling import state_of

from specjax import step, verify
from specjax.drafters.base import NO_DRAFT, Drafter, Proposal, chain
from specjax.target.decoder import TargetOutput
from specjax.verify import Uniforms

TOP = float(np.nextafter(np.float32(1), np.float32(0)))


def uniforms(accept, second):
    """Coins float32[B, G], and float32[B] that draw the next token from a small vocabulary."""
    accept = jnp.asarray(accept, jnp.float32)
    recover = jnp.zeros((accept.shape[0], accept.shape[1] + 1, 3)).at[:, :, 2].set(jnp.asarray(second)[:, None])
    return Uniforms(accept, recover)


def logits_for(best, vocab_size=6):
    """float32[B, T, V] whose largest entry is at best."""
    return jax.nn.one_hot(jnp.asarray(best), vocab_size) * 100.0


@pytest.mark.parametrize("rule", [verify.greedy, verify.residual])
@pytest.mark.parametrize(
    ("drafts", "best", "num_accepted", "next_token"),
    [
        ([1, 2, 3], [1, 2, 3, 4], 3, 4),
        ([1, 2, 3], [1, 2, 5, 4], 2, 5),
        ([1, 2, 3], [0, 2, 3, 4], 0, 0),
        ([1, 5, 3], [1, 2, 3, 4], 1, 2),
        ([1, NO_DRAFT, NO_DRAFT], [1, 2, 3, 4], 1, 2),
        ([NO_DRAFT, NO_DRAFT, NO_DRAFT], [1, 2, 3, 4], 0, 1),
    ],
)
def test_greedy_rows_accept_the_matching_prefix(rule, drafts, best, num_accepted, next_token):
    verdict = rule(
        logits_for([best]), Proposal(jnp.array([drafts])), state_of([RowParams(0.0)]), uniforms([[0.9] * 3], [0.3])
    )
    assert (int(verdict.num_accepted[0]), int(verdict.next_token[0])) == (num_accepted, next_token)


def test_greedy_rows_in_a_sampling_batch_decide_as_they_do_alone():
    rng = np.random.RandomState(0)
    logits = jnp.asarray(rng.randn(4, 4, 9).astype(np.float32))
    best = jnp.argmax(logits, axis=-1)
    drafts = jnp.where(jnp.asarray(rng.rand(4, 3) < 0.7), best[:, :3], 0).astype(jnp.int32)
    rows = [RowParams(0.0), RowParams(1.0), RowParams(0.0), RowParams(0.5, top_k=2)]
    given = uniforms(rng.rand(4, 3), rng.rand(4))
    mixed = verify.residual(logits, Proposal(drafts), state_of(rows), given)
    alone = verify.greedy(logits, Proposal(drafts), state_of(rows), given)
    for row in (0, 2):
        assert int(mixed.num_accepted[row]) == int(alone.num_accepted[row])
        assert int(mixed.next_token[row]) == int(alone.next_token[row])


@pytest.mark.exact
def test_golden_residual_of_two_tokens():
    """p = (.7, .3), q = (.5, .5): accepted with probability .8; a rejection always gives token 0."""
    logits = jnp.log(jnp.array([[[0.7, 0.3], [0.5, 0.5]]]))
    probs = jnp.array([[[0.5, 0.5]]])
    run = functools.partial(verify.residual, sampling=state_of([RowParams()]))
    always = run(logits, Proposal(jnp.array([[0]]), probs), uniforms=uniforms([[TOP]], [0.5]))
    assert int(always.num_accepted[0]) == 1
    for u, accepted in ((0.6 - EDGE, 1), (0.6 + EDGE, 0)):
        verdict = run(logits, Proposal(jnp.array([[1]]), probs), uniforms=uniforms([[u]], [TOP]))
        assert int(verdict.num_accepted[0]) == accepted
        assert accepted or int(verdict.next_token[0]) == 0


@pytest.mark.exact
@pytest.mark.parametrize(("num", "expected"), [(1, 0.5), (2, 0.75), (3, 0.875), (4, 0.9375)])
def test_golden_mean_of_accepted_drafts(num, expected):
    """p = (.7, .2, .1), q = (.2, .5, .3) at every position: E[n] by exact enumeration."""
    target, draft = np.array([0.7, 0.2, 0.1]), np.array([0.2, 0.5, 0.3])
    logits = jnp.log(jnp.asarray(np.tile(target, (1, num + 1, 1)), jnp.float32))
    mean = 0.0
    for drafts in itertools.product(range(3), repeat=num):
        weight = np.prod(draft[list(drafts)])
        limits = np.minimum(1, target[list(drafts)] / draft[list(drafts)])
        cells = list(itertools.product((True, False), repeat=num))
        inside = np.array([[limit / 2 if yes else (1 + limit) / 2 for yes, limit in zip(c, limits)] for c in cells])  # noqa: B905
        volumes = [np.prod([limit if yes else 1 - limit for yes, limit in zip(c, limits)]) for c in cells]  # noqa: B905
        rows = len(cells)
        proposal = Proposal(jnp.tile(jnp.array(drafts), (rows, 1)), jnp.tile(draft, (rows, num, 1)))
        verdict = verify.residual(
            jnp.tile(logits, (rows, 1, 1)), proposal, state_of([RowParams()] * rows), uniforms(inside, [0.5] * rows)
        )
        mean += weight * float(np.dot(volumes, np.asarray(verdict.num_accepted)))
    assert mean == pytest.approx(expected, abs=1e-6)


@pytest.mark.exact
def test_drafts_equal_to_the_target_are_always_accepted():
    rng = np.random.RandomState(1)
    logits = jnp.asarray(rng.randn(1, 4, 40).astype(np.float32))
    rows = state_of([RowParams(0.8, top_k=9)])
    law = [truncated(logits[0, i], RowParams(0.8, top_k=9)) for i in range(3)]
    drafts = jnp.array([[int(np.argmax(p)) for p in law]])
    # p and q differ by float32 rounding, so a uniform within 1e-6 of one may reject.
    verdict = verify.residual(
        logits, Proposal(drafts, jnp.asarray(np.array([law]), jnp.float32)), rows, uniforms([[1 - 1e-6] * 3], [0.5])
    )
    assert int(verdict.num_accepted[0]) == 3


def test_a_rejection_without_residual_falls_back_to_the_target():
    """Where p equals q up to rounding, a rejection leaves no mass; the token must still be one the target allows."""
    probs = jnp.array([[[0.25, 0.75, 0.0]]])
    logits = jnp.log(jnp.array([[[0.25, 0.75, 0.0], [0.2, 0.3, 0.5]]]))
    inflated = probs * (1 + 1e-6)
    verdict = verify.residual(
        logits, Proposal(jnp.array([[1]]), inflated), state_of([RowParams()]), uniforms([[TOP]], [TOP])
    )
    assert int(verdict.num_accepted[0]) == 0
    assert int(verdict.next_token[0]) in (0, 1)


def test_a_draft_outside_the_truncated_target_is_always_rejected():
    logits = jnp.array([[[3.0, 2.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]]])
    for second in (0.0, 0.5, TOP):
        verdict = verify.residual(
            logits, Proposal(jnp.array([[3]])), state_of([RowParams(top_k=2)]), uniforms([[0.0]], [second])
        )
        assert int(verdict.num_accepted[0]) == 0
        assert int(verdict.next_token[0]) in (0, 1)


def test_a_drafter_that_gives_no_probabilities_costs_speed_and_not_the_law():
    logits = jnp.array([[[3.0, 2.0, 1.0], [0.0, 0.0, 0.0]]])
    for probs in (jnp.zeros((1, 1, 3)), jnp.full((1, 1, 3), jnp.nan)):
        verdict = jax.jit(verify.residual)(
            logits, Proposal(jnp.array([[2]]), probs), state_of([RowParams()]), uniforms([[0.0]], [0.1])
        )
        assert (int(verdict.num_accepted[0]), int(verdict.next_token[0])) == (0, 0)


VOCAB, DRAFTS, PERIOD = 4, 2, 3
MIXED = [
    RowParams(),
    RowParams(0.0),
    RowParams(0.6, top_k=3),
    RowParams(1.4, top_p=0.75),
    RowParams(0.9, min_p=0.2),
    RowParams(1.1, top_k=3, top_p=0.9, min_p=0.05),
]


class NoCache:
    """The cache of a target that needs none."""

    def keep(self, start, num_kept):
        return self


jax.tree_util.register_pytree_node(NoCache, lambda cache: ((), None), lambda aux, children: NoCache())


def table_target(tables):
    """A target whose next-token logits depend on position and token through a table."""

    def forward(params, tokens, start, cache, taps, with_logits):
        positions = start[:, None] + jnp.arange(tokens.shape[1])
        logits = jnp.asarray(tables, jnp.float32)[positions % len(tables), tokens]
        return TargetOutput(logits, (), logits, cache)

    return forward


def given_drafts(probs):
    """A drafter that proposes what its state holds."""
    return Drafter(
        name="given",
        parents=chain(DRAFTS),
        widths=(DRAFTS + 1,),
        init=lambda params, batch, capacity: (),
        propose=lambda params, state, context: (Proposal(state, probs), state),
    )


CELLS = {verify.residual: residual_cells, verify.token_matching: matching_cells, verify.block: block_cells}


def one_round_cells(rule, tables, draft_tables, params, position, token, sampled):
    """Every draft and every box of uniforms on which a round should be constant, with its probability.

    The rule is evaluated close to both ends of every box, so a rule with other ends gives another law or another value
    at one of them.
    """
    for drafts in itertools.product(range(VOCAB), repeat=DRAFTS):
        weight, target, draft, last = 1.0, [], [], token
        for i, following in enumerate(drafts):
            proposed = draft_tables[(position + i) % PERIOD, last]
            weight *= proposed[following]
            target.append(truncated(tables[(position + i) % PERIOD, last], params))
            draft.append(proposed if sampled else np.eye(VOCAB)[following])
            last = following
        target.append(truncated(tables[(position + DRAFTS) % PERIOD, last], params))
        draft.append(np.zeros(VOCAB))
        for coins, draws in CELLS[rule](target, draft, drafts):
            used = draws if rule is verify.token_matching else draws[:1]
            volume = np.prod([high - low for low, high in [*coins, *used]])
            yield drafts, coins, draws, weight * volume


@pytest.mark.exact
@pytest.mark.parametrize("rule", CELLS, ids=lambda rule: rule.__name__)
@pytest.mark.parametrize("sampled", [True, False], ids=["sampled drafts", "one-hot drafts"])
@pytest.mark.parametrize("side", [0, 1])
def test_the_joint_law_of_the_next_three_tokens_is_the_targets(rule, sampled, side, monkeypatch):
    """All of the step, mixed parameters in one batch, conditional on position and last token: exact integration."""
    rng = np.random.RandomState(7)
    tables = rng.randn(PERIOD, VOCAB, VOCAB).astype(np.float32) * 1.5
    draft_tables = rng.dirichlet(np.ones(VOCAB), (PERIOD, VOCAB))

    starts = list(itertools.product(range(len(MIXED)), range(PERIOD), range(VOCAB)))
    cells, owner = [], []
    for start in starts:
        which, position, token = start
        found = list(one_round_cells(rule, tables, draft_tables, MIXED[which], position, token, sampled))
        cells += found
        owner += [start] * len(found)

    rows = len(cells)
    positions = np.array([position for _, position, _ in owner])
    # The last committed token stands at length - 1, and its logits are those of position length - 1.
    tokens = np.zeros((rows, 16), np.int32)
    tokens[np.arange(rows), positions + PERIOD] = [token for _, _, token in owner]
    drafts = jnp.array([cell[0] for cell in cells], jnp.int32)
    probs = None
    if sampled:
        q = np.zeros((rows, DRAFTS, VOCAB), np.float32)
        for row, ((_, position, token), cell) in enumerate(zip(owner, cells, strict=True)):
            history = (token, *cell[0])
            for i in range(DRAFTS):
                q[row, i] = draft_tables[(position + i) % PERIOD, history[i]]
        probs = jnp.asarray(q)
    state = step.DecodeState(
        tokens=jnp.asarray(tokens),
        logprobs=None,
        length=jnp.asarray(positions + PERIOD + 1, jnp.int32),
        max_length=jnp.full(rows, 16),
        stop_tokens=jnp.full((rows, 1), step.PAD),
        finish=jnp.zeros(rows, jnp.int32),
        sampling=state_of([MIXED[which] for which, _, _ in owner], seeds=[0] * rows),
        cache=NoCache(),
        drafter=drafts,
        num_drafted=jnp.zeros(rows, jnp.int32),
        acceptance_counts=jnp.zeros((rows, DRAFTS + 1), jnp.int32),
    )
    given = Uniforms(*map(jnp.asarray, evaluated([cell[1:3] for cell in cells], side)))
    monkeypatch.setattr(step, "round_uniforms", lambda *_: given)
    system = step.System(table_target(tables), given_drafts(probs), rule)
    after = jax.jit(lambda state: step.speculative_step(system, step.Params((), ()), state))(state)
    texts, begins, ends = (np.asarray(x) for x in (after.tokens, state.length, after.length))

    rounds = {start: {} for start in starts}
    for row, start in enumerate(owner):
        committed = tuple(texts[row, begins[row] : ends[row]].tolist())
        rounds[start][committed] = rounds[start].get(committed, 0.0) + cells[row][3]

    @functools.cache
    def law(which, position, token, num):
        """The law of the next num tokens, put together from rounds."""
        found = {}
        for committed, mass in rounds[which, position % PERIOD, token].items():
            head = committed[:num]
            rest = num - len(head)
            tails = law(which, position + len(head), head[-1], rest) if rest else {(): 1.0}
            for tail, tail_mass in tails.items():
                found[head + tail] = found.get(head + tail, 0.0) + mass * tail_mass
        return found

    for which, position, token in starts:
        expected = joint(tables, MIXED[which], position, token, 3)
        found = law(which, position, token, 3)
        assert sum(found.values()) == pytest.approx(1, abs=1e-6)
        worst = max(abs(found.get(key, 0) - expected.get(key, 0)) for key in found.keys() | expected.keys())
        assert worst < EDGE
