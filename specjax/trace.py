"""What happened in every round of every row: recorded on the device, read once at the end, spelled as text."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from specjax.drafters.base import NO_DRAFT

UNFINISHED = "\ufffd"
"""What tokenizers write for the bytes of a character that later tokens complete."""


class Trace(flax.struct.PyTreeNode):
    """The rounds of a batch, each at the absolute position of the first token that it committed.

    Attributes:
        drafts: int32[B, S, G], padded with NO_DRAFT.
        num_new: int32[B, S], tokens committed; 0 where no round began.
    """

    drafts: jax.Array
    num_new: jax.Array


class Round(NamedTuple):
    """One round of one row.

    Attributes:
        drafts: tokens proposed, 0 to G of them.
        num_accepted: drafts committed.
        next_token: committed behind them: recovered, bonus, or where the row ends in this round simply its last token.
    """

    drafts: tuple[int, ...]
    num_accepted: int
    next_token: int

    @property
    def tokens(self) -> tuple[int, ...]:
        """The tokens that the round committed."""
        return (*self.drafts[: self.num_accepted], self.next_token)


class SpelledRound(NamedTuple):
    """One round as text; the answer's text is that of accepted drafts and next tokens, joined.

    Attributes:
        drafts: the text that each draft added, or would have added.
        accepted: drafts committed.
        next: the text of the token behind them.
    """

    drafts: tuple[str, ...]
    accepted: int
    next: str


def empty_trace(batch: int, capacity: int, num_drafts: int) -> Trace:
    """A trace without rounds, for so many rows, positions and drafts a round."""
    drafts = jnp.full((batch, capacity, num_drafts), NO_DRAFT, jnp.int32)
    return Trace(drafts, jnp.zeros((batch, capacity), jnp.int32))


def record_round(trace: Trace | None, length: jax.Array, drafts: jax.Array, num_new: jax.Array) -> Trace | None:
    """Writes one round of every row that committed something; None stays None.

    Args:
        trace: Trace or None.
        length: int32[B], before the round.
        drafts: int32[B, G], or fewer where none has more.
        num_new: int32[B].
    """
    if trace is None:
        return None
    rows = jnp.arange(length.size)
    positions = jnp.where(num_new > 0, length, trace.num_new.shape[1])
    return Trace(
        drafts=trace.drafts.at[rows, positions, : drafts.shape[1]].set(drafts, mode="drop"),
        num_new=trace.num_new.at[rows, positions].set(num_new, mode="drop"),
    )


def row_rounds(drafts: np.ndarray, num_new: np.ndarray, begin: int, tokens: Sequence[int]) -> tuple[Round, ...]:
    """The rounds in which a row's output came about.

    Args:
        drafts: int32[S, G], of the row's Trace.
        num_new: int32[S], of the row's Trace.
        begin: the length of its prompt.
        tokens: its output; where a stop string cut it, so is the last round.
    """
    rounds, done = [], 0
    while done < len(tokens):
        proposed = drafts[begin + done]
        num = min(int(num_new[begin + done]), len(tokens) - done)
        if num < 1:
            raise AssertionError(f"no round begins at position {begin + done}, though a token stands there")
        done += num
        rounds.append(Round(tuple(proposed[proposed != NO_DRAFT].tolist()), num - 1, tokens[done - 1]))
    return tuple(rounds)


def spell(rounds: Sequence[Round], tokenizer: Any) -> list[SpelledRound]:
    """The texts of rounds. A character of several tokens counts as the text of its last one.

    Args:
        rounds: of one answer, from its beginning.
        tokenizer: the target's; None spells token ids.
    """
    speller = _Speller(tokenizer)
    spelled = []
    for round_ in rounds:
        accepted = [speller.add(token) for token in round_.drafts[: round_.num_accepted]]
        lookahead = speller.copy()
        rejected = [lookahead.add(token, partial=True) for token in round_.drafts[round_.num_accepted :]]
        spelled.append(SpelledRound((*accepted, *rejected), round_.num_accepted, speller.add(round_.next_token)))
    if spelled:
        spelled[-1] = spelled[-1]._replace(next=spelled[-1].next + speller.rest())
    return spelled


class _Speller:
    """Tells what each further token adds to a text; decodes from the last whole character on, not the whole text."""

    CONTEXT = 4
    """Tokens decoded along in front, since a tokenizer may treat the beginning of a text in its own way."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.settled: list[int] = []
        self.pending: list[int] = []

    def copy(self) -> "_Speller":
        other = _Speller(self.tokenizer)
        other.settled, other.pending = list(self.settled), list(self.pending)
        return other

    def add(self, token: int, partial: bool = False) -> str:
        """The text that a token adds; "" while its character is unfinished, unless partial."""
        if self.tokenizer is None:
            return f"{token} "
        self.pending.append(token)
        added = self._added()
        if added.endswith(UNFINISHED) and not partial:
            return ""
        self._settle()
        return added

    def rest(self) -> str:
        """What remains of a character that the text's end cut off."""
        added = self._added() if self.pending else ""
        self._settle()
        return added

    def _added(self) -> str:
        before = self._decode(self.settled)
        return self._decode(self.settled + self.pending)[len(before) :]

    def _settle(self) -> None:
        self.settled = (self.settled + self.pending)[-self.CONTEXT :]
        self.pending = []

    def _decode(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
