"""The chapters: executed, complete, of readable size, and compared in a way that finds mistakes.

``pytest --nbval chapters`` runs the cells. It compares a cell only if it carries its outputs, so a
notebook that lost them passes whatever it computes. These tests see to it that nothing is lost.
"""

from __future__ import annotations

import ast
import base64
import copy
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output
from nbval import plugin
from support import CHAPTERS

ROOT = CHAPTERS
CHAPTERS = sorted(ROOT.glob("[0-9][0-9]_*.ipynb"))
SOLUTIONS = sorted((ROOT / "solutions").glob("*.ipynb"))

MOST_CELLS = 38  # about thirty, more where there are records of several studies
MOST_LINES = 15  # in a code cell
MOST_COLUMNS = 100
LARGEST_FIGURE = 80_000  # bytes of PNG
LARGEST_NOTEBOOK = 700_000  # bytes
FEWEST_CLAIMS = 3
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
# What a cell must show if its code says so at the start of a line.
SHOWING = {"print(": "stream", "plt.show()": "display_data", "draw_graph(": "display_data"}
CLAIM = re.compile(r"^\s*(assert |testing\.\w+\()", re.MULTILINE)

Notebook = Any  # nbformat's objects have no types
every_notebook = pytest.mark.parametrize("path", CHAPTERS + SOLUTIONS, ids=lambda p: p.stem)
every_chapter = pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)


def read(path: Path) -> Notebook:
    return nbformat.read(path, as_version=4)


def code_cells(notebook: Notebook) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def prose(notebook: Notebook) -> str:
    return "\n\n".join(c.source for c in notebook.cells if c.cell_type == "markdown")


def figures(cell: Any) -> list[Any]:
    return [o for o in cell.get("outputs", []) if "image/png" in o.get("data", {})]


# -- executed from top to bottom, with nothing lost ----------------------------------------------


def complaints(notebook: Notebook) -> Iterator[str]:
    """What is wrong with an executed notebook, one sentence each."""
    cells = code_cells(notebook)
    if [cell.execution_count for cell in cells] != list(range(1, len(cells) + 1)):
        yield "it was not executed once from top to bottom: run chapters/execute.py"
    if notebook.metadata != METADATA:
        yield f"its metadata are {dict(notebook.metadata)}: run chapters/execute.py"
    for cell in notebook.cells:
        if set(cell.metadata) - {"tags"}:
            yield f"cell {cell.id} has metadata {dict(cell.metadata)}: run chapters/execute.py"
    for cell in cells:
        yield from (f"cell {cell.id} {complaint}" for complaint in cell_complaints(cell))


def cell_complaints(cell: Any) -> Iterator[str]:
    kinds = {output.output_type for output in cell.outputs}
    if "error" in kinds and "raises-exception" not in cell.metadata.get("tags", []):
        yield "ends in an error"
    if any(output.get("name") == "stderr" for output in cell.outputs):
        yield "prints warnings"
    for call, kind in SHOWING.items():
        if re.search(rf"^{re.escape(call)}", cell.source, re.MULTILINE) and kind not in kinds:
            yield f"has lost the output of {call}"
    for output in cell.outputs:
        if any("widget" in mime or "svg" in mime for mime in output.get("data", {})):
            yield "shows a widget or SVG, which cannot be compared: use print and PNG figures"
    for figure in figures(cell):
        if len(base64.b64decode(figure.data["image/png"])) > LARGEST_FIGURE:
            yield f"has a figure of more than {LARGEST_FIGURE} bytes"
    lines = cell.source.splitlines()
    if len(lines) > MOST_LINES or max(map(len, lines), default=0) > MOST_COLUMNS:
        yield f"is longer than {MOST_LINES} lines or wider than {MOST_COLUMNS} columns"


def test_there_are_chapters() -> None:
    assert CHAPTERS


@every_notebook
def test_notebook_is_executed_and_complete(path: Path) -> None:
    notebook = read(path)
    nbformat.validate(notebook)
    assert list(complaints(notebook)) == []
    assert len(notebook.cells) <= MOST_CELLS
    assert path.stat().st_size <= LARGEST_NOTEBOOK


def strip_counts(notebook: Notebook) -> None:
    for cell in code_cells(notebook):
        cell.execution_count = None


def strip_outputs(notebook: Notebook) -> None:
    for cell in code_cells(notebook):
        cell.outputs = []


def swap_cells(notebook: Notebook) -> None:
    first, second, *_ = (i for i, c in enumerate(notebook.cells) if c.cell_type == "code")
    cells = notebook.cells
    cells[first], cells[second] = cells[second], cells[first]


