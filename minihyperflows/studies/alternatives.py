"""Hyperflows and its alternatives at equal sparsity, equal epochs and equal learning rates.

    minihyperflows study alternatives --data-dir DIR --out FILE

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
``--folder`` keeps the dense networks, so that several commands share them, and the final mask of
every run.
"""

from __future__ import annotations

import dataclasses
import io
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from minihyperflows import flows, optim
from minihyperflows import functional as F
from minihyperflows.analysis import planned_sparsity
from minihyperflows.data.datasets import Dataset, normalise
from minihyperflows.engine import Tensor
from minihyperflows.errors import UserError
from minihyperflows.flows.gates import gated_layers, is_present
from minihyperflows.flows.scheduler import cosine
from minihyperflows.flows.stages import PRUNING
from minihyperflows.lab.checkpoint import write_atomically
from minihyperflows.lab.recipes import Recipe, find
from minihyperflows.lab.records import Row
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
from minihyperflows.studies.frame import Bench, Study, main
from minihyperflows.studies.options import choice, one, seeds, values

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
    error = 1 - pressed[-1].density - trainer.recipe.aim
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


# -- the study -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Run:
    """What tells a run from all others."""

    recipe: str = choice(*RECIPES, default=["lenet300-mnist"])
    method: str = choice(*METHODS, others=("--methods",))
    target_sparsity: float = values(float, *SPARSITIES, others=("--sparsities",))
    folder: Any = one(Path, identity=False, help="for the dense networks and the masks")
    seed: int = seeds(3)


class Alternatives(Study[Run]):
    """Hyperflows and other methods of pruning at equal sparsity, epochs and learning rates."""

    name, Setting = "alternatives", Run
    shown = ("test_accuracy", "train_loss")

    def plan(self, chosen: dict[str, tuple[Any, ...]]) -> Iterable[Run]:
        for run in super().plan(chosen):
            whole = run.method == DENSE_CONTROL
            yield dataclasses.replace(run, target_sparsity=0.0) if whole else run

    def shares(self, s: Run) -> tuple[str, int]:
        return s.recipe, s.seed

    def dataset(self, s: Run) -> str:
        return RECIPES[s.recipe].dataset

    def check(self, s: Run, bench: Bench) -> None:
        if s.method != DENSE_CONTROL:
            RECIPES[s.recipe].with_target(s.target_sparsity)  # complains of what is no sparsity
        bench.data(self.dataset(s))

    def command(self, s: Run, device: str = "cpu") -> str:
        return super().command(dataclasses.replace(s, folder=None), device)

    def run(self, s: Run, bench: Bench) -> Row:
        recipe, data = RECIPES[s.recipe], bench.data(self.dataset(s))
        dense, accuracy = bench.shared(
            ("dense", s.recipe, s.seed), lambda: dense_network(recipe, data, s.seed, s.folder)
        )
        started = time.perf_counter()
        outcome = run(s.method, recipe, data, dense, s.target_sparsity, s.seed)
        result = row(s.method, recipe, data, outcome, s.target_sparsity, s.seed)
        if s.folder is not None:
            packed = {name: np.packbits(mask) for name, mask in outcome.present.items()}
            name = f"{s.recipe}-{s.method}-{s.target_sparsity:g}-{s.seed}.npz"
            save_arrays(s.folder / name, packed)
        return result | {"dense_accuracy": accuracy, "seconds": time.perf_counter() - started}

    def order(self, row: Row) -> Any:
        return row["target_sparsity"], row["method"], row["seed"]


def dense_network(
    recipe: Recipe, data: Dataset, seed: int, folder: Path | None
) -> tuple[Weights, float]:
    """The weights of a seed's dense network, from ``folder`` if they are there, and its accuracy.

    Raises:
        UserError: the file in the folder is damaged, or of another network.
    """
    net, _ = fresh(recipe, data, seed)
    file = folder / f"{recipe.name}-dense-{seed}.npz" if folder else None
    if file is not None and file.exists():
        try:
            with np.load(file, allow_pickle=False) as arrays:
                net.load_state_dict(dict(arrays))
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{file} is not a dense network ({reason}): remove it") from error
    else:
        net.load_state_dict(train_dense(recipe, data, seed))
        if file is not None:
            save_arrays(file, net.state_dict())
    return net.state_dict(), evaluate(net, data)


def save_arrays(file: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write an npz file, all of it or nothing."""
    content = io.BytesIO()
    np.savez_compressed(content, allow_pickle=False, **arrays)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, content.getvalue())


STUDY = Alternatives()

if __name__ == "__main__":
    main(STUDY, listed=True)
