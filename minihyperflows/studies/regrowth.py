"""Who comes back when the pressure ends? LeNet-300 pruned in several ways, then left alone.

    minihyperflows study regrowth --data-dir DIR --out FILE

After the authors' ablations of regrowth (chapter 09): SGD with momentum on the weights, so that the
learning rate times the weight decay shrinks a removed weight, and Adam on t. All variants of a seed
begin with the same dense network; all learning rates of t for one variant begin at the same end of
its pruning stage. Nothing lands: regrowth ends where it ends.

Three tables. FILE has a row for each run; FILE-epochs one for each epoch (a variant's pruning
epochs, which its runs share, have an empty ``scale``); FILE-ages the weights that were absent when
the pruning ended, by how many epochs ago they were removed last.

Columns of FILE-ages: ``count``; ``returned`` and ``present``, the fractions that came back at least
once and that were there at the end; ``depth``, the mean of -t; ``weight`` and ``weight_removed``,
the mean of |w| at the end of pruning and when they were removed; ``closed_form``, what the first
should be by the second (:func:`decayed`), and ``without_velocity``, the same for weights removed
at rest: the mean of |w| exp(-sum of lr decay / (1 - momentum)); ``flux``, the mean of |flux| over
the training set, at a fixed network. (A row's ages, but for the first three, are those of the
pruning stage and so the same for all its scales.)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from minihyperflows import flows
from minihyperflows.analysis import decayed, supports, travel
from minihyperflows.analysis.summaries import means
from minihyperflows.data.datasets import Dataset
from minihyperflows.flows.gates import gated_layers, is_present
from minihyperflows.lab.recipes import Recipe, find
from minihyperflows.lab.records import Row
from minihyperflows.lab.training import EpochRecord, Trainer, build_network
from minihyperflows.nn import Parameter
from minihyperflows.studies.frame import Bench, Study, Tables, main
from minihyperflows.studies.options import choice, seeds
from minihyperflows.studies.trainers import State, run_until, state_of

SCALE = 10.0  # of the learning rate of t in regrowth, where it is not what varies
SCALES = (1.0, 3.0, 10.0, 20.0, 50.0)
NEVER = -1  # the step in which a weight left that has not left

# The learning rates of the weights are five times the authors', except the very high one (theirs
# times five is 0.5, at which this network, without batch norm, does not train). Their pruning stage
# has 39,100 steps and this one 7,035: what shrinks a removed weight is the rate times the number
# of steps. t moves 6.8 downwards here and 39 there, so their scale 10 is about 1.7 here.
_COMMON = {
    "dense.epochs": 5,
    "dense.optimizer": "sgd",
    "dense.lr": 0.05,
    "dense.end_lr": 0.0005,
    "dense.schedule": "cosine",
    "dense.weight_decay": 5e-4,
    "pruning.epochs": 15,
    "pruning.optimizer": "sgd",
    "pruning.lr": 0.05,
    "pruning.end_lr": 0.005,
    "pruning.schedule": "cosine",
    "pruning.weight_decay": 5e-4,
    "pressure.updates_per_epoch": 4,
    "pressure.step": 0.1,
    "regrowth.epochs": 8,
    "regrowth.lr": 5e-4,
    "regrowth.schedule": "constant",
    "regrowth.land": False,
    "regrowth.lr_scale": SCALE,
    "regrowth.lr_decay": 0.75,
    "target_sparsity": 0.99,
}
_LOW = {"pruning.schedule": "constant", "pruning.lr": 5e-4}
_HIGH = {"pruning.schedule": "constant", "regrowth.lr": 0.05}

# What each variant changes; the names are learning rates of the weights, before -> after.
VARIANTS: dict[str, dict[str, Any]] = {
    "high to low": {},
    "high to low, no decay": {"pruning.weight_decay": 0.0},
    "very high to low": {"pruning.lr": 0.2},
    "low": _LOW,
    "high": _HIGH,
    "high to low, floor": {"pressure.floor": -0.3},
}
# The digits have 45 batches of 32 an epoch, a tenth of MNIST's: so t moves five times as fast, and
# the weight decay is ten times as strong.
_DATASETS: dict[str, dict[str, Any]] = {
    "mnist": {},
    "digits": {"presence.lr": 5e-3, "pruning.weight_decay": 5e-3},
}


def recipe(variant: str, scale: float = SCALE, dataset: str = "mnist") -> Recipe:
    """The run of a variant whose t learns ``scale`` times as fast in regrowth as before."""
    changes = _COMMON | _DATASETS[dataset] | VARIANTS[variant] | {"regrowth.lr_scale": scale}
    return find(f"lenet300-{dataset}").with_fields(changes)


def scales(variant: str) -> tuple[float, ...]:
    """The learning rates of t in regrowth to try after the pruning of this variant."""
    return SCALES if variant == "high to low" else (SCALE,)


class RemovalTrainer(Trainer):
    """A trainer that remembers of each weight when it left last, and how it was then.

    It begins with the first step of t after it was made (or loaded its state).

    Attributes:
        rates: the learning rate of the weights in every step since.
        removed_after: (N,) the step, counted from 1; NEVER for a weight that has not left.
        weight, velocity: (N,) when it left (the velocity is that of SGD).
        returned: (N,) whether it came back at least once.
    """

    removed_after: np.ndarray | None = None

    def step(self) -> None:
        if self.presence_optimizer and self.removed_after is None:
            self._begin()
        super().step()
        if self.removed_after is not None:
            self._observe(self.removed_after)

    def _begin(self) -> None:
        self.rates: list[float] = []
        self._was = is_present(self.presence())
        self.removed_after = np.full(self._was.size, NEVER)
        self.weight, self.velocity = np.zeros((2, self._was.size))
        self.returned = np.zeros(self._was.size, bool)

    def _observe(self, removed_after: np.ndarray) -> None:
        self.rates.append(self.weight_optimizer.lr)
        present = is_present(self.presence())
        changed = np.flatnonzero(present != self._was)
        self._was = present
        self.returned[changed[present[changed]]] = True
        left = changed[~present[changed]]
        removed_after[left] = len(self.rates)
        layers = gated_layers(self.net).values()
        self.weight[left] = _at(left, [layer.weight.data for layer in layers])
        self.velocity[left] = _at(left, [self._velocity(layer.weight) for layer in layers])

    def presence(self) -> np.ndarray:
        """(N,) all t, layer after layer."""
        return _flat([t.data for t in flows.presences(self.net).values()])

    def weights(self) -> np.ndarray:
        """(N,) all gated weights, present or not."""
        return _flat([layer.weight.data for layer in gated_layers(self.net).values()])

    def _velocity(self, weight: Parameter) -> np.ndarray:
        optimizer = self.weight_optimizer
        number = next(i for i, p in enumerate(optimizer.params) if p is weight)
        return optimizer.state[number]["velocity"]


def _flat(arrays: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.ravel(a) for a in arrays])


def _at(places: np.ndarray, arrays: Sequence[np.ndarray]) -> np.ndarray:
    """``_flat(arrays)[places]`` for ascending places."""
    ends = np.cumsum([a.size for a in arrays])
    parts = np.split(places, np.searchsorted(places, ends))
    pairs = zip(arrays, parts, ends, strict=False)  # beyond the last end there are none
    return np.concatenate([np.ravel(a)[part - (end - a.size)] for a, part, end in pairs])


# -- one variant ---------------------------------------------------------------------------------


def new_trainer(settings: Recipe, data: Dataset, seed: int) -> RemovalTrainer:
    """A run at its beginning."""
    rng = np.random.default_rng(seed)
    return RemovalTrainer(build_network(settings, data, rng), data, settings, rng)


def train_dense(
    dataset: str, data: Dataset, seed: int, observe: Callable[[], Any] = lambda: None
) -> tuple[State, float]:
    """The dense network of a seed, which all variants begin with, and its test accuracy."""
    trainer = new_trainer(recipe("low", dataset=dataset), data, seed)
    records = run_until(trainer, trainer.recipe.dense.epochs, observe)
    return state_of(trainer), records[-1].test_accuracy


class Pruned:
    """A variant at the end of its pruning stage, and what it did until then.

    Attributes:
        absent: (N,) which weights are not there.
        age: (N,) how many epochs ago each was removed, in whole epochs; for absent weights.
        depth: (N,) minus t.
        flux: (N,) over the training set, at the network as it is; 0 for present weights.
        closed_form, without_velocity: (N,) what should have become of a removed weight.
    """

    def __init__(
        self,
        variant: str,
        dataset: str,
        data: Dataset,
        dense: State,
        seed: int,
        observe: Callable[[], Any] = lambda: None,
    ) -> None:
        self.settings = recipe(variant, dataset=dataset)
        trainer = new_trainer(self.settings, data, seed)
        trainer.load_state_dict(*dense)
        before = self.settings.dense.epochs + self.settings.pruning.epochs
        self.records = run_until(trainer, before, observe)
        self.state = state_of(trainer)
        self.steps = -(-len(data.train_y) // self.settings.batch_size)  # an epoch
        self._describe(trainer, data, seed)

    def _describe(self, trainer: RemovalTrainer, data: Dataset, seed: int) -> None:
        after, training = trainer.removed_after, self.settings.pruning
        assert after is not None
        self.depth = -trainer.presence()
        self.absent = self.depth > 0
        self.age = (len(trainer.rates) - after) // self.steps
        self.weight, self.weight_removed = trainer.weights(), trainer.weight
        hyper = training.weight_decay, training.momentum
        self.closed_form = decayed(trainer.weight, trainer.velocity, after, trainer.rates, *hyper)
        sums = np.append(np.cumsum(trainer.rates[::-1])[::-1], 0.0)[after]
        self.without_velocity = trainer.weight * np.exp(-sums * hyper[0] / (1 - hyper[1]))
        self.flux = np.zeros(self.absent.size)
        rng = np.random.default_rng(seed)  # draws nothing: no present weight is sampled
        found = supports(trainer.net, data, training.label_smoothing, rng, sample=0)
        self.flux[self.absent] = -found.values


def regrow(
    pruned: Pruned,
    scale: float,
    data: Dataset,
    seed: int,
    observe: Callable[[], Any] = lambda: None,
) -> tuple[list[EpochRecord], RemovalTrainer]:
    """The regrowth stage with another learning rate of t: its records, and the network after it."""
    settings = pruned.settings.with_fields({"regrowth.lr_scale": scale})
    trainer = new_trainer(settings, data, seed)
    trainer.load_state_dict(*pruned.state)
    return run_until(trainer, settings.timeline.epochs, observe), trainer


# -- rows ----------------------------------------------------------------------------------------


def run_row(
    pruned: Pruned, dense_accuracy: float, records: Sequence[EpochRecord], after: RemovalTrainer
) -> Row:
    """What a run did, in fractions.

    ``travel`` is (:func:`travel`) of its regrowth stage; of the absent weights, ``reachable`` is
    the share no deeper than that, ``returned`` and ``present`` as in FILE-ages; ``from_beyond`` is
    the share of the returned that were deeper, ``kept`` that of the weights present before the
    stage that are there after it.
    """
    r, n = after.recipe.regrowth, after.density_before_regrowth
    there = is_present(after.presence())
    far = travel(after.recipe.presence.lr, pruned.steps, r.lr_scale, r.lr_decay, r.epochs)
    absent, returned = pruned.absent, pruned.absent & after.returned
    middle = records[len(records) // 2 - 1]
    return {
        "scale": r.lr_scale,
        "weights": absent.size,
        "gamma": pruned.records[-1].gamma,
        "density_before": n,
        "density_after": after.density,
        "ratio": after.density / n,
        "dense_accuracy": dense_accuracy,
        "accuracy_first": pruned.records[0].test_accuracy,
        "accuracy_before": pruned.records[-1].test_accuracy,
        "accuracy_regrowth_1": records[0].test_accuracy,
        "accuracy_regrowth_middle": middle.test_accuracy,
        "accuracy_after": records[-1].test_accuracy,
        "travel": far,
        "deepest": float(pruned.depth.max()),
        "reachable": float((pruned.depth[absent] <= far).mean()),
        "returned": float(returned.sum() / absent.sum()),
        "present": float(there[absent].mean()),
        "from_beyond": float((pruned.depth[returned] > far).mean()) if returned.any() else 0.0,
        "kept": float(there[~absent].mean()),
        "seconds": sum(record.seconds for record in (*pruned.records, *records)),
    }


def epoch_rows(records: Sequence[EpochRecord], first: int) -> list[Row]:
    """The epochs of a stage, numbered on from ``first``."""
    rows = []
    for epoch, record in enumerate(records, start=first):
        regrown = sum(layer.regrowths for layer in record.layers.values())
        rows.append(
            {
                "epoch": epoch,
                "stage": record.stage,
                "gamma": record.gamma,
                "lr_weights": record.lr_weights,
                "lr_presence": record.lr_presence,
                "density": record.density,
                "test_accuracy": record.test_accuracy,
                "train_loss": record.train_loss,
                "regrown": regrown,
                "removed": record.flips - regrown,
            }
        )
    return rows


def age_rows(pruned: Pruned, after: RemovalTrainer) -> list[Row]:
    """The absent weights by age; see the top of this module."""
    there, rows = is_present(after.presence()), []
    for age in np.unique(pruned.age[pruned.absent]):
        group = pruned.absent & (pruned.age == age)

        def mean(values: np.ndarray, group: np.ndarray = group) -> float:
            return float(abs(values[group]).mean(dtype=np.float64))

        rows.append(
            {
                "scale": after.recipe.regrowth.lr_scale,
                "age": int(age),
                "count": int(group.sum()),
                "returned": mean(after.returned),
                "present": mean(there),
                "depth": mean(pruned.depth),
                "weight": mean(pruned.weight),
                "weight_removed": mean(pruned.weight_removed),
                "closed_form": mean(pruned.closed_form),
                "without_velocity": mean(pruned.without_velocity),
                "flux": mean(pruned.flux),
            }
        )
    return rows


def measure(
    dense: tuple[State, float],
    variant: str,
    dataset: str,
    data: Dataset,
    seed: int,
    observe: Callable[[], Any] = lambda: None,
) -> Tables:
    """Prune one way and regrow at every scale: new rows of the epochs, the ages and the runs."""
    key = {"dataset": dataset, "variant": variant, "seed": seed}
    pruned = Pruned(variant, dataset, data, dense[0], seed, observe)
    epochs = [key | {"scale": ""} | row for row in epoch_rows(pruned.records, 1)]
    runs, ages = [], []
    for scale in scales(variant):
        records, after = regrow(pruned, scale, data, seed, observe)
        first = len(pruned.records) + 1
        epochs += [key | {"scale": scale} | row for row in epoch_rows(records, first)]
        ages += [key | row for row in age_rows(pruned, after)]
        runs.append(key | run_row(pruned, dense[1], records, after))
    return [epochs, ages, runs]


# -- the study -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Run:
    """A variant of a seed, at all its scales."""

    dataset: str = choice(*_DATASETS, default=["mnist"])
    variant: str = choice(*VARIANTS, others=("--variants",))
    seed: int = seeds(3)


class Regrowth(Study[Run]):
    """Who comes back when the pressure ends? LeNet-300 pruned in several ways, then left alone."""

    name, Setting, parts = "regrowth", Run, ("epochs", "ages")

    def shares(self, s: Run) -> tuple[str, int]:
        return s.dataset, s.seed

    def dataset(self, s: Run) -> str:
        return s.dataset

    def check(self, s: Run, bench: Bench) -> None:
        bench.data(s.dataset)

    def run(self, s: Run, bench: Bench) -> Tables:
        data = bench.data(s.dataset)
        dense = bench.shared(
            ("dense", s.dataset, s.seed), lambda: train_dense(s.dataset, data, s.seed, bench.tick)
        )
        return measure(dense, s.variant, s.dataset, data, s.seed, bench.tick)

    def order(self, row: Row) -> Any:
        return (
            row["dataset"],
            list(VARIANTS).index(row["variant"]),
            row["seed"],
            row["scale"] or 0.0,
        )

    def report(self, rows: Sequence[Row]) -> str:
        shown = ("density_before", "ratio", "returned", "accuracy_before", "accuracy_after")
        return means(rows, ("dataset", "variant", "scale"), shown)


STUDY = Regrowth()

if __name__ == "__main__":
    main(STUDY, listed=True)
