"""Where flux and pressure balance: constant pressures, and the support of every weight at the end.

The support of a weight is minus the flux it has while it is *removed*, averaged over the training
set at fixed topology: s = -kappa w dL/dw' at w' = 0. The pressure gamma / N outweighs it or not
(chapter 07). The study trains a network under each constant pressure, follows density and flips,
and then measures s for all removed weights and, removing them one at a time, for a sample of the
present ones. ::

    python -m minihyperflows.studies.equilibrium lenet300-digits-gamma \
        --gammas 0,2^-6:2^6:2 --seeds 0 1 --out chapters/results/equilibrium.csv

writes a row for each run to that file, the epochs of the runs to ``equilibrium-epochs.csv`` and the
distributions of s to ``equilibrium-supports.csv``. Runs that are in the files are not repeated.
With ``--runs DIR...`` in place of a recipe it measures finished runs, those of a sweep for example.

Columns: ``density`` after the last epoch; ``above``, the fraction of weights with s > gamma / N;
``presence``, the sum of 1 - gamma / (N s) over these, over N; ``balance_gamma``, the gamma at which
``above`` would be ``density``; ``flips_per_step`` over the last quarter of the epochs.
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from tqdm import tqdm

from minihyperflows import flows
from minihyperflows.analysis import supports
from minihyperflows.data.datasets import Dataset, load
from minihyperflows.errors import UserError
from minihyperflows.flows.recorder import LayerFlow
from minihyperflows.lab.checkpoint import load_checkpoint
from minihyperflows.lab.console import Parser
from minihyperflows.lab.recipes import Recipe, find
from minihyperflows.lab.records import Record, adds_to_table
from minihyperflows.lab.runs import RunFolder, provenance
from minihyperflows.lab.sweep import parse_gammas
from minihyperflows.lab.training import EpochRecord, Trainer, build_network
from minihyperflows.nn import Module
from minihyperflows.studies.command import parse_seed, reporting

OCTAVES = range(-12, 13)  # at which pressures gamma = 2^k the distribution of s is written down
MODULE = "minihyperflows.studies.equilibrium"
Row: TypeAlias = dict[str, Any]


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
    rng, records = np.random.default_rng(seed), []
    trainer = Trainer(build_network(recipe, data, rng), data, recipe, rng)
    while not trainer.finished:
        records.append(trainer.run_epoch())
        observe()
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

IDENTITY = ("recipe", "seed", "gamma")  # columns
_identity = itemgetter(*IDENTITY)


@reporting()
def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = Parser(prog=f"python -m {MODULE}", description=__doc__)
    parser.add_argument("recipe", nargs="?", help="for example lenet300-digits-gamma")
    parser.add_argument("--gammas", default="2^-6:2^6:2", help="as for minihyperflows sweep")
    parser.add_argument("--seeds", type=parse_seed, nargs="+", default=[0])
    parser.add_argument("--epochs", type=int, help="of the stage under pressure")
    parser.add_argument("--runs", type=Path, nargs="+", default=[], help="measure finished runs")
    parser.add_argument("--sample", type=int, default=200, help="present weights to measure")
    parser.add_argument("--data-dir", help="where MNIST lies")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    if (options.recipe is None) == (not options.runs):
        parser.error("give a recipe, or finished runs with --runs")
    run_study(options)


@adds_to_table
def run_study(options: argparse.Namespace) -> None:
    """Measure the runs that are not in the tables yet."""
    record = Record(options.out, ("epochs", "supports"), _identity, IDENTITY)
    bar = tqdm(unit="epoch", dynamic_ncols=True)
    for recipe, seed, command, finish in _plan(options, bar):
        name = f"gamma {recipe.pressure.gamma:g} seed {seed}"
        if (recipe.name, seed, recipe.pressure.gamma) in record.done:
            bar.write(f"{name}: done before")
            continue
        data = load(recipe.dataset, options.data_dir)
        row, epochs, distribution = measure(finish(data), data, options.sample)
        record.add(epochs, distribution, [row | provenance(recipe.dtype, command)])
        bar.write(f"{name}: density {row['density']:.4%}")


Plan: TypeAlias = Iterator[tuple[Recipe, int, str, Callable[[Dataset], Finished]]]


def _plan(options: argparse.Namespace, bar: tqdm) -> Plan:
    """Recipe, seed, the command that repeats the run, and what carries it out."""
    ending = ["--sample", str(options.sample), "--out", options.out.name]
    for folder in options.runs:
        summary = RunFolder(folder).read_summary()
        here = shlex.join(["python", "-m", MODULE, "--runs", "RUN", *ending])
        command = f"{summary['command']} --out RUN; {here}"
        recipe = Recipe.from_json(summary["recipe"])
        yield recipe, summary["seed"], command, partial(from_folder, folder)
    if options.runs:
        return
    recipe = find(options.recipe)
    epochs = ["--epochs", str(options.epochs)] if options.epochs else []
    if options.epochs:
        recipe = recipe.with_fields({"pruning.epochs": options.epochs})
    for seed in options.seeds:
        for gamma in parse_gammas(options.gammas):
            words = ["python", "-m", MODULE, recipe.name, "--gammas", f"{gamma!r}"]
            command = shlex.join([*words, "--seeds", str(seed), *epochs, *ending])
            pressed = recipe.with_gamma(gamma)

            def finish(data: Dataset, pressed: Recipe = pressed, seed: int = seed) -> Finished:
                bar.reset(pressed.timeline.epochs)
                return train_under_pressure(pressed, data, seed, bar.update)

            yield pressed, seed, command, finish


if __name__ == "__main__":
    main()
