"""As many drafts a round as pay: num_speculative_tokens="auto"."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from specjax.control import switch_in_place, zero_outputs
from specjax.drafters.base import NO_DRAFT, Context, Drafter, Features, Proposal

LOOKS = 0.0075
"""By how much looks at what more drafts than the chosen number would bring lengthen decoding."""

GAIN, STAKE = 0.05, 0.3
"""How many tokens more than drafts cost, in tokens of plain rounds, they must promise, and that as a share of the cost.

Costs and acceptance are noisy, and the more a window costs, the more is lost with drafts that do not pay after all.
"""

RATE = 0.05
"""Weight of a round in the running mean of acceptance, in the long run."""

PRIOR_ROUNDS = 7
"""How many rounds what is supposed before the first one weighs as much as."""

KEPT = 32
"""Positions committed without drafts that are kept for the drafter to learn from at once: one by one costs more."""

PRIOR = 0.5
"""Probability that a draft behind accepted ones is accepted, before anything is known: high enough to try."""


class PacedParams(NamedTuple):
    """The drafter's weights, and what its rounds cost.

    Attributes:
        inner: weights of the drafter.
        seconds: float32[number of choices], a round with so many drafts, in any unit.
    """

    inner: Any
    seconds: jax.Array


class PacedState(flax.struct.PyTreeNode):
    """What pacing carries beside the drafter's own state. B stands for rows of the batch.

    Attributes:
        inner: the drafter's state.
        passed: float32[B, G], running mean of P(draft i is accepted | those before it are).
        num_seen: int32[B, G], rounds in it.
        running: bool[B], rows that committed something in the last round.
        choice: int32[], of this round, an index.
        proposed: int32[B], drafts of this round, of rows that run.
        rounds: int32[], since more drafts than the best number were tried.
        forced: int32[], a choice that is taken whatever it brings, to measure what it costs; -1 for none.
        taps, final: features of positions that were committed without drafts and that the drafter has not seen yet.
        num_unseen: int32[B], how many those are.
    """

    inner: Any
    passed: jax.Array
    num_seen: jax.Array
    running: jax.Array
    choice: jax.Array
    proposed: jax.Array
    rounds: jax.Array
    forced: jax.Array
    taps: tuple[jax.Array, ...]
    final: jax.Array
    num_unseen: jax.Array


def paced(drafters: Sequence[Drafter], feature_width: int, dtype: jnp.dtype) -> Drafter:
    """Drafts as many tokens a round as give the most tokens a second, none where speculation does not pay.

    A round with K drafts brings 1 + the sum over i <= K of P(the first i are accepted) tokens, averaged over the rows
    that run, and costs what was measured. The choice follows committed text and past rounds only, so the output's law
    stays the target's. Rounds without drafts cost a plain step: what the drafter has to learn from them it learns
    many rounds at once.

    Args:
        drafters: one method with K = 1 and more drafts, as base.draft_counts gives them, alike but for K. Their prefill
            learns from positions that they have not seen.
        feature_width: D of the target's hidden states.
        dtype: of these.
    """
    largest = drafters[-1]
    G, lag = largest.num_speculative_tokens, largest.lag
    counts = (0, *(drafter.num_speculative_tokens for drafter in drafters))
    least = G + 1 - lag  # few rounds are learnt from in a window as wide as with the most drafts
    kept = max(KEPT, least)

    def learn(inner_params, context: Context, width: int, state: PacedState) -> PacedState:
        """The drafter sees the positions that were committed without drafts, at most so many in any row."""
        start = jnp.maximum(context.length - 1 - state.num_unseen - lag, 0)
        ahead = jnp.minimum(start[:, None] + jnp.arange(width + lag), context.tokens.shape[1] - 1)
        tokens = jnp.maximum(jnp.take_along_axis(context.tokens, ahead, axis=1), 0)
        seen = jax.tree.map(lambda x: jnp.pad(x[:, :width], ((0, 0), (lag, 0), (0, 0))), (state.taps, state.final))
        num_valid = jnp.where(state.num_unseen > 0, jnp.minimum(state.num_unseen + lag, context.length - 1 - start), 0)
        inner = largest.prefill(inner_params, state.inner, context, Features(tokens, start, *seen), num_valid)
        return state.replace(inner=inner, num_unseen=jnp.zeros_like(state.num_unseen))

    def catch_up(inner_params, state: PacedState, context: Context, drafts: jax.Array) -> PacedState:
        """Where drafts, bool[], follow or no more can be kept, the drafter learns what it has not seen."""
        most = state.num_unseen.max()
        behind = (drafts & (most > 0)) | (most == kept)
        widths = sorted({least, kept})
        learning = [functools.partial(learn, inner_params, context, width) for width in widths]
        index = jnp.where(behind, 1 + (most > jnp.array(widths[:-1], jnp.int32)).sum(), 0)
        return switch_in_place(index, (_same, *learning), state)

    def choose(seconds: jax.Array, state: PacedState) -> tuple[jax.Array, jax.Array]:
        """The choice, int32[], and whether more drafts than the best number are tried by it, or there are no more."""
        reached = jnp.cumprod(state.passed, axis=1)
        rows = state.running[:, None].astype(jnp.float32)
        reached = (reached * rows).sum(axis=0) / jnp.maximum(rows.sum(), 1.0)
        tokens = 1.0 + jnp.concatenate([jnp.zeros(1), jnp.cumsum(reached)])[jnp.array(counts)]
        cost = seconds / seconds[0] - 1.0
        pays = (tokens - 1.0 >= GAIN + (1.0 + STAKE) * cost).at[0].set(True)
        best = jnp.argmax(jnp.where(pays, tokens / seconds, 0.0))
        more = jnp.minimum(best + 1, len(counts) - 1)
        looks = state.rounds * LOOKS * seconds[best] >= seconds[more] - seconds[best]
        choice = jnp.where(looks, more, best)
        return jnp.where(state.forced >= 0, state.forced, choice).astype(jnp.int32), looks

    def propose(params: PacedParams, state: PacedState, context: Context) -> tuple[Proposal, PacedState]:
        choice, looks = choose(params.seconds, state)
        state = catch_up(params.inner, state, context, choice > 0)

        def with_drafts(drafter: Drafter):
            def run(carry):
                _, inner = carry
                proposal, inner = drafter.propose(params.inner, inner, context)
                return _widened(proposal, G), inner

            return run

        nothing = zero_outputs(with_drafts(largest), (None, state.inner))
        nothing = nothing._replace(tokens=jnp.full_like(nothing.tokens, NO_DRAFT))
        branches = (_same, *map(with_drafts, drafters))
        proposal, inner = switch_in_place(choice, branches, (nothing, state.inner))
        # A choice whose cost is measured is measured with drafts, also where the method finds none.
        wanted = (state.forced >= 0) & (jnp.arange(G) < jnp.array(counts)[choice])
        tokens = jnp.where(wanted & (proposal.tokens == NO_DRAFT), 0, proposal.tokens)
        proposal = proposal._replace(tokens=tokens)
        rounds = jnp.where(looks, 0, state.rounds + 1)
        proposed = jnp.where(state.running, proposal.num_drafts, 0)
        return proposal, state.replace(inner=inner, choice=choice, proposed=proposed, rounds=rounds)

    def observe(params: PacedParams, state: PacedState, context: Context, features: Features, num_new: jax.Array):
        def after_drafts(state: PacedState) -> PacedState:
            inner = largest.observe(params.inner, state.inner, context, features, num_new)
            num_drafts = jnp.where(state.proposed.any(), jnp.array(counts)[state.choice], 0)
            passed, num_seen = _update(state.passed, state.num_seen, num_new, num_drafts)
            return state.replace(inner=inner, passed=passed, num_seen=num_seen)

        def after_none(state: PacedState) -> PacedState:
            slot = jnp.where(num_new > 0, state.num_unseen, kept)
            rows = jnp.arange(slot.size)
            seen, new = (state.taps, state.final), (features.taps, features.final)
            seen = jax.tree.map(lambda old, new: old.at[rows, slot].set(new[:, 0], mode="drop"), seen, new)
            return state.replace(taps=seen[0], final=seen[1], num_unseen=state.num_unseen + (num_new > 0))

        without = (state.choice == 0).astype(jnp.int32)
        state = switch_in_place(without, (after_drafts, after_none), state)
        return state.replace(running=num_new > 0)

    def prefill(params: PacedParams, state: PacedState, context: Context, features: Features, num_valid: jax.Array):
        return state.replace(inner=largest.prefill(params.inner, state.inner, context, features, num_valid))

    def init(params: PacedParams, batch: int, capacity: int) -> PacedState:
        unseen = jnp.zeros((batch, kept, feature_width), dtype)
        return PacedState(
            inner=largest.init(params.inner, batch, capacity),
            passed=jnp.full((batch, G), PRIOR),
            num_seen=jnp.zeros((batch, G), jnp.int32),
            running=jnp.ones(batch, bool),
            choice=jnp.zeros((), jnp.int32),
            proposed=jnp.zeros(batch, jnp.int32),
            rounds=jnp.zeros((), jnp.int32),
            forced=jnp.full((), -1, jnp.int32),
            taps=(unseen,) * len(largest.taps),
            final=unseen,
            num_unseen=jnp.zeros(batch, jnp.int32),
        )

    return largest._replace(
        widths=tuple(count + 1 for count in counts),
        reach=kept + lag,
        init=init,
        propose=propose,
        prefill=prefill,
        observe=observe,
    )


def _same(x: Any) -> Any:
    return x


def _widened(proposal: Proposal, num: int) -> Proposal:
    """A proposal of fewer drafts as one of so many."""
    more = num - proposal.tokens.shape[1]
    pad = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, more), *((0, 0),) * (x.ndim - 2))), proposal)
    return pad._replace(tokens=jnp.pad(proposal.tokens, ((0, 0), (0, more)), constant_values=NO_DRAFT))


def _update(
    passed: jax.Array, num_seen: jax.Array, num_new: jax.Array, num_drafts: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The running means, and how many rounds are in them, after a round of so many drafts; a row that had none of them
    counts as one that rejected them, because the window was paid for. A position is seen where all before it passed.
    """
    accepted = (num_new - 1)[:, None]
    position = jnp.arange(passed.shape[1])
    seen = (num_new > 0)[:, None] & (accepted >= position) & (position < num_drafts)
    rate = jnp.maximum(RATE, 1.0 / (1 + PRIOR_ROUNDS + num_seen))
    return jnp.where(seen, passed + rate * ((accepted > position) - passed), passed), num_seen + seen
