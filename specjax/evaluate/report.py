"""Progress bars, tables, and the files of a report: report.md and report.html of one summary.json or several."""

import contextlib
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from specjax.errors import SpecJAXError
from specjax.evaluate import content
from specjax.evaluate.content import Answer, Note, Plot, Run, Section, Source, Table
from specjax.evaluate.files import prepare_workdir, write_text
from specjax.evaluate.summary import SCHEMA
from specjax.view import marked_text

SUMMARY, MARKDOWN, HTML = "summary.json", "report.md", "report.html"

KINDS: dict[str, type] = {
    **dict.fromkeys(("baseline", "methods", "comparisons", "by_category", "versions", "config"), dict),
    **dict.fromkeys(("costs", "predicted", "profile"), dict),
    **dict.fromkeys(("failed", "differences", "examples", "warnings"), list),
}
"""Fields of summary.json that hold others. Each may be null."""

COMPARABLE = "device", "dtype", "prompt_set", "prompts", "turns", "max_tokens", "temperature", "batch_size"
CONFIGURED = "categories", "chat"
"""Fields in which runs must agree for their numbers to be compared, and such fields of their configs."""


@contextlib.contextmanager
def progress() -> Iterator[Callable[[int, int, str], None]]:
    """A progress bar on standard error; yields advance(done, total, description)."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}")
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("loading", total=None)

        def advance(done: int, total: int, description: str) -> None:
            bar.update(task, completed=done, total=total, description=description)

        yield advance


def write_report(
    directories: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str] | None = None
) -> tuple[Path, list[str]]:
    """Writes report.md and report.html of one run, or of several side by side.

    Args:
        directories: of the runs, each with a summary.json.
        out: the folder to write to; None is that of the one run.

    Returns:
        The folder, and why the runs' numbers can't be compared, if so.

    Raises:
        SpecJAXError: a folder has no summary.json or a damaged or unknown one, or out is missing or unwritable.
    """
    from specjax.evaluate import html

    if not directories:
        raise SpecJAXError("directories: none given; expected at least one folder with a summary.json.")
    if out is None and len(directories) > 1:
        raise SpecJAXError(f"--out: is missing; expected the folder for the report on {len(directories)} runs.")
    folder = Path(directories[0] if out is None else out)
    runs = read_runs(directories)
    warnings = incomparable(runs)
    texts = {MARKDOWN: markdown(runs, warnings), HTML: html.page(runs, warnings)}
    prepare_workdir(folder)
    for name, text in texts.items():
        write_text(folder / name, text)
    return folder, warnings


def read_runs(directories: Sequence[str | os.PathLike[str]]) -> list[Run]:
    """The summaries of some folders, labelled by the folders' names; by their paths where names are equal.

    Raises:
        SpecJAXError: a folder has no summary.json, or a damaged or unknown one.
    """
    paths = [Path(directory) for directory in directories]
    summaries = [_read_summary(path) for path in paths]
    if len(paths) == 1:
        return [Run("", summaries[0])]
    names = [path.resolve().name for path in paths]
    labels = names if len(set(names)) == len(names) else [str(path) for path in paths]
    if len(set(labels)) < len(labels):
        twice = next(label for label in labels if labels.count(label) > 1)
        raise SpecJAXError(f"directories: {twice!r} is given twice; expected each run once.")
    return [Run(label, summary) for label, summary in zip(labels, summaries, strict=True)]


def _read_summary(directory: Path) -> dict[str, Any]:
    path = directory / SUMMARY
    if not path.is_file():
        raise SpecJAXError(
            f"{str(directory)!r}: holds no {SUMMARY}; expected the --workdir of a specjax evaluate that has measured."
        )
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SpecJAXError(f"{path}: is damaged ({error}); run specjax evaluate on its folder again.") from error
    if not isinstance(summary, dict) or summary.get("schema") != SCHEMA:
        found = summary.get("schema") if isinstance(summary, dict) else type(summary).__name__
        raise SpecJAXError(
            f"{path}: schema={found!r}; expected {SCHEMA}. Another version of SpecJAX wrote it: run specjax evaluate "
            "with this one, in a new folder, or read it with that one."
        )
    for name, kind in KINDS.items():
        value = summary.get(name)
        if value is not None and not isinstance(value, kind):
            raise SpecJAXError(f"{path}: {name} is a {type(value).__name__}; expected {kind.__name__} or null.")
    return summary


def incomparable(runs: Sequence[Run]) -> list[str]:
    """Why the numbers of runs can't be compared: a sentence for each field in which they differ."""
    found = []
    compared = {name: [run.summary.get(name) for run in runs] for name in COMPARABLE}
    compared |= {name: [(run.summary.get("config") or {}).get(name) for run in runs] for name in CONFIGURED}
    for name, values in compared.items():
        if any(value != values[0] for value in values):
            said = ", ".join(f"{run.label} {value}" for run, value in zip(runs, values, strict=True))
            found.append(f"{name} differs ({said}): numbers of these runs can't be compared with each other.")
    return found


