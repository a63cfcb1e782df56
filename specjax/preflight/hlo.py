"""What a round of a program that was compiled for a TPU costs: read from its HLO, nothing is run.

Cycles are the compiler's own (`estimated_cycles` of each operation). Bytes are those of operands and results in HBM, of
which slices and updates in place touch only a part. Collectives have no estimate: what is counted is their bytes, and
what links at full speed would take for them. Rows decode greedily, which is the branch of a conditional without loops
of unknown length, or else the cheapest.
"""

import collections
import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pallas_kernels.tpu_bundles import first_group
from pallas_kernels.tpu_cost import FREE, Chip, Operation, buffers, moved, read_hlo

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

SLICES = ("dynamic-slice", "slice", "gather")
"""Operations that read a part of their first operand, as large as their result."""

UPDATES = {"dynamic-update-slice": 1, "scatter": 2}
"""Operations that write a part of their first operand in place, and which operand is the part."""

SAME = ("bitcast", "reshape", "transpose")
"""What may stand between a fusion's parameter and its slice."""

SCALAR = 4096
"""Results of up to so many bytes are left out: a padded scalar or index is no traffic."""

KERNEL = "tpu_custom_call"


@dataclasses.dataclass
class Cost:
    """Of one device.

    Attributes:
        cycles: that the compiler estimates; of Pallas kernels without an estimate what their bytes take.
        bytes: from or to HBM.
        sent: bytes sent to other devices.
        collectives: kind -> how many.
        collective_bytes: kind -> bytes of their results.
        kernels: Pallas kernels, and of these those that the compiler does not estimate.
        unestimated: see kernels.
        loops: of unknown length, which count once.
    """

    cycles: float = 0.0
    bytes: float = 0.0
    sent: float = 0.0
    collectives: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    collective_bytes: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    kernels: int = 0
    unestimated: int = 0
    loops: int = 0

    def add(self, other: "Cost", times: int = 1) -> None:
        """Adds another cost so many times."""
        for name in ("cycles", "bytes", "sent", "kernels", "unestimated", "loops"):
            setattr(self, name, getattr(self, name) + times * getattr(other, name))
        for name in ("collectives", "collective_bytes"):
            for kind, number in getattr(other, name).items():
                getattr(self, name)[kind] += times * number


