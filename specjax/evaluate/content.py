"""What a report says: its sections, tables and plots, from one summary.json or several, in no format yet."""

import functools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from specjax.trace import SpelledRound

MISSING = "–"
"""Stands in a table where something was not measured."""

MANY_DIFFERENCES = 200
"""So many differing outputs are listed; summary.json holds all."""

Summary = Mapping[str, Any]


class Run(NamedTuple):
    """A summary.json.

    Attributes:
        label: tells it from the others of a report; "" where it is the only one.
        summary: its content.
    """

    label: str
    summary: Summary

    def name(self, name: str) -> str:
        """A method's, with the run's label in front."""
        return f"{self.label}: {name}" if self.label else name


class Table(NamedTuple):
    """Rows of texts.

    Attributes:
        title: what it shows.
        header: a name for each column.
        rows: a text for each column.
        texts: names of the columns that hold no numbers.
        note: below it.
        folded: whether it may be folded away, since a plot shows the same.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    texts: Sequence[str]
    note: str = ""
    folded: bool = False


class Plot(NamedTuple):
    """A picture of a table.

    Attributes:
        about: in words what can be seen.
        draw: a prefix for ids -> an SVG element.
    """

    about: str
    draw: Callable[[str], str]


class Note(NamedTuple):
    """A paragraph."""

    text: str


class Source(NamedTuple):
    """Text as it is, such as a config."""

    title: str
    text: str


class Answer(NamedTuple):
    """An example: what was asked, and how each method came to its answer."""

    title: str
    question: str
    methods: Sequence[tuple[str, Sequence[SpelledRound]]]


class Fact(NamedTuple):
    """A number that stands alone at the top."""

    value: str
    about: str


Part = Table | Plot | Note | Source | Answer


class Section(NamedTuple):
    """A heading and what stands below it."""

    title: str
    parts: Sequence[Part]


def title(runs: Sequence[Run]) -> str:
    """Of the report."""
    if len(runs) == 1:
        return f"Evaluation of {runs[0].summary.get('target') or 'an unnamed target'}"
    return f"{len(runs)} evaluations side by side"


def setting(summary: Summary) -> str:
    """On what a run was measured, in one line."""
    batch, temperature = summary.get("batch_size"), summary.get("temperature")
    parts = [
        summary.get("dtype"),
        summary.get("device"),
        summary.get("prompt_set"),
        _count(summary.get("prompts"), "prompt"),
        _count(summary.get("turns"), "turn"),
        f"batch {batch}" if batch is not None else None,
        f"at most {summary['max_tokens']} tokens" if summary.get("max_tokens") is not None else None,
        None if temperature is None else "greedy" if not temperature else f"temperature {temperature:g}",
        _count(summary.get("repeats"), "repeat"),
    ]
    return ", ".join(str(part) for part in parts if part)


def warnings_of(runs: Sequence[Run]) -> list[str]:
    """What a reader must know before any number."""
    found = []
    for run in runs:
        where = f"{run.label}: " if run.label else ""
        if not run.summary.get("finished"):
            found.append(f"{where}partial run: not everything has been measured yet. The same command goes on.")
        found += [where + text for text in run.summary.get("warnings") or ()]
        for name, row in _methods(run):
            if row.get("mismatch"):
                turns = _count(row["mismatch"], "answer")
                found.append(f"{run.name(name)}: {turns} unlike plain decoding's by more than rounding; see Agreement.")
        if run.summary.get("failed"):
            found.append(f"{where}{_count(len(run.summary['failed']), 'answer')} failed; see Failures.")
    return found


def facts(runs: Sequence[Run]) -> list[Fact]:
    """The numbers at the top of a report of one run."""
    if len(runs) > 1:
        return []
    [run] = runs
    found = []
    plain = _of(run.summary, "baseline").get("tokens_per_second")
    rows = [(name, row) for name, row in _methods(run) if row.get("speedup") is not None]
    if rows:
        # Of lossless methods the fastest, where there is one.
        name, row = max(rows, key=lambda pair: (pair[1].get("lossless") is not False, pair[1]["speedup"]))
        name += _lossy(row)
        about = f"speed-up of {name} over plain decoding"
        if row.get("speedup_interval"):
            about += f", 95 % interval {_range(row['speedup_interval'])}"
        found.append(Fact(f"{row['speedup']:.2f}×", about))
        if row.get("tokens_per_second") is not None:
            found.append(Fact(f"{row['tokens_per_second']:.1f}", f"tokens/s with {name}"))
    if plain is not None:
        found.append(Fact(f"{plain:.1f}", "tokens/s of plain decoding"))
    if rows and row.get("acceptance_length") is not None:
        found.append(Fact(f"{row['acceptance_length']:.2f}", f"tokens a round with {name}"))
    return found


def sections(runs: Sequence[Run]) -> list[Section]:
    """All that a report says, in its order: the results, then by subject what can be seen and its numbers."""
    parts: dict[str, Iterable[Part]] = {
        "Speed": [results_table(runs, brief=True), *_speed_plots(runs)],
        "Acceptance": _plots_first(_acceptance(runs)),
        "Categories": _plots_first(_categories(runs)),
        "Costs and predicted speed-up": _plots_first(_costs(runs)),
        "Where a round's time goes": _plots_first(_profile(runs)),
        "Comparisons with other libraries": _comparisons(runs),
        "Agreement with plain decoding": _agreement(runs),
        "Failures": _failures(runs),
        "Example answers": _examples(runs),
        "Environment": _environment(runs),
    }
    return [Section(name, list(found) or [Note("Not measured.")]) for name, found in parts.items()]


def _plots_first(parts: Iterable[Part]) -> list[Part]:
    return sorted(parts, key=lambda part: not isinstance(part, Plot))


def results_table(runs: Sequence[Run], brief: bool = False) -> Table:
    """Plain decoding and each method: a row each.

    Args:
        brief: without acceptance by position and agreement, which have tables of their own.
    """
    rows = []
    for run in runs:
        plain = _of(run.summary, "baseline")
        same = {"speedup": 1.0, "acceptance_length": 1.0} if plain.get("tokens_per_second") is not None else {}
        rows.append([run.label, "plain", "", "", *_rates({**plain, **same}), "", "", ""])
        rows[-1][8] = ""
        for name, row in _methods(run):
            rates = row.get("acceptance_rate_by_position") or []
            counts = [row.get(kind) for kind in ("identical", "near_tie", "mismatch")]
            rows.append(
                [
                    run.label,
                    name,
                    f"{row.get('rule') or ''}{_lossy(row)}",
                    str(row.get("num_speculative_tokens") or MISSING),
                    *_rates(row),
                    _number(row.get("efficiency")),
                    " ".join(_number(rate) for rate in rates) or MISSING,
                    "not compared" if None in counts else " / ".join(map(str, counts)),
                ]
            )
    header = ["run", "method", "rule", "G", "tokens/s", "median", "range", "speed-up", "95 % interval"]
    header += ["tokens a round", "efficiency", "acceptance by position", "identical / near tie / mismatch"]
    note = (
        "Decoding time only, of repeats the fastest of each prompt; median and range are over repeats. Intervals: "
        "bootstrap over prompts. Efficiency: speed-up over tokens a round."
    )
    if brief:
        header, rows = header[:-2], [row[:-2] for row in rows]
    return _tidy(Table("Results", header, rows, ("run", "method", "rule"), note))


def _rates(row: Mapping[str, Any]) -> list[str]:
    """tokens/s, median, range, speed-up, interval, tokens a round."""
    names = "tokens_per_second", "tokens_per_second_median"
    return [
        *(_number(row.get(name), 1) for name in names),
        _range(row.get("tokens_per_second_range"), 1),
        _number(row.get("speedup")),
        _range(row.get("speedup_interval")),
        _number(row.get("acceptance_length")),
    ]


def _speed_plots(runs: Sequence[Run]) -> Iterator[Plot]:
    from specjax.evaluate import plots

    speedups, rates = [], []
    for run in runs:
        rows = [("plain", _of(run.summary, "baseline")), *_methods(run), *_of(run.summary, "comparisons").items()]
        for name, row in rows:
            label, colour = run.name(name) + _lossy(row), _colour(runs, run, name)
            if row.get("speedup") is not None:
                ends = _ends(row.get("speedup_interval"))
                speedups.append(plots.Series(label, (), [row["speedup"]], *ends, colour=colour))
            if row.get("tokens_per_second") is not None:
                ends = _ends(row.get("tokens_per_second_range"))
                rates.append(plots.Series(label, (), [row["tokens_per_second"]], *ends, colour=colour))
    if speedups:
        axis = "times plain decoding (ends: 95 % interval)"
        heading = "Speed-up over plain decoding"
        yield Plot(
            f"{heading}: {_listed(speedups)}.",
            functools.partial(plots.bars, title=heading, axis=axis, series=speedups, reference=1.0),
        )
    if rates:
        heading = "Tokens per second"
        yield Plot(
            f"{heading}: {_listed(rates, 1)}.",
            functools.partial(plots.bars, title=heading, axis="tokens/s (ends: range over repeats)", series=rates),
        )


def _acceptance(runs: Sequence[Run]) -> Iterator[Part]:
    from specjax.evaluate import plots

    chosen = [(run, name, row) for run in runs for name, row in _methods(run) if row.get("acceptance_counts")]
    if not chosen:
        return
    widest = max(len(row["acceptance_counts"]) for _, _, row in chosen) - 1
    rows, shares, positions, histogram = [], [], [], []
    for run, name, row in chosen:
        rates, counts = row.get("acceptance_rate_by_position") or [], row["acceptance_counts"]
        colour = _colour(runs, run, name)
        head = [run.label, name + _lossy(row), _number(row.get("acceptance_length"))]
        head += [_range(row.get("acceptance_length_interval")), _share(row.get("acceptance_rate"))]
        drafted = row.get("drafted")
        head += [MISSING if drafted is None else str(drafted)]
        rows.append(head + [_number(rate) for rate in rates] + [""] * (widest - len(rates)))
        total = sum(counts)
        percent = [100 * count / total if total else None for count in counts]
        shares.append([run.label, name + _lossy(row), str(total)] + [_number(share, 1) for share in percent])
        shares[-1] += [""] * (widest + 1 - len(counts))
        if rates:
            positions.append(plots.Series(run.name(name), range(1, len(rates) + 1), rates, colour=colour))
        histogram.append(plots.Series(run.name(name), range(len(counts)), percent, colour=colour))
    places = [str(place) for place in range(1, widest + 1)]
    header = ["run", "method", "tokens a round", "95 % interval", "accepted", "drafts", *places]
    note = "Columns 1, 2, …: share of all rounds in which at least so many drafts were accepted."
    yield _tidy(Table("Acceptance by position", header, rows, ("run", "method"), note))
    if positions:
        heading, labels = "Acceptance by position", ("position of the draft", "share of rounds that accept it")
        said = "; ".join(f"{one.label}: {' '.join(map(_number, one.y))}" for one in positions)
        yield Plot(
            f"{heading}. {said}.", functools.partial(plots.lines, title=heading, axes_labels=labels, series=positions)
        )
    header = ["run", "method", "rounds", "0", *places]
    note = "Columns 0, 1, 2, …: per cent of rounds with exactly so many accepted drafts."
    yield _tidy(Table("Accepted drafts a round", header, shares, ("run", "method"), note))
    heading, labels = "Accepted drafts a round", ("accepted drafts", "% of rounds")
    said = "; ".join(f"{one.label}: {' '.join(_number(share, 1) for share in one.y)}" for one in histogram)
    yield Plot(
        f"{heading}, per cent of rounds from 0 on. {said}.",
        functools.partial(plots.grouped_bars, title=heading, axes_labels=labels, series=histogram),
    )


def _categories(runs: Sequence[Run]) -> Iterator[Part]:
    from specjax.evaluate import plots

    columns = [(run, name) for run in runs for name, _ in _methods(run)]
    names = list(dict.fromkeys(name for run in runs for name in _of(run.summary, "by_category")))
    if not names:
        return

    def row_of(run: Run, category: str, name: str) -> Mapping[str, Any]:
        return _of(_of(_of(run.summary, "by_category"), category), name)

    for heading, field, digits in (
        ("Speed-up by category", "speedup", 2),
        ("Tokens a round by category", "acceptance_length", 2),
        ("Tokens per second by category", "tokens_per_second", 1),
    ):
        plain = [(run, "plain") for run in runs] if field == "tokens_per_second" else []
        shown = [*plain, *columns]
        values = [[row_of(run, category, name).get(field) for run, name in shown] for category in names]
        if all(value is None for line in values for value in line):
            continue
        turns = [
            max((row_of(*pair[:1], category, pair[1]).get("turns") or 0 for pair in shown), default=0)
            for category in names
        ]
        rows = [
            [category or "(none)", str(number or ""), *(_number(value, digits) for value in line)]
            for category, number, line in zip(names, turns, values, strict=True)
        ]
        header = ["category", "turns", *(run.name(name) for run, name in shown)]
        yield _tidy(Table(heading, header, rows, ("category",), folded=True))
        if field == "speedup":
            best = [max(filter(None, line), default=None) for line in values]
            said = ", ".join(f"{category} {_number(value)}" for category, value in zip(names, best, strict=True))
            draw = functools.partial(
                plots.heat_map,
                title=heading,
                scale="times plain decoding; orange: faster, purple: slower",
                rows=[category or "(none)" for category in names],
                columns=[run.name(name) for run, name in shown],
                values=values,
            )
            yield Plot(f"{heading}; the best of each: {said}.", draw)


def _costs(runs: Sequence[Run]) -> Iterator[Part]:
    for run in runs:
        yield from _score_costs(run)
        yield from _draft_costs(run, runs)
        yield from _predictions(run, runs)


def _score_costs(run: Run) -> Iterator[Part]:
    from specjax.evaluate import plots

    costs = _of(run.summary, "costs")
    widths, batches, score = (costs.get(name) or [] for name in ("widths", "batch", "score_ms"))
    if not score:
        return
    heading = run.name("Cost of scoring")
    context = costs.get("context")
    note = f"Milliseconds of one forward pass, {context} tokens in the cache." if context is not None else ""
    if costs.get("rest_ms") is not None:
        note += f" What is the same in every round takes {_number(costs['rest_ms'])} ms."
    rows = [[str(batch), *(_number(ms, 2) for ms in line)] for batch, line in zip(batches, score, strict=True)]
    yield _tidy(Table(heading, ["batch", *(f"T = {width}" for width in widths)], rows, (), note))
    series = [plots.Series(f"batch {batch}", widths, line) for batch, line in zip(batches, score, strict=True)]
    labels = "tokens scored at once (T), in each row", "ms"
    said = "; ".join(f"{one.label}: {' '.join(_number(ms, 1) for ms in one.y)} ms" for one in series)
    about = f"{heading} of {', '.join(map(str, widths))} tokens at once. {said}."
    yield Plot(about, functools.partial(plots.lines, title=heading, axes_labels=labels, series=series))


def _draft_costs(run: Run, runs: Sequence[Run]) -> Iterator[Part]:
    from specjax.evaluate import plots

    drafts = _of(_of(run.summary, "costs"), "draft_ms")
    series = [
        plots.Series(name, row["K"], row["ms"], colour=_colour(runs, run, name))
        for name, row in drafts.items()
        if row and row.get("K")
    ]
    if not series:
        return
    heading = run.name("Cost of drafting")
    yield _by_drafts(heading, series, "Milliseconds of drafting G tokens for the whole batch.")
    said = "; ".join(f"{one.label}: {' '.join(_number(ms) for ms in one.y)} ms" for one in series)
    labels = "num_speculative_tokens (G)", "ms a round"
    about = f"{heading} by num_speculative_tokens. {said}."
    yield Plot(about, functools.partial(plots.lines, title=heading, axes_labels=labels, series=series))


def _predictions(run: Run, runs: Sequence[Run]) -> Iterator[Part]:
    from specjax.evaluate import plots

    predicted, methods = _of(run.summary, "predicted"), dict(_methods(run))
    series = []
    for name, row in predicted.items():
        if not row or not row.get("K"):
            continue
        method = methods.get(name, {})
        G, speedup = method.get("num_speculative_tokens"), method.get("speedup")
        measured = [(G, speedup, *(method.get("speedup_interval") or (None, None)))]
        known = isinstance(G, int) and speedup is not None
        points = measured if known else ()
        series.append(plots.Series(name, row["K"], row["speedup"], measured=points, colour=_colour(runs, run, name)))
    if not series:
        return
    heading = run.name("Predicted speed-up")
    note = "From the cost of scoring and drafting and the measured acceptance; G = 0 is plain decoding."
    found = [f"{one.label} {y:.2f} at G = {x}" for one in series for x, y, _, _ in one.measured]
    found += [
        f"{name} {row['speedup']:.2f} with G = auto"
        for name, row in methods.items()
        if row.get("num_speculative_tokens") == "auto" and row.get("speedup") is not None
    ]
    if found:
        note += f" Measured: {', '.join(found)}."
    yield _by_drafts(heading, series, note)
    labels = "num_speculative_tokens (G)", "speed-up over plain decoding"
    said = "; ".join(f"{one.label}: {' '.join(map(_number, one.y))}" for one in series)
    draw = functools.partial(plots.lines, title=heading, axes_labels=labels, series=series, reference=1.0)
    yield Plot(f"{heading} by num_speculative_tokens. {said}. {note}", draw)


def _by_drafts(heading: str, series: Sequence[Any], note: str) -> Table:
    """Series over numbers of drafts, a row each."""
    numbers = sorted({x for one in series for x in one.x})
    rows = []
    for one in series:
        values = dict(zip(one.x, one.y, strict=True))
        rows.append([one.label, *(_number(values[x]) if x in values else "" for x in numbers)])
    return _tidy(Table(heading, ["method", *(f"G = {x}" for x in numbers)], rows, ("method",), note))


def _profile(runs: Sequence[Run]) -> Iterator[Part]:
    from specjax.evaluate import plots

    phases = "propose", "score", "verify", "commit"
    chosen = [(run, name, row) for run in runs for name, row in _of(run.summary, "profile").items() if row]
    if not chosen:
        return
    rows = [
        [run.label, name, *(_number(row.get(f"{phase}_ms")) for phase in (*phases, "round"))]
        for run, name, row in chosen
    ]
    header = ["run", "method", *(f"{phase} (ms)" for phase in phases), "whole round (ms)"]
    note = "Each part is compiled and timed on its own, so the parts of a round add up to more or less than the whole."
    yield _tidy(Table("Time of a round", header, rows, ("run", "method"), note))
    series = [plots.Series(phase, (), [row.get(f"{phase}_ms") for _, _, row in chosen]) for phase in phases]
    names = [run.name(name) for run, name, _ in chosen]
    said = "; ".join(
        f"{name}: {', '.join(f'{one.label} {_number(one.y[i])}' for one in series)}" for i, name in enumerate(names)
    )
    yield Plot(
        f"Time of a round in milliseconds. {said}.",
        functools.partial(plots.stacked_bars, title="Time of a round", axis="ms a round", names=names, series=series),
    )


def _comparisons(runs: Sequence[Run]) -> Iterator[Part]:
    rows = []
    for run in runs:
        for name, row in _of(run.summary, "comparisons").items():
            numbers = [_number(row.get("tokens_per_second"), 1), _range(row.get("tokens_per_second_range"), 1)]
            numbers += [_number(row.get("speedup")), str(row.get("num_tokens") or MISSING)]
            turns, identical = row.get("turns"), row.get("identical")
            equal = MISSING if turns is None or identical is None else f"{identical} of {turns}"
            reason = row.get("not_run")
            rows.append([run.label, name, *numbers, equal, f"not run: {reason}" if reason else "measured"])
    if rows:
        header = ["run", "system", "tokens/s", "range", "over our plain decoding", "tokens", "equal texts", "state"]
        note = "Measured in the same run, on the same prompts, tokens counted from ids in the same way."
        yield _tidy(Table("Comparisons", header, rows, ("run", "system", "state"), note))


def _agreement(runs: Sequence[Run]) -> Iterator[Part]:
    rows = []
    for run in runs:
        for name, row in _methods(run):
            counts = [row.get(kind) for kind in ("identical", "near_tie", "mismatch")]
            if None not in counts:
                rows.append([run.label, name + _lossy(row), *map(str, counts)])
    if not rows:
        yield Note("Not measured: texts are compared when a run is finished, at temperature 0, for lossless rules.")
        return
    header = ["run", "method", "identical", "near tie", "mismatch"]
    note = (
        "Answers against plain decoding's. Near tie: at the first difference the two tokens' logits lie closer to the "
        "largest than rounding noise there, which was measured."
    )
    yield _tidy(Table("Answers compared", header, rows, ("run", "method"), note))
    found = [(run, one) for run in runs for one in run.summary.get("differences") or ()]
    if not found:
        yield Note("No answer differs.")
        return
    found.sort(key=lambda pair: pair[1].get("kind") != "mismatch")
    rows = []
    for run, one in found[:MANY_DIFFERENCES]:
        where = [run.label, str(one.get("prompt")), _turn(one), str(one.get("method"))]
        texts = [_quoted(one.get("plain_text")), _quoted(one.get("text"))]
        kind = str(one.get("kind")).replace("_", " ")
        rows.append(
            [*where, kind, _text(one.get("at")), *texts, _number(one.get("gap"), 5), _number(one.get("noise"), 5)]
        )
    header = ["run", "prompt", "turn", "method", "kind", "token", "plain decoding", "the method", "gap", "noise"]
    hidden = len(found) - len(rows)
    note = "Gap and noise: differences of logits." + (f" {hidden} more are in summary.json." if hidden else "")
    words = "run", "prompt", "method", "kind", "plain decoding", "the method"
    yield _tidy(Table("Where answers differ first", header, rows, words, note))


def _failures(runs: Sequence[Run]) -> Iterator[Part]:
    if all(run.summary.get("failed") is None for run in runs):
        return
    rows = [
        [
            run.label,
            str(one.get("prompt")),
            _turn(one),
            str(one.get("method")),
            _text(one.get("repeat")),
            str(one.get("error")),
        ]
        for run in runs
        for one in run.summary.get("failed") or ()
    ]
    if rows:
        header = ["run", "prompt", "turn", "method", "repeat", "error"]
        yield _tidy(Table("Failed answers", header, rows, ("run", "prompt", "method", "error")))
    else:
        yield Note("None: every prompt was answered.")


def _examples(runs: Sequence[Run]) -> Iterator[Part]:
    for run in runs:
        grouped: dict[tuple[str, str, str], list[tuple[str, list[SpelledRound]]]] = {}
        for one in run.summary.get("examples") or ():
            rounds = [SpelledRound(tuple(row["drafts"]), row["accepted"], row["next"]) for row in one["rounds"]]
            key = str(one.get("prompt")), str(one.get("category") or ""), str(one.get("question") or "")
            grouped.setdefault(key, []).append((str(one.get("method")), rounds))
        for (prompt, category, question), methods in grouped.items():
            heading = f"{prompt} ({category})" if category else prompt
            yield Answer(run.name(heading), question, methods)


def _environment(runs: Sequence[Run]) -> Iterator[Part]:
    packages = list(dict.fromkeys(name for run in runs for name in _of(run.summary, "versions")))
    fields = ["target", "dtype", "device", "commit", "prompt_set", "prompts", "turns", "batch_size", "repeats"]
    fields += ["max_tokens", "temperature", "finished"]
    rows = [[name.replace("_", " "), *(_text(run.summary.get(name)) for run in runs)] for name in fields]
    overheads = [run.summary.get("harness_overhead") for run in runs]
    rows.append(["time of the harness itself", *(_share(overhead) for overhead in overheads)])
    rows += [[name, *(_text(_of(run.summary, "versions").get(name)) for run in runs)] for name in packages]
    header = ["", *(run.label or "value" for run in runs)]
    yield Table("Environment", header, [row for row in rows if set(row[1:]) != {MISSING}], header)
    for run in runs:
        if run.summary.get("config"):
            text = json.dumps(run.summary["config"], indent=2, ensure_ascii=False)
            yield Source(run.name("Config of the experiment"), text)


def _methods(run: Run) -> list[tuple[str, Mapping[str, Any]]]:
    return list(_of(run.summary, "methods").items())


def _colour(runs: Sequence[Run], run: Run, name: str) -> int:
    """The place of a method's colour, the same in all plots; -1 for what methods are compared with."""
    known = [(one.label, method) for one in runs for method, _ in _methods(one)]
    return known.index((run.label, name)) if (run.label, name) in known else -1


