"""Plots of reports and notebooks: nothing is computed here but layout."""

import io
import json
import math
import os
import re
import textwrap
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from specjax.metrics import Metrics

COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8c6d00")
"""Okabe and Ito's colours, which stay apart in every kind of colour blindness; markers and hatches repeat them."""

NEUTRAL = "#8a929b"
"""The colour of a series whose place is negative: what others are compared with."""

MARKERS = "os^DvPX*"
HATCHES = ("", "///", "...", "xxx", "\\\\\\", "ooo", "+++", "---")
WIDTH = 4.7
"""Inches; small, so that letters stay readable where a telephone scales the plot to its width."""

NOTEBOOK_DPI = 90
"""Pixels of a notebook's page to an inch."""

LONGEST_LABEL = 28

SETTINGS: dict[str, Any] = {
    "svg.fonttype": "path",  # looks the same where the fonts are not there
    "text.parse_math": False,  # names may hold dollars
    "font.family": ["DejaVu Sans"],
    "font.size": 9,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#7a828c",
    "axes.labelcolor": "#33393f",
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#e3e7eb",
    "xtick.color": "#33393f",
    "ytick.color": "#33393f",
    "text.color": "#1b1f24",
    "hatch.color": "#ffffff",
    "hatch.linewidth": 0.7,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
}