def end_in_error(notebook: Notebook) -> None:
    code_cells(notebook)[-1].outputs = [new_output("error", ename="E", evalue="", traceback=[])]


def lengthen(notebook: Notebook) -> None:
    code_cells(notebook)[0].source += "\n#" * MOST_LINES


@pytest.mark.parametrize("spoil", [strip_counts, strip_outputs, swap_cells, end_in_error, lengthen])
def test_spoilt_notebook_is_noticed(spoil: Callable[[Notebook], None]) -> None:
    notebook = copy.deepcopy(read(CHAPTERS[0]))
    spoil(notebook)
    assert list(complaints(notebook))


# -- the parts of a chapter ----------------------------------------------------------------------


@every_chapter
def test_chapter_follows_the_template(path: Path) -> None:
    notebook, number = read(path), int(path.name[:2])
    opening = notebook.cells[0].source
    assert opening.startswith(f"# {number} · ")
    assert all(mark in opening for mark in ("**Question.**", "**You need**", "**Time**"))
    headings = re.findall(r"^## (.*)", prose(notebook), re.MULTILINE)
    assert headings[-2:] == ["Exercises", "Where it lives"]
    assert any(heading.startswith("What goes wrong") for heading in headings)
    claims = sum(len(CLAIM.findall(cell.source)) for cell in code_cells(notebook))
    assert claims >= FEWEST_CLAIMS


@every_chapter
def test_equations_and_figures_are_numbered_in_order(path: Path) -> None:
    text, chapter = prose(read(path)), int(path.name[:2])
    for pattern in (r"\\tag{(.*?)}", r"^\*\*Figure (.*?)\.\*\*"):
        numbers = re.findall(pattern, text, re.MULTILINE)
        assert numbers == [f"{chapter}.{k}" for k in range(1, len(numbers) + 1)]


@every_chapter
def test_chapter_cites_only_equations_that_exist(path: Path) -> None:
    text, chapter = prose(read(path)), int(path.name[:2])
    tags = set(re.findall(r"\\tag{(.*?)}", text))
    assert set(re.findall(rf"\(({chapter}\.\d+)\)", text)) <= tags


@every_notebook
def test_figures_have_a_caption_which_is_their_alternative_text(path: Path) -> None:
    notebook = read(path)
    for cell, following in zip(notebook.cells, [*notebook.cells[1:], None], strict=True):
        for figure in figures(cell):
            assert following is not None
            assert following.source.startswith("**Figure "), f"cell {cell.id} has no caption"
            alt = figure.metadata["image/png"]["alt"]
            assert alt.startswith("Figure ")
            assert len(alt) > 40


@every_chapter
def test_every_exercise_has_a_solution(path: Path) -> None:
    exercises = re.findall(r"^\*\*(\d+\.\d+) \(", prose(read(path)), re.MULTILINE)
    chapter = int(path.name[:2])
    assert exercises == [f"{chapter}.{k}" for k in range(1, len(exercises) + 1)]
    assert 4 <= len(exercises) <= 6
    solutions = read(ROOT / "solutions" / f"{path.name[:2]}_solutions.ipynb")
    assert re.findall(r"^## (\d+\.\d+) ", prose(solutions), re.MULTILINE) == exercises


