"""Formatting only: progress bars and tables."""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any


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


def summary_table(summary: dict[str, Any]) -> str:
    """A summary.json as a Markdown table."""
    baseline = summary["baseline"]["tokens_per_second"]
    rows = [["plain", "", "", f"{baseline:.1f}", "1.00", "1.00", "", "", ""]]
    for name, row in summary["methods"].items():
        rates = " ".join(f"{rate:.2f}" for rate in row["acceptance_rate_by_position"])
        counts = [row["identical"], row["near_tie"], row["mismatch"]]
        rule = row["rule"] if row["lossless"] else f"{row['rule']} (lossy)"
        agreement = "not compared" if counts[0] is None else " / ".join(map(str, counts))
        numbers = [f"{row[key]:.2f}" for key in ("speedup", "acceptance_length", "efficiency")]
        tokens_per_second = f"{row['tokens_per_second']:.1f}"
        rows.append([name, rule, str(row["num_speculative_tokens"]), tokens_per_second, *numbers, rates, agreement])
    header = "method", "rule", "G", "tokens/s", "speed-up", "tokens a round", "efficiency", "acceptance by position"
    title = f"{summary['target']} {summary['dtype']}, {summary['device']}, {summary['prompts']} prompts"
    return f"{title}\n\n{table([*header, 'identical / near tie / mismatch'], rows)}"


def benchmark_table(results: dict[str, Any]) -> str:
    """A benchmark.json as a Markdown table."""
    rows = [[row["claim"], row["measured"], _number(row["ratio"]), row["goal"]] for row in results["rows"]]
    title = f"{results['target']} {results['dtype']}, {results['device']}, {results['prompts']} prompts"
    return f"{title}\n\n{table(['claim', 'measured', 'ratio', 'goal'], rows)}"


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table with aligned columns."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    head = "| " + " | ".join(cell.ljust(width) for cell, width in zip(header, widths, strict=True)) + " |"
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([head, rule, *lines])


def _number(value: float | None) -> str:
    return "not run" if value is None or math.isnan(value) else f"{value:.2f}"