class Series(NamedTuple):
    """Numbers that belong together; None where one was not measured.

    Attributes:
        label: in the legend or beside the bar.
        x: where they stand; not used by bars.
        y: the numbers.
        low, high: ends of their intervals, or empty.
        measured: single points beside a line, as (x, y, low, high); low and high may be None.
        colour: its place among COLOURS and markers; None is its place among the series.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float | None]
    low: Sequence[float | None] = ()
    high: Sequence[float | None] = ()
    measured: Sequence[tuple[float, float, float | None, float | None]] = ()
    colour: int | None = None

    def place(self, index: int) -> int:
        """Among COLOURS, for the series that stands at an index."""
        return index if self.colour is None else self.colour


class Picture(str):
    """An SVG, as text; a notebook shows it as PNG, because sites that show stored notebooks drop SVG elements.

    Attributes:
        figure: matplotlib's.
        about: what it shows.
    """

    figure: Figure
    about: str

    def __new__(cls, svg: str, figure: Figure, about: str) -> "Picture":
        self = super().__new__(cls, svg)
        self.figure, self.about = figure, about
        return self

    def __repr__(self) -> str:
        return f"<plot: {self.about}>"

    def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
        """The image with two pixels to one of the page, and its width on the page."""
        file = io.BytesIO()
        with style():
            self.figure.savefig(
                file, format="png", dpi=2 * NOTEBOOK_DPI, facecolor="#ffffff", metadata={"Software": None}
            )
        return file.getvalue(), {"width": round(self.figure.get_figwidth() * NOTEBOOK_DPI)}


def bars(prefix: str, title: str, axis: str, series: Sequence[Series], reference: float | None = None) -> Picture:
    """One horizontal bar for each series, of its first number, with its interval; returns an SVG element.

    Args:
        prefix: makes the ids of the element unique in its page.
        title, axis: what it shows, and in which unit.
        series: from top to bottom.
        reference: where to draw a line, if anywhere.
    """

    def draw(axes: Axes) -> None:
        shown = [(row, _number(one.y[0])) for row, one in enumerate(series)]
        ends = [_number(one.high[0]) if one.high else value for one, (_, value) in zip(series, shown, strict=True)]
        widest = max([*(end for end in ends if end == end), *(value for _, value in shown if value == value), 1e-9])
        for row, value in shown:
            one = series[row]
            axes.barh(row, value, height=0.62, color=_colour(one.place(row)))
            low, high = (_number(end[0]) if end else math.nan for end in (one.low, one.high))
            if low == low and high == high:
                axes.plot([low, high], [row, row], color="#1b1f24", linewidth=1.2, marker="|", markersize=7)
            text, place = (
                (f"{value:.2f}" if value < 20 else f"{value:.1f}"),
                max(value, high if high == high else value),
            )
            if value == value:
                axes.annotate(text, (place, row), (5, 0), textcoords="offset points", va="center", fontsize=8.5)
        if reference is not None:
            axes.axvline(reference, color="#1b1f24", linewidth=1, linestyle=(0, (4, 3)))
        axes.set_xlim(0, max(widest, reference or 0) * 1.16)
        axes.set_yticks(range(len(series)), [_short(one.label) for one in series])
        axes.set_ylim(len(series) - 0.4, -0.6)
        axes.grid(False, axis="y")
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel(axis)

    return _svg(prefix, title, 1.05 + 0.3 * len(series), draw)


def lines(
    prefix: str, title: str, axes_labels: tuple[str, str], series: Sequence[Series], reference: float | None = None
) -> Picture:
    """Lines with markers, and hollow points where something was measured beside a line; returns an SVG element.

    With a reference the vertical axis shows what lies around it, without one it begins at 0.
    """

    def draw(axes: Axes) -> None:
        for index, one in enumerate(series):
            colour, marker = _colour(one.place(index)), MARKERS[one.place(index) % len(MARKERS)]
            values = [_number(value) for value in one.y]
            axes.plot(one.x, values, color=colour, marker=marker, markersize=4, linewidth=1.6, label=_short(one.label))
            for x, y, low, high in one.measured:
                if low is not None and high is not None:
                    axes.plot([x, x], [low, high], color=colour, linewidth=1.2)
                style: dict[str, Any] = {
                    "markerfacecolor": "#ffffff",
                    "markeredgecolor": colour,
                    "markeredgewidth": 1.8,
                }
                axes.plot([x], [y], linestyle="", marker=marker, markersize=8, zorder=4, **style)
        if any(one.measured for one in series):
            style = {"markerfacecolor": "#ffffff", "markeredgecolor": "#555555", "markeredgewidth": 1.8}
            axes.plot([], [], linestyle="", marker="o", markersize=8, label="measured", **style)
        if reference is not None:
            axes.axhline(reference, color="#1b1f24", linewidth=1, linestyle=(0, (4, 3)))
        if reference is None:
            axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel(axes_labels[0])
        axes.set_ylabel(axes_labels[1])

    return _svg(prefix, title, 3.1 + _legend_height(len(series)), draw, legend=True)


def grouped_bars(prefix: str, title: str, axes_labels: tuple[str, str], series: Sequence[Series]) -> Picture:
    """Upright bars, side by side where series share an x; returns an SVG element."""

    def draw(axes: Axes) -> None:
        width = 0.84 / max(len(series), 1)
        for index, one in enumerate(series):
            places = [x + (index - (len(series) - 1) / 2) * width for x in one.x]
            values = [_number(value) for value in one.y]
            hatch = HATCHES[one.place(index) % len(HATCHES)]
            style: dict[str, Any] = {"color": _colour(one.place(index)), "hatch": hatch, "edgecolor": "#ffffff"}
            axes.bar(places, values, width=width, linewidth=0.4, label=_short(one.label), **style)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(False, axis="x")
        axes.set_xlabel(axes_labels[0])
        axes.set_ylabel(axes_labels[1])

    return _svg(prefix, title, 3.1 + _legend_height(len(series)), draw, legend=True)


def stacked_bars(prefix: str, title: str, axis: str, names: Sequence[str], series: Sequence[Series]) -> Picture:
    """One horizontal bar for each name, made of one piece of every series; returns an SVG element."""

    def draw(axes: Axes) -> None:
        left = [0.0] * len(names)
        for index, one in enumerate(series):
            values = [value or 0.0 for value in one.y]
            style: dict[str, Any] = {
                "color": _colour(index),
                "hatch": HATCHES[index % len(HATCHES)],
                "edgecolor": "#ffffff",
            }
            axes.barh(range(len(names)), values, 0.62, left, linewidth=0.4, label=_short(one.label), **style)
            left = [before + value for before, value in zip(left, values, strict=True)]
        axes.set_yticks(range(len(names)), [_short(name) for name in names])
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.grid(False, axis="y")
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel(axis)

    return _svg(prefix, title, 1.1 + 0.32 * len(names) + _legend_height(len(series)), draw, legend=True)


def heat_map(
    prefix: str, title: str, scale: str, rows: Sequence[str], columns: Sequence[str], values: Sequence[Sequence[Any]]
) -> Picture:
    """Ratios as a table of colours, white at 1, each with its number; returns an SVG element."""

    def draw(axes: Axes) -> None:
        logs = [[math.log2(value) if value else math.nan for value in map(_number, row)] for row in values]
        largest = max([abs(value) for row in logs for value in row if value == value] + [0.25])
        style: dict[str, Any] = {
            "cmap": "PuOr_r",
            "vmin": -largest,
            "vmax": largest,
            "edgecolors": "#ffffff",
            "linewidth": 1.5,
        }
        mesh = axes.pcolormesh(logs, **style)
        for row, line in enumerate(logs):
            for column, value in enumerate(line):
                text = "–" if value != value else f"{2**value:.2f}"
                style = {"color": _readable(*mesh.cmap((value / largest + 1) / 2)[:3]), "fontsize": 8.5}
                axes.text(column + 0.5, row + 0.5, text, ha="center", va="center", **style)
        slanted = len(columns) > 4
        style = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"} if slanted else {}
        axes.set_xticks([0.5 + place for place in range(len(columns))], [_short(name, 18) for name in columns], **style)
        axes.set_yticks([0.5 + place for place in range(len(rows))], [_short(name) for name in rows])
        axes.set_ylim(len(rows), 0)
        axes.grid(False)
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
        axes.set_xlabel(scale)

    return _svg(prefix, title, 1.2 + 0.27 * len(rows) + (0.5 if len(columns) > 4 else 0), draw)


def acceptance(metrics: Mapping[str, Metrics]) -> Picture:
    """How often each draft was accepted. metrics: of a name, such as GenerationResult.metrics of each method."""
    series = [
        Series(name, range(1, len(one.acceptance_rate_by_position) + 1), list(one.acceptance_rate_by_position))
        for name, one in metrics.items()
    ]
    labels = "position of the draft", "share of rounds that accept it"
    return lines("acceptance", "Acceptance by position", labels, series)


def training(workdir: str | os.PathLike[str]) -> Picture:
    """How often the drafts of a head were the target's own choice while it was trained, from workdir/metrics.jsonl."""
    text = (Path(workdir) / "metrics.jsonl").read_text(encoding="utf-8")
    found = [json.loads(line) for line in text.splitlines()]
    held_out = [{"step": line["step"], **line["validation"]} for line in found if "validation" in line]
    series = []
    for kind, rows in (("", found), (", held-out text", held_out)):
        for place in range(max((len(row["accuracy"]) for row in rows), default=0)):
            shown = [row for row in rows if place < len(row["accuracy"])]
            accuracies = [row["accuracy"][place] for row in shown]
            series.append(Series(f"draft {place + 1}{kind}", [row["step"] for row in shown], accuracies))
    labels = "training step", "share of tokens guessed"
    return lines("training", "Accuracy of the drafts", labels, series)


