"""preflight.json, its table and its plot, from what was compiled."""

import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from specjax import cache as kv
from specjax.config import MeshConfig
from specjax.drafters.head import HeadWeights
from specjax.errors import ConfigError
from specjax.evaluate import environment, plots
from specjax.evaluate.files import write_json, write_text
from specjax.preflight.compile import Compiled, Plan, caches, device_bytes
from specjax.preflight.hlo import Cost
from specjax.sharding import GROUP, KV, make_mesh

JSON, PLOT = "preflight.json", "preflight.svg"
SCHEMA = 1
GIB = 2**30

NOTE = (
    "Compiled, not run: times are what the compiler estimates for each operation, added up along the program; Pallas "
    "kernels, which it does not estimate, and collectives take what their bytes do at the full speed of HBM and links. "
    "Rows decode greedily."
)


def summarize(plan: Plan, programs: Sequence[Compiled]) -> dict[str, Any]:
    """All numbers of a preflight, as preflight.json has them. programs: plain decoding first."""
    experiment, topology, chip = plan.experiment, plan.topology, plan.topology.chip
    last = programs[-1]
    rows = [_program(plan, compiled, programs[0]) for compiled in programs]
    fits = all(row["fits"] for row in rows)
    target, drafter = device_bytes(last.params.target), device_bytes(last.params) - device_bytes(last.params.target)
    return {
        "schema": SCHEMA,
        "compiled_not_run": NOTE,
        "model": experiment.model,
        "method": experiment.method.method if experiment.method else "plain",
        "topology": topology.name,
        "num_devices": len(topology.devices),
        "mesh": {"data": experiment.data, "model": math.prod(plan.mesh.shape[name] for name in (KV, GROUP))},
        "chip": chip._asdict(),
        "dtype": experiment.dtype,
        "batch": experiment.batch,
        "context": experiment.context,
        "capacity": experiment.positions,
        "versions": environment.versions(),
        "fits": fits,
        "remedies": [] if fits else _remedies(plan, last),
        "weights": {"target": target, "drafter": drafter},
        "caches": {"target": device_bytes(last.state.cache), "drafter": device_bytes(caches(last.state.drafter))},
        "largest": _largest(plan, programs),
        "programs": rows,
        "predictions": _predictions(plan, rows) if fits else [],
    }


def _program(plan: Plan, compiled: Compiled, plain: Compiled) -> dict[str, Any]:
    chip = plan.topology.chip
    row: dict[str, Any] = {
        "drafts": compiled.drafts,
        "compile_seconds": compiled.seconds,
        "fits": compiled.memory is not None,
        "refusal": compiled.refusal,
    }
    if compiled.memory is None or compiled.round is None:
        return row
    memory, cost, around = compiled.memory, compiled.round.cost, compiled.round.around
    total = total_bytes(memory)
    cache_bytes = device_bytes(caches(compiled.state))
    least_bytes, least_flops = least(plan, compiled)
    seconds = _seconds(plan, cost)
    roofline = max(least_bytes / chip.bytes_per_second, least_flops / chip.flops_per_second)
    row |= {
        "fits": total <= chip.hbm_bytes,
        "memory": memory | {"total": total, "headroom": int(chip.hbm_bytes - total)},
        "cache_bytes": cache_bytes,
        "caches_aliased": memory["aliased"] >= cache_bytes,
        "traffic": {"bytes": cost.bytes, "least": least_bytes, "ratio": cost.bytes / least_bytes},
        "collectives": {
            kind: {"number": number, "bytes": cost.collective_bytes[kind]} for kind, number in cost.collectives.items()
        },
        "cycles": cost.cycles,
        "loops_counted_once": cost.loops,
        "kernels": {"number": cost.kernels, "unestimated": cost.unestimated},
        "seconds": seconds | {"roofline": roofline, "ratio": seconds["round"] / roofline},
        "around": {
            "seconds": _seconds(plan, around)["round"],
            "bytes": around.bytes,
            "copied_weights": compiled.round.copied["params"],
            "copied_state": compiled.round.copied["state"],
        },
    }
    if plain.round is not None:
        row["over_plain"] = seconds["round"] / _seconds(plan, plain.round.cost)["round"]
    return row


def total_bytes(memory: dict[str, int]) -> int:
    """That a program takes of a device."""
    return memory["arguments"] + memory["outputs"] - memory["aliased"] + memory["temporaries"] + memory["code"]


def _seconds(plan: Plan, cost: Cost) -> dict[str, float]:
    """What a cost takes: of operations or of HBM whichever is more, and then of links."""
    chip = plan.topology.chip
    operations, traffic = cost.cycles / chip.hertz, cost.bytes / chip.bytes_per_second
    links = cost.sent / chip.link_bytes_per_second
    return {"operations": operations, "hbm": traffic, "links": links, "round": max(operations, traffic) + links}


