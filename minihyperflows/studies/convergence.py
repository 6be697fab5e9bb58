"""The epochs of finished runs under constant pressure, thinned to a small table (chapter 10).

    python -m minihyperflows.studies.convergence RUN... --out FILE

A run's folder has a row for every epoch in ``metrics.csv``. This writes some of them, the first
ten and then ever fewer, for all folders of a sweep. Columns: what tells the runs apart (``gamma``,
``floor``, ``presence_optimizer``, ``presence_lr``, ``epochs``, ``seed``); ``epoch``; ``density``
and ``test_accuracy`` after it; ``flips`` and ``regrowths``, summed over the epochs since the row
before; ``flux``, the mean of |flux| over the present weights in this epoch. Where the runs come
from (commit, versions, commands) is in the table that ``minihyperflows collect`` makes of them.

With ``--unfinished`` also runs that have not come to their end, as far as they have come;
``epochs`` is the length they are to have.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from minihyperflows.errors import UserError
from minihyperflows.lab.checkpoint import load_checkpoint
from minihyperflows.lab.console import Parser
from minihyperflows.lab.recipes import Recipe
from minihyperflows.lab.records import adds_to_table, records_so_far, settings, write_records
from minihyperflows.lab.runs import RunFolder
from minihyperflows.studies.command import reporting

Row: TypeAlias = dict[str, Any]
MODULE = "minihyperflows.studies.convergence"


def kept_epochs(epochs: int, every: int = 10, a_factor_ten: int = 16) -> list[int]:
    """1 to ``every``, then about ``a_factor_ten`` of each ten times as many, and the last one."""
    steps = int(a_factor_ten * np.log10(max(epochs / every, 1)))
    later = every * 10 ** (np.arange(1, steps + 1) / a_factor_ten)
    return sorted({*range(1, min(every, epochs) + 1), *map(round, later), epochs})


def course(folder: Path, unfinished: bool = False) -> Iterator[Row]:
    """The rows of the finished run in ``folder``; with ``unfinished`` those of its last checkpoint.

    Raises:
        UserError: there is none.
    """
    files = RunFolder(folder)
    if not (files.summary.exists() or (unfinished and files.checkpoint.exists())):
        raise UserError(f"{folder} holds no finished run (it has no summary.json)")
    arrays, values = load_checkpoint(files.checkpoint)
    head = settings(Recipe.from_json(values["recipe"])) | {"seed": values["seed"]}
    records, flips, regrowths = values["records"], 0, 0
    kept = set(kept_epochs(len(records)))
    for record in records:
        layers = record["layers"]
        flips += record["flips"]
        regrowths += sum(layer["regrowths"] for layer in layers.values())
        if record["epoch"] in kept:
            yield head | {
                "epoch": record["epoch"],
                "density": record["density"],
                "test_accuracy": record["test_accuracy"],
                "flips": flips,
                "regrowths": regrowths,
                "flux": _mean_flux(layers, arrays),
            }
            flips = regrowths = 0


def _mean_flux(layers: dict[str, Row], arrays: dict[str, np.ndarray]) -> float:
    """The mean of |flux| over all present weights; 0 if there are none."""
    present = {k: v["density"] * arrays[f"net.{k}.presence"].size for k, v in layers.items()}
    fluxes = [layers[name]["flux_present"] * n for name, n in present.items() if n]
    return float(np.nansum(fluxes) / max(sum(present.values()), 1))


@reporting()
def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = Parser(prog=f"python -m {MODULE}", description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", help="folders of finished runs")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument("--unfinished", action="store_true", help="take unfinished runs too")
    write_courses(parser.parse_args(arguments))


@adds_to_table
def write_courses(options: argparse.Namespace) -> None:
    """Replace the table by one of these runs."""
    records_so_far(options.out, ("seed", "epoch", "flips", "flux"))  # nothing else is replaced
    rows = [row for folder in options.runs for row in course(folder, options.unfinished)]
    write_records(options.out, rows, digits=6)


if __name__ == "__main__":
    main()
