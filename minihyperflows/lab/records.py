"""Records of many runs in one tidy table: what ``chapters/results`` is made of."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minihyperflows.lab.checkpoint import read_json, write_atomically
from minihyperflows.lab.errors import UserError
from minihyperflows.lab.recipes import Recipe

RESULTS = (
    "target_sparsity",
    "sparsity",
    "sparsity_before_regrowth",
    "dense_accuracy",
    "accuracy_before_regrowth",
    "test_accuracy",
    "weights",
    "remaining",
    "flops_dense",
    "flops_sparse",
    "landed_by",
    "seconds",
)
PROVENANCE = ("device", "dtype", "date", "commit", "command")


def collect(folders: Sequence[Path], out: Path) -> int:
    """Write a row for every finished run in ``folders`` to the CSV file ``out``.

    A row has the results and where they come from: recipe, data set, seed, what sweeps vary
    (``gamma`` is empty unless the pressure was constant), device, dtype, date, commit, versions,
    and the command that repeats the run. Returns the number of rows.

    Raises:
        UserError: a folder holds no finished run.
    """
    rows = [_row(folder) for folder in folders]
    write_records(out, rows)
    return len(rows)


def _row(folder: Path) -> dict[str, Any]:
    summary_file = folder / "summary.json"
    if not summary_file.exists():
        raise UserError(f"{folder} holds no finished run (it has no summary.json)")
    summary = read_json(summary_file)
    recipe = Recipe.from_json(summary["recipe"])
    head = {"recipe": recipe.name, "dataset": recipe.dataset, "seed": summary["seed"]}
    density = {"density": summary["remaining"] / summary["weights"]}
    body = {name: summary[name] for name in (*RESULTS, *PROVENANCE)}
    return head | settings(recipe) | density | body | summary["versions"]


def settings(recipe: Recipe) -> dict[str, Any]:
    """What tells the runs of a sweep and of its variants apart, beside the seed."""
    return {
        "gamma": recipe.pressure.gamma,
        "floor": recipe.pressure.floor,
        "presence_optimizer": recipe.presence.optimizer,
        "presence_lr": recipe.presence.lr,
        "epochs": recipe.timeline.epochs,
    }


def write_records(path: Path, rows: Sequence[dict[str, Any]], digits: int | None = None) -> None:
    """Replace the CSV file ``path`` by one with these rows.

    It has the columns of all rows, in the order in which they come up. ``digits``: how many of a
    float's to write; None: all.
    """
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: _rounded(v, digits) for k, v in row.items()} for row in rows)
    write_atomically(path, text.getvalue().encode("utf-8"))


def _rounded(value: Any, digits: int | None) -> Any:
    return f"{value:.{digits}g}" if digits and isinstance(value, float) else value


def read_records(path: Path) -> list[dict[str, Any]]:
    """The rows of a table written by :func:`collect`, numbers as numbers."""
    with open(path, encoding="utf-8", newline="") as file:
        return [{k: _number(v) for k, v in row.items()} for row in csv.DictReader(file)]


def _number(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