def least(plan: Plan, compiled: Compiled) -> tuple[float, float]:
    """Bytes and flops that a round of a device can't do without.

    Every forward pass reads its weights once, of an embedding the rows it looks up, and the live part of its cache, and
    writes the new entries. A head makes one pass over what was committed and one for each draft but the first.
    """
    itemsize = plan.dtype.itemsize
    rows, window = plan.experiment.batch / plan.experiment.data, compiled.drafts + 1
    target = {name: part for name, part in compiled.params.target.items() if name != "embedding"}
    looked_up = rows * window * plan.model.width * itemsize
    queries = plan.model.queries_per_kv / plan.mesh.shape[GROUP]
    total = _read(plan, target, compiled.state.cache, window) + looked_up
    flops = _flops(plan, target, compiled.state.cache, rows * window, window, queries)
    if isinstance(compiled.params.drafter, HeadWeights) and plan.head is not None:
        weights, config = compiled.params.drafter, plan.head
        queries = config.layer.queries_per_kv / plan.mesh.shape[GROUP]
        for block, cache in enumerate(compiled.state.drafter.caches):
            steps = sum(step % config.num_blocks == block for step in range(1, compiled.drafts))
            for num, width in ((1, window), (steps, 1)):
                part = weights.head[f"block_{block}"]
                total += num * _read(plan, part, cache, width)
                flops += num * _flops(plan, part, cache, rows * width, width, queries)
        fusion = weights.head.get("fusion", {})
        output = weights.head["head"] if config.own_head else weights.shared.head
        total += device_bytes(fusion) + compiled.drafts * device_bytes(output)
        flops += 2 * rows * (window * device_bytes(fusion) + compiled.drafts * device_bytes(output)) / itemsize
    return total, flops


def _live(plan: Plan, cache: kv.KVCache) -> float:
    return device_bytes(cache) * plan.experiment.context / plan.experiment.positions


def _read(plan: Plan, weights: Any, cache: kv.KVCache, window: int) -> float:
    return device_bytes(weights) + _live(plan, cache) + device_bytes(cache) * window / plan.experiment.positions


def _flops(plan: Plan, weights: Any, cache: kv.KVCache, tokens: float, window: int, queries: float) -> float:
    return (2 * tokens * device_bytes(weights) + 2 * window * queries * _live(plan, cache)) / plan.dtype.itemsize


