"""Walks through the instructions that libtpu's compiler writes out for one operation, and counts: no TPU needed.

A dump lists scheduled bundles (very long instruction words, one a cycle); the one after register allocation also spells
out, as empty bundles, the cycles in which a result is waited for. Vector instructions are skipped and scalar ones are
computed, so that grid loops, pipelines and predicated copies do what they would do on the chip; every bundle passed is
a cycle. What depends on data is unknown, and then

- a loop goes on for the assumed number of iterations, or for as many as its own bound allows if these are fewer,
- a conditional region is entered,
- a copy from or to HBM is counted apart, as one that may happen.

Not modelled: how long copies take, memory banks, fetching of instructions.
"""

import bisect
import collections
import dataclasses
import itertools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

PASS = "packed-bundles-post-ra"
"""The dump that is read."""

DELAY_SLOTS = 4
"""Bundles behind a branch that are executed before it is taken: in the dumps, regions end that many behind theirs."""

MAX_STOPS = 10**8
"""Scalar bundles that a run may take."""

GRANULE = 32
"""Bytes in the unit of a copy's size: a block of f32[1008, 128] is copied with size 16128, on v5e and on v6e."""


@dataclasses.dataclass
class Cost:
    """What something costs.

    Attributes:
        bundles: passed.
        cycles: the same, or what copying the bytes takes, if that is more: operation by operation.
        bytes: copied from or to HBM.
        maybe_bytes: the same, in copies whose condition is unknown.
        iterations: of loops of unknown length, all together.
        uncounted: what could not be counted: operations without a dump, copies of unknown size.
    """

    bundles: float = 0
    cycles: float = 0
    bytes: float = 0
    maybe_bytes: float = 0
    iterations: int = 0
    uncounted: tuple[str, ...] = ()

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(*(getattr(self, f.name) + getattr(other, f.name) for f in dataclasses.fields(self)))

    def __mul__(self, times: int) -> "Cost":
        names = ("bundles", "cycles", "bytes", "maybe_bytes", "iterations")
        numbers: dict[str, Any] = {name: getattr(self, name) * times for name in names}
        return Cost(**numbers, uncounted=self.uncounted if times else ())


def first_group(pattern: str, text: str) -> str:
    """What the first group of a pattern matches.

    Raises:
        ValueError: the text is not what this libtpu's dumps are known to hold.
    """
    match = re.search(pattern, text)
    if match is None:
        raise ValueError(f"{text[:200]!r}: expected {pattern!r}; libtpu may write its dumps in another form now.")
    return match[1]


def _signed(x: Any) -> Any:
    return (x + 2**31) % 2**32 - 2**31 if isinstance(x, int) else x


def _and(x: bool | None, y: bool | None) -> bool | None:
    return False if x is False or y is False else None if x is None or y is None else True


def _not(x: bool | None) -> bool | None:
    return None if x is None else not x


LOGIC: dict[str, Callable[..., Any]] = {
    "sdivrem.u32": lambda x, y: None if x is None or y is None else list(divmod(x, y)),
    "spop.drf": lambda results: results.pop(0) if results else None,
    "sld": lambda x: x,
    "sst": lambda x: x,
    "pmov": lambda x: x,
    "pneg": _not,
    "por": lambda x, y: _not(_and(_not(x), _not(y))),
    "pand": _and,
    "pnand": lambda x, y: _not(_and(x, y)),
    "scalar_select": lambda p, x, y: None if p is None else x if p else y,
}
UNSIGNED = 2**32 - 1
ARITHMETIC: dict[str, Callable[..., Any]] = {
    "smov": lambda x: x,
    "sadd": lambda x, y: x + y,
    "ssub": lambda x, y: x - y,
    "smul": lambda x, y: x * y,
    "smulhi": lambda x, y: ((x & UNSIGNED) * (y & UNSIGNED)) >> 32,
    "sshll": lambda x, y: x << y if y < 32 else 0,
    "sshra": lambda x, y: x >> y,
    "sshrl": lambda x, y: (x & UNSIGNED) >> y,
    "sand": lambda x, y: x & y,
    "sor": lambda x, y: x | y,
    "sxor": lambda x, y: x ^ y,
    "scmp.eq": lambda x, y: x == y,
    "scmp.ne": lambda x, y: x != y,
    "scmp.lt": lambda x, y: x < y,
    "scmp.le": lambda x, y: x <= y,
    "scmp.gt": lambda x, y: x > y,
    "scmp.ge": lambda x, y: x >= y,
}