def of_report(workdir: str | os.PathLike[str], *sections: str) -> list[Picture]:
    """The plots of some sections of an evaluation's report, such as "Speed" and "Acceptance"."""
    from specjax.evaluate import content, report

    chosen = [section for section in content.sections(report.read_runs([workdir])) if section.title in sections]
    parts = [part for section in chosen for part in section.parts if isinstance(part, content.Plot)]
    return [part.draw(f"plot-{number}") for number, part in enumerate(parts)]  # type: ignore[misc]


def style(prefix: str = "") -> Any:
    """A context in which figures look alike; the ids in their SVG follow from the prefix."""
    settings: Any = SETTINGS | {"svg.hashsalt": prefix}
    return rc_context(settings)


def _svg(prefix: str, title: str, height: float, draw: Callable[[Axes], None], legend: bool = False) -> Picture:
    with style(prefix), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # names may be in any script
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
        # Over the whole figure, so that it begins where the names of bars begin.
        figure.suptitle(textwrap.fill(title, 46), x=0.015, ha="left", fontsize=10.5, fontweight="bold")
        handles, labels = axes.get_legend_handles_labels()
        if legend and labels:
            columns = 3 if max(map(len, labels)) < 14 else 2
            figure.legend(handles, labels, loc="outside lower center", ncols=columns)
        file = io.StringIO()
        metadata: dict[str, Any] = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", metadata=metadata, transparent=True)
    return Picture(_inline(file.getvalue(), prefix), figure, title)


def _inline(svg: str, prefix: str) -> str:
    """An SVG file as an element of an HTML page: its ids are its own, it names no file and styles nothing else."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg).replace("xlink:href=", "href=")
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r"(href=\"|url\()#", rf"\1#{prefix}-", svg)
    svg = re.sub(r'^<svg height="[\d.]+pt"|^<svg', "<svg", svg)
    head, rest = svg.split(">", 1)
    head = re.sub(r'\s(width|height)="[\d.]+pt"', "", head)
    return f"{head}>{rest.strip()}"


def _legend_height(num_series: int) -> float:
    return 0.2 * math.ceil(num_series / 2)


def _readable(*background: float) -> str:
    """White or ink, whichever stands out more against red, green and blue in 0..1 (WCAG's relative luminance)."""
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in background]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#ffffff" if 1.05 / (luminance + 0.05) > (luminance + 0.05) / 0.063 else "#1b1f24"


def _colour(place: int) -> str:
    return COLOURS[place % len(COLOURS)] if place >= 0 else NEUTRAL


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _short(label: str, longest: int = LONGEST_LABEL) -> str:
    """A label in one short line. Matplotlib leaves labels out of legends that begin with an underscore."""
    label = " ".join(label.split())
    label = label if len(label) <= longest else f"{label[: longest - 1]}…"
    return f" {label}" if label.startswith("_") else label
