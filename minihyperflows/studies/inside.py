"""Inside the network: where the surviving weights are, and whether they are always the same ones.

Two kinds of runs, each of which leaves one file in a folder (chapter 11)::

    python -m minihyperflows.studies.inside run [NAME...] --data-dir DIR --out FOLDER
    python -m minihyperflows.studies.inside tables --data-dir DIR --out FOLDER

``run`` does the runs that are named (or all) and not yet in the folder; several processes can share
a folder. *Prunings* begin with one of three dense networks and have a seed of their own for the
order of the data and another for the first t, ``dense0-order1-presence1-98``; two begin with the
random weights that dense network 0 was trained from, ``start0-...``. *Bottlenecks* press on the
weights of one layer only, ever harder, ``bottleneck-fc3-seed0-100`` (100: the epochs), until it has
been empty through a whole level of pressure.

``tables`` writes what the files contain; there is one row

* in ``inside.csv`` for each run: settings, results, where it comes from. ``units1``, ``units2``:
  hidden units with a path from an input and to an output; ``idle``: present weights on no path from
  an input to an output;
* in ``inside-layers.csv`` for each epoch of a pruning: present weights in all, by layer, and of fc1
  by the pixel they read: constant in the training set, rare (above its smallest value in less than
  1 % of the images), other. ``magnitude1`` to ``3``: what the same number of weights would be by
  layer if they were the largest of the dense network;
* in ``inside-pixels.csv`` for each run to 98 % whose order and t have the same seed: the present
  weights of fc1 by pixel, 784 numbers in order; also the pixels' mean and standard deviation (of
  255), and as many of the largest weights of dense network 0;
* in ``inside-overlap.csv`` for two masks, the present weights of each, their intersection, and what
  chance expects it to be if it places the weights anywhere (``uniform``), in the same layers
  (``layers``), at the same pixels (``pixels``; the other layers as before), at the same inputs and
  outputs of every layer (``margins``), among the weights that were about as large in the same layer
  of the network that both begin with (``sizes``); "largest0" is the mask of dense network 0's
  largest weights.
  A unit of one dense network is no unit of another: between those, only pixels can be compared
  (``pixel_correlation``);
* in ``inside-bottleneck.csv`` for each epoch of a bottleneck. ``flux_present`` and
  ``flux_removed``: means of the absolute flux; ``weight_rms``: of the layer's present weights.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from tqdm import tqdm

from minihyperflows.analysis.masks import (
    Masks,
    joined,
    masks_of,
    overlap,
    parted,
    paths,
    pixel_groups,
)
from minihyperflows.data.datasets import Dataset, load
from minihyperflows.errors import UserError
from minihyperflows.flows.gates import gated_layers, is_present
from minihyperflows.flows.stages import PRUNING
from minihyperflows.lab.checkpoint import is_temporary, load_checkpoint, save_checkpoint
from minihyperflows.lab.console import Parser
from minihyperflows.lab.folders import foreign
from minihyperflows.lab.locks import locked
from minihyperflows.lab.recipes import Recipe, find
from minihyperflows.lab.records import write_records
from minihyperflows.lab.runs import provenance
from minihyperflows.lab.training import EpochRecord, Trainer, build_network, evaluate
from minihyperflows.nn import Module
from minihyperflows.studies.command import reporting

MODULE = "minihyperflows.studies.inside"
LAYERS = ("fc1", "fc2", "fc3")
LEVELS = 10  # of pressure in a bottleneck, each five times the one before

# Twelve epochs under pressure are enough if the scheduler has 48 periods in them.
SHORT = {
    "dense.epochs": 4,
    "pruning.epochs": 12,
    "regrowth.epochs": 4,
    "pressure.updates_per_epoch": 4,
    "pressure.step": 0.1,
}
Row: TypeAlias = dict[str, Any]
# -- runs ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Pruning:
    """A pruning of dense network ``dense``, or, if not ``trained``, of its first random weights;
    ``order`` and ``presence`` are the seeds of the order of the data and of the first t."""

    dense: int
    order: int
    presence: int
    target: float = 0.98
    trained: bool = True

    @property
    def begin(self) -> str:
        """The network it begins with."""
        return f"{'dense' if self.trained else 'start'}{self.dense}"

    @property
    def name(self) -> str:
        seeds = f"order{self.order}-presence{self.presence}"
        return f"{self.begin}-{seeds}-{100 * self.target:g}"


@dataclasses.dataclass(frozen=True)
class Bottleneck:
    """Pressure on one layer only (on "all" for comparison), from random weights."""

    seed: int
    epochs: int
    layer: str = "fc3"

    @property
    def name(self) -> str:
        return f"bottleneck-{self.layer}-seed{self.seed}-{self.epochs}"


Run: TypeAlias = Pruning | Bottleneck
_PRUNINGS = (
    *(Pruning(0, seed, seed) for seed in range(4)),
    *(Pruning(dense, 0, 0) for dense in (1, 2)),
    *(Pruning(0, 1, 0), Pruning(0, 0, 1)),
    *(Pruning(0, 0, 0, target) for target in (0.9, 0.95, 0.99)),
    *(Pruning(0, seed, seed, trained=False) for seed in (0, 1)),
)
_BOTTLENECKS = Bottleneck(0, 100), Bottleneck(1, 40), Bottleneck(2, 40), Bottleneck(0, 40, "all")
RUNS: dict[str, Run] = {run.name: run for run in _PRUNINGS}
RUNS |= {run.name: run for run in _BOTTLENECKS}


class SeededTrainer(Trainer):
    """A pruning that starts from a dense network, with one generator for the order of the data and
    another for the first t.

    Attributes:
        masks: at the end of each epoch, all masks in a row, eight weights a byte.
    """

    def __init__(
        self, net: Module, data: Dataset, recipe: Recipe, order: int, presence: int
    ) -> None:
        super().__init__(net, data, recipe, np.random.default_rng([order, 1]))
        self.presence_rng = np.random.default_rng([presence, 2])
        self.epoch = recipe.dense.epochs  # the dense stage is over
        self.masks: list[np.ndarray] = []

    def enter(self) -> None:
        order = self.rng
        if (self.stage, self.stage_epoch) == (PRUNING, 1):
            self.rng = self.presence_rng
        super().enter()
        self.rng = order

    def run_epoch(self) -> EpochRecord:
        record = super().run_epoch()
        self.masks.append(np.packbits(joined(masks_of(self.net))))
        return record


class BottleneckTrainer(Trainer):
    """Pressure on one layer only. In the loss it would be gamma / N times the sum of that layer's
    t, where N still counts all weights; here its gradient is added to theirs."""

    def press_on(self, layer: str) -> None:
        """Choose the layer; "all" for every one."""
        self.layer = layer

    def pressure(self) -> float:
        """gamma in this epoch: 0 during the first tenth of the run, then 5, 25, 125, ..."""
        level = self.epoch * LEVELS // self.recipe.pruning.epochs
        return 5.0**level if level else 0.0

    def step(self) -> None:
        layers = gated_layers(self.net)
        share = self.pressure() / sum(layer.weight.size for layer in layers.values())
        for name, layer in layers.items():
            if self.layer in (name, "all"):
                layer.presence.grad = layer.presence.grad + np.asarray(share, layer.weight.dtype)
        super().step()


def train_dense(
    recipe: Recipe, data: Dataset, seed: int, epochs: int
) -> tuple[dict[str, np.ndarray], float]:
    """The state of a network after so many epochs of the dense stage, and its test accuracy."""
    rng = np.random.default_rng(seed)
    trainer = Trainer(build_network(recipe, data, rng), data, recipe, rng)
    while trainer.epoch < epochs:
        trainer.run_epoch()
    return trainer.net.state_dict(), evaluate(trainer.net, data)


def prune(
    run: Pruning, recipe: Recipe, data: Dataset, dense: dict[str, np.ndarray], bar: tqdm
) -> tuple[list[EpochRecord], np.ndarray]:
    """The records of the epochs with gates, and the masks at their ends (epochs, bytes)."""
    recipe = recipe.with_target(run.target)
    net = build_network(recipe, data, np.random.default_rng(run.dense))
    net.load_state_dict(dense)
    trainer = SeededTrainer(net, data, recipe, run.order, run.presence)
    records = list(_epochs(trainer, bar))
    return records, np.array(trainer.masks)


def squeeze(run: Bottleneck, recipe: Recipe, data: Dataset, bar: tqdm) -> list[Row]:
    """The rows of a bottleneck's epochs."""
    fields = {"dense.epochs": 0, "pruning.epochs": run.epochs}
    recipe = recipe.with_fields(fields).with_gamma(0.0)
    rng = np.random.default_rng(run.seed)
    trainer = BottleneckTrainer(build_network(recipe, data, rng), data, recipe, rng)
    trainer.press_on(run.layer)
    rows: list[Row] = []
    while not trainer.finished:
        if _is_over(rows, trainer.pressure()):
            break
        gamma = trainer.pressure()
        (record,) = itertools.islice(_epochs(trainer, bar), 1)
        layer = gated_layers(trainer.net)["fc3"]
        used = layer.weight.data[is_present(layer.presence.data)]
        flow = record.layers["fc3"]
        rows.append(
            {"name": run.name, "epoch": record.epoch, "gamma": gamma}
            | {"train_loss": record.train_loss, "test_accuracy": record.test_accuracy}
            | {name: record.layers[name].density for name in LAYERS}
            | {"flips": flow.flips, "regrowths": flow.regrowths}
            | {"flux_present": flow.flux_present, "flux_removed": flow.flux_removed}
            | {"weight_rms": float(np.sqrt(np.mean(used**2))) if used.size else math.nan}
        )
    return rows


