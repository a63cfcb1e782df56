"""What a generation measured: counts that are stored, and every ratio that follows from them."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Metrics:
    """Counts and times of one generation. Counts of several generations add up; ratios are taken once, at the end.

    Attributes:
        acceptance_counts: int[G + 1], rounds of a row in which 1 + so many tokens were committed.
        drafted: drafts proposed.
        num_tokens: tokens of the outputs, prompts not counted; what was decoded behind a stop string is not in it.
        prefill_seconds: computing the prompts.
        decode_seconds: all rounds, compilation not counted.
        first_round_seconds: the first round, which gives each row its first token.
        compile_seconds: compiling programs that this call was the first to need.
    """

    acceptance_counts: np.ndarray
    drafted: int
    num_tokens: int
    prefill_seconds: float
    decode_seconds: float
    first_round_seconds: float
    compile_seconds: float

    def __add__(self, other: "Metrics") -> "Metrics":
        fields = [field.name for field in dataclasses.fields(self)]
        return Metrics(**{name: getattr(self, name) + getattr(other, name) for name in fields})

    @property
    def rounds(self) -> int:
        """Rounds, each row's counted on its own."""
        return int(self.acceptance_counts.sum())

    @property
    def accepted(self) -> int:
        """Drafts committed."""
        return int((self.acceptance_counts * np.arange(self.acceptance_counts.size)).sum())

    @property
    def acceptance_length(self) -> float:
        """Tokens a round: 1 + the mean of accepted drafts (bonus or recovered token included).

        Rounds without drafts count too, as 1.
        """
        return 1.0 + _ratio(self.accepted, self.rounds)

    @property
    def acceptance_rate(self) -> float:
        """Accepted over proposed drafts."""
        return _ratio(self.accepted, self.drafted)

    @property
    def acceptance_rate_by_position(self) -> tuple[float, ...]:
        """For i = 1 .. G the share of all rounds in which at least i drafts were committed (unconditional)."""
        at_least = self.acceptance_counts[::-1].cumsum()[::-1]
        return tuple(_ratio(int(count), self.rounds) for count in at_least[1:])

    @property
    def tokens_per_second(self) -> float:
        """Tokens over seconds of decoding; prefill and compilation are not in it."""
        return _ratio(self.num_tokens, self.decode_seconds)

    @property
    def time_to_first_token(self) -> float:
        """Seconds from a group's start to the first token of each of its rows, compilation not counted.

        Of a call that decoded several groups it is their sum.
        """
        return self.prefill_seconds + self.first_round_seconds


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else float("nan")
