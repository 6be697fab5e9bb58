"""A run: one experiment in a folder of its own, that can be killed and continued at any moment.

The folder holds ``recipe.json``, ``metrics.csv`` (a row per epoch), ``layers.csv`` (a row per epoch
and layer), ``checkpoint.safetensors``, and at the end ``summary.json`` and ``plots/*.png``.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import os
import platform
import subprocess
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from minihyperflows.engine import NonFiniteLossError
from minihyperflows.flows.gate import counts
from minihyperflows.flows.recorder import LayerFlow
from minihyperflows.flows.stages import DENSE, REGROWTH
from minihyperflows.lab import plots
from minihyperflows.lab.checkpoint import (
    load_checkpoint,
    read_json,
    save_checkpoint,
    write_atomically,
    write_json,
)
from minihyperflows.lab.data import Dataset, load
from minihyperflows.lab.errors import UserError
from minihyperflows.lab.recipes import RECIPES, Recipe, find
from minihyperflows.lab.train import METRICS, EpochRecord, Trainer, build_network
from minihyperflows.nn.counting import flops, sparse_flops

# Short epochs share a checkpoint: a run that is killed repeats at most about this much work.
SECONDS_BETWEEN_CHECKPOINTS = 5.0

LAYER_FIELDS = tuple(f.name for f in dataclasses.fields(LayerFlow))


class RunFolder:
    """The files of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.recipe = path / "recipe.json"
        self.metrics = path / "metrics.csv"
        self.layers = path / "layers.csv"
        self.checkpoint = path / "checkpoint.safetensors"
        self.summary = path / "summary.json"
        self.plots = path / "plots"

    def create(self) -> None:
        """Make the folder.

        Raises:
            UserError: it cannot be made.
        """
        try:
            self.plots.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make the folder {self.path}: {error.strerror}") from error

    def forget(self) -> None:
        """Remove what an earlier run left, the checkpoint last."""
        for file in (self.summary, self.metrics, self.layers, self.recipe, self.checkpoint):
            try:
                file.unlink(missing_ok=True)
            except OSError as error:
                raise UserError(f"cannot remove {file}: {error.strerror}") from error


def run(
    recipe: Recipe | str,
    out: str | os.PathLike[str],
    data_dir: str | os.PathLike[str] | None = None,
    device: str = "cpu",
    seed: int = 0,
    resume: bool = True,
    progress: bool = True,
) -> dict[str, Any]:
    """Run ``recipe`` in the folder ``out`` and return its summary.

    A run that was interrupted continues from its last finished epoch and ends with the same metrics
    as an undisturbed one, bit for bit (wall times aside). A finished run is not repeated: its
    summary is read and returned.

    Args:
        recipe: a :class:`Recipe`, or the name of one.
        out: the run's folder; made if needed.
        data_dir: where MNIST or CIFAR lie; see :func:`minihyperflows.lab.load`.
        device: "cpu" or "cuda".
        seed: of the generator that all random numbers come from.
        resume: False starts over and replaces what is in the folder.
        progress: show a progress bar on standard error.

    Raises:
        UserError: the folder holds another experiment, the data are missing or damaged, the disk is
            full, or the loss is no longer finite. One line that says what to do.
    """
    recipe = recipe if isinstance(recipe, Recipe) else find(recipe)
    folder = RunFolder(Path(out))
    if not resume:
        folder.forget()
    elif folder.summary.exists():
        summary = read_json(folder.summary)
        _require_same(folder, summary, recipe, seed, device)
        return summary
    data = load(recipe.dataset, data_dir)
    trainer, records = _start(folder, recipe, data, seed, device)
    _train(trainer, records, folder, seed, device, progress)
    summary = summarise(trainer, records, seed, device)
    _draw(folder, records)
    write_json(folder.summary, summary)  # last: its presence says that the run is finished
    return summary


# -- starting and continuing ---------------------------------------------------------------------