class Round:
    """A decode program, whose loop's body is a round.

    Attributes:
        cost: of a round.
        around: of all that runs once a call, before and after the loop.
        copied: "params" and "state" -> bytes of their copies that are made before the loop, so that the rounds find
            them in another layout, and that stay in memory with what they are copies of.
    """

    def __init__(self, hlo: str, chip: Chip, blocks: int, live: Mapping[tuple[int, ...], float]):
        """Reads a program.

        Args:
            blocks: of a cache that attention reads; a loop in a scope "attention" takes so many trips.
            live: sorted dimensions of a device's part of each kind of cache -> the share of it that holds the context,
                which is what Pallas kernels read of it.
        """
        self._computations, entry = read_hlo(hlo)
        self._chip, self._blocks, self._live = chip, blocks, live
        self._shapes = {x.name: x.shape for lines in self._computations.values() for x in lines}
        self._known: dict[str, Cost] = {}
        operations = self._computations[entry]
        loop = next((x for x in operations if x.op == "while" and _scope(x).endswith("(decode)/while")), None)
        if loop is None:
            raise ValueError(
                "no loop of jit(decode) in the program; this libtpu may write its HLO in another form now."
            )
        self.cost = self._computation(_called(loop, "body"))
        self.around = self._sum([x for x in operations if x is not loop])
        self.copied = {"params": 0, "state": 0}
        by_name = {x.name: x for x in operations}
        for x in operations:
            if x.op == "copy" and _in_hbm(x.shape) and (origin := _origin(x, by_name)) in self.copied:
                self.copied[origin] += self._size(x.name)

    def _computation(self, name: str) -> Cost:
        if name not in self._known:
            self._known[name] = self._sum(self._computations[name])
        return self._known[name]

    def _sum(self, operations: Sequence[Operation]) -> Cost:
        total = Cost()
        widths: list[Cost] = []
        for x in operations:
            if x.op == "while" and "known_trip_count" not in x.rest and _scope(x).endswith("window/while"):
                # One loop for each width that a round is compiled for, of which one runs: with drafts the widest.
                widths.append(self._computation(_called(x, "body")))
            else:
                self._add_operation(total, x)
        if widths:
            total.add(max(widths, key=lambda cost: cost.cycles))
        return total

    def _add_operation(self, total: Cost, x: Operation) -> None:
        kind = x.op.removesuffix("-start")
        if x.op == "while":
            known = re.search(r'"known_trip_count":\{"n":"(\d+)"', x.rest)
            in_attention = "/attention/" in _scope(x)
            trips = int(known[1]) if known else self._blocks if in_attention else 1
            total.add(self._computation(_called(x, "body")), trips)
            total.loops += not (known or in_attention)
        elif x.op == "conditional":
            names = first_group(r"branch_computations=\{(.*?)\}", x.rest).replace("%", "").split(", ")
            total.add(min(map(self._computation, names), key=lambda cost: (cost.loops, cost.cycles)))
        elif x.op == "call":
            total.add(self._computation(_called(x, "to_apply")))
        elif kind in COLLECTIVES:
            size = max(size for size, _ in buffers(x.shape)) if x.op != kind else sum(n for n, _ in buffers(x.shape))
            total.collectives[kind] += 1
            total.collective_bytes[kind] += size
            total.sent += size * _sent_share(kind, _parts(x))
            total.bytes += 0 if x.op != kind else self._bytes(x)
        elif x.op in ("copy-start", "slice-start"):
            total.bytes += moved(x.shape)
        elif x.op in FREE or x.op.endswith("-done") or "ConcatBitcast" in x.rest:
            return
        elif x.op == "custom-call" and KERNEL in x.rest:
            total.add(self._kernel(x))
        else:
            total.cycles += _estimate(x) or 0
            total.bytes += self._bytes(x)

    def _kernel(self, x: Operation) -> Cost:
        """Of a Pallas kernel: it reads its operands, of caches the live part, and writes its results but for caches."""
        moved_bytes: float = sum(size for size, in_hbm in self._buffers_but_caches(x.shape) if in_hbm)
        for operand in _operands(x):
            shape = self._shapes[operand]
            if _in_hbm(shape):
                moved_bytes += self._live.get(_dimensions(shape), 1.0) * self._size(operand)
        cycles = _estimate(x)
        return Cost(
            cycles=moved_bytes / self._chip.bytes_per_second * self._chip.hertz if cycles is None else cycles,
            bytes=moved_bytes,
            kernels=1,
            unestimated=int(cycles is None),
        )

    def _buffers_but_caches(self, shape: str) -> list[tuple[int, bool]]:
        parts = re.findall(r"\w+\[[\d,]*\](?:\{[^}]*\})?", shape)
        return [buffer for part in parts if _dimensions(part) not in self._live for buffer in buffers(part)]

    def _bytes(self, x: Operation) -> int:
        """That an operation moves from and to HBM."""
        operands = _operands(x)
        if x.op == "fusion":
            inside = self._computations[_called(x, "calls")]
            read = sum(self._read(operand, inside, number) for number, operand in enumerate(operands))
            roots, results = self._roots(inside), buffers(x.shape)
            if len(roots) == 1:  # a reduction may have several results
                roots *= len(results)
            return read + sum(
                self._written(root, whole, size)
                for (root, whole), (size, in_hbm) in zip(roots, results, strict=True)
                if in_hbm
            )
        if x.op in UPDATES:
            return 2 * self._size(operands[UPDATES[x.op]]) if _in_hbm(x.shape) else 0
        written = sum(size for size, in_hbm in buffers(x.shape) if in_hbm)
        if x.op in SLICES:
            return written + (self._size(x.name) if _in_hbm(self._shapes[operands[0]]) else 0)
        return written + sum(self._size(operand) for operand in operands if _in_hbm(self._shapes[operand]))

    def _read(self, operand: str, inside: Sequence[Operation], number: int) -> int:
        """Bytes that a fusion reads of its operand of that number."""
        shape = self._shapes[operand]
        if not _in_hbm(shape):
            return 0
        whole = sum(size for size, _ in buffers(shape))
        return min(whole, self._used(_parameter(inside, number), inside, whole))

    def _used(self, name: str, inside: Sequence[Operation], whole: int, beyond: int | None = None) -> int:
        """Bytes of an array of so many that the operations of a computation read.

        Args:
            beyond: what is read of the computation's result, where that is the array; None is all.
        """
        if name == inside[-1].name:
            return whole if beyond is None else beyond
        used = 0
        for y in inside:
            operands = _operands(y)
            if name not in operands:
                continue
            first = operands[0] == name
            if y.op in SAME:
                used += self._used(y.name, inside, whole, beyond)
            elif y.op in SLICES and first:
                used += self._size(y.name)
            elif y.op == "fusion":
                nested, after = self._computations[_called(y, "calls")], self._used(y.name, inside, whole, beyond)
                used += sum(
                    self._used(_parameter(nested, number), nested, whole, after)
                    for number, operand in enumerate(operands)
                    if operand == name
                )
            elif y.op != "tuple" and not (y.op in UPDATES and first):
                return whole
        return used

    def _roots(self, inside: Sequence[Operation]) -> list[tuple[Operation, Sequence[Operation]]]:
        """The operations that give a computation's results, each with the computation that it is in."""
        root, by_name = inside[-1], {y.name: y for y in inside}
        if root.op == "fusion":
            return self._roots(self._computations[_called(root, "calls")])
        return [(by_name[name], inside) for name in (_operands(root) if root.op == "tuple" else [root.name])]

    def _written(self, root: Operation, inside: Sequence[Operation], size: int) -> int:
        """Bytes that a fusion writes of a result of so many."""
        while root.op in SAME:
            before = _operands(root)[0]
            root = next(y for y in inside if y.name == before)
        if root.op == "fusion":
            roots = self._roots(self._computations[_called(root, "calls")])
            return self._written(*roots[0], size) if len(roots) == 1 else size
        if root.op in UPDATES:
            return min(size, self._size(_operands(root)[UPDATES[root.op]]))
        return 0 if root.op == "parameter" else size

    def _size(self, name: str) -> int:
        return sum(size for size, _ in buffers(self._shapes[name]))


