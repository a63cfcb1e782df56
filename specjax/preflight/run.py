"""A whole preflight: config and topology in, preflight.json and a plot out."""

import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from specjax.evaluate.files import prepare_workdir
from specjax.preflight import report
from specjax.preflight.compile import compile_all, plan
from specjax.preflight.experiment import Preflight, read_topology


def preflight(
    config: ConfigDict, topology: str, workdir: str | Path, advance: Callable[[int, int, str], None]
) -> dict[str, Any]:
    """Compiles what a config names for a topology, and writes what that says to workdir.

    Args:
        topology: such as "v6e:2x2".
        workdir: the folder for preflight.json and preflight.svg; empty writes nothing.
        advance: is told (programs done, of how many, what is being done).

    Returns:
        What preflight.json holds; its "fits" says whether the program fits in memory.

    Raises:
        ConfigError: something in the config or the topology does not fit together; names the nearest that does.
        CheckpointError: a config.json that can't be read.
    """
    began, processor = time.perf_counter(), _processor_seconds()
    if jax.config.jax_platforms is None:  # type: ignore[attr-defined]
        # Nothing runs here, so no accelerator is to be looked for, or taken where there is one.
        jax.config.update("jax_platforms", "cpu")
    if workdir:
        prepare_workdir(Path(workdir))
    planned = plan(Preflight.from_config(config), read_topology(topology))
    programs = list(compile_all(planned, advance))
    summary = report.summarize(planned, programs)
    summary |= {"seconds": time.perf_counter() - began, "processor_seconds": _processor_seconds() - processor}
    if workdir:
        report.write(summary, Path(workdir))
    return summary


def _processor_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
