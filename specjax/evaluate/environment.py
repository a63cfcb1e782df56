"""On what, and by which code, something was measured."""

import contextlib
import os
import platform
import subprocess
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import jax

PACKAGES = ("specjax", "jax", "jaxlib", "flax")
"""Packages whose versions change what is measured."""


def device_name() -> str:
    """The kind and number of jax's devices; for CPU the processor and its cores."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return f"{len(jax.devices())} x {device.device_kind}"
    return f"cpu, {os.cpu_count()} cores, {_processor()}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def versions(others: Iterable[str] = ()) -> dict[str, str]:
    """Package -> version, of PACKAGES and those others that are installed."""
    found = {name: metadata.version(name) for name in PACKAGES}
    for name in others:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def source_commit() -> str | None:
    """The git commit that this code was checked out from, "-dirty" behind it where files differ; None if unknown."""
    here = Path(__file__).resolve()

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)  # else the repository around it is somebody else's
        return git("describe", "--always", "--dirty", "--abbrev=40", "--match=")
    except (OSError, subprocess.SubprocessError):
        return None
