"""What a program compiled for an absent TPU costs: its operations (`tpu_bundles`), added up along its HLO.

Not counted: the few bundles that call each operation, and scalar operations that have none of their own.
"""

import math
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from pallas_kernels.tpu_bundles import PASS, Cost, Kernel, first_group


class Chip(NamedTuple):
    """A chip, or what jax calls a device of one: on tpu7x half a chip.

    The figures of v5e, v5p, v6e and tpu7x are those that Google publishes (docs.cloud.google.com/tpu/docs/v5e, /v5p,
    /v6e and /tpu7x), tpu7x's halved.

    Attributes:
        hertz: of the TensorCore. The dumps don't say; it is the published peak over the flops that a device's matrix
            units do in a cycle: 2 * 128**2 each on v5e (4 of them) and v5p (8), 2 * 256**2 each on v6e and tpu7x (4;
            with fewer, libtpu's own estimates of large products would exceed the peak).
        bytes_per_second: of HBM.
        flops_per_second: peak, bfloat16.
        hbm_bytes: that a program may use, as libtpu says when one does not fit (15.75, 95.73, 31.24 and 94.74 GiB).
        link_bytes_per_second: of all links to other chips together, in one direction.
    """

    hertz: float
    bytes_per_second: float
    flops_per_second: float
    hbm_bytes: float
    link_bytes_per_second: float


CHIPS = {
    "v5e": Chip(1.5e9, 819e9, 197e12, 15.75 * 2**30, 200e9),
    "v5p": Chip(1.75e9, 2765e9, 459e12, 95.73 * 2**30, 600e9),
    "v6e": Chip(1.75e9, 1640e9, 918e12, 31.24 * 2**30, 400e9),
    "tpu7x": Chip(2.2e9, 3690e9, 1153.5e12, 94.74 * 2**30, 300e9),
}


class Operation(NamedTuple):
    """A line of HLO."""

    name: str
    shape: str
    op: str
    rest: str


FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "copy-done", "slice-done", "after-all"}
WIDTHS = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "s32": 4, "u32": 4, "f32": 4}


def read_hlo(hlo: str) -> tuple[dict[str, list[Operation]], str]:
    """The operations of each computation by its name, and the name of the one that a program begins with."""
    computations, entry = {}, ""
    for header, body in re.findall(r"^((?:ENTRY )?%[\w.-]+) \([^\n]*\{\n(.*?)^\}", hlo, re.M | re.S):
        name = header.rsplit("%", 1)[1]
        lines = re.findall(r"^\s*(?:ROOT )?%([\w.-]+) = (.*?) ([a-z][a-z\d-]*)\((.*)$", body, re.M)
        computations[name] = [Operation(*line) for line in lines]
        entry = name if header.startswith("ENTRY") else entry
    return computations, entry


