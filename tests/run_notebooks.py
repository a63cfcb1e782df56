"""Runs the notebooks of colab/ and stores what they show: the run that test_notebooks.py repeats in a small size.

    python tests/run_notebooks.py                 # all of them, in full size
    python tests/run_notebooks.py quickstart      # or some

needs the test extra. Run it again after changing a cell, or what a cell shows; test_notebooks.py says which notebooks
hold outputs of other cells than those that they have now.
"""

import hashlib
import os
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[1] / "colab"
NAMES = "quickstart", "train_a_head", "read_the_step"
LIMIT = 1800
"""Seconds after which a cell is given up."""

# Said by tqdm, which others import, where Jupyter has no widgets; nothing here draws one.
KERNEL_ENVIRONMENT = {"PYTHONWARNINGS": "ignore:IProgress not found"}


def read(name: str) -> nbformat.NotebookNode:
    """A notebook as it is stored."""
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    """Its cells that run."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def digest(notebook: nbformat.NotebookNode) -> str:
    """Of the sources of its code cells: outputs are those of these sources."""
    return hashlib.sha256("\0".join(cell.source for cell in code_cells(notebook)).encode()).hexdigest()


def execute(name: str, size: str, workdir: Path) -> nbformat.NotebookNode:
    """Runs a notebook in a fresh kernel, from top to bottom, on CPU.

    Args:
        size: "full" or "small".
        workdir: the folder that the kernel starts in.

    Raises:
        CellExecutionError: a cell failed.
    """
    notebook = read(name)
    environment = os.environ | KERNEL_ENVIRONMENT | {"SPECJAX_NOTEBOOK_SIZE": size, "JAX_PLATFORMS": "cpu"}
    options = {"timeout": LIMIT, "kernel_name": "python3", "record_timing": False, "coalesce_streams": True}
    client = NotebookClient(notebook, resources={"metadata": {"path": str(workdir)}}, **options)
    client.execute(env=environment)
    return notebook


def store(name: str) -> None:
    """Runs a notebook in full size and writes it with its outputs."""
    with tempfile.TemporaryDirectory() as workdir:
        notebook = execute(name, "full", Path(workdir))
    notebook.metadata.language_info = {"name": "python"}
    notebook.metadata.specjax = {"outputs_of": digest(notebook)}
    nbformat.validate(notebook)
    nbformat.write(notebook, FOLDER / f"{name}.ipynb")


def main() -> None:
    for name in sys.argv[1:] or NAMES:
        began = time.perf_counter()
        store(name)
        size = (FOLDER / f"{name}.ipynb").stat().st_size
        print(f"{name}: {time.perf_counter() - began:.0f} s, {size / 1000:.0f} kB", flush=True)


if __name__ == "__main__":
    main()
