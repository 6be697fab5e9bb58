"""Where flux and pressure balance: constant pressures, and the support of every weight at the end.

The support of a weight is minus the flux it has while it is *removed*, averaged over the training
set at fixed topology: s = -kappa w dL/dw' at w' = 0. The pressure gamma / N outweighs it or not
(chapter 07). The study trains a network under each constant pressure, follows density and flips,
and then measures s for all removed weights and, removing them one at a time, for a sample of the
present ones. ::

    minihyperflows study equilibrium --recipe lenet300-digits-gamma \
        --gamma 0,2^-6:2^6:2 --seeds 2 --out chapters/results/equilibrium.csv

writes a row for each run to that file, the epochs of the runs to ``equilibrium-epochs.csv`` and the
distributions of s to ``equilibrium-supports.csv``. With ``--run DIR...`` in place of a recipe it
measures finished runs, those of a sweep for example.

Columns: ``density`` after the last epoch; ``above``, the fraction of weights with s > gamma / N;
``presence``, the sum of 1 - gamma / (N s) over these, over N; ``balance_gamma``, the gamma at which
``above`` would be ``density``; ``flips_per_step`` over the last quarter of the epochs.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from minihyperflows import flows
from minihyperflows.analysis import supports
from minihyperflows.data.datasets import Dataset
from minihyperflows.errors import UserError
from minihyperflows.flows.recorder import LayerFlow
from minihyperflows.lab.checkpoint import load_checkpoint
from minihyperflows.lab.recipes import RECIPES, Recipe, find
from minihyperflows.lab.records import Row
from minihyperflows.lab.runs import RunFolder
from minihyperflows.lab.sweep import parse_gammas
from minihyperflows.lab.training import EpochRecord, Trainer, build_network
from minihyperflows.nn import Module
from minihyperflows.studies.frame import WITH_THE_PACKAGE, Bench, Study, Tables, main
from minihyperflows.studies.options import choice, one, parse_count, seeds, values
from minihyperflows.studies.trainers import run_until

OCTAVES = range(-12, 13)  # at which pressures gamma = 2^k the distribution of s is written down


# -- one run -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Finished:
    """A network at the end of its run under constant pressure, and how it came there."""

    net: Module
    recipe: Recipe
    seed: int
    records: list[EpochRecord]


def train_under_pressure(
    recipe: Recipe, data: Dataset, seed: int, observe: Callable[[], Any] = lambda: None
) -> Finished:
    """Train with the recipe's constant pressure; ``observe`` is called after each epoch."""
    rng = np.random.default_rng(seed)
    trainer = Trainer(build_network(recipe, data, rng), data, recipe, rng)
    records = run_until(trainer, tick=observe)
    return Finished(trainer.net, recipe, seed, records)


def from_folder(folder: Path, data: Dataset) -> Finished:
    """The network that a finished run left in its folder (one of ``minihyperflows sweep``, say)."""
    arrays, values = load_checkpoint(RunFolder(folder).checkpoint)
    recipe, seed = Recipe.from_json(values["recipe"]), values["seed"]
    rng = np.random.default_rng(seed)
    trainer = Trainer(build_network(recipe, data, rng), data, recipe, rng)
    trainer.load_state_dict(arrays, values["trainer"])
    if not trainer.finished:
        raise UserError(f"the run in {folder} is not finished")
    records = []
    for epoch in values["records"]:
        layers = {name: LayerFlow(**flow) for name, flow in epoch["layers"].items()}
        records.append(EpochRecord(**epoch | {"layers": layers}))
    return Finished(trainer.net, recipe, seed, records)