class Program:
    """A compiled program: its HLO, and the dumped bundles of its operations."""

    def __init__(self, hlo: str, dump: Path):
        self.computations, self.entry = read_hlo(hlo)
        self.shapes = {x.name: x.shape for lines in self.computations.values() for x in lines}
        self.kernels: dict[str, Kernel] = {}
        for path in sorted(dump.glob(f"*-{PASS}.txt")):
            match = re.fullmatch(rf"\d+-(.+)-\d+-{PASS}\.txt", path.name)
            if match and match[1] in self.shapes:
                self.kernels[match[1]] = Kernel(path.read_text())
        # Of operations that are alike the compiler writes one.
        self.alike: dict[str, Kernel] = {}
        for lines in self.computations.values():
            for x in lines:
                if x.name in self.kernels:
                    self.alike.setdefault(self._likeness(x), self.kernels[x.name])

    def _likeness(self, x: Operation) -> str:
        """A text that is the same for operations that differ in names only."""
        rest = re.sub(r", (metadata|backend_config|frontend_attributes|sharding)=.*", "", x.rest)
        operands, _, attributes = rest.partition(")")
        called = re.findall(r"(?:calls|to_apply)=%([\w.-]+)", attributes)
        inside = [self._likeness(y) for name in called for y in self.computations.get(name, [])]
        shapes = [self.shapes.get(name, "") for name in re.findall(r"%([\w.-]+)", operands)]
        return "|".join([x.shape, x.op, *shapes, re.sub(r"%[\w.-]+", "", rest), *inside])

    def cost(self, chip: Chip, bisections: int, bisection_bound: int) -> Cost:
        """Of one run.

        Args:
            chip: whose HBM.
            bisections: iterations of a loop of unknown length. 0 leaves out the conditional regions around such loops,
                too, but for the outermost (see Kernel.cost).
            bisection_bound: the constant in the condition of a loop that takes that many iterations; a loop with
                another one is counted up to it.
        """
        return self._computation(self.entry, chip, bisections, bisection_bound, nested=False)[0]

    def _computation(self, name: str, chip: Chip, *how: int, nested: bool) -> tuple[Cost, bool]:
        """Its cost, and whether it has loops of unknown length."""
        total, loops = Cost(), False
        for x in self.computations[name]:
            cost, looping = self._operation(x, chip, *how, nested=nested)
            total, loops = total + cost, loops or looping
        return total, loops

    def _operation(self, x: Operation, chip: Chip, *how: int, nested: bool) -> tuple[Cost, bool]:
        bisections, bound = how
        if x.op == "while":
            condition, body = (first_group(rf"{key}=%([\w.-]+)", x.rest) for key in ("condition", "body"))
            constants = [y.rest for y in self.computations[condition] if y.op == "constant"]
            limits = [int(n) for text in constants for n in re.findall(r"^(\d+)\)", text)]
            known = re.search(r'"known_trip_count":\{"n":"(\d+)"', x.rest)
            limit = int(known[1]) if known else max(limits, default=bound)
            times = min(bisections, bound) if limit == bound else limit
            once = self._computation(body, chip, *how, nested=nested)[0]
            check = self._computation(condition, chip, *how, nested=nested)[0]
            return once * times + check * (times + 1), limit == bound
        if x.op == "conditional":
            names = first_group(r"branch_computations=\{(.*?)\}", x.rest).replace("%", "").split(", ")
            branches = [self._computation(branch, chip, *how, nested=True) for branch in names]
            loops = any(looping for _, looping in branches)
            pick = min if nested and loops and not bisections else max
            return pick((cost for cost, _ in branches), key=lambda cost: cost.cycles), loops
        if x.op == "call":
            return self._computation(first_group(r"to_apply=%([\w.-]+)", x.rest), chip, *how, nested=nested)
        if x.op in FREE or "ConcatBitcast" in x.rest:
            return Cost(), False
        if x.op.endswith("-start"):
            return Cost(bytes=moved(x.shape)), False
        kernel = self.kernels.get(x.name) or self.alike.get(self._likeness(x))
        if kernel is None:
            return Cost(uncounted=(x.name,)), False
        cost = kernel.cost(bisections)
        cost.cycles = max(cost.bundles, cost.bytes / chip.bytes_per_second * chip.hertz)
        return cost, False


def compile_apart(module: str, case: str) -> Program:
    """A case compiled for an absent chip in a process of its own, whose compiler writes out its instructions.

    Args:
        module: run as `python -m MODULE --compile CASE --output FOLDER`; it leaves the HLO in FOLDER/program.txt.
        case: what is to be compiled, as the module reads it.

    Raises:
        RuntimeError: the process failed; with the end of what it said.
    """
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")])),
            "TPU_SKIP_MDS_QUERY": "1",
            # Nothing but the compiler is used, so that others may use theirs meanwhile.
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
            "LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true "
            f"--xla_jf_dump_llo_pass_label_regex={PASS}",
        }
        command = [sys.executable, "-m", module, "--compile", case, "--output", folder]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"Compiling {case} failed:\n{done.stderr[-4000:]}")
        return Program((Path(folder) / "program.txt").read_text(), Path(folder))


def moved(shape: str) -> int:
    """Bytes that an asynchronous copy moves from or to HBM, of its shape: both ends and a flag."""
    ends = buffers(shape)[:2]
    return min(size for size, _ in ends) * sum(in_hbm for _, in_hbm in ends)


def buffers(shape: str) -> list[tuple[int, bool]]:
    """Bytes, padding to whole tiles included, of each array of a shape, and whether it lies in HBM: S(...) is not."""
    found = []
    pattern = r"(\w+)\[([\d,]*)\](?:\{([\d,]*)(?::T\((\d+)(?:,(\d+))?\))?([^}]*)\})?"
    for dtype, dims, order, *tile, space in re.findall(pattern, shape):
        lengths = [int(n) for n in dims.split(",") if n]
        minor_first = [lengths[int(i)] for i in order.split(",") if i] or lengths
        for i, step in enumerate(int(n) for n in reversed(tile) if n):
            minor_first[i : i + 1] = [-(-n // step) * step for n in minor_first[i : i + 1]]
        found.append((WIDTHS.get(dtype, 0) * math.prod(minor_first), "S(" not in space))
    return found
