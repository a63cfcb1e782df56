"""results.jsonl: what was measured, on disk as soon as it is known, and read back by the run that goes on."""

import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from specjax.errors import SpecJAXError
from specjax.evaluate.files import prepare_workdir, write_json, write_text
from specjax.metrics import Metrics

FILES = CONFIG, RESULTS = "config.json", "results.jsonl"
"""What a run goes on from."""


@dataclasses.dataclass(frozen=True)
class Answer:
    """One turn of a prompt answered once by one method.

    Attributes:
        prompt: id of the prompt.
        turn: 0 is the first.
        category: of the prompt.
        method: its name; "plain" is decoding without drafts.
        repeat: 0 is the first.
        error: why there is no output; None if there is.
        token_ids: output, a stop token included.
        text: of the output.
        finish_reason: "stop" or "length".
        timed_tokens: those that decode_seconds brought; None for all. Other libraries' prefill gives the first token.
        acceptance_counts: see Metrics; empty for other libraries.
        drafted: drafts proposed.
        prefill_seconds, decode_seconds, first_round_seconds: see Metrics; a pass of several rows has them, not its
            answers.
        compile_seconds: compiling, and the run with which the compiled programs were warmed up.
        harness_seconds: spent around this measurement on anything else.
    """

    prompt: str
    turn: int
    category: str
    method: str
    repeat: int
    error: str | None = None
    token_ids: list[int] = dataclasses.field(default_factory=list)
    text: str = ""
    finish_reason: str = ""
    timed_tokens: int | None = None
    acceptance_counts: list[int] = dataclasses.field(default_factory=list)
    drafted: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    first_round_seconds: float = 0.0
    compile_seconds: float = 0.0
    harness_seconds: float = 0.0

    @property
    def key(self) -> tuple[str, int, str, int]:
        """What tells it from all others: prompt, turn, method, repeat."""
        return self.prompt, self.turn, self.method, self.repeat

    @property
    def metrics(self) -> Metrics:
        """Its counts and times."""
        return Metrics(
            acceptance_counts=np.array(self.acceptance_counts, np.int64),
            drafted=self.drafted,
            num_tokens=len(self.token_ids) if self.timed_tokens is None else self.timed_tokens,
            prefill_seconds=self.prefill_seconds,
            decode_seconds=self.decode_seconds,
            first_round_seconds=self.first_round_seconds,
            compile_seconds=self.compile_seconds,
        )


@dataclasses.dataclass(frozen=True)
class Pass:
    """One turn of all prompts, decoded by one method in a batch whose rows are refilled.

    Attributes:
        turn, method, repeat: as in Answer.
        prefill_seconds, decode_seconds, compile_seconds, harness_seconds: as in Answer, of the whole pass.
        answers: of each prompt.
    """

    turn: int
    method: str
    repeat: int
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    compile_seconds: float = 0.0
    harness_seconds: float = 0.0
    answers: Sequence[Answer] = ()

    @property
    def key(self) -> tuple[int, str, int]:
        """What tells it from all others."""
        return self.turn, self.method, self.repeat

    @property
    def metrics(self) -> Metrics | None:
        """The counts of its answers, and its times; None where every answer failed."""
        good = [answer.metrics for answer in self.answers if answer.error is None]
        if not good:
            return None
        return dataclasses.replace(
            add(good),
            prefill_seconds=self.prefill_seconds,
            decode_seconds=self.decode_seconds,
            compile_seconds=self.compile_seconds,
        )


def add(metrics: Sequence[Metrics]) -> Metrics:
    """The sum of one or more."""
    total = metrics[0]
    for more in metrics[1:]:
        total += more
    return total


class Results:
    """The lines of results.jsonl: answers, passes, and what is measured once a run ("extras").

    Attributes:
        answers: by (prompt, turn, method, repeat).
        passes: by (turn, method, repeat).
        extras: by name.
        commits: states of the code that measured, in the order of their first measurement; None is one not known.
    """

    def __init__(self, workdir: Path, identity: dict[str, Any], commit: str | None = None):
        self.path = workdir / RESULTS
        self.answers: dict[tuple[str, int, str, int], Answer] = {}
        self.passes: dict[tuple[int, str, int], Pass] = {}
        self.extras: dict[str, Any] = {}
        self._identity, self._commit = identity, commit
        prepare_workdir(workdir)
        self.commits = self._check_config(workdir / CONFIG)
        for line in self._complete_lines():
            self._keep(_read(line))

    def _check_config(self, path: Path) -> list[str | None]:
        """Writes config.json, or checks that it is the same. Returns the commits in it."""
        if not path.is_file():
            write_json(path, self._identity | {"commits": []})
            return []
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise SpecJAXError(f"{path}: is damaged ({error}); choose another workdir or remove it.") from error
        commits, now = before.pop("commits", []), self._identity
        changed = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
        if changed:
            raise SpecJAXError(
                f"workdir={str(path.parent)!r}: holds results of another experiment ({changed[0]} was "
                f"{before.get(changed[0])!r}, is {now.get(changed[0])!r}); choose another folder or remove it."
            )
        return commits

    def _complete_lines(self) -> Iterator[dict[str, Any]]:
        """What is on disk, less a last line that a kill cut short; that one is measured again."""
        if not self.path.is_file():
            return
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            write_text(self.path, whole.decode())
        yield from map(json.loads, whole.decode().split("\n")[:-1])

    def append(self, measured: Answer | Pass) -> None:
        """Writes a measurement to disk, and keeps it."""
        self._write(dataclasses.asdict(measured))
        self._keep(measured)

    def append_extra(self, name: str, value: Any) -> None:
        """Writes what is measured once a run."""
        self._write({"extra": name, "value": value})
        self._keep((name, value))

    def _write(self, line: dict[str, Any]) -> None:
        if self._commit not in self.commits:
            self.commits.append(self._commit)
            write_json(self.path.with_name(CONFIG), self._identity | {"commits": self.commits})
        with self.path.open("ab", buffering=0) as file:  # one call, which Ctrl-C does not cut in two
            file.write((json.dumps(line) + "\n").encode())
            os.fsync(file.fileno())

    def _keep(self, measured: Any) -> None:
        if isinstance(measured, Answer):
            self.answers[measured.key] = measured
        elif isinstance(measured, Pass):
            self.passes[measured.key] = measured
            self.answers.update((answer.key, answer) for answer in measured.answers)
        else:
            name, value = measured
            self.extras[name] = value

    def __len__(self) -> int:
        return len(self.answers)


def _read(line: dict[str, Any]) -> Any:
    if "extra" in line:
        return line["extra"], line["value"]
    if "answers" in line:
        return Pass(**line | {"answers": [Answer(**answer) for answer in line["answers"]]})
    return Answer(**line)
