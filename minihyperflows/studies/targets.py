"""Does the pressure scheduler reach its target? Networks x targets x seeds, one row a run.

    python -m minihyperflows.studies.targets --out FILE

Regrowth ends on the target by construction (:func:`minihyperflows.flows.land`), so the number that
says something about the scheduler is the sparsity at the end of the pruning stage, against the one
that the stage aims at. Both are in the table. Chapter 08 shows it. All networks read the digits,
and each is steered in two ways: by the package's scheduler, and in proportion to the error.

The file is the state: a run that has its row is not repeated, so an interrupted study goes on where
it stopped. All runs with the same network and seed begin with the same dense network.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from minihyperflows.analysis import perceptron, small_convnet
from minihyperflows.data.datasets import Dataset, load
from minihyperflows.flows.scheduler import PressureScheduler
from minihyperflows.flows.stages import PRUNING, REGROWTH
from minihyperflows.lab.console import Parser
from minihyperflows.lab.recipes import Recipe, find
from minihyperflows.lab.records import adds_to_table, records_so_far, write_records
from minihyperflows.lab.runs import provenance
from minihyperflows.lab.training import EpochRecord, Trainer, build_network
from minihyperflows.nn import Module
from minihyperflows.studies.command import reporting

TARGETS = (0.8, 0.9, 0.95, 0.98, 0.99)
SEEDS = 4
IDENTITY = ("setting", "target_sparsity", "seed")  # columns
COMMAND = "python -m minihyperflows.studies.targets --settings {} --out FILE"

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

State = tuple[dict[str, np.ndarray], dict[str, Any]]


def new_trainer(setting: Setting, data: Dataset, target: float, seed: int) -> Trainer:
    """A run at its beginning."""
    recipe, rng = setting.recipe.with_target(target), np.random.default_rng(seed)
    trainer = Trainer(setting.build(recipe, data, rng), data, recipe, rng)
    s = trainer.scheduler
    assert s is not None
    trainer.scheduler = setting.scheduler(
        s.target_sparsity, s.epochs, s.step, s.exponent, s.aggressivity
    )
    return trainer


def train_dense(setting: Setting, data: Dataset, seed: int) -> State:
    """The state of a run at the end of its dense stage, which does not depend on the target."""
    trainer = new_trainer(setting, data, TARGETS[0], seed)
    while trainer.epoch < setting.recipe.dense.epochs:
        trainer.run_epoch()
    arrays, values = trainer.state_dict()
    return {name: array.copy() for name, array in arrays.items()}, values


def prune(setting: Setting, data: Dataset, dense: State, target: float, seed: int) -> list[Any]:
    """The records of the pruning and regrowth stages of a run that begins with ``dense``."""
    trainer = new_trainer(setting, data, target, seed)
    trainer.load_state_dict(*dense)
    records = []
    while not trainer.finished:
        records.append(trainer.run_epoch())
    return records


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


def row(
    name: str, recipe: Recipe, target: float, seed: int, records: Sequence[EpochRecord]
) -> dict[str, Any]:
    """A row of the table: settings, results, and where they come from."""
    head = {
        "setting": name,
        "dataset": recipe.dataset,
        "target_sparsity": target,
        "seed": seed,
        "epochs": recipe.pruning.epochs,
        "updates_per_epoch": recipe.pressure.updates_per_epoch,
        "step": recipe.pressure.step,
    }
    source = provenance(recipe.dtype, COMMAND.format(name))
    return head | results(recipe, target, records) | source


# -- the study -----------------------------------------------------------------------------------


@adds_to_table
def run_study(
    out: Path,
    settings: Sequence[str] = tuple(SETTINGS),
    targets: Sequence[float] = TARGETS,
    seeds: int = SEEDS,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Do the runs that have no row in ``out`` yet; returns all rows."""
    rows = records_so_far(out, IDENTITY)
    done = set(map(itemgetter(*IDENTITY), rows))
    wanted = [(n, t, s) for s in range(seeds) for n in settings for t in targets]
    missing = [run for run in dict.fromkeys(wanted) if run not in done]
    data = load("digits")
    dense: dict[tuple[str, int], State] = {}
    for name, target, seed in tqdm(missing, disable=not progress, unit="run"):
        setting = SETTINGS[name]
        if (name, seed) not in dense:
            dense = {(name, seed): train_dense(setting, data, seed)}
        records = prune(setting, data, dense[name, seed], target, seed)
        rows.append(row(name, setting.recipe, target, seed, records))
        write_records(out, rows)
    return rows


@reporting()
def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = Parser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the CSV file, continued if there")
    parser.add_argument("--settings", nargs="+", choices=tuple(SETTINGS), default=tuple(SETTINGS))
    parser.add_argument("--targets", nargs="+", type=float, default=TARGETS)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    options = parser.parse_args(arguments)
    run_study(options.out, options.settings, options.targets, options.seeds)


if __name__ == "__main__":
    main()