def markdown(runs: Sequence[Run], warnings: Sequence[str] = ()) -> str:
    """The report as Markdown."""
    lines = [f"# {_escape(content.title(runs))}"]
    lines += [_escape((f"{run.label}: " if run.label else "") + content.setting(run.summary)) for run in runs]
    lines += [f"> **{_escape(text)}**" for text in (*warnings, *content.warnings_of(runs))]
    lines += [_markdown_section(section) for section in content.sections(runs)]
    return "\n\n".join(lines) + "\n"


def _markdown_section(section: Section) -> str:
    blocks = [f"## {_escape(section.title)}"]
    for part in section.parts:
        match part:
            case Table():
                heading = [] if part.title == section.title else [f"### {_escape(part.title)}"]
                numeric = [name not in part.texts for name in part.header]
                cells = [[_escape(cell) for cell in row] for row in part.rows]
                blocks += [*heading, table([_escape(name) for name in part.header], cells, numeric)]
                blocks += [_escape(part.note)] if part.note else []
            case Note():
                blocks.append(_escape(part.text))
            case Source():
                blocks += [f"### {_escape(part.title)}", _fenced(part.text)]
            case Answer():
                blocks += [f"### {_escape(part.title)}", _fenced(part.question)]
                for name, rounds in part.methods:
                    blocks += [
                        f"{_escape(name)}: [accepted] ~rejected~ (recovered or bonus)",
                        _fenced(marked_text(rounds)),
                    ]
            case Plot():
                pass  # the tables say the same
    return "\n\n".join(blocks)


def summary_table(summary: dict[str, Any]) -> str:
    """The results of a summary.json as a Markdown table."""
    results = content.results_table([Run("", summary)])
    partial = "" if summary.get("finished", True) else " (partial run)"
    heading = f"{summary.get('target')} {content.setting(summary)}{partial}"
    numeric = [name not in results.texts for name in results.header]
    return f"{heading}\n\n{table(results.header, results.rows, numeric)}"


def benchmark_table(results: dict[str, Any]) -> str:
    """A benchmark.json as a Markdown table."""
    rows = [[row["claim"], row["measured"], _number(row["ratio"]), row["goal"]] for row in results["rows"]]
    title = f"{results['target']} {results['dtype']}, {results['device']}, {results['prompts']} prompts"
    return f"{title}\n\n{table(['claim', 'measured', 'ratio', 'goal'], rows)}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], numeric: Sequence[bool] = ()) -> str:
    """A Markdown table with aligned columns; numeric ones are marked to stand at the right."""
    right = [*numeric, *[False] * (len(header) - len(numeric))]
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = (cell.rjust(w) if r else cell.ljust(w) for cell, w, r in zip(cells, widths, right, strict=True))
        return "| " + " | ".join(padded) + " |"

    rule = "|".join("-" * (width + 1) + (":" if r else "-") for width, r in zip(widths, right, strict=True))
    return "\n".join([line(header), f"|{rule}|", *map(line, rows)])


def _escape(text: str) -> str:
    """Text as Markdown shows it unchanged, in one line."""
    return re.sub(r"([\\`*_\[\]<>|#&~])", r"\\\1", " ".join(text.split()))


def _fenced(text: str) -> str:
    """Text as it is, between fences that it does not hold."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"


def _number(value: float | None) -> str:
    return "not run" if value is None or math.isnan(value) else f"{value:.2f}"
