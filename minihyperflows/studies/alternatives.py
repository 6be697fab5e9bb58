"""Hyperflows and its alternatives at equal sparsity, equal epochs and equal learning rates.

    python -m minihyperflows.studies.alternatives --data-dir DIR --out FILE

trains LeNet-300 on MNIST. For each seed there is one dense network (5 epochs). Every method starts
from a copy of it and has 10 epochs more, with a new Adam whose learning rate falls along the same
cosine, ``START_LR`` to ``END_LR``. The methods that remove weights little by little do so in the
first 8 epochs. RigL has no use for a dense network: it trains sparse for all 15 epochs, from the
initial weights of the same seed. Nothing is selected: the accuracy is that on the test set after
the last epoch.

    random, magnitude    prune once, train for 10 epochs
    iterative            8 rounds, one at the end of each epoch, then 2 epochs
    gradual, movement    the cubic schedule for 8 epochs, then 2 epochs
    hyperflows           8 epochs under pressure, 2 of regrowth, landing on the target
    rigl                 15 epochs, rewired in the first three quarters
    dense                no pruning: the same 10 epochs with all weights
    gradual-planned, movement-planned
                         as gradual and movement, at the pace of Hyperflows: the density follows the
                         trajectory of the pressure scheduler in place of the cubic schedule

The methods are those of :mod:`minihyperflows.related.pruners` with its defaults. Hyperflows is the
recipe ``lenet300-mnist``, whose 40 epochs under pressure have become 8. So it is steered five times
an epoch, and t and the pressure move as in ``lenet300-digits``, a recipe with as many batches under
pressure as these 8 epochs have (3600 and 3752).

A row for each run: ``sparsity`` (reached, exact), ``test_accuracy``, ``train_loss`` (mean
cross-entropy over the last epoch, with label smoothing), ``density_LAYER``, ``dense_accuracy``
(of the network it started from; for RigL that of its seed), ``steering_error`` and ``landed_by``
(Hyperflows: by how much the pressure alone missed its aim, and how many weights the landing moved).
The file is the state: a run that has its row is not repeated. ``--folder`` keeps the dense
networks, so that several processes share them, and the final mask of every run. ``--join FILE...``
takes over the runs of other files, and does none.
"""

from __future__ import annotations

import dataclasses
import io
import time
from collections.abc import Callable, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from tqdm import tqdm

from minihyperflows import flows, optim
from minihyperflows import functional as F
from minihyperflows.analysis import planned_sparsity
from minihyperflows.data.datasets import Dataset, load, normalise
from minihyperflows.engine import Tensor
from minihyperflows.errors import UserError
from minihyperflows.flows.gates import gated_layers, is_present
from minihyperflows.flows.scheduler import cosine
from minihyperflows.flows.stages import PRUNING
from minihyperflows.lab.checkpoint import write_atomically
from minihyperflows.lab.console import Parser
from minihyperflows.lab.recipes import Recipe, find
from minihyperflows.lab.records import adds_to_table, join_records, records_so_far, write_records
from minihyperflows.lab.runs import provenance
from minihyperflows.lab.training import Trainer, build_network, evaluate
from minihyperflows.nn import Module
from minihyperflows.nn.counting import kept_weights
from minihyperflows.related.pruners import (
    Gradual,
    Iterative,
    Magnitude,
    Movement,
    Pruner,
    Random,
    RigL,
)
from minihyperflows.studies.command import parse_seed, reporting

MODULE = "minihyperflows.studies.alternatives"
SPARSITIES = (0.9, 0.95, 0.98, 0.99, 0.995)
START_LR, END_LR = 1e-3, 1e-5
HYPERFLOWS, DENSE_CONTROL, RIGL = "hyperflows", "dense", "rigl"


class PlannedGradual(Gradual):
    """Gradual magnitude pruning at the pace of Hyperflows."""

    def schedule(self, progress: float) -> float:
        return planned_sparsity(progress, self.sparsity)


class PlannedMovement(Movement):
    """Movement pruning at the pace of Hyperflows."""

    def schedule(self, progress: float) -> float:
        return planned_sparsity(progress, self.sparsity)


