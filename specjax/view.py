"""What notebooks and terminals show: answers coloured by where their tokens come from, and a line of progress."""

import contextlib
import html
import io
import itertools
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from specjax.trace import SpelledRound


class Origin(NamedTuple):
    """Where a token of an answer comes from, and how it looks.

    Attributes:
        label: in the legend.
        tag: of its HTML element; says the same again where a site drops all styles, as GitHub does with notebooks.
        css: declarations; a colour brings its own background, so it does not depend on the page's theme.
        style: rich's.
        marks: the two characters around it where there are no colours.
    """

    label: str
    tag: str
    css: str
    style: str
    marks: str


ORIGINS = {
    "accepted": Origin(
        "accepted draft",
        "ins",
        "background:#cfe4fb;color:#0a335c;text-decoration:none;box-shadow:inset 0 -2px #1f6fbf",
        "black on sky_blue1",
        "[]",
    ),
    "rejected": Origin(
        "rejected draft", "s", "color:#6b5a66;text-decoration:line-through;font-size:.87em", "dim strike", "~~"
    ),
    "next": Origin(
        "recovered or bonus token",
        "b",
        "background:#ffe2b3;color:#5c3300;border-radius:4px;font-weight:inherit",
        "black on light_goldenrod2",
        "()",
    ),
    "plain": Origin("token of a round without drafts", "span", "", "", ""),
}
"""Blue and orange stay apart in every kind of colour blindness; underline, strike-through and corners say it again."""

CSS = (
    ".sjx{background:#fff;color:#1b1f24;border:1px solid #d0d7de;border-radius:8px;padding:.7em .9em;margin:.4em 0;"
    "font:14px/1.75 system-ui,sans-serif;print-color-adjust:exact;-webkit-print-color-adjust:exact}"
    ".sjx-text{white-space:pre-wrap;overflow-wrap:anywhere;unicode-bidi:isolate;margin:0}"
    ".sjx-text+.sjx-text{border-top:1px solid #d0d7de;margin-top:.7em;padding-top:.7em}"
    ".sjx-legend{font-size:13px;line-height:1.9;margin:0 0 .4em;color:#424a53}.sjx-legend>*{padding:.1em .3em}"
    + "".join(f".sjx-{name}{{{origin.css}}}" for name, origin in ORIGINS.items() if origin.css)
)
"""Of all classes that answer_html and legend_html use."""

CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


class Piece(NamedTuple):
    """The text of one token.

    Attributes:
        text: control characters replaced by pictures of them; a line break is "↵", and breaks the line if committed.
        origin: a key of ORIGINS.
        about: its round and place there.
    """

    text: str
    origin: str
    about: str


def answer_pieces(rounds: Sequence[SpelledRound]) -> Iterator[Piece]:
    """An answer's tokens in the order in which they were tried; those without a text of their own are left out."""
    for number, (drafts, accepted, next_text) in enumerate(rounds, 1):
        # Where the answer's end cut a round, the next draft is the last token itself, and nothing was rejected.
        cut = number == len(rounds) and drafts[accepted : accepted + 1] == (next_text,)
        for place, text in enumerate(drafts[:accepted] if cut else drafts, 1):
            origin = "accepted" if place <= accepted else "rejected"
            about = f"round {number}: draft {place} of {len(drafts)}, {origin}"
            yield from _piece(text, origin, about)
        if drafts:
            kind = "last token" if cut else "bonus token" if accepted == len(drafts) else "recovered token"
            yield from _piece(next_text, "next", f"round {number}: {kind} after {accepted} of {len(drafts)} drafts")
        else:
            yield from _piece(next_text, "plain", f"round {number}: no drafts")


def answer_html(rounds: Sequence[SpelledRound]) -> str:
    """One answer as an HTML element; needs CSS."""
    tokens = (
        _element(origin, html.escape(text), f' title="{html.escape(about)}"')
        for text, origin, about in answer_pieces(rounds)
    )
    return f'<div class="sjx-text">{"".join(tokens)}</div>'


def legend_html(answers: Sequence[Sequence[SpelledRound]]) -> str:
    """What the colours of some answers mean, with counts, as an HTML element; needs CSS."""
    counts = _counts(answers)
    parts = (f"{_element(name, ORIGINS[name].label)} {counts[name]}" for name in ORIGINS if counts[name])
    return f'<div class="sjx-legend">{" · ".join(parts)} · {_rounds(answers)}</div>'


def _element(origin: str, content: str, attributes: str = "") -> str:
    tag = ORIGINS[origin].tag
    return f'<{tag} class="sjx-{origin}"{attributes}>{content}</{tag}>'


