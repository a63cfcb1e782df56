"""The one-way flow of the code, the size of step.py, and that every config field is read."""

import ast
import re
import sys
from pathlib import Path

import pytest

import specjax
from specjax.config import SamplingParams, SpeculativeConfig

ROOT = Path(specjax.__file__).parent
LAYERS = [
    ["errors"],
    ["config", "processes"],
    ["metrics", "cache", "control", "sampling", "sharding", "tokenizer", "target"],
    ["heads"],
    ["checkpoints"],
    ["drafters"],
    ["verify", "trace"],
    ["step", "view"],
    ["pacing"],
    ["generate"],
    ["slots"],
    ["evaluate", "train"],
    ["preflight"],
    ["cli"],
]
"""Every module may import those of earlier rows, and of its own."""

RANK = {name: rank for rank, row in enumerate(LAYERS) for name in row}


def imports_of(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
    modules |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names = {module.split(".")[1] for module in modules if module.startswith("specjax.")}
    direct = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "specjax"
        for alias in node.names
    }
    return names | direct


FILES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path):
    own = path.relative_to(ROOT).parts[0].removesuffix(".py")
    assert own in RANK
    # "The base of the drafters" is what the step and the rules may know of them.
    assert all(RANK[name] <= RANK[own] for name in imports_of(path) if name in RANK)


def test_kernels_import_jax_and_never_specjax():
    kernels = sorted((ROOT.parent / "pallas_kernels").rglob("*.py"))
    assert kernels
    for path in kernels:
        tree = ast.parse(path.read_text())
        names = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        names |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        packages = {name.split(".")[0] for name in names} - sys.stdlib_module_names
        assert packages <= {"jax", "numpy", "pallas_kernels"}, path


def test_the_step_imports_no_drafter():
    text = (ROOT / "step.py").read_text()
    assert re.findall(r"specjax\.drafters\.(\w+)", text) == ["base"]


def test_the_step_fits_on_a_few_screens():
    assert len((ROOT / "step.py").read_text().splitlines()) < 200


@pytest.mark.parametrize("folder", ["target"])
def test_linen_stays_where_models_are(folder):
    users = {
        path.relative_to(ROOT).parts[0]
        for path in FILES
        if re.search(r"import flax\.linen|from flax import linen", path.read_text())
    }
    assert users == {"heads", "target"}


@pytest.mark.parametrize("settings", [SpeculativeConfig, SamplingParams])
def test_every_field_is_read_by_something(settings):
    text = "".join(path.read_text() for path in FILES if path.name != "config.py")
    own = (ROOT / "config.py").read_text()
    for name in settings.model_fields:
        # config_file and section_name are read while the config itself is made.
        read_here = name in ("config_file", "section_name") and f'"{name}"' in own
        assert read_here or re.search(rf"\.{name}\b", text), name