@every_notebook
def test_links_lead_somewhere(path: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#\s]+)\)", prose(read(path)))
    assert [link for link in links if not (path.parent / link).exists()] == []


def test_every_solutions_notebook_belongs_to_a_chapter() -> None:
    assert [p.name[:2] for p in SOLUTIONS] == [p.name[:2] for p in CHAPTERS]


# -- the comparison of outputs (chapters/conftest.py) --------------------------------------------

# name: (code, stored output, whether the comparison should accept it)
COMPARISONS = {
    "same": ("print('x = 1.2345')", "x = 1.2345\n", True),
    "wobble of 1e-7": ("print(1.2345 * (1 + 1e-7))", "1.2345\n", True),
    "change of 1e-3": ("print(1.2345 * (1 + 1e-3))", "1.2345\n", False),
    "no jump where rounding would": ("print(0.99995001)", "0.99994999\n", True),
    "small numbers are numbers": ("print('1.2e-05')", "1.3e-05\n", False),
    "round-off is round-off": ("print(3e-17, -1e-16)", "-2e-17 0.0\n", True),
    "sign": ("print(-1.5)", "1.5\n", False),
    "whole numbers are exact": ("print(100001)", "100000\n", False),
    "word": ("print('loss 1.0')", "lost 1.0\n", False),
    "one number more": ("print('1.0 2.0')", "1.0\n", False),
    "not a number": ("print(float('nan'))", "1.0\n", False),
    "nothing printed": ("pass", "1.0\n", False),
    "claim": ("assert 1 + 1 == 3", "", False),
    "warnings are left out": ("import sys; print('noise', file=sys.stderr)", "", True),
    "hash seed": ("import os; print(os.environ['PYTHONHASHSEED'])", "0\n", True),
    "threads": ("print(int(os.environ['OPENBLAS_NUM_THREADS']) > 0)", "True\n", True),
}


def comparison_cell(count: int, code: str, stored: str, tags: tuple[str, ...] = ()) -> Any:
    outputs = [new_output("stream", name="stdout", text=stored)] if stored else []
    cell = new_code_cell(code, execution_count=count, outputs=outputs)
    cell.metadata["tags"] = list(tags)
    return cell


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bool]:
    """Whether each cell of COMPARISONS passed; cells that were not run are missing."""
    folder = tmp_path_factory.mktemp("book")
    shutil.copy(ROOT / "conftest.py", folder)
    (folder / "pytest.ini").write_text("[pytest]\nmarkers =\n  slow\n  gpu\n", encoding="utf-8")
    rows = list(COMPARISONS.values())
    cells = [comparison_cell(i, code, stored) for i, (code, stored, _) in enumerate(rows, start=1)]
    cells.append(comparison_cell(len(cells) + 1, "assert False", "", tags=("slow",)))
    nbformat.write(new_notebook(cells=cells, metadata=METADATA), folder / "cells.ipynb")
    command = [sys.executable, "-m", "pytest", "--nbval", "--nbval-current-env", "-m", "not slow"]
    command += ["-p", "no:cacheprovider", "--junitxml=report.xml", "cells.ipynb"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert (folder / "report.xml").exists(), done.stdout + done.stderr
    results = ElementTree.parse(folder / "report.xml").iter("testcase")
    passed = {case.attrib["name"]: len(case) == 0 for case in results}
    assert "1 deselected" in done.stdout  # the cell tagged slow
    return {name: passed[f"Cell {i}"] for i, name in enumerate(COMPARISONS)}


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPARISONS)
def test_outputs_are_compared_with_a_tolerance(name: str, verdicts: dict[str, bool]) -> None:
    assert verdicts[name] == COMPARISONS[name][2]


def test_nbval_still_has_what_the_comparison_needs() -> None:
    assert callable(plugin.IPyNbCell.sanitize)
    assert "sanitize" in plugin.IPyNbCell.compare_outputs.__code__.co_names
    assert "skip_compare" in plugin.IPyNbFile.__init__.__code__.co_names


# -- what the chapters import ----------------------------------------------------------------------

# Of the studies' own things: how their runs are set up and trained, which no other study shares.
FROM_STUDIES = {
    "alternatives": {"RECIPES", "fit", "fresh", "learning_rate", "train_dense"},
    "inside": {"SHORT", "BottleneckTrainer", "SeededTrainer", "train_dense"},
    "regrowth": {"recipe"},
}


def names_from_studies(path: Path) -> set[tuple[str, str]]:
    """(study, name) of all that a notebook takes from ``minihyperflows.studies``."""
    package, found = "minihyperflows.studies", set()
    cells = (c.source for c in nbformat.read(path, 4).cells if c.cell_type == "code")
    nodes = list(ast.walk(ast.parse("\n".join(cells))))
    modules = {}
    for node in nodes:
        if isinstance(node, ast.Import):
            assert not [a for a in node.names if a.name.startswith(package)]
        elif isinstance(node, ast.ImportFrom) and node.module == package:
            modules |= {alias.asname or alias.name: alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and str(node.module).startswith(f"{package}."):
            found |= {(str(node.module).rpartition(".")[2], alias.name) for alias in node.names}
    for node in nodes:
        if isinstance(node, ast.Attribute) and (name := ast.unparse(node.value)) in modules:
            found.add((modules[name], node.attr))
    return found


def test_what_chapters_share_with_studies_is_in_analysis() -> None:
    """Formulas and statistics come from ``analysis``; the exceptions are used."""
    found = set().union(*map(names_from_studies, (*CHAPTERS, *SOLUTIONS)))
    assert found == {(study, name) for study, names in FROM_STUDIES.items() for name in names}