def marked_text(rounds: Sequence[SpelledRound]) -> str:
    """One answer with ORIGINS' marks around its tokens, for where there are no colours."""
    text = ""
    for origin, pieces in itertools.groupby(answer_pieces(rounds), key=lambda piece: piece.origin):
        joined = "".join(piece.text for piece in pieces)
        text += _around(joined, ORIGINS[origin].marks)
    return text


def _around(text: str, marks: str) -> str:
    return f"{marks[:1]}{text}{marks[1:]}"


class AnswerView:
    """Answers coloured by the origin of their tokens; notebooks show it as HTML, str() is for terminals.

    Attributes:
        answers: the rounds of each.
    """

    def __init__(self, answers: Sequence[Sequence[SpelledRound]]):
        self.answers = [list(rounds) for rounds in answers]

    def _repr_html_(self) -> str:
        texts = "".join(map(answer_html, self.answers))
        return f'<style>{CSS}</style><div class="sjx">{legend_html(self.answers)}{texts}</div>'

    def __rich__(self) -> Any:
        from rich.text import Text

        counts = _counts(self.answers)
        text = Text()
        for name, origin in ORIGINS.items():
            if counts[name]:
                text.append(origin.label, origin.style).append(f" {counts[name]}  ")
        text.append(_rounds(self.answers))
        for rounds in self.answers:
            text.append("\n\n")
            for piece in answer_pieces(rounds):
                text.append(piece.text, ORIGINS[piece.origin].style)
        return text

    def __str__(self) -> str:
        """With colours where standard output is a terminal that wants them, else with marks."""
        if not sys.stdout.isatty() or os.environ.get("NO_COLOR"):
            return self.marked()
        from rich.console import Console

        console = Console(file=io.StringIO(), force_terminal=True, width=10**6)
        with console.capture() as captured:
            console.print(self, soft_wrap=True, end="")
        return captured.get()

    __repr__ = __str__

    def marked(self) -> str:
        """The answers with marks instead of colours."""
        counts = _counts(self.answers)
        labels = [
            _around(ORIGINS[name].label, ORIGINS[name].marks) + f" {counts[name]}" for name in ORIGINS if counts[name]
        ]
        return "\n\n".join([", ".join([*labels, _rounds(self.answers)]), *map(marked_text, self.answers)])


def _piece(text: str, origin: str, about: str) -> Iterator[Piece]:
    text = CONTROLS.sub(_picture, text).replace("\n", "↵" if origin == "rejected" else "↵\n")
    if text:
        yield Piece(text, origin, about)


def _picture(match: re.Match[str]) -> str:
    code = ord(match[0])
    if code < 0x20:
        return chr(0x2400 + code)
    return "␡" if code == 0x7F else "\ufffd"


def _counts(answers: Sequence[Sequence[SpelledRound]]) -> Counter[str]:
    """Tokens of each origin; a character's earlier tokens count with its last one."""
    return Counter(piece.origin for rounds in answers for piece in answer_pieces(rounds))


def _rounds(answers: Sequence[Sequence[SpelledRound]]) -> str:
    number = sum(len(rounds) for rounds in answers)
    return f"{number} round{'s' * (number != 1)}"


REFRESH_SECONDS = 0.3
"""Between two states of a notebook's progress line."""


class ProgressLine(NamedTuple):
    """How far something is: a bar in notebooks, and a text.

    Attributes:
        done, total: steps.
        description: of what is being done.
    """

    done: int
    total: int
    description: str

    def _repr_html_(self) -> str:
        bar = f'<progress max="{max(self.total, 1)}" value="{self.done}"></progress>'
        return f'<div style="font-family:monospace">{bar} {html.escape(repr(self))}</div>'

    def __repr__(self) -> str:
        return f"{self.done}/{self.total} {self.description}"


@contextlib.contextmanager
def notebook_progress() -> Iterator[Callable[[int, int, str], None]]:
    """One line below a notebook's cell, changed in place; yields advance(done, total, description)."""
    from IPython.display import display

    handle = display(ProgressLine(0, 1, "loading"), display_id=True)
    shown = time.perf_counter()
    line = None

    def advance(done: int, total: int, description: str) -> None:
        nonlocal line, shown
        line = ProgressLine(done, total, description)
        if time.perf_counter() - shown > REFRESH_SECONDS:
            handle.update(line)
            shown = time.perf_counter()

    try:
        yield advance
    finally:
        if line is not None:
            handle.update(line)
