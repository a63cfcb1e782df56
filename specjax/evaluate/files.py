"""Files that are whole or not there, and experiments as plain dicts."""

import json
import tempfile
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from specjax.errors import SpecJAXError


def plain_dict(config: ConfigDict) -> dict[str, Any]:
    """A ConfigDict as nested plain dicts, fields that are None left out."""
    return {
        key: plain_dict(value) if isinstance(value, ConfigDict) else value
        for key, value in config.items()
        if value is not None
    }


def prepare_workdir(workdir: Path) -> None:
    """Makes the folder and tries to write to it.

    Raises:
        SpecJAXError: it can't be made or written to.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=workdir):
            pass
    except OSError as error:
        raise SpecJAXError(
            f"workdir={str(workdir)!r}: cannot be written to ({error.strerror}); choose a folder that can."
        ) from error


def write_json(path: Path, content: Any) -> None:
    """Writes JSON to a temporary name and renames it; NaN (a ratio without a denominator) becomes null."""
    write_text(path, json.dumps(_without_nan(content), indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes text to a temporary name beside path and renames it."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _without_nan(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _without_nan(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_without_nan(value) for value in content]
    return None if isinstance(content, float) and content != content else content