def measure(run: Finished, data: Dataset, sample: int = 200) -> tuple[Row, list[Row], list[Row]]:
    """The run's row, its epochs, and the distribution of the supports at its end."""
    recipe, records, gamma = run.recipe, run.records, run.recipe.pressure.gamma
    assert gamma is not None
    rng = np.random.default_rng(run.seed)
    found = supports(run.net, data, recipe.pruning.label_smoothing, rng, sample)
    weights = sum(t.size for t in flows.presences(run.net).values())
    late = records[-max(1, len(records) // 4) :]
    steps = len(late) * -(-len(data.train_y) // recipe.batch_size)
    key = {"recipe": recipe.name, "dataset": data.name, "seed": run.seed, "gamma": gamma}
    row = key | {
        "epochs": len(records),
        "weights": weights,
        "density": records[-1].density,
        "density_at_three_quarters": late[0].density,
        "test_accuracy": records[-1].test_accuracy,
        "flips_per_step": sum(r.flips for r in late) / steps,
        "above": found.above(gamma / weights),
        "presence": found.presence(gamma / weights),
        "balance_gamma": weights * found.balance(records[-1].density),
        "sample": sample,
        "seconds": sum(r.seconds for r in records),
    }
    pushes = [2.0**k for k in OCTAVES]
    distribution = [key | {"push": p, "above": found.above(p / weights)} for p in pushes]
    return row, [key | _epoch(r) for r in records], distribution


def _epoch(record: EpochRecord) -> Row:
    layers = record.layers.values()
    return {
        "epoch": record.epoch,
        "density": record.density,
        "test_accuracy": record.test_accuracy,
        "flips": record.flips,
        "regrowths": sum(layer.regrowths for layer in layers),
    }


# -- the study -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Run:
    """A recipe under a constant pressure; or a finished run, in its folder."""

    recipe: str = choice(*sorted(RECIPES), default=())
    gamma: float = values(parse_gammas, *parse_gammas("2^-6:2^6:2"), others=("--gammas",))
    run: Any = values(Path, others=("--runs",), identity=False, help="measure finished runs")
    epochs: int | None = one(parse_count, identity=False, help="of the stage under pressure")
    sample: int = one(parse_count, 200, identity=False, help="present weights to measure")
    seed: int = seeds(1)


class Equilibrium(Study[Run]):
    """Where flux and pressure balance: constant pressures, and the support of every weight."""

    name, Setting, parts = "equilibrium", Run, ("epochs", "supports")
    shown = ("density", "above", "presence", "balance_gamma", "flips_per_step", "test_accuracy")

    def plan(self, chosen: dict[str, tuple[Any, ...]]) -> Iterable[Run]:
        if bool(chosen["recipe"]) == bool(chosen["run"]):
            raise UserError("give a recipe with --recipe, or finished runs with --run")
        if not chosen["run"]:
            return super().plan(chosen | {"run": (None,)})
        (sample,) = chosen["sample"]
        return [self._finished(folder, sample) for folder in chosen["run"]]

    def _finished(self, folder: Path, sample: int) -> Run:
        summary = RunFolder(folder).read_summary()
        recipe = Recipe.from_json(summary["recipe"])
        if recipe.pressure.gamma is None:
            raise UserError(f"the run in {folder} was steered, not under a constant pressure")
        return Run(recipe.name, recipe.pressure.gamma, folder, None, sample, summary["seed"])

    def recipe(self, s: Run) -> Recipe:
        """What is trained."""
        if s.run is not None:
            return Recipe.from_json(RunFolder(s.run).read_summary()["recipe"])
        fields = {} if s.epochs is None else {"pruning.epochs": s.epochs}
        return find(s.recipe).with_fields(fields).with_gamma(s.gamma)

    def dataset(self, s: Run) -> str:
        return self.recipe(s).dataset

    def dtype(self, s: Run) -> str:
        return self.recipe(s).dtype

    def check(self, s: Run, bench: Bench) -> None:
        bench.data(self.dataset(s))

    def command(self, s: Run, device: str = "cpu") -> str:
        if s.run is None:
            return super().command(s, device)
        place = " --data-dir DIR" if self.dataset(s) not in WITH_THE_PACKAGE else ""
        here = f"minihyperflows study {self.name} --run RUN --sample {s.sample}{place} --out FILE"
        return f"{RunFolder(s.run).read_summary()['command']} --out RUN; {here}"

    def run(self, s: Run, bench: Bench) -> Tables:
        data = bench.data(self.dataset(s))
        if s.run is not None:
            finished = from_folder(s.run, data)
        else:
            finished = train_under_pressure(self.recipe(s), data, s.seed, bench.tick)
        row, epochs, distribution = measure(finished, data, s.sample)
        return [epochs, distribution, [row]]


STUDY = Equilibrium()

if __name__ == "__main__":
    words = sys.argv[1:]
    if words and not words[0].startswith("-"):  # the recipe had no option in the past
        words.insert(0, "--recipe")
    main(STUDY, words, listed=True)