class _Instruction(NamedTuple):
    """A scalar instruction, a branch or a copy.

    Attributes:
        dest: the register, or the memory cell of a spilled one, that it writes; None if it writes none.
        op: its name.
        guard: a predicate register and what that has to be for the instruction to count; None if it always does.
        args: registers, cells and numbers; of a copy, its size; None is an operand that is not followed.
        target: where a branch leads.
        merges: whether dest keeps its value where the guard fails. Otherwise nobody reads it there.
    """

    dest: str | None
    op: str
    guard: tuple[str, bool] | None
    args: tuple[Any, ...]
    target: int | None = None
    merges: bool = False

    @property
    def steers(self) -> bool:
        return self.target is not None or self.op.startswith("dma.")


_BUNDLE = re.compile(r"^\s*(0x[0-9a-f]+|0)\s+(?:[A-Z]{2})?:(?:\s|>)*\{(.*?)\}\s*$", re.M | re.S)
_INSTRUCTION = re.compile(
    r"(?:%(?P<dest>\w+) = )?(?P<op>[a-z][\w.]*)(?: \[thread:\$\d+\])?\s*"
    r"(?:\((?P<guard>!?%\w+)(?P<old>, %\w+)?\),?)?\s*(?P<args>.*)",
    re.S,
)


def _register(name: str) -> str:
    """'s12' of '%s828_s12': values that a loop or a join hands on share a physical register. Memory cells stay."""
    return name if name.startswith("[") else name.lstrip("!%").rsplit("_", 1)[-1]


