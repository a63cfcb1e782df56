"""What the implementations cost on a TPU that is not there.

    python -m pallas_kernels.rejection_sampling.benchmark --topology=v6e:2x2

Each case is compiled by libtpu for the absent chip, in a process of its own that writes out the instructions of every
operation; `tpu_cost` adds them up. One method for all three implementations, wrappers around the kernel included.

- cycles: bundles, and operation by operation at least what its HBM traffic takes at full bandwidth.
- worst: cycles if every bisection takes all the steps that it may.
- HBM: bytes that the instructions copy from and to HBM, asynchronous copies into VMEM between operations included, and
  how many reads of the logits that is. Copies on a condition that depends on data (rows of draft_probs, which are only
  needed where a sequence ends) count at most once for each sequence.
- speed-up: the reference's cycles over these.

Assumed are the number of steps of a bisection, that all positions are looked at, that every conditional region is
entered, and that the arguments come in the layouts that the compiler gives to their shapes. A case without cuts (no
top-k, no top-p) leaves out the bisections and the conditional regions around them.
"""

import argparse
import functools
import itertools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from pallas_kernels.rejection_sampling.api import rejection_sample
from pallas_kernels.rejection_sampling.base import MAX_BISECTIONS, Truncation
from pallas_kernels.tpu_cost import CHIPS, Program, compile_apart

COMPARED = ("reference", "xla", "tpu")


def estimate(
    topology: str,
    implementation: str,
    batch: int,
    *,
    vocab: int = 128256,
    drafts: int = 4,
    dtype: str = "float32",
    sampled: bool = False,
    cuts: bool = True,
    bisections: int = 16,
) -> dict[str, Any]:
    """What one call costs.

    Args:
        topology: for example v5e:2x2 or v6e:2x2; one of its chips is used.
        implementation: one of api.IMPLEMENTATIONS but "gpu".
        batch: sequences.
        vocab: tokens.
        drafts: a sequence's.
        dtype: of the logits.
        sampled: whether the drafts come with their distributions; otherwise these are one-hot.
        cuts: whether rows have a top-k and a top-p.
        bisections: assumed steps of each of the bisections for these two.

    Returns:
        the arguments, cycles, worst_cycles, microseconds, hbm_bytes, logits_reads (hbm_bytes over those of the logits),
        bundles (without regard to HBM) and uncounted (operations that no instructions were found for).
    """
    case = {
        "topology": topology,
        "implementation": implementation,
        "batch": batch,
        "vocab": vocab,
        "drafts": drafts,
        "dtype": dtype,
        "sampled": sampled,
    }
    chip = CHIPS[topology.split(":")[0]]
    program = _compiled(json.dumps(case))
    cost = program.cost(chip, bisections if cuts else 0, MAX_BISECTIONS)
    worst = program.cost(chip, MAX_BISECTIONS if cuts else 0, MAX_BISECTIONS)
    moved = cost.bytes + min(cost.maybe_bytes, 4 * batch * vocab)
    at_least = moved / chip.bytes_per_second * chip.hertz
    cycles = max(cost.cycles, at_least)
    return case | {
        "cuts": cuts,
        "bisections": bisections,
        "cycles": round(cycles),
        "worst_cycles": round(max(worst.cycles, at_least)),
        "microseconds": cycles / chip.hertz * 1e6,
        "hbm_bytes": round(moved),
        "logits_reads": moved / (batch * (drafts + 1) * vocab * {"float32": 4, "bfloat16": 2}[dtype]),
        "bundles": round(cost.bundles),
        "uncounted": sorted(set(cost.uncounted)),
    }


@functools.lru_cache(maxsize=len(COMPARED))
def _compiled(case: str) -> Program:
    return compile_apart(__spec__.name, case)


def _compile(case: dict[str, Any], folder: str) -> None:
    """Compiles a case for a chip of the topology; libtpu dumps into the folder, to which the HLO is added."""
    B, G, V = case["batch"], case["drafts"], case["vocab"]
    floats: Any = functools.partial(jax.ShapeDtypeStruct, dtype="float32")
    ints: Any = functools.partial(jax.ShapeDtypeStruct, dtype="int32")
    rows = Truncation(floats((B,)), ints((B,)), floats((B,)), floats((B,)))
    logits = jax.ShapeDtypeStruct((B, G + 1, V), jnp.dtype(case["dtype"]))
    draft_probs = floats((B, G, V)) if case["sampled"] else None
    arguments = (logits, ints((B, G)), draft_probs, floats((B, G)), floats((B, G + 1, 3)), rows)

    run = functools.partial(rejection_sample, implementation=case["implementation"])
    chips = topologies.get_topology_desc(platform="tpu", topology_name=case["topology"]).devices
    place = jax.sharding.SingleDeviceSharding(chips[0])
    lowered = jax.jit(run, in_shardings=place, out_shardings=place).lower(*arguments)
    (Path(folder) / "program.txt").write_text(lowered.compile().as_text() or "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", default="v6e:2x2")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--vocab", type=int, default=128256)
    parser.add_argument("--drafts", type=int, default=4, help="drafts of a sequence")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the logits")
    parser.add_argument("--bisections", type=int, default=16, help="assumed steps for top-k and for top-p, each")
    parser.add_argument("--json", type=Path, help="a file for the numbers")
    parser.add_argument("--compile", help=argparse.SUPPRESS)
    parser.add_argument("--output", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.compile:
        return _compile(json.loads(args.compile), args.output)

    chip = CHIPS[args.topology.split(":")[0]]
    print(f"{args.topology}, V = {args.vocab}, G = {args.drafts}, {args.dtype} logits.")
    print(
        "Counted in the instructions that libtpu compiles for this chip, not measured; taken: "
        f"{chip.hertz / 1e9} GHz, {chip.bytes_per_second / 1e9:.0f} GB/s, {args.bisections} steps a bisection "
        f"(worst: {MAX_BISECTIONS}), every position and every conditional region.\n"
    )
    titles = ("B", "drafts", "cuts", "implementation", "cycles", "worst", "us", "HBM MB", "logits reads", "speed-up")
    print(f"| {' | '.join(titles)} |\n|{'---|' * len(titles)}", flush=True)
    common = {"vocab": args.vocab, "drafts": args.drafts, "dtype": args.dtype, "bisections": args.bisections}
    results = []
    for batch, sampled, cuts in itertools.product(args.batch, (False, True), (True, False)):
        found = [estimate(args.topology, name, batch, sampled=sampled, cuts=cuts, **common) for name in COMPARED]
        for x in found:
            x["speedup"] = found[0]["cycles"] / x["cycles"]
            print(
                f"| {batch} | {'sampled' if sampled else 'one-hot'} | {'yes' if cuts else 'no'} "
                f"| {x['implementation']} | {x['cycles']:,} | {x['worst_cycles']:,} | {x['microseconds']:.1f} "
                f"| {x['hbm_bytes'] / 1e6:.1f} | {x['logits_reads']:.2f} | {x['speedup']:.1f} |",
                flush=True,
            )
        results += found
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