PRUNERS: dict[str, Callable[[float], Pruner]] = {
    "random": Random,
    "magnitude": Magnitude,
    "iterative": Iterative,
    "gradual": Gradual,
    "movement": Movement,
    RIGL: RigL,
    "gradual-planned": PlannedGradual,
    "movement-planned": PlannedMovement,
}
METHODS = (HYPERFLOWS, *PRUNERS, DENSE_CONTROL)

# 5 + 8 + 2 epochs of MNIST's 469 batches; on the digits twice as many, of 45.
_CHANGES: dict[str, dict[str, Any]] = {
    "lenet300-mnist": {
        **{"dense.epochs": 5, "pruning.epochs": 8, "regrowth.epochs": 2},
        **{"pressure.updates_per_epoch": 5, "pressure.step": 0.1, "presence.lr": 3e-3},
    },
    "lenet300-digits": {
        **{"dense.epochs": 10, "pruning.epochs": 16, "regrowth.epochs": 4},
        "pressure.updates_per_epoch": 5,
    },
}
RECIPES = {name: find(name).with_fields(fields) for name, fields in _CHANGES.items()}

Row: TypeAlias = dict[str, Any]
Weights: TypeAlias = dict[str, np.ndarray]


# -- the budget ----------------------------------------------------------------------------------


def learning_rate(recipe: Recipe, epoch: int) -> float:
    """Of the weights in ``epoch`` (from 1) of the whole training, whatever the method."""
    after = epoch - recipe.dense.epochs
    if after <= 0:
        return recipe.dense.lr_at(epoch)
    return cosine(START_LR, END_LR, (after - 1) / pruned_epochs(recipe))


def pruned_epochs(recipe: Recipe) -> int:
    """How many epochs a method has after the dense stage."""
    return recipe.pruning.epochs + recipe.regrowth.epochs


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A trained network: its mean loss in the last epoch, and who is present, by layer."""

    net: Module
    train_loss: float
    present: dict[str, np.ndarray]
    steering: Row = dataclasses.field(default_factory=dict)


def fit(
    net: Module,
    data: Dataset,
    recipe: Recipe,
    rng: np.random.Generator,
    first: int,
    last: int,
    pruner: Pruner,
) -> Outcome:
    """Train ``net`` with ``pruner`` from epoch ``first`` to epoch ``last`` of the budget."""
    images = normalise(data.train_x, data, np.dtype(recipe.dtype))
    count, size = len(data.train_y), recipe.batch_size
    optimizer = optim.Adam(net.parameters(), START_LR)
    steps, step, total = (last - first + 1) * -(-count // size), 0, 0.0
    pruner.start(net, optimizer, steps, rng)
    for epoch in range(first, last + 1):
        stage = recipe.dense if epoch <= recipe.dense.epochs else recipe.pruning
        optimizer.lr, total = learning_rate(recipe, epoch), 0.0
        order = rng.permutation(count)
        for batch in (order[start : start + size] for start in range(0, count, size)):
            net.zero_grad()
            loss = F.cross_entropy(
                net(Tensor(images[batch])), data.train_y[batch], stage.label_smoothing
            )
            loss.backward()
            optimizer.step()
            step += 1
            pruner.after_step(step)
            total += loss.item() * len(batch)
    present = {name: mask.present for name, mask in pruner.masks.items()}
    pruner.finish()
    return Outcome(net, total / count, present)


# -- the methods ---------------------------------------------------------------------------------


def fresh(recipe: Recipe, data: Dataset, seed: int) -> tuple[Module, np.random.Generator]:
    """The network of a seed with its initial weights."""
    rng = np.random.default_rng(seed)
    return build_network(recipe, data, rng), rng


def train_dense(recipe: Recipe, data: Dataset, seed: int) -> Weights:
    """The weights of a seed's dense network, which all methods but RigL start from."""
    net, rng = fresh(recipe, data, seed)
    return fit(net, data, recipe, rng, 1, recipe.dense.epochs, Pruner(0.0)).net.state_dict()