class Kernel:
    """One operation's bundles."""

    def __init__(self, text: str):
        text = re.sub(r"/\*.*?\*/", "", text, flags=re.S)
        bundles = {int(address, 16): body.split(";;") for address, body in _BUNDLE.findall(text)}
        self.end = max(bundles) + 1
        parsed = {a: list(filter(None, (self._parse(x.strip()) for x in body))) for a, body in bundles.items()}
        self.code = self._what_steers(parsed)
        self.addresses = sorted(self.code)
        self.costs: dict[int, Cost] = {}

    @staticmethod
    def _parse(text: str) -> tuple[_Instruction | None, str | None, set[str]] | None:
        """An instruction (None for a phi, which only renames) with the name that it defines and those that it uses."""
        match = _INSTRUCTION.match(text)
        if not match or not re.match(r"[sp]|dma\.(?!done)", match["op"]) or match["op"] == "shalt.err":
            return None
        op, dest, args, target = match["op"], match["dest"], match["args"].split(","), None
        if op == "sbr.rel":
            args, target = [], int(first_group(r"bundleno = (\d+)", match["args"]))
        elif op.startswith("dma."):
            dest, args = None, args[1:2]
        elif op in ("sld", "sst"):
            # A cell with a register in it can only be reached by its address; of others, data may be anywhere.
            spilled = re.search(r"\[smem:(\[#allocation\d+_spill\])\]", match["args"])
            cell = spilled[1] if spilled else None
            dest, args = (cell, [match["args"].rsplit(" ", 1)[-1]]) if op == "sst" else (dest, [cell or ""])
        if dest is None and op != "sbr.rel" and not op.startswith("dma."):
            return None
        args = [x.strip() for x in args]
        guard = (_register(match["guard"]), match["guard"][0] != "!") if match["guard"] else None
        uses = {x.lstrip("!%") for x in (*args, match["guard"] or "", (match["old"] or "").lstrip(", "))}
        if op == "sphi":
            return None, dest, uses
        operands = tuple(Kernel._operand(x) for x in args)
        return _Instruction(dest and _register(dest), op, guard, operands, target, bool(match["old"])), dest, uses

    @staticmethod
    def _operand(text: str) -> Any:
        if text.startswith("[#") or re.match(r"!?%", text):
            return ("!" if text[0] == "!" else "") + _register(text)
        try:
            return _signed(int(text)) if re.fullmatch(r"-?\d+", text) else float(text)
        except ValueError:
            return None

    @staticmethod
    def _what_steers(bundles: dict[int, list]) -> dict[int, list[_Instruction]]:
        """Branches, copies, and what their conditions and sizes are computed from."""
        sources: dict[str, set[str]] = {}
        wanted: set[str] = set()
        for instruction, dest, uses in itertools.chain(*bundles.values()):
            if instruction and instruction.steers:
                wanted |= uses
            else:
                sources.setdefault(dest, set()).update(uses)
        todo = list(wanted)
        while todo:
            new = sources.get(todo.pop(), set()) - wanted
            wanted |= new
            todo += new
        kept = {a: [x for x, dest, _ in found if x and (x.steers or dest in wanted)] for a, found in bundles.items()}
        return {address: found for address, found in kept.items() if found}

    def run(self, iterations: int, skipped: frozenset[int] = frozenset()) -> tuple[Cost, set[int]]:
        """Passes through the bundles, branches in skipped taken. Returns also those whose condition was unknown."""
        cost, unknown = Cost(), set[int]()
        rounds, state = dict[int, int](), dict[str | None, Any]()
        position, landing = 0, None  # landing: (the last delay slot of a branch that was taken, where it leads)
        for _ in range(MAX_STOPS):
            index = bisect.bisect_left(self.addresses, position)
            address = self.addresses[index] if index < len(self.addresses) else self.end
            if landing and address > landing[0]:
                cost.bundles += landing[0] + 1 - position
                position, landing = landing[1], None
                continue
            if address == self.end:
                cost.bundles += self.end - position
                return cost, unknown
            written = {}
            for x in self.code[address]:
                holds: bool | None = True
                if x.guard:
                    value, wanted = state.get(x.guard[0]), x.guard[1]
                    holds = value if wanted else _not(value)
                if x.target is not None:
                    if holds is None:
                        unknown.add(address)
                        holds = address in skipped
                        if x.target <= address:
                            cost.iterations += 1
                            rounds[address] = rounds.get(address, 0) + 1
                            holds = rounds[address] < iterations
                    if not holds:
                        rounds.pop(address, None)
                    elif not landing:
                        landing = (address + DELAY_SLOTS, x.target)
                elif x.steers:
                    self._copy(x, holds, state, cost)
                elif holds is not False:
                    written[x.dest] = None if holds is None and x.merges else self._compute(state, x)
            state |= written
            cost.bundles += address + 1 - position
            position = address + 1
        raise RuntimeError(f"No end after {MAX_STOPS} instructions: an instruction is misread.")

    def _copy(self, x: _Instruction, holds: bool | None, state: dict[str | None, Any], cost: Cost) -> None:
        """Adds a copy to the cost."""
        size = self._value(state, x.args[0])
        ends = x.op.count("hbm")
        if holds is False or not ends:
            return
        if size is None:
            cost.uncounted += (x.op,)
        elif holds:
            cost.bytes += size * GRANULE * ends
        else:
            cost.maybe_bytes += size * GRANULE * ends

    @staticmethod
    def _value(state: dict[str | None, Any], operand: Any) -> Any:
        if not isinstance(operand, str):
            return operand
        return _not(state.get(operand[1:])) if operand[0] == "!" else state.get(operand)

    def _compute(self, state: dict[str | None, Any], x: _Instruction) -> Any:
        args = [self._value(state, operand) for operand in x.args]
        if x.op in LOGIC:
            return LOGIC[x.op](*args)
        name = ".".join(x.op.split(".")[: 2 if x.op.startswith("scmp") else 1])
        if name not in ARITHMETIC or None in args:
            return None
        if name.startswith("scmp"):
            return ARITHMETIC[name](*(y & UNSIGNED for y in args) if ".u32" in x.op else args)
        return _signed(ARITHMETIC[name](*args))

    def cost(self, iterations: int) -> Cost:
        """What a run costs.

        With 0 iterations, conditional regions that hold a loop of unknown length are not entered, but for the outermost
        of such regions: that one decides whether there is anything to do.
        """
        if iterations not in self.costs:
            cost, unknown = self.run(max(iterations, 1))
            if not unknown:
                self.costs = collections.defaultdict(lambda: cost)
            elif iterations == 0:
                branches = {a: next(x.target for x in self.code[a] if x.target is not None) for a in unknown}
                loops = [(target, a) for a, target in branches.items() if target <= a]
                regions = {a: t for a, t in branches.items() if any(a < first and last < t for first, last in loops)}
                inner = {a for a, t in regions.items() if any(b < a and t <= u for b, u in regions.items())}
                cost, _ = self.run(1, frozenset(inner))
            self.costs[iterations] = cost
        return dataclasses.replace(self.costs[iterations])
