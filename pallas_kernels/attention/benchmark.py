"""What the implementations cost on a TPU that is not there.

    python -m pallas_kernels.attention.benchmark --topology=v6e:2x2

Each case is compiled by libtpu for the absent chip, in a process of its own that writes out the instructions of every
operation; `tpu_cost` adds them up, what prepares the kernel's operands included. Every row has the same context.

- bundles: cycles of instructions, as if no copy from HBM were ever waited for.
- HBM: cycles that copies of the cache take at full bandwidth, whole blocks of it where whole blocks are read.
- at best, at worst: the larger of the two, and their sum. The kernel copies ahead, some blocks at a time; an operation
  of XLA waits for what it reads itself.
- least: cycles that reading the context once would take.

Not counted: what it takes to begin an operation, of which the kernel is one and XLA's loop eleven a block.
"""

import argparse
import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from pallas_kernels.attention.api import write_and_attend
from pallas_kernels.attention.base import LANES, SUBLANES
from pallas_kernels.attention.tpu import block_size, piece_size
from pallas_kernels.tpu_cost import CHIPS, Program, compile_apart

XLA_BLOCK = 256

UNBOUNDED = 10**6
"""More iterations than any loop here takes."""


def estimate(
    topology: str,
    implementation: str,
    *,
    batch: int = 8,
    tokens: int = 5,
    kv_heads: int = 2,
    queries: int = 4,
    head_dim: int = 128,
    context: int = 4096,
    capacity: int = 8192,
    dtype: str = "bfloat16",
    block: int | None = None,
) -> dict[str, Any]:
    """What one call of write_and_attend costs. Without changes: a layer of Llama-3.1-8B, one of 4 chips' heads.

    Args:
        topology: for example v5e:2x2 or v6e:2x2; one of its chips is used.
        implementation: tpu or xla.
        batch: rows.
        tokens: of each row's window.
        kv_heads, queries, head_dim: K, Q and H.
        context: positions of each row, the window's included.
        capacity: of the cache, in slots.
        dtype: of everything.
        block: slots of a block of the kernel, None for those that it chooses.

    Returns:
        the arguments, bundles, hbm_bytes, hbm_cycles, cycles (at best), cycles_at_worst, least_cycles, microseconds (at
        best) and uncounted (operations that no instructions were found for).
    """
    case = {
        "topology": topology,
        "implementation": implementation,
        "batch": batch,
        "tokens": tokens,
        "kv_heads": kv_heads,
        "queries": queries,
        "head_dim": head_dim,
        "capacity": capacity,
        "dtype": dtype,
        "block": block,
    }
    chip = CHIPS[topology.split(":")[0]]
    width = jnp.dtype(dtype).itemsize
    slot_bytes = 2 * batch * kv_heads * head_dim * width
    if implementation == "tpu":
        size = block or block_size(kv_heads, tokens * queries, head_dim, capacity, width)
        piece, unit = piece_size(size), SUBLANES if head_dim % LANES == 0 else LANES
        # Read up to the window; the slots around it are read and written.
        slots = -(-(context - tokens) // piece) * piece + 2 * (-(-(tokens + unit - 1) // unit) * unit)
        blocks = -(-(context - tokens) // size)
    else:
        blocks = -(-context // XLA_BLOCK)
        slots = blocks * XLA_BLOCK
    cost = _compiled(json.dumps(case)).cost(chip, blocks, UNBOUNDED)
    per_byte = chip.hertz / chip.bytes_per_second
    hbm_cycles = slots * slot_bytes * per_byte
    cycles = max(cost.bundles, hbm_cycles)
    return case | {
        "context": context,
        "bundles": round(cost.bundles),
        "hbm_bytes": slots * slot_bytes,
        "hbm_cycles": round(hbm_cycles),
        "cycles": round(cycles),
        "cycles_at_worst": round(cost.bundles + hbm_cycles),
        "least_cycles": round(context * slot_bytes * per_byte),
        "microseconds": cycles / chip.hertz * 1e6,
        "uncounted": sorted(set(cost.uncounted)),
    }


@functools.lru_cache(maxsize=2)
def _compiled(case: str) -> Program:
    return compile_apart(__spec__.name, case)


def _compile(case: dict[str, Any], folder: str) -> None:
    """Compiles a case for a chip of the topology; libtpu dumps into the folder, to which the HLO is added."""
    B, T, K, Q, H = (case[name] for name in ("batch", "tokens", "kv_heads", "queries", "head_dim"))
    place = jax.sharding.SingleDeviceSharding(
        topologies.get_topology_desc(platform="tpu", topology_name=case["topology"]).devices[0]
    )

    def array(*shape: int, dtype: str = case["dtype"]) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=place)

    entries, cache = array(B, T, K, H), array(B, K, case["capacity"], H)
    options = {"block": case["block"]} if case["block"] else {}
    run = functools.partial(write_and_attend, implementation=case["implementation"], **options)
    arguments = array(B, T, K, Q, H), entries, entries, cache, cache, array(B, dtype="int32")
    text = jax.jit(run, donate_argnums=(3, 4)).lower(*arguments).compile().as_text()
    Path(folder, "program.txt").write_text(text or "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", default="v6e:2x2", help="for example v5e:2x2; one of its chips is used")
    parser.add_argument("--block", type=int, nargs="*", default=[256, 512, 1024, 2048], help="the kernel's, to compare")
    parser.add_argument("--json", type=Path, help="a file for the numbers")
    parser.add_argument("--compile", help=argparse.SUPPRESS)
    parser.add_argument("--output", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.compile:
        return _compile(json.loads(args.compile), args.output)

    chip = CHIPS[args.topology.split(":")[0]]
    print(
        f"{args.topology}, counted in compiled instructions, not measured; taken: {chip.hertz / 1e9} GHz, "
        f"{chip.bytes_per_second / 1e9:.0f} GB/s.\n"
    )
    titles = ("model", "T", "context", "capacity", "implementation", "block", "bundles", "HBM", "at best", "at worst")
    print(f"| {' | '.join((*titles, 'least', 'at best / least'))} |\n|{'---|' * (len(titles) + 2)}", flush=True)
    llama, smollm = {"kv_heads": 2, "queries": 4, "head_dim": 128}, {"kv_heads": 3, "queries": 3, "head_dim": 64}
    # 8 rows, of 2 of Llama-3.1-8B's 8 KV heads.
    cases: list[dict[str, Any]] = [llama | {"implementation": "tpu", "capacity": size} for size in (4096, 16384)]
    cases += [llama | {"implementation": "tpu", "block": block} for block in args.block]
    cases += [llama | {"implementation": "tpu", "context": 512}, llama | {"implementation": "tpu", "tokens": 1}]
    cases += [llama | {"implementation": "xla", "capacity": size} for size in (4096, 16384)]
    cases += [smollm | {"implementation": name} for name in ("tpu", "xla")]
    results = []
    for case in cases:
        x = estimate(args.topology, **case)
        results.append(x)
        print(
            f"| {'Llama-3.1-8B / 4' if case['head_dim'] == 128 else 'SmolLM2-135M'} | {x['tokens']} | {x['context']} "
            f"| {x['capacity']} | {x['implementation']} | {x['block'] or ''} | {x['bundles']:,} | {x['hbm_cycles']:,} "
            f"| {x['cycles']:,} | {x['cycles_at_worst']:,} | {x['least_cycles']:,} "
            f"| {x['cycles'] / x['least_cycles']:.2f} |",
            flush=True,
        )
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
