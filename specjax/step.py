"""The unified step: propose, score, verify, commit. Read this file first.

One round drafts up to G tokens, runs the target once over the last committed token and the drafts, keeps a prefix of
the drafts by an acceptance rule, and commits it together with one token more (Leviathan et al. 2211.17192; Chen et al.
2302.01318). Plain decoding is the same step with a drafter that drafts nothing.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from specjax.control import in_narrowest
from specjax.drafters.base import NO_DRAFT, Context, Drafter, Features, Proposal
from specjax.sampling import SamplingState, adjust, record_log_probability
from specjax.trace import Trace, record_round
from specjax.verify import Rule, Verdict, round_uniforms

RUNNING, STOP, LENGTH, ERROR = 0, 1, 2, 3
"""Values of DecodeState.finish: not finished, a stop token, max_length reached, no finite logit."""

PAD = -1
"""Pads DecodeState.stop_tokens; no token has this id."""

Forward = Callable[..., Any]
"""(params, tokens int32[B, T], start int32[B], cache, taps, with_logits) -> TargetOutput; cache shapes fit any T."""


class System(NamedTuple):
    """What is compiled into one program: all static.

    Attributes:
        forward: the target, giving logits, taps, final hidden states and the cache.
        drafter: the drafting method.
        rule: the acceptance rule.
    """

    forward: Forward
    drafter: Drafter
    rule: Rule


class Params(NamedTuple):
    """Weights of target and drafter, each a pytree of arrays."""

    target: Any
    drafter: Any


class DecodeState(flax.struct.PyTreeNode):
    """All that changes while a batch decodes. It lives on the device; rows differ only by what is indexed by B.

    Invariant: the caches hold positions [0, length - 1). The last committed token is not in them yet: the next round
    scores it together with the drafts. So full acceptance is no special case, and a rejection is only a shorter length.

    Attributes:
        Text:
        tokens: int32[B, S], prompt and output.
        logprobs: float32[B, S], the target's log-probability of each token of the output; None where no row wants it.
        length: int32[B], tokens committed, prompt included.
        Limits:
        max_length: int32[B], prompt plus max_tokens.
        stop_tokens: int32[B, E], padded with PAD.
        finish: int32[B], RUNNING or why the row is done. A row that is done commits nothing.
        Randomness:
        sampling: SamplingState.
        Models:
        cache: the target's cache.
        drafter: the drafter's own state.
        Counts:
        num_drafted: int32[B], drafts proposed in rounds of running rows.
        acceptance_counts: int32[B, G + 1], rounds in which 1 + so many tokens were committed.
        trace: what each round proposed and committed; None where nobody asks.
    """

    tokens: jax.Array
    logprobs: jax.Array | None
    length: jax.Array
    max_length: jax.Array
    stop_tokens: jax.Array
    finish: jax.Array
    sampling: SamplingState
    cache: Any
    drafter: Any
    num_drafted: jax.Array
    acceptance_counts: jax.Array
    trace: Trace | None = None

    @property
    def done(self) -> jax.Array:
        """bool[B]."""
        return self.finish != RUNNING

    @property
    def context(self) -> Context:
        """What drafters see."""
        return Context(self.tokens, self.length, self.sampling)


class Scores(NamedTuple):
    """The target's view of a round. W is the window: the last committed token and W - 1 drafts.

    Attributes:
        logits: float32[B, W, V]; row i predicts the token after i drafts.
        finite: bool[B, W], whether their largest is a number.
        features: what the drafter may learn from.
        cache: with the entries of the window's tokens behind length - 1.
    """

    logits: jax.Array
    finite: jax.Array
    features: Features
    cache: Any


def speculative_step(system: System, params: Params, state: DecodeState) -> DecodeState:
    """One round: every running row commits between 1 and G + 1 tokens.

    What follows the proposal runs in the narrowest window that holds every row's drafts.
    """
    with jax.named_scope("propose"):
        proposal, drafter = propose(system, params, state)

    def judge(width: int, state: DecodeState) -> DecodeState:
        drafts = proposal.first(width - 1)
        with jax.named_scope("score"):
            scores = score(system, params, state, drafts)
        with jax.named_scope("verify"):
            verdict = verify(system, state, scores, drafts)
        with jax.named_scope("commit"):
            return commit(system, params, state, scores, drafts, verdict)

    with jax.named_scope("window"):
        return in_narrowest(judge, system.drafter.widths, proposal.width, state.replace(drafter=drafter))


def propose(system: System, params: Params, state: DecodeState) -> tuple[Proposal, Any]:
    """The drafter's proposal and its new state. Rows that are done propose nothing."""
    proposal, drafter = system.drafter.propose(params.drafter, state.drafter, state.context)
    return proposal._replace(tokens=jnp.where(state.done[:, None], NO_DRAFT, proposal.tokens)), drafter