def run(
    method: str, recipe: Recipe, data: Dataset, dense: Weights, sparsity: float, seed: int
) -> Outcome:
    """One method at one sparsity, from the dense network of its seed."""
    net, _ = fresh(recipe, data, seed)
    rng = np.random.default_rng([seed, 1])
    last = recipe.dense.epochs + pruned_epochs(recipe)
    if method == RIGL:
        return fit(net, data, recipe, rng, 1, last, RigL(sparsity))
    net.load_state_dict(dense)
    if method == HYPERFLOWS:
        return run_hyperflows(net, data, recipe.with_target(sparsity), rng)
    pruner = Pruner(0.0) if method == DENSE_CONTROL else PRUNERS[method](sparsity)
    return fit(net, data, recipe, rng, recipe.dense.epochs + 1, last, pruner)


class EqualRates(Trainer):
    """Hyperflows from a dense network, its weights learning at the rates of the other methods."""

    budget: Recipe

    def learning_rates(self) -> tuple[float, float]:
        _, presence = super().learning_rates()
        rate = learning_rate(self.budget, self.budget.dense.epochs + self.epoch + 1)
        self.weight_optimizer.lr = rate
        return rate, presence


def run_hyperflows(net: Module, data: Dataset, recipe: Recipe, rng: np.random.Generator) -> Outcome:
    """The pruning and regrowth stages of ``recipe`` on a trained network."""
    trainer = EqualRates(net, data, recipe.with_fields({"dense.epochs": 0}), rng)
    trainer.budget = recipe
    records = []
    while not trainer.finished:
        records.append(trainer.run_epoch())
    present = {name: is_present(m.presence.data) for name, m in gated_layers(net).items()}
    flows.to_dense(net)
    pressed = [record for record in records if record.stage == PRUNING]
    assert trainer.scheduler is not None
    error = 1 - pressed[-1].density - trainer.scheduler.target_sparsity
    steering = {"steering_error": error, "landed_by": trainer.landed_by}
    return Outcome(net, records[-1].train_loss, present, steering)


def row(
    method: str, recipe: Recipe, data: Dataset, outcome: Outcome, sparsity: float, seed: int
) -> Row:
    """A row of the table, without what is known of the dense network."""
    total = sum(mask.size for mask in outcome.present.values())
    kept = sum(int(mask.sum()) for mask in outcome.present.values())
    wanted = kept_weights(1 - sparsity, total)
    if kept != wanted:
        raise RuntimeError(f"{method} left {kept} weights where {wanted} were asked for")
    densities = {f"density_{k}": float(mask.mean()) for k, mask in outcome.present.items()}
    dense_epochs, epochs = recipe.dense.epochs, pruned_epochs(recipe)
    if method == RIGL:
        dense_epochs, epochs = 0, dense_epochs + epochs
    return {
        **{"method": method, "recipe": recipe.name, "dataset": data.name, "seed": seed},
        **{"target_sparsity": sparsity, "sparsity": 1 - kept / total, "kept": kept},
        **{"dense_epochs": dense_epochs, "epochs": epochs},
        **{"test_accuracy": evaluate(outcome.net, data), "train_loss": outcome.train_loss},
        **densities,
        **{"steering_error": "", "landed_by": ""},
        **outcome.steering,
    }


@adds_to_table
def join(files: Sequence[Path], out: Path) -> list[Row]:
    """Add the rows of all files to ``out``, by sparsity, method and seed, each run once."""
    rows = join_records(out, files, _identity, IDENTITY)
    rows.sort(key=lambda r: (r["target_sparsity"], r["method"], r["seed"]))
    if not rows:
        raise UserError("these files hold no run")
    write_records(out, rows)
    return rows


# -- the study -----------------------------------------------------------------------------------


