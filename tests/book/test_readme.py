"""The README's tables are what the records say."""

from __future__ import annotations

import json
import os
import re
import shlex
import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import REPOSITORY, RESULTS

from minihyperflows.cli import main
from minihyperflows.lab import registry
from minihyperflows.lab.records import Row, read_records
from minihyperflows.studies import frame

FRONT = REPOSITORY / "README.md"
ALL = RESULTS / "README.md"
BOTH = pytest.mark.parametrize("page", [FRONT, ALL], ids=["front", "all"])


def tables(page: Path) -> Iterator[tuple[list[str], list[list[str]]]]:
    """The heads and the rows of the tables of ``page``, cell by cell."""
    for block in re.findall(r"(?:^\|.*\n)+", page.read_text(encoding="utf-8"), re.MULTILINE):
        rows = [
            [cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()
        ]
        yield rows[0], rows[2:]


def table(page: Path, *head: str) -> list[list[str]]:
    (found,) = [rows for columns, rows in tables(page) if columns[: len(head)] == list(head)]
    assert found
    return found


def mean_and_deviation(values: list[float]) -> str:
    return f"{100 * statistics.mean(values):.2f} ± {100 * statistics.stdev(values):.2f} %"


def test_what_a_run_ends_with() -> None:
    files = {"MNIST": "lenet300-mnist.csv", "CIFAR-10": "cifar10-small.csv"}
    for network, data, sparsity, dense, pruned, left in table(FRONT, "network", "data"):
        name = network.lower().replace("-", "")
        rows = [
            row
            for row in read_records(RESULTS / files[data])
            if row["recipe"].startswith(name)
            and row["target_sparsity"] == float(sparsity.removesuffix(" %")) / 100
        ]
        assert [row["seed"] for row in sorted(rows, key=lambda row: row["seed"])] == [0, 1, 2]
        assert dense == mean_and_deviation([row["dense_accuracy"] for row in rows])
        assert pruned == mean_and_deviation([row["test_accuracy"] for row in rows])
        assert {left} == {f"{row['remaining']:,} of {row['weights']:,}" for row in rows}


METHODS = {
    "random": "random",
    "magnitude, at once": "magnitude",
    "magnitude, in rounds": "iterative",
    "RigL": "rigl",
    "gradual magnitude (GMP)": "gradual",
    "GMP at Hyperflows' pace": "gradual-planned",
    "movement": "movement",
    "movement at Hyperflows' pace": "movement-planned",
    "Hyperflows": "hyperflows",
}


@BOTH
def test_the_other_methods(page: Path) -> None:
    records = read_records(RESULTS / "alternatives.csv")
    head = next(head for head, _ in tables(page) if head[0] == "method")
    sparsities = [round(float(cell.removesuffix(" %")) / 100, 4) for cell in head[1:]]
    for method, *cells in table(page, *head):
        for sparsity, cell in zip(sparsities, cells, strict=True):
            found = accuracies(records, METHODS[method], sparsity)
            expected = f"{100 * statistics.mean(found):.2f} ({len(found)})" if found else ""
            assert cell == expected, (method, sparsity)


def accuracies(records: list[Row], method: str, sparsity: float) -> list[float]:
    return [
        row["test_accuracy"]
        for row in records
        if row["method"] == method and row["target_sparsity"] == sparsity
    ]


@BOTH
def test_how_fast(page: Path) -> None:
    record = json.loads((RESULTS / "bench-cpu.json").read_text(encoding="utf-8"))
    rows = next(rows for head, rows in tables(page) if "PyTorch" in head)
    assert len(rows) == len(record["networks"])
    for (step, *cells), measured in zip(rows, record["networks"], strict=True):
        assert step.replace("-", "").lower().startswith(measured["network"])
        assert step.endswith(f"batch {measured['batch']}")
        peer = f"torch_{measured['torch_format']}"
        *times, ratio, memory, memory_of_torch = cells
        assert times == [milliseconds(measured["milliseconds"][who]) for who in ("ours", peer)]
        assert ratio == f"{measured['ratio']:.2f}"
        assert [memory, memory_of_torch] == [
            f"{measured['memory'][who]['increase'] / 2**20:,.0f} MiB" for who in ("ours", peer)
        ]


def milliseconds(value: float) -> str:
    return f"{value:.1f} ms" if value < 100 else f"{value:,.0f} ms"


@BOTH
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    assert links
    missing = [
        link
        for link in links
        if not link.startswith("https://") and not (page.parent / link).exists()
    ]
    assert not missing


def test_every_record_is_described() -> None:
    text = ALL.read_text(encoding="utf-8")
    files = {path.name for path in RESULTS.iterdir() if path.name != "README.md"}
    assert not {name for name in files if f"`{name}`" not in text}


def block(heading: str, language: str) -> str:
    """The first code of a language under a heading of the front page."""
    text = FRONT.read_text(encoding="utf-8").partition(f"## {heading}\n")[2]
    return text.partition(f"```{language}\n")[2].partition("```")[0]


@pytest.mark.slow
def test_the_twelve_lines(capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(block("In twelve lines", "python"), "README.md", "exec"), {})
    found = re.fullmatch(r"(.*)% of the weights left, accuracy (.*)%\n", capsys.readouterr().out)
    assert found
    told = re.search(
        r"# prints (.*)% of the weights left, accuracy (.*)%", FRONT.read_text("utf-8")
    )
    assert told
    print(found.group(), told.group())
    assert float(found[1]) == pytest.approx(float(told[1]), abs=0.5)  # of float32, with any BLAS
    assert float(found[2]) == pytest.approx(float(told[2]), abs=1)


def test_the_plugin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("squares.py").write_text(block("Extending it", "python"), encoding="utf-8")
    program, *words = shlex.split(block("Extending it", "bash"))
    assert program == "minihyperflows"
    try:
        assert main([*words, "--epochs-scale", "0.02", "--out", "run"]) == 0
    finally:
        registry.forget(os.path.realpath("squares.py"))
    recipe = json.loads(Path("run/recipe.json").read_text(encoding="utf-8"))
    assert recipe["pressure"]["kind"] == "squares"
    assert [Path(plugin["path"]).name for plugin in recipe["plugins"]] == ["squares.py"]


@BOTH
def test_commands_of_studies_are_understood(page: Path) -> None:
    """SEED stands for a number, METHOD for a method; FILE and DIR stay as they are."""
    text = page.read_text(encoding="utf-8").replace("SEED", "0").replace("METHOD", "magnitude")
    found = re.findall(r"minihyperflows study ([a-z_]+)([^`\n;,)]*)", text)
    assert found or page == FRONT
    for name, words in found:
        out = [] if "--out" in words else ["--out", "FILE"]
        options, settings = frame.parse(frame.find(name), [*shlex.split(words), *out])
        print(f"{name}: {len(settings)} runs for {options.out}")
        assert settings