def score(system: System, params: Params, state: DecodeState, drafts: Proposal) -> Scores:
    """The target over the last committed token and the drafts."""
    start = state.length - 1
    last = jnp.take_along_axis(state.tokens, start[:, None], axis=1)
    window = jnp.concatenate([last, jnp.maximum(drafts.tokens, 0)], axis=1)
    out = system.forward(params.target, window, start, state.cache, system.drafter.taps, True)
    finite = jnp.isfinite(out.logits.max(axis=-1))
    return Scores(out.logits, finite, Features(window, start, out.taps, out.final), out.cache)


def verify(system: System, state: DecodeState, scores: Scores, drafts: Proposal) -> Verdict:
    """The acceptance rule, on random numbers that only the row's seed and the absolute positions determine."""
    logits = adjust(scores.logits, state.sampling, drafts.tokens)
    uniforms = round_uniforms(state.sampling, state.length, system.drafter.num_speculative_tokens)
    return system.rule(logits, drafts, state.sampling, uniforms.first(drafts.tokens.shape[1]))


def commit(
    system: System, params: Params, state: DecodeState, scores: Scores, drafts: Proposal, verdict: Verdict
) -> DecodeState:
    """Appends the accepted drafts and the next token, up to a stop token or the row's limit, and keeps their entries.

    A stop token or the limit ends the row there: what is dropped counts as not accepted, and a round's last token
    always as the one that is no draft.
    """
    slots, accepted = jnp.arange(drafts.tokens.shape[1] + 1), verdict.num_accepted[:, None]
    new_tokens = jnp.where(slots < accepted, jnp.pad(drafts.tokens, ((0, 0), (0, 1))), verdict.next_token[:, None])

    stops = (new_tokens[:, :, None] == state.stop_tokens[:, None, :]).any(axis=-1) & (slots <= accepted)
    until_stop = jnp.where(stops.any(axis=1), jnp.argmax(stops, axis=1) + 1, slots.size + 1)
    broken = (~scores.finite & (slots <= accepted)).any(axis=1)
    room = jnp.where(state.done | broken, 0, state.max_length - state.length)
    num_new = jnp.minimum(jnp.minimum(verdict.num_accepted + 1, until_stop), room)
    length = state.length + num_new

    finish = jnp.where(num_new == until_stop, STOP, jnp.where(length >= state.max_length, LENGTH, RUNNING))
    finish = jnp.where(broken, ERROR, finish)

    rows = jnp.arange(num_new.size)[:, None]
    positions = jnp.where(slots < num_new[:, None], state.length[:, None] + slots, state.tokens.shape[1])
    tokens = state.tokens.at[rows, positions].set(new_tokens, mode="drop")
    context = Context(tokens, length, state.sampling)
    return state.replace(
        tokens=tokens,
        logprobs=record_log_probability(state.logprobs, (rows, positions), scores.logits, new_tokens),
        length=length,
        sampling=state.sampling.observe(new_tokens, num_new),
        finish=jnp.where(state.done, state.finish, finish),
        cache=scores.cache.keep(state.length - 1, num_new),
        drafter=system.drafter.observe(params.drafter, state.drafter, context, scores.features, num_new),
        num_drafted=state.num_drafted + jnp.where(num_new > 0, drafts.num_drafts, 0),
        acceptance_counts=state.acceptance_counts.at[:, : slots.size].add(slots == num_new[:, None] - 1),
        trace=record_round(state.trace, state.length, drafts.tokens, num_new),
    )
