"""Run notebooks top to bottom in a fresh kernel and save them with their outputs.

    python chapters/execute.py chapters/01_*.ipynb chapters/solutions/01_*.ipynb

A maintainer's tool (it needs nbclient, which comes with JupyterLab). It leaves out what changes
from run to run (times, versions, editor settings), so that a diff shows what really changed, and
gives every figure the caption below it as its alternative text.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import nbformat
from conftest import set_kernel_environment
from nbclient import NotebookClient

KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
CELL_TIMEOUT = 300  # seconds


def execute(path: Path) -> None:
    """Run the notebook at ``path`` and write it back. An error leaves the file as it was."""
    notebook = nbformat.read(path, as_version=4)
    where = {"metadata": {"path": str(path.parent)}}
    client = NotebookClient(notebook, timeout=CELL_TIMEOUT, kernel_name="python3", resources=where)
    client.execute(stderr=subprocess.DEVNULL)
    strip(notebook)
    describe_figures(notebook)
    nbformat.validate(notebook)
    nbformat.write(notebook, path)


def strip(notebook: nbformat.NotebookNode) -> None:
    """Remove everything that is neither text, code, output nor tag."""
    notebook.metadata = {"kernelspec": KERNEL, "language_info": {"name": "python"}}
    for cell in notebook.cells:
        tags = cell.metadata.get("tags")
        cell.metadata = {"tags": tags} if tags else {}
        for output in cell.get("outputs", []):
            if "metadata" in output:
                output.metadata = {}


def describe_figures(notebook: nbformat.NotebookNode) -> None:
    """Give each figure the caption that opens the next cell as alternative text."""
    for cell, following in zip(notebook.cells, notebook.cells[1:], strict=False):
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                output.metadata = {"image/png": {"alt": caption(following.source)}}


def caption(source: str) -> str:
    """The first paragraph of a cell without its markup."""
    text = " ".join(source.split("\n\n")[0].split())
    return re.sub(r"[*`$\\{}]", "", text)


if __name__ == "__main__":
    if not sys.argv[1:]:
        sys.exit(__doc__)
    set_kernel_environment()
    for argument in sys.argv[1:]:
        execute(Path(argument))
        print(argument)
