"""What a drafter is: a NamedTuple of pure functions, and what passes between it and the step."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax

from specjax.sampling import SamplingState

NO_DRAFT = -1
"""Token of a proposal where the row has no draft; it is always rejected and never counted."""

COUNTS = (0, 1, 2, 3, 4, 6, 8)
"""Drafts of a round where their number varies."""


@flax.struct.dataclass
class Context:
    """What has been committed so far, as a drafter sees it.

    Attributes:
        tokens: int32[B, S], prompt and output; meaningless at and beyond length.
        length: int32[B].
        sampling: SamplingState of the rows.
    """

    tokens: jax.Array
    length: jax.Array
    sampling: SamplingState


class Features(NamedTuple):
    """What the target computed for the positions start .. start + T - 1.

    Attributes:
        tokens: int32[B, T].
        start: int32[B].
        taps: one dtype[B, T, D] for each of Drafter.taps.
        final: dtype[B, T, D], after the final norm.
    """

    tokens: jax.Array
    start: jax.Array
    taps: tuple[jax.Array, ...]
    final: jax.Array


class Proposal(NamedTuple):
    """Drafts of one round.

    Attributes:
        tokens: int32[B, G]; NO_DRAFT from the first position on where the row proposes nothing.
        probs: float32[B, G, V], the distribution that each token was drawn from, or None where drafts are not drawn
            but chosen: then the distribution is all on the token (one-hot).
        logits: float32[B, G], the drafter's own logit of each token, before temperature; None where it has none.
    """

    tokens: jax.Array
    probs: jax.Array | None = None
    logits: jax.Array | None = None

    @property
    def drawn(self) -> tuple[jax.Array, jax.Array | None]:
        """Tokens, and the laws that they come from."""
        return self.tokens, self.probs

    def first(self, num: int) -> "Proposal":
        """The first so many drafts of each row."""
        part: Proposal = jax.tree.map(lambda x: x[:, :num], self)
        return part

    @property
    def num_drafts(self) -> jax.Array:
        """int32[B], 0..G."""
        return (self.tokens != NO_DRAFT).sum(axis=1)

    @property
    def width(self) -> jax.Array:
        """int32[], tokens of the window that holds every row's drafts and the token before them."""
        return 1 + self.num_drafts.max()


class Drafter(NamedTuple):
    """A drafting method. Its state is a pytree that the step carries along and never looks into.

    Attributes:
        name: the method's name.
        parents: the topology of the G drafts, static; parents[i] is the draft that draft i follows, -1 the last
            committed token. A chain is (-1, 0, 1, ...).
        widths: window sizes that a round is compiled for, increasing, the last one G + 1. The smallest that holds
            every row's drafts is used, so a round in which nobody drafts costs a plain step.
        taps: target layers whose entering hidden states the drafter wants to see.
        lag: positions before the last committed token that it may not have learnt yet when it proposes; a drafter that
            lags reads no features.
        reach: positions from the first that it has not learnt on that its windows may write, where these are more than
            a round's; its caches have to have room for them.
        init: (params, batch, capacity) -> state.
        prefill: (params, state, context, features, num_valid) -> state; sees the prompts, less their last tokens, in
            pieces. The first num_valid, int32[B], positions of the piece belong to the row; the rest is padding.
        propose: (params, state, context) -> (Proposal, state).
        observe: (params, state, context, features, num_new) -> state; sees the context after the round, what the
            target computed for the window, and how many tokens, int32[B], the row committed; 0 where it is done.
    """

    name: str
    parents: tuple[int, ...]
    widths: tuple[int, ...]
    init: Callable[[Any, int, int], Any]
    propose: Callable[[Any, Any, Context], tuple[Proposal, Any]]
    prefill: Callable[[Any, Any, Context, Features, jax.Array], Any] = lambda params, state, *seen: state
    observe: Callable[[Any, Any, Context, Features, jax.Array], Any] = lambda params, state, *seen: state
    taps: tuple[int, ...] = ()
    lag: int = 0
    reach: int = 0

    @property
    def num_speculative_tokens(self) -> int:
        """G."""
        return len(self.parents)


def draft_counts(most: int) -> tuple[int, ...]:
    """Numbers of drafts that windows are compiled for where rounds draft from none to at most so many."""
    return tuple(sorted({num for num in COUNTS if num < most} | {most}))


def chain(num_speculative_tokens: int) -> tuple[int, ...]:
    """The topology in which each draft follows the one before."""
    return tuple(range(-1, num_speculative_tokens - 1))