def _start(
    folder: RunFolder, recipe: Recipe, data: Dataset, seed: int, device: str
) -> tuple[Trainer, list[EpochRecord]]:
    """A trainer, new or continued from the folder's checkpoint, with the records so far."""
    rng = np.random.default_rng(seed)
    net = build_network(recipe, data, rng).to(device)
    trainer, records = Trainer(net, data, recipe, rng), []
    if folder.checkpoint.exists():
        arrays, values = load_checkpoint(folder.checkpoint)
        _require_same(folder, values, recipe, seed, device)
        trainer.load_state_dict(arrays, values["trainer"])
        records = [_record_from_json(r) for r in values["records"]]
    folder.create()
    write_json(folder.recipe, recipe.to_json())
    _write_tables(folder, records)
    return trainer, records


def _require_same(
    folder: RunFolder, found: dict[str, Any], recipe: Recipe, seed: int, device: str
) -> None:
    """Raise unless the folder's run is the one that is asked for."""
    there = _identity(Recipe.from_json(found["recipe"]), found["seed"], found["device"])
    if difference := _first_difference(there, _identity(recipe, seed, device)):
        raise UserError(
            f"{folder.path} holds another run ({difference}): choose another folder with --out, "
            "or start over with --no-resume"
        )


def _identity(recipe: Recipe, seed: int, device: str) -> dict[str, Any]:
    """What makes a run this run and no other."""
    return _as_json(recipe) | {"seed": seed, "device": device}


def _as_json(recipe: Recipe) -> dict[str, Any]:
    """The recipe as it looks once it has been through a JSON file (lists for tuples)."""
    return json.loads(json.dumps(recipe.to_json()))


def _first_difference(there: dict[str, Any], here: dict[str, Any]) -> str | None:
    """The first value, by dotted name, in which two nested dictionaries differ; None if equal."""
    ours, theirs = _flat(here), _flat(there)
    for name in {**ours, **theirs}:
        if ours.get(name) != theirs.get(name):
            return f"{name} {theirs.get(name)} there, {name} {ours.get(name)} here"
    return None


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"dense": {"lr": 0.1}} -> {"dense.lr": 0.1}."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= (
            _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
        )
    return flat


# -- the epochs ----------------------------------------------------------------------------------


def _train(
    trainer: Trainer,
    records: list[EpochRecord],
    folder: RunFolder,
    seed: int,
    device: str,
    progress: bool,
) -> None:
    """Run the remaining epochs, saving every few seconds and at the end."""
    total = trainer.recipe.timeline.epochs
    bar = tqdm(
        total=total, initial=trainer.epoch, disable=not progress, unit="epoch", dynamic_ncols=True
    )
    saved = time.monotonic()
    with bar:
        while not trainer.finished:
            try:
                records.append(trainer.run_epoch())
            except NonFiniteLossError as error:
                raise UserError(_divergence_message(error, folder)) from error
            if trainer.finished or time.monotonic() - saved > SECONDS_BETWEEN_CHECKPOINTS:
                _save(trainer, records, folder, seed, device)
                saved = time.monotonic()
            bar.set_postfix_str(_progress_text(records[-1]), refresh=False)
            bar.update()


def _progress_text(record: EpochRecord) -> str:
    return (
        f"{record.stage}, accuracy {record.test_accuracy:.2%}, "
        f"density {record.density:.2%}, pressure {record.gamma:.3g}"
    )


def _divergence_message(error: NonFiniteLossError, folder: RunFolder) -> str:
    if not folder.checkpoint.exists():
        return f"{error}; no checkpoint was written yet"
    epoch = load_checkpoint(folder.checkpoint)[1]["trainer"]["epoch"]
    return f"{error}; the last good checkpoint is {folder.checkpoint}, after epoch {epoch}"


def _save(
    trainer: Trainer, records: list[EpochRecord], folder: RunFolder, seed: int, device: str
) -> None:
    """The checkpoint first: it holds the records too, so the tables can always be made from it."""
    arrays, state = trainer.state_dict()
    values = {
        "recipe": _as_json(trainer.recipe),
        "seed": seed,
        "device": device,
        "trainer": state,
        "records": [dataclasses.asdict(r) for r in records],
    }
    save_checkpoint(folder.checkpoint, arrays, values)
    _write_tables(folder, records)


