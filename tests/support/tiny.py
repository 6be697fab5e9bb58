"""Runs that take a moment: a small network, a handful of images, pictures of three bytes."""

from __future__ import annotations

import contextlib
import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from minihyperflows import lab
from minihyperflows.data.datasets import Dataset
from minihyperflows.lab import checkpoint, plots, recipes, runs

IMAGES = 40
NAME = "tiny"
_rng = np.random.default_rng(0)
DATA = Dataset(
    "digits",
    *(_rng.integers(0, 256, (IMAGES, 4, 4, 1), np.uint8), _rng.integers(0, 3, IMAGES)),
    *(_rng.integers(0, 256, (IMAGES, 4, 4, 1), np.uint8), _rng.integers(0, 3, IMAGES)),
    ("a", "b", "c"),
    (0.5,),
    (0.25,),
)
RECIPE = lab.RECIPES["lenet300-digits"].with_fields(
    {
        "name": NAME,
        "model": "lenet300",
        "dense.epochs": 1,
        "pruning.epochs": 1,
        "regrowth.epochs": 1,
        "target_sparsity": 0.5,
    }
)


class Picture:
    def savefig(self, file: Any, **_: Any) -> None:
        file.write(b"PNG")


@contextlib.contextmanager
def tiny_runs(monkeypatch: Any) -> Iterator[None]:
    """The recipe "tiny" is known, has its data, and saves a checkpoint after every epoch.

    Nothing waits for the disk: a process that dies does not take down the system with it.
    """
    monkeypatch.setattr(checkpoint.os, "fsync", lambda descriptor: None)
    monkeypatch.setattr(runs, "commit", lambda: None)
    monkeypatch.setattr(runs, "load", lambda name, data_dir: DATA)
    monkeypatch.setitem(recipes.RECIPES, NAME, RECIPE)
    monkeypatch.setattr(runs, "SECONDS_BETWEEN_CHECKPOINTS", -1.0)
    monkeypatch.setattr(
        plots, "run_figures", lambda records: {n: Picture() for n in ("flips", "layers")}
    )
    yield


def rows(folder: Path, table: str = "metrics.csv") -> list[dict[str, str]]:
    """A table without the wall times."""
    with open(folder / table, encoding="utf-8", newline="") as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


def results(folder: Path) -> Any:
    """All that must not depend on what happened on the way."""
    arrays, values = runs.load_checkpoint(folder / "checkpoint.safetensors")
    tensors = {k: (v.dtype, v.shape, v.tobytes()) for k, v in arrays.items()}
    summary = runs.RunFolder(folder).read_summary()
    own = ("seconds", "date", "dense_from", "commit", "command")
    kept = {k: v for k, v in summary.items() if k not in own}
    return rows(folder), rows(folder, "layers.csv"), tensors, values["trainer"], kept