def _operands(x: Operation) -> list[str]:
    return re.findall(r"%([\w.-]+)", x.rest.partition(")")[0])


def _origin(x: Operation, by_name: Mapping[str, Operation]) -> str:
    """The argument that an operation's first operand comes from: "params", "state" or ""; "" for other operands."""
    while x.op != "parameter":
        operands = _operands(x)
        if not operands or operands[0] not in by_name or x.op == "while":
            return ""
        x = by_name[operands[0]]
    return _scope(x).partition(".")[0]


def _parameter(inside: Sequence[Operation], number: int) -> str:
    return next(y.name for y in inside if y.op == "parameter" and y.rest.startswith(f"{number})"))


def _called(x: Operation, key: str) -> str:
    return first_group(rf"{key}=%([\w.-]+)", x.rest)


def _scope(x: Operation) -> str:
    found = re.search(r'op_name="([^"]*)"', x.rest)
    return found[1] if found else ""


def _estimate(x: Operation) -> int | None:
    found = re.search(r'"estimated_cycles":"(\d+)"', x.rest)
    return int(found[1]) if found else None


def _in_hbm(shape: str) -> bool:
    return any(in_hbm and size > SCALAR for size, in_hbm in buffers(shape))


def _dimensions(shape: str) -> tuple[int, ...]:
    """Of the first array of a shape, sorted."""
    return tuple(sorted(int(n) for n in first_group(r"\[([\d,]*)\]", shape).split(",") if n))


def _parts(x: Operation) -> int:
    """Devices that a collective joins."""
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", x.rest)
    if listed:
        return listed[1].count(",") + 1
    iota = re.search(r"replica_groups=\[\d+,(\d+)\]", x.rest)
    if iota:
        return int(iota[1])
    parts = 1
    mesh = re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", x.rest)
    if mesh:
        for axis, size in re.findall(r"'(\w+)'=(\d+)", mesh[1]):
            parts *= int(size) if f"'{axis}'" in mesh[2] else 1
    return parts


def _sent_share(kind: str, parts: int) -> float:
    """What a device sends in a ring, as a multiple of its result."""
    shares: dict[str, Any] = {
        "all-reduce": 2 * (parts - 1) / parts,
        "all-gather": (parts - 1) / parts,
        "reduce-scatter": parts - 1,
        "all-to-all": (parts - 1) / parts,
    }
    return shares.get(kind, 1.0)