def _of(content: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A dict inside a dict; empty where it is missing or null."""
    return content.get(name) or {}


def _lossy(row: Mapping[str, Any]) -> str:
    return " (lossy)" if row.get("lossless") is False else ""


def _tidy(table: Table) -> Table:
    """A table without the columns in which nothing stands; says what a dash means."""
    columns = range(len(table.header))
    kept = [column for column in columns if {row[column] for row in table.rows} - {"", MISSING}]
    rows = [[row[column] for column in kept] for row in table.rows]
    dashes = any(cell == MISSING for row in rows for cell in row)
    note = f"{table.note} {MISSING}: not measured.".strip() if dashes else table.note
    return table._replace(header=[table.header[column] for column in kept], rows=rows, note=note)


def _number(value: float | None, digits: int = 2) -> str:
    return MISSING if value is None or math.isnan(value) else f"{value:.{digits}f}"


def _share(value: float | None) -> str:
    return MISSING if value is None else f"{100 * value:.1f} %"


def _range(ends: Sequence[float | None] | None, digits: int = 2) -> str:
    return f"{_number(ends[0], digits)} to {_number(ends[1], digits)}" if ends else MISSING


def _ends(interval: Sequence[float] | None) -> tuple[Sequence[float], Sequence[float]]:
    return ([interval[0]], [interval[1]]) if interval else ((), ())


def _listed(series: Sequence[Any], digits: int = 2) -> str:
    return ", ".join(
        f"{one.label} {_number(one.y[0], digits)}"
        + (f" ({_range((one.low[0], one.high[0]), digits)})" if one.low else "")
        for one in series
    )


def _count(number: int | None, noun: str) -> str | None:
    return None if number is None else f"{number} {noun}{'s' * (number != 1)}"


def _turn(one: Mapping[str, Any]) -> str:
    """Counted from 1, as people do."""
    return MISSING if one.get("turn") is None else str(one["turn"] + 1)


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return MISSING if value is None else str(value)


def _quoted(text: str | None) -> str:
    """A token's text so that blanks and line breaks can be seen."""
    return MISSING if text is None else json.dumps(text, ensure_ascii=False)
