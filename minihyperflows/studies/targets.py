"""Does the pressure scheduler reach its target? Networks x targets x seeds, one row a run.

    minihyperflows study targets --out FILE

Regrowth ends on the target by construction (:func:`minihyperflows.flows.land`), so the number that
says something about the scheduler is the sparsity at the end of the pruning stage, against the one
that the stage aims at. Both are in the table. Chapter 08 shows it. All networks read the digits,
and each is steered in two ways: by the package's scheduler, and in proportion to the error.

All runs with the same network and seed begin with the same dense network.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from minihyperflows import flows
from minihyperflows.analysis import perceptron, small_convnet
from minihyperflows.data.datasets import Dataset
from minihyperflows.flows.scheduler import PressureScheduler
from minihyperflows.flows.stages import PRUNING, REGROWTH
from minihyperflows.lab.recipes import Recipe, find
from minihyperflows.lab.records import Row
from minihyperflows.lab.training import EpochRecord, Trainer, build_network
from minihyperflows.nn import Module
from minihyperflows.studies.frame import Bench, Study, main
from minihyperflows.studies.options import choice, parse_fraction, seeds, values
from minihyperflows.studies.trainers import State, run_until, state_of

TARGETS = (0.8, 0.9, 0.95, 0.98, 0.99)

# What a run of 30 epochs needs to settle: periods of 11 or 12 steps, a t that moves quickly, and a
# trajectory that is nearly flat at its end.
_OFTEN = {
    "pressure.updates_per_epoch": 4,
    "pressure.step": 0.02,
    "pressure.aggressivity": 10.0,
    "presence.lr": 0.01,
}
_SHORT = {"dense.epochs": 10, "pruning.epochs": 30, "regrowth.epochs": 2}


class ProportionalScheduler(PressureScheduler):
    """b <- max(0, b + step ln(D / E(e))): a change in proportion to the relative error.

    The package's controller has steps of a given size and inertia instead; the trajectory E and
    gamma = b ** exponent are the same.
    """

    _b = 0.0

    @property
    def base(self) -> float:
        return self._b

    def update(self, epoch: int, density: float) -> float:
        if epoch < self.epochs:
            error = math.log(density / self.expected(epoch)) if density > 0 else -math.inf
            self._b = max(0.0, self._b + self.step * error)
        return self.gamma

    def state_dict(self) -> dict[str, Any]:
        return {"base": self._b}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._b = float(state["base"])


@dataclasses.dataclass(frozen=True)
class Setting:
    """A network, its data, and how the scheduler steers: everything but target and seed."""

    recipe: Recipe
    build: Callable[[Recipe, Dataset, np.random.Generator], Module]
    scheduler: type[PressureScheduler] = PressureScheduler


def _settings() -> dict[str, Setting]:
    recipe = find("lenet300-digits").with_fields(_SHORT | _OFTEN)
    builders = {"lenet300": build_network, "convnet": small_convnet, "perceptron": perceptron}
    result = {name: Setting(recipe, build) for name, build in builders.items()}
    recipe = recipe.with_fields({"pressure.step": 1.0})
    for name, build in builders.items():
        result[f"{name}-proportional"] = Setting(recipe, build, ProportionalScheduler)
    return result


SETTINGS = _settings()

# -- runs ----------------------------------------------------------------------------------------


def new_trainer(setting: Setting, data: Dataset, target: float, seed: int) -> Trainer:
    """A run at its beginning."""
    recipe, rng = setting.recipe.with_target(target), np.random.default_rng(seed)
    trainer = Trainer(setting.build(recipe, data, rng), data, recipe, rng)
    s = trainer.scheduler
    assert isinstance(s, flows.PressureScheduler)
    trainer.scheduler = setting.scheduler(
        s.target_sparsity, s.epochs, s.step, s.exponent, s.aggressivity
    )
    return trainer


def train_dense(setting: Setting, data: Dataset, seed: int) -> State:
    """The state of a run at the end of its dense stage, which does not depend on the target."""
    trainer = new_trainer(setting, data, TARGETS[0], seed)
    run_until(trainer, setting.recipe.dense.epochs)
    return state_of(trainer)


def prune(setting: Setting, data: Dataset, dense: State, target: float, seed: int) -> list[Any]:
    """The records of the pruning and regrowth stages of a run that begins with ``dense``."""
    trainer = new_trainer(setting, data, target, seed)
    trainer.load_state_dict(*dense)
    return run_until(trainer)


def results(recipe: Recipe, target: float, records: Sequence[EpochRecord]) -> dict[str, Any]:
    """What a run achieved, in fractions; ``error`` is how far the pressure alone missed its aim.

    ``late_error`` is the largest distance to the trajectory at the ends of the last fifth of the
    pruning epochs, a sign of how much of a small ``error`` is luck.
    """
    pruning = [r for r in records if r.stage == PRUNING]
    regrowth = [r for r in records if r.stage == REGROWTH]
    aim = 1 - (1 - recipe.regrowth.share) * (1 - target)
    late = pruning[-max(1, len(pruning) // 5) :]
    return {
        "aim": aim,
        "sparsity_before_regrowth": 1 - pruning[-1].density,
        "error": 1 - pruning[-1].density - aim,
        "late_error": max(abs(r.density - float(r.expected_density or 0)) for r in late),
        "gamma": pruning[-1].gamma,
        "accuracy_before_regrowth": pruning[-1].test_accuracy,
        "sparsity": 1 - regrowth[-1].density,
        "test_accuracy": regrowth[-1].test_accuracy,
        "seconds": sum(r.seconds for r in records),
    }


# -- the study -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Run:
    """What tells a run from all others."""

    setting: str = choice(*SETTINGS, others=("--settings",))
    target_sparsity: float = values(parse_fraction, *TARGETS, others=("--targets",))
    seed: int = seeds(4)


class Targets(Study[Run]):
    """Does the pressure scheduler reach its target? Networks x targets x seeds, one row a run."""

    name, Setting = "targets", Run
    shown = ("error", "late_error", "accuracy_before_regrowth", "test_accuracy")

    def shares(self, s: Run) -> tuple[str, int]:
        return s.setting, s.seed

    def run(self, s: Run, bench: Bench) -> Row:
        setting, data = SETTINGS[s.setting], bench.data("digits")
        dense = bench.shared(
            ("dense", s.setting, s.seed), lambda: train_dense(setting, data, s.seed)
        )
        records = prune(setting, data, dense, s.target_sparsity, s.seed)
        recipe = setting.recipe
        head = {
            "dataset": recipe.dataset,
            "epochs": recipe.pruning.epochs,
            "updates_per_epoch": recipe.pressure.updates_per_epoch,
            "step": recipe.pressure.step,
        }
        return head | results(recipe, s.target_sparsity, records)


STUDY = Targets()

if __name__ == "__main__":
    main(STUDY)