def _is_over(rows: Sequence[Row], gamma: float) -> bool:
    """Whether the layer was empty through the whole level that has ended."""
    last = [row for row in rows if row["gamma"] == rows[-1]["gamma"]]
    return bool(last) and gamma != last[0]["gamma"] and not any(row["fc3"] for row in last)


def _epochs(trainer: Trainer, bar: tqdm) -> Iterator[EpochRecord]:
    while not trainer.finished:
        yield trainer.run_epoch()
        bar.update()


# -- the folder ----------------------------------------------------------------------------------


class Study:
    """The runs in a folder, one file each: arrays, and a row with settings and provenance."""

    def __init__(self, folder: Path, recipe: Recipe, data: Dataset) -> None:
        self.folder, self.recipe, self.data = folder, recipe, data
        folder.mkdir(parents=True, exist_ok=True)
        pixels, classes = int(np.prod(data.train_x.shape[1:])), len(data.classes)
        self.shapes: dict[str, tuple[int, ...]] = {"fc1": (300, pixels), "fc2": (100, 300)}
        self.shapes["fc3"] = (classes, 100)

    def file(self, name: str) -> Path:
        """Where a run is."""
        return self.folder / f"{name}.safetensors"

    def has(self, name: str) -> bool:
        """Whether the run is done."""
        return self.file(name).exists()

    def read(self, name: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Arrays and values of a run.

        Raises:
            UserError: the file is damaged, or of another recipe.
        """
        arrays, values = load_checkpoint(self.file(name), "delete it, and do that run again")
        recipe = values.get("row", values).get("recipe", self.recipe.name)  # not in older networks
        if recipe != self.recipe.name:
            raise UserError(
                f"{self.file(name)} is a run of {recipe}, not of {self.recipe.name}: choose "
                "another folder with --out"
            )
        return arrays, values

    def dense(self, run: Pruning) -> tuple[dict[str, np.ndarray], float]:
        """The network a pruning begins with, made if it is not there, and its test accuracy."""
        name = run.begin
        if not self.has(name):
            epochs = self.recipe.dense.epochs if run.trained else 0
            state, accuracy = train_dense(self.recipe, self.data, run.dense, epochs)
            about = {"accuracy": accuracy, "recipe": self.recipe.name}
            save_checkpoint(self.file(name), state, about)
        state, values = self.read(name)
        return state, values["accuracy"]

    def do(self, run: Run, command: str) -> None:
        """Do a run and write its file."""
        settings = dataclasses.asdict(run)
        head = {"name": run.name, "kind": type(run).__name__.lower()} | settings
        source: Row = {"recipe": self.recipe.name, "dataset": self.data.name}
        with tqdm(desc=run.name, unit="epoch", leave=False) as bar:
            if isinstance(run, Pruning):
                state, accuracy = self.dense(run)
                records, masks = prune(run, self.recipe, self.data, state, bar)
                arrays = {"masks": masks}
                epochs: list[Row] = [_epoch(run.name, record) for record in records]
                head |= {"dense_accuracy": accuracy}
            else:
                epochs, arrays = squeeze(run, self.recipe, self.data, bar), {}
        head |= {"epochs": len(epochs), "test_accuracy": epochs[-1]["test_accuracy"]}
        source |= provenance(self.recipe.dtype, command)
        # JSON has no NaN: the flux of no weights is null.
        text = json.dumps([{k: None if v != v else v for k, v in e.items()} for e in epochs])
        save_checkpoint(self.file(run.name), arrays, {"row": head | source, "epochs": text})

    def finished(self, kind: type[Run]) -> list[Any]:
        """The runs of one kind that are in the folder."""
        return [r for r in RUNS.values() if isinstance(r, kind) and self.has(r.name)]

    def masks(self, run: Pruning, epoch: int = -1) -> Masks:
        """The masks at the end of an epoch with gates (from 0; -1: the last)."""
        packed = self.read(run.name)[0]["masks"][epoch]
        return parted(np.unpackbits(packed).astype(bool), self.shapes)

    def weights(self, run: Pruning) -> Masks:
        """By layer, of the network it begins with."""
        state, _ = self.dense(run)
        return {name: state[f"{name}.weight"] for name in LAYERS}

    def largest(self, run: Pruning, number: int) -> Masks:
        """The mask of the largest weights, over all layers, of the network it begins with."""
        sizes = np.concatenate([abs(w).reshape(-1) for w in self.weights(run).values()])
        mask = np.zeros(sizes.size, bool)
        mask[np.argsort(-sizes, kind="stable")[:number]] = True
        return parted(mask, self.shapes)


def _epoch(name: str, record: EpochRecord) -> Row:
    fields = ("epoch", "stage", "gamma", "train_loss", "test_accuracy")
    return {"name": name} | {field: record[field] for field in fields}


# -- tables --------------------------------------------------------------------------------------


def run_rows(study: Study) -> Iterator[Row]:
    """``inside.csv``."""
    for run in (*study.finished(Pruning), *study.finished(Bottleneck)):
        row = study.read(run.name)[1]["row"]
        extra: Row = {}
        if isinstance(run, Pruning):
            masks = study.masks(run)
            present = int(joined(masks).sum())
            extra = {"weights": joined(masks).size, "present": present} | paths(masks)
        names = dict.fromkeys(f.name for k in (Pruning, Bottleneck) for f in dataclasses.fields(k))
        head = {name: row.pop(name, None) for name in ("name", "kind", *names)}
        head |= dataclasses.asdict(run)
        results = {name: row.pop(name, None) for name in ("dense_accuracy", "test_accuracy")}
        unused = dict.fromkeys(("weights", "present", "units1", "units2", "idle"))
        yield head | results | unused | extra | row


def layer_rows(study: Study) -> Iterator[Row]:
    """``inside-layers.csv``."""
    groups = pixel_groups(study.data)
    for run in study.finished(Pruning):
        for number, epoch in enumerate(json.loads(study.read(run.name)[1]["epochs"])):
            masks = study.masks(run, number)
            present = int(joined(masks).sum())
            by_layer = {name: int(masks[name].sum()) for name in LAYERS}
            by_pixel = {name: int(masks["fc1"][:, group].sum()) for name, group in groups.items()}
            largest = study.largest(run, present)
            sizes = {f"magnitude{k}": int(largest[f"fc{k}"].sum()) for k in (1, 2, 3)}
            yield epoch | {"present": present} | by_layer | by_pixel | sizes


def pixel_rows(study: Study) -> Iterator[Row]:
    """``inside-pixels.csv``."""
    x = study.data.train_x.reshape(len(study.data.train_x), -1).astype(np.float64)
    yield {"what": "mean", "by_pixel": _line(x.mean(axis=0))}
    yield {"what": "deviation", "by_pixel": _line(x.std(axis=0))}
    runs = [run for run in study.finished(Pruning) if run.target == 0.98]
    for run in (run for run in runs if run.order == run.presence):
        yield {"what": run.name, "by_pixel": _line(study.masks(run)["fc1"].sum(axis=0))}
    for run in [run for run in runs if run.begin == "dense0"][:1]:
        present = int(joined(study.masks(run)).sum())
        largest = study.largest(run, present)["fc1"].sum(axis=0)
        yield {"what": f"largest0-{present}", "by_pixel": _line(largest)}


def _line(values: np.ndarray) -> str:
    return " ".join(f"{value:.4g}" for value in values)


def overlap_rows(study: Study) -> Iterator[Row]:
    """``inside-overlap.csv``: the final masks of the prunings to 98 % that begin with the same
    network, two and two, and with its largest weights; of the first run from each network, with
    those of the others; for the seeds of dense network 0 also each epoch."""
    runs = [run for run in study.finished(Pruning) if run.target == 0.98]
    masks = {run.name: study.masks(run) for run in runs}
    begin = {run.name: run for run in runs}
    for run in {run.begin: run for run in runs if run.trained}.values():
        masks[f"largest{run.dense}"] = study.largest(run, int(joined(masks[run.name]).sum()))
        begin[f"largest{run.dense}"] = run
    largest = set(masks) - {run.name for run in runs}
    for a, b in itertools.combinations(masks, 2):
        same = begin[a].begin == begin[b].begin
        if not same and (
            {a, b} & largest or any(begin[n].order or begin[n].presence for n in (a, b))
        ):
            continue
        pixels = [masks[name]["fc1"].sum(axis=0) for name in (a, b)]
        with np.errstate(invalid="ignore", divide="ignore"):
            correlation = float(np.corrcoef(*pixels)[0, 1])
        weights = study.weights(begin[a]) if same else None
        for row in overlap(masks[a], masks[b], weights):
            yield {"a": a, "b": b, "epoch": "last", "pixel_correlation": correlation} | row
    own = [run for run in runs if run.begin == "dense0" and run.order == run.presence]
    for one, other in itertools.combinations(own, 2):
        epochs = len(study.read(one.name)[0]["masks"])
        for epoch in range(epochs):
            a_mask, b_mask = (study.masks(run, epoch) for run in (one, other))
            row = next(overlap(a_mask, b_mask, fit=False))
            number = study.recipe.dense.epochs + epoch + 1
            yield {"a": one.name, "b": other.name, "epoch": number} | row


def bottleneck_rows(study: Study) -> Iterator[Row]:
    """``inside-bottleneck.csv``."""
    for run in study.finished(Bottleneck):
        yield from json.loads(study.read(run.name)[1]["epochs"])


TABLES = {
    "inside": run_rows,
    "inside-layers": layer_rows,
    "inside-pixels": pixel_rows,
    "inside-overlap": overlap_rows,
    "inside-bottleneck": bottleneck_rows,
}


def require_ours(folder: Path) -> None:
    """Raise UserError if there is something in the folder that this study does not write."""
    runs = {*RUNS, *(run.begin for run in RUNS.values() if isinstance(run, Pruning))}
    names = {*(f"{name}.safetensors" for name in runs), *(f"{name}.csv" for name in TABLES)}
    others = foreign(folder, lambda e: e.name in names or is_temporary(e.name, names))
    if others:
        raise UserError(
            f"{folder} holds {others[0]}, which is not of this study: choose another folder with "
            "--out"
        )


def write_tables(study: Study) -> None:
    """Write the tables that have rows."""
    for name, make in TABLES.items():
        write_records(study.folder / f"{name}.csv", list(make(study)), digits=5)


# -- the command line ----------------------------------------------------------------------------


@reporting()
def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; see the module's text."""
    parser = Parser(prog=f"python -m {MODULE}")
    parser.add_argument("action", choices=("run", "tables"))
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of a run: {', '.join(RUNS)}")
    parser.add_argument("--recipe", default="lenet300-mnist")
    parser.add_argument("--data-dir", help="where MNIST lies")
    parser.add_argument("--out", type=Path, required=True, help="a folder, continued if there")
    options = parser.parse_args(arguments)
    names = options.names or list(RUNS)
    for name in names:
        if name not in RUNS:
            raise UserError(f"there is no run {name!r}; the runs are {', '.join(RUNS)}")
    recipe = find(options.recipe).with_fields(SHORT)
    if recipe.model != "lenet300":
        raise UserError(f"this study looks into LeNet-300, not into {recipe.model}")
    require_ours(options.out)
    with locked(options.out):
        require_ours(options.out)  # another process may have written to it in between
        study = Study(options.out, recipe, load(recipe.dataset, options.data_dir))
        if options.action == "tables":
            write_tables(study)
            return
        for name in filter(study.has, names):
            study.read(name)
        for name in tqdm([name for name in names if not study.has(name)], unit="run"):
            words = ["python", "-m", MODULE, "run", name, "--recipe", recipe.name]
            study.do(RUNS[name], f"{shlex.join(words)} --data-dir DIR --out FOLDER")


if __name__ == "__main__":
    main()