def _largest(plan: Plan, programs: Sequence[Compiled]) -> dict[str, int]:
    """The largest batch and the largest bucket of capacity that fit with all else as it is: by arithmetic."""
    experiment = plan.experiment
    batches, capacities = [], []
    for compiled in programs:
        grows = device_bytes(compiled.state)
        fixed = device_bytes(compiled.params)
        if compiled.memory is not None and compiled.round is not None:
            copied = compiled.round.copied["state"]
            fixed = total_bytes(compiled.memory) - grows - copied
            grows += copied
        room = max(plan.topology.chip.hbm_bytes - fixed, 0) / grows
        batches.append(int(room * experiment.batch) // experiment.data * experiment.data)
        positions = min(int(room * experiment.positions), kv.round_capacity(plan.model.max_position))
        capacities.append(max((n for n in _buckets(positions)), default=0))
    return {"batch": min(batches), "capacity": min(capacities)}


def _buckets(positions: int) -> list[int]:
    found, capacity = [], kv.round_capacity(1)
    while capacity <= positions:
        found.append(capacity)
        capacity *= 2
    return found


def _remedies(plan: Plan, compiled: Compiled) -> list[str]:
    """The nearest of what would fit."""
    found, largest = [], _largest(plan, [compiled])
    experiment, model = plan.experiment, plan.model
    if largest["batch"]:
        found.append(f"batch={largest['batch']}")
    if largest["capacity"]:
        found.append(f"context={largest['capacity']}")
    parts = math.prod(plan.mesh.shape[name] for name in (KV, GROUP))
    weights, cache_bytes = (
        device_bytes(compiled.params) * parts,
        device_bytes(caches(compiled.state)) * plan.mesh.shape[KV],
    )
    for more in range(parts + 1, 257):
        needed = weights / more + cache_bytes / math.gcd(more, model.num_kv_heads)
        if needed <= plan.topology.chip.hbm_bytes and _can_be_split(plan, more):
            found.append(f"at least {more * experiment.data} devices, with mesh.model={more}")
            break
    return found


def _can_be_split(plan: Plan, parts: int) -> bool:
    try:
        make_mesh(MeshConfig(model=parts), plan.model, list(plan.topology.devices[:1]) * parts)
    except ConfigError:
        return False
    return True


def _predictions(plan: Plan, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Tokens a round, and the speed-up over plain decoding, for each acceptance and number of drafts."""
    experiment = plan.experiment
    found = []
    speculative = [row for row in rows if row["drafts"]]
    laws: list[tuple[Any, Any]] = [(rate, lambda i, rate=rate: rate**i) for rate in experiment.acceptance_rates]
    if experiment.acceptance_by_position:
        laws.append(("measured", lambda i: experiment.acceptance_by_position[i - 1]))
    for name, at_least in laws:
        lengths = [1 + sum(at_least(i) for i in range(1, row["drafts"] + 1)) for row in speculative]
        speedups = [length / row["over_plain"] for length, row in zip(lengths, speculative, strict=True)]
        if speedups:
            best = max(range(len(speedups)), key=speedups.__getitem__)
            found.append(
                {
                    "acceptance": name,
                    "acceptance_length": lengths,
                    "speedup": speedups,
                    "best_drafts": speculative[best]["drafts"],
                }
            )
    return found


def write(summary: dict[str, Any], workdir: Path) -> None:
    """Writes preflight.json and, where something was compiled, preflight.svg, each in one piece."""
    write_json(workdir / JSON, summary)
    if summary["fits"]:
        write_text(workdir / PLOT, plot(summary))


def tables(summary: dict[str, Any]) -> list[Any]:
    """What the terminal shows: rich tables and texts, one below the other."""
    from rich.box import SIMPLE
    from rich.table import Table

    chip, mesh = summary["chip"], summary["mesh"]
    num_devices = f"{summary['num_devices']} device{'s' * (summary['num_devices'] > 1)}"
    heading = (
        f"{summary['model']} {summary['dtype']}, {summary['method']}, on {summary['topology']} "
        f"({num_devices}, data={mesh['data']} model={mesh['model']}): batch {summary['batch']}, "
        f"context {summary['context']}, capacity {summary['capacity']}"
    )
    rows = summary["programs"]
    names = ["plain" if not row["drafts"] else f"K={row['drafts']}" for row in rows]
    table = Table("of one device", *names, title=heading, title_justify="left", box=SIMPLE)
    kinds = sorted({kind for row in rows for kind in row.get("collectives", ())})
    for label, cell in [*_LINES, *((f"{kind}s a round", _number_of(kind)) for kind in kinds), _COMPILED]:
        table.add_row(label, *[cell(row) if "memory" in row else "-" for row in rows])
    shown: list[Any] = [table]
    weights, held = summary["weights"], summary["caches"]
    shown.append(
        f"Weights {_gib(weights['target'])} and {_gib(weights['drafter'])} (drafter), caches {_gib(held['target'])} "
        f"and {_gib(held['drafter'])}, of {_gib(chip['hbm_bytes'])} a device. Largest batch that fits: "
        f"{summary['largest']['batch']}; largest capacity: {summary['largest']['capacity']} (by arithmetic)."
    )
    if summary["predictions"]:
        speedups = Table(
            "acceptance", *names[1:], "best", title="Speed-up over plain", title_justify="left", box=SIMPLE
        )
        for line in summary["predictions"]:
            cells = [f"{value:.2f}" for value in line["speedup"]]
            speedups.add_row(str(line["acceptance"]), *cells, f"K={line['best_drafts']}")
        shown.append(speedups)
    if not summary["fits"]:
        reasons = [f"{name}: {_reason(row, chip)}" for name, row in zip(names, rows, strict=True) if not row["fits"]]
        remedies = "; or ".join(summary["remedies"]) or "a topology with more memory"
        shown.append(f"DOES NOT FIT. {' '.join(reasons)} Nearest that would, by arithmetic: {remedies}.")
    return [*shown, summary["compiled_not_run"]]


def _reason(row: dict[str, Any], chip: dict[str, Any]) -> str:
    if row["refusal"]:
        return f"{row['refusal']}."
    return f"takes {_gib(row['memory']['total'])} of {_gib(chip['hbm_bytes'])}."


def _gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB"


def _number_of(kind: str) -> Callable[[dict[str, Any]], str]:
    return lambda row: str(row["collectives"].get(kind, {"number": 0})["number"])


Line = tuple[str, Callable[[dict[str, Any]], str]]

_LINES: list[Line] = [
    ("memory, GiB", lambda row: f"{row['memory']['total'] / GIB:.2f}"),
    ("  temporaries", lambda row: f"{row['memory']['temporaries'] / GIB:.2f}"),
    ("  weights copied in them", lambda row: f"{row['around']['copied_weights'] / GIB:.2f}"),
    ("  caches copied in them", lambda row: f"{row['around']['copied_state'] / GIB:.2f}"),
    ("  headroom", lambda row: f"{row['memory']['headroom'] / GIB:.2f}"),
    ("caches aliased", lambda row: "in full" if row["caches_aliased"] else "NO"),
    ("HBM traffic a round, GB", lambda row: f"{row['traffic']['bytes'] / 1e9:.2f}"),
    ("  over the least", lambda row: f"{row['traffic']['ratio']:.2f}"),
    ("cycles a round, millions", lambda row: f"{row['cycles'] / 1e6:.2f}"),
    ("time a round, ms", lambda row: f"{row['seconds']['round'] * 1e3:.2f}"),
    ("  roofline", lambda row: f"{row['seconds']['roofline'] * 1e3:.2f}"),
    ("  over the roofline", lambda row: f"{row['seconds']['ratio']:.2f}"),
    ("  over plain", lambda row: f"{row['over_plain']:.2f}"),
    ("once a call, ms", lambda row: f"{row['around']['seconds'] * 1e3:.2f}"),
    ("Pallas kernels a round", lambda row: str(row["kernels"]["number"])),
    ("  timed by their bytes", lambda row: str(row["kernels"]["unestimated"])),
    ("collectives a round, MB", lambda row: f"{sum(x['bytes'] for x in row['collectives'].values()) / 1e6:.2f}"),
]
_COMPILED: Line = ("compiled in, s", lambda row: f"{row['compile_seconds']:.0f}")
"""What a line of the table says, and how of a program."""


def plot(summary: dict[str, Any]) -> plots.Picture:
    """Memory, time of a round and speed-ups, as an SVG file that notebooks show."""
    rows = summary["programs"]
    panels = 3 if summary["predictions"] else 2
    with plots.style("preflight"):
        figure = Figure(figsize=(3.7 * panels, 3.4), layout="constrained")
        axes = figure.subplots(1, panels)
        _draw_memory(axes[0], summary, rows)
        _draw_times(axes[1], rows)
        if summary["predictions"]:
            _draw_speedups(axes[2], summary, [row["drafts"] for row in rows if row["drafts"]])
        title = (
            f"{summary['model']}, {summary['method']}, {summary['topology']}, batch {summary['batch']}, context "
            f"{summary['context']}: compiled, not run"
        )
        figure.suptitle(title, x=0.01, ha="left", fontsize=10.5)
        file = io.StringIO()
        metadata: dict[str, Any] = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", metadata=metadata)
    return plots.Picture(file.getvalue(), figure, title)


def _draw_memory(axes: Axes, summary: dict[str, Any], rows: Sequence[dict[str, Any]]) -> None:
    names = ["plain" if not row["drafts"] else str(row["drafts"]) for row in rows]
    parts = {
        "arguments": [row["memory"]["arguments"] for row in rows],
        "temporaries": [row["memory"]["temporaries"] for row in rows],
        "code and outputs": [
            row["memory"]["total"] - row["memory"]["arguments"] - row["memory"]["temporaries"] for row in rows
        ],
    }
    bottom = [0.0] * len(rows)
    for index, (label, sizes) in enumerate(parts.items()):
        heights = [size / GIB for size in sizes]
        style: dict[str, Any] = {"hatch": plots.HATCHES[index], "edgecolor": "#ffffff", "linewidth": 0.4}
        axes.bar(names, heights, 0.6, bottom, label=label, color=plots.COLOURS[index], **style)
        bottom = [below + height for below, height in zip(bottom, heights, strict=True)]
    axes.axhline(summary["chip"]["hbm_bytes"] / GIB, color="#1b1f24", linewidth=1, linestyle=(0, (4, 3)))
    axes.set(title="Memory of a device", xlabel="drafts a round", ylabel="GiB (dashed: all there is)")
    axes.legend()


def _draw_times(axes: Axes, rows: Sequence[dict[str, Any]]) -> None:
    drafts = [row["drafts"] for row in rows]
    for index, (label, name) in enumerate((("estimated", "round"), ("roofline", "roofline"))):
        times = [row["seconds"][name] * 1e3 for row in rows]
        axes.plot(drafts, times, color=plots.COLOURS[index], marker=plots.MARKERS[index], label=label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylim(bottom=0)
    axes.set(title="Time of a round", xlabel="drafts a round (0: plain)", ylabel="ms")
    axes.legend()


def _draw_speedups(axes: Axes, summary: dict[str, Any], drafts: Sequence[int]) -> None:
    for index, line in enumerate(summary["predictions"]):
        colour = plots.COLOURS[index % len(plots.COLOURS)]
        marker = plots.MARKERS[index % len(plots.MARKERS)]
        axes.plot(drafts, line["speedup"], color=colour, marker=marker, label=str(line["acceptance"]))
    axes.axhline(1, color="#1b1f24", linewidth=1, linestyle=(0, (4, 3)))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.set(title="Speed-up, by acceptance of a draft", xlabel="drafts a round", ylabel="times plain decoding")
    axes.legend()