class Networks:
    """The dense networks by seed, in memory and, if there is a folder, in files of it."""

    def __init__(self, recipe: Recipe, data: Dataset, folder: Path | None) -> None:
        self.recipe, self.data, self.folder = recipe, data, folder
        self._found: dict[int, tuple[Weights, float]] = {}

    def __getitem__(self, seed: int) -> tuple[Weights, float]:
        """The weights and the test accuracy."""
        if seed not in self._found:
            weights = self._load(seed)
            net, _ = fresh(self.recipe, self.data, seed)
            net.load_state_dict(weights)
            self._found = {seed: (weights, evaluate(net, self.data))}
        return self._found[seed]

    def _load(self, seed: int) -> Weights:
        if self.folder is None:
            return train_dense(self.recipe, self.data, seed)
        file = self.folder / f"{self.recipe.name}-dense-{seed}.npz"
        if not file.exists():
            save_arrays(file, train_dense(self.recipe, self.data, seed))
        with np.load(file) as arrays:
            return dict(arrays)


def save_arrays(file: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write an npz file, all of it or nothing."""
    content = io.BytesIO()
    np.savez_compressed(content, allow_pickle=False, **arrays)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, content.getvalue())


@adds_to_table
def run_study(
    out: Path,
    recipe: Recipe,
    data: Dataset,
    methods: Sequence[str] = METHODS,
    sparsities: Sequence[float] = SPARSITIES,
    seeds: Sequence[int] = (0, 1, 2),
    folder: Path | None = None,
    progress: bool = True,
) -> list[Row]:
    """Do the runs that have no row in ``out`` yet; returns all rows."""
    rows = records_so_far(out, IDENTITY)
    done = {_identity(r) for r in rows}
    wanted = [
        (method, sparsity, seed)
        for seed in seeds
        for method in methods
        for sparsity in ((0.0,) if method == DENSE_CONTROL else sparsities)
    ]
    missing = [run for run in dict.fromkeys(wanted) if (recipe.name, *run) not in done]
    networks = Networks(recipe, data, folder)
    for method, sparsity, seed in tqdm(missing, disable=not progress, unit="run"):
        dense, accuracy = networks[seed]
        started = time.perf_counter()
        outcome = run(method, recipe, data, dense, sparsity, seed)
        result = row(method, recipe, data, outcome, sparsity, seed)
        result |= {"dense_accuracy": accuracy, "seconds": time.perf_counter() - started}
        rows.append(result | source(recipe, method, sparsity, seed))
        write_records(out, rows)
        if folder is not None:
            packed = {name: np.packbits(mask) for name, mask in outcome.present.items()}
            save_arrays(folder / f"{recipe.name}-{method}-{sparsity:g}-{seed}.npz", packed)
    return rows


IDENTITY = ("recipe", "method", "target_sparsity", "seed")  # columns
_identity = itemgetter(*IDENTITY)


def source(recipe: Recipe, method: str, sparsity: float, seed: int) -> Row:
    """Where a row comes from; the command repeats it."""
    place = "--data-dir DIR " if recipe.dataset != "digits" else ""
    command = (
        f"python -m {MODULE} --recipe {recipe.name} --methods {method} --sparsities {sparsity:g} "
        f"--seeds {seed} {place}--out FILE"
    )
    return provenance(recipe.dtype, command)


@reporting()
def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = Parser(prog=f"python -m {MODULE}", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--recipe", choices=tuple(RECIPES), default="lenet300-mnist")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--sparsities", nargs="+", type=float, default=SPARSITIES)
    parser.add_argument("--seeds", nargs="+", type=parse_seed, default=(0, 1, 2))
    parser.add_argument("--data-dir", help="where MNIST lies")
    parser.add_argument("--folder", type=Path, help="for the dense networks and the masks")
    parser.add_argument("--join", nargs="+", type=Path, default=(), help="only take their runs")
    parser.add_argument("--out", type=Path, required=True, help="the CSV file, continued if there")
    options = parser.parse_args(arguments)
    if options.join:
        join(options.join, options.out)
        return
    recipe = RECIPES[options.recipe]
    targets = [s for s in options.sparsities if options.methods != [DENSE_CONTROL]]
    for sparsity in targets:
        recipe.with_target(sparsity)  # complains of what is no sparsity
    data = load(recipe.dataset, options.data_dir)
    choice = options.methods, targets, options.seeds
    run_study(options.out, recipe, data, *choice, options.folder)


if __name__ == "__main__":
    main()