def _record_from_json(values: dict[str, Any]) -> EpochRecord:
    layers = {name: LayerFlow(**flow) for name, flow in values["layers"].items()}
    return EpochRecord(**values | {"layers": layers})


# -- what a run leaves ---------------------------------------------------------------------------


def _write_tables(folder: RunFolder, records: list[EpochRecord]) -> None:
    _write_csv(folder.metrics, METRICS, (record.row() for record in records))
    rows = (
        {"epoch": record.epoch, "layer": name, **dataclasses.asdict(flow)}
        for record in records
        for name, flow in record.layers.items()
    )
    _write_csv(folder.layers, ("epoch", "layer", *LAYER_FIELDS), rows)


def _write_csv(path: Path, names: tuple[str, ...], rows: Iterable[dict[str, Any]]) -> None:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue().encode("utf-8"), durable=False)


def _draw(folder: RunFolder, records: list[EpochRecord]) -> None:
    for name, figure in plots.run_figures(records).items():
        image = io.BytesIO()
        figure.savefig(image, format="png", dpi=120)
        write_atomically(folder.plots / f"{name}.png", image.getvalue(), durable=False)


def summarise(
    trainer: Trainer, records: list[EpochRecord], seed: int, device: str
) -> dict[str, Any]:
    """What came out of a finished run, and what it was run with. Fractions, not per cent."""
    per_layer = counts(trainer.net)
    remaining = sum(present for present, _ in per_layer.values())
    weights = sum(total for _, total in per_layer.values())
    dense = flops(trainer.net, trainer.data.train_x.shape[1:])
    density = {name: present / total for name, (present, total) in per_layer.items()}
    dense_epochs = [r for r in records if r.stage == DENSE]
    pruned = [r for r in records if r.stage != REGROWTH][-1]
    return {
        "recipe": _as_json(trainer.recipe),
        "seed": seed,
        "device": device,
        "dtype": trainer.recipe.dtype,
        "dense_accuracy": dense_epochs[-1].test_accuracy if dense_epochs else None,
        "test_accuracy": records[-1].test_accuracy,
        "sparsity": 1 - remaining / weights,
        "target_sparsity": trainer.recipe.target_sparsity,
        "sparsity_before_regrowth": 1 - pruned.density,
        "accuracy_before_regrowth": pruned.test_accuracy,
        "landed_by": trainer.landed_by,
        "weights": weights,
        "remaining": remaining,
        "flops_dense": sum(dense.values()),
        "flops_sparse": sum(sparse_flops(dense, density).values()),
        "seconds": math.fsum(r.seconds for r in records),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command_for(trainer.recipe, seed, device),
        "versions": versions(),
        "commit": commit(),
    }


def command_for(recipe: Recipe, seed: int, device: str) -> str:
    """The command line that repeats a run (give --data-dir where the data set needs one)."""
    known = RECIPES.get(recipe.name)
    if known is None or known.with_target(recipe.target_sparsity) != recipe:
        return f"lab.run(recipe, out, device={device!r}, seed={seed}) with the recipe of this file"
    return (
        f"minihyperflows prune {recipe.name} --target-sparsity {recipe.target_sparsity:g} "
        f"--device {device} --seed {seed}"
    )


def versions() -> dict[str, str]:
    """The versions that a number may depend on."""
    return {
        "minihyperflows": metadata.version("minihyperflows"),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "platform": f"{platform.system()} {platform.machine()}",
    }


def commit() -> str | None:
    """The commit of the source tree that this package runs from; None if it is installed."""
    here = Path(__file__).resolve().parent
    git = ["git", "-C", str(here)]
    try:
        tracked = subprocess.run(
            [*git, "ls-files", "--error-unmatch", Path(__file__).name], capture_output=True
        )
        if tracked.returncode:
            return None
        answer = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
    except OSError:  # git is not installed
        return None
    return answer.stdout.strip() or None
