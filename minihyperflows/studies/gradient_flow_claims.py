"""The claims of the gradient-flow framework for pruning (Lubana & Dick 2021), measured.

    python -m minihyperflows.studies.gradient_flow_claims --part weights --dataset mnist \\
        --data-dir DIR --out FILE
    python -m minihyperflows.studies.gradient_flow_claims --part filters --dataset cifar10 \\
        --data-dir DIR --out FILE

removes single weights of LeNet-300, or filters of small VGG-13, ResNet-20 and MobileNet-V1, by
their scores: in 1, 5 or 25 rounds, from the initial network, after one epoch or late. All runs have
equally many epochs. :mod:`~minihyperflows.studies.gradient_flow_weights` and
:mod:`~minihyperflows.studies.gradient_flow_filters` say what the scores and controls are,
:mod:`~minihyperflows.studies.gradient_flow_runs` how a run goes and what its columns mean.

A row for each run, with ``score``, ``temperature``, ``start`` (epochs before the first round),
``rounds``, ``kept`` (the fraction that is to stay), ``seed``, ``control`` (filters: empty for the
score's own run), ``remaining`` of ``total`` weights or channels, and ``density_LAYER`` or
``widths``. Score "dense" is the training without pruning. The file is the state: a run that has its
row is not repeated. ``--join FILE...`` takes over the runs of other files, and does none.

The default grid on MNIST takes about an hour of one core.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

from tqdm import tqdm

from minihyperflows.data.datasets import Dataset, load
from minihyperflows.errors import UserError
from minihyperflows.lab.console import Parser
from minihyperflows.lab.records import adds_to_table, join_records, records_so_far, write_records
from minihyperflows.lab.runs import provenance
from minihyperflows.studies import gradient_flow_filters as filters
from minihyperflows.studies import gradient_flow_weights as weights
from minihyperflows.studies.command import DIGITS, parse_fraction, parse_seed, reporting
from minihyperflows.studies.gradient_flow_runs import (
    DTYPE,
    Build,
    Plan,
    Ranking,
    Row,
    Task,
    train_dense,
)

MODULE = "minihyperflows.studies.gradient_flow_claims"
DENSE = "dense"
ROUNDS = (1, 5, 25)


@dataclasses.dataclass(frozen=True)
class Part:
    """What can be chosen from, and what is chosen by default."""

    networks: Mapping[str, Build]
    plans: Mapping[str, Plan]
    rankings: Mapping[str, Ranking]
    scores: tuple[str, ...]
    starts: tuple[int, ...]
    kept: tuple[float, ...]
    seeds: tuple[int, ...]
    controls: tuple[str, ...] = ()


PARTS = {
    "weights": Part(
        networks={weights.NETWORK: weights.build},
        plans=weights.PLANS,
        rankings=weights.RANKINGS,
        scores=(DENSE, *weights.RANKINGS),
        starts=weights.TIMES,
        kept=weights.KEPT,
        seeds=(0, 1, 2, 3),
    ),
    "filters": Part(
        networks=filters.NETWORKS,
        plans=filters.PLANS,
        rankings=filters.RANKINGS,
        scores=(DENSE, *filters.SCORES),
        starts=filters.TIMES,
        kept=filters.KEPT,
        seeds=(0, 1),
        controls=filters.CONTROLS,
    ),
}


@dataclasses.dataclass(frozen=True)
class Run:
    """What tells a run from all others of its part, data set and plan, except for controls."""

    network: str
    score: str
    start: int
    rounds: int
    kept: float
    seed: int


@dataclasses.dataclass(frozen=True)
class Grid:
    """The runs to do, all combinations of the choices."""

    part: str
    networks: Sequence[str]
    scores: Sequence[str]
    starts: Sequence[int]
    rounds: Sequence[int]
    kept: Sequence[float]
    seeds: Sequence[int]
    controls: Sequence[str]

    def runs(self) -> list[Run]:
        """In an order in which few dense networks are needed at a time."""
        found = []
        for network, seed in itertools.product(self.networks, self.seeds):
            for score in self.scores:
                choices = itertools.product(self.starts, self.rounds, self.kept)
                for choice in [(0, 0, 1.0)] if score == DENSE else choices:
                    found.append(Run(network, score, *choice, seed))
        return found

    def rows_of(self, run: Run) -> list[str]:
        """The values of "control" in the rows of a run."""
        return [""] if run.score == DENSE else ["", *self.controls]


# -- the study -----------------------------------------------------------------------------------


@adds_to_table
def run_study(out: Path, grid: Grid, plan: Plan, data: Dataset, progress: bool = True) -> list[Row]:
    """Do the runs that have no rows in ``out`` yet; returns all rows."""
    networks = PARTS[grid.part].networks
    tasks = {name: Task(data, plan, networks[name]) for name in grid.networks}
    require_possible(grid, plan, tasks)
    rows = records_so_far(out, IDENTITY)
    done = {identity(row) for row in rows}
    missing = [
        run
        for run in grid.runs()
        if any(identity(head(grid, run, plan, data, c)) not in done for c in grid.rows_of(run))
    ]
    for run in tqdm(missing, disable=not progress, unit="run"):
        for results in results_of(grid, run, tasks[run.network]):
            row = head(grid, run, plan, data, results.get("control", "")) | results
            if identity(row) not in done:
                rows.append(row | source(grid, run, plan, data))
                write_records(out, rows, digits=DIGITS)
    return rows


def require_possible(grid: Grid, plan: Plan, tasks: Mapping[str, Task]) -> None:
    """Raise UserError if a run has no time, or must keep more than it may."""
    pruned = [run for run in grid.runs() if run.score != DENSE]
    for run in pruned:
        plan.check(run.start, run.rounds)
    if grid.part == "filters":
        for network, kept in dict.fromkeys((run.network, run.kept) for run in pruned):
            filters.require_possible(tasks[network], kept, network)


def results_of(grid: Grid, run: Run, task: Task) -> Iterator[Row]:
    """Do a run and its controls."""
    choice = run.score, run.start, run.rounds, run.kept, run.seed
    if run.score == DENSE:
        yield train_dense(task, run.seed)
    elif grid.part == "weights":
        yield weights.run(task, *choice)
    else:
        yield from filters.run(task, *choice, grid.controls)


def head(grid: Grid, run: Run, plan: Plan, data: Dataset, control: str) -> Row:
    """The columns that say which run a row belongs to."""
    ranking = PARTS[grid.part].rankings.get(run.score)
    return {
        **{"part": grid.part, "dataset": data.name, "images": plan.images, "epochs": plan.epochs},
        **dataclasses.asdict(run),
        "temperature": ranking.temperature if ranking else "",
        "control": control,
    }


IDENTITY = (
    *("part", "dataset", "images", "epochs"),
    *(field.name for field in dataclasses.fields(Run)),
    "control",
)
identity = itemgetter(*IDENTITY)  # what no two rows of a table have in common


def source(grid: Grid, run: Run, plan: Plan, data: Dataset) -> Row:
    """Where a row comes from; the command repeats it."""
    words = [f"--part {grid.part} --dataset {data.name} --networks {run.network}"]
    words.append(f"--images {plan.images} --epochs {plan.epochs} --scores {run.score}")
    if run.score != DENSE:
        words.append(f"--starts {run.start} --rounds {run.rounds} --kept {run.kept:g}")
    if PARTS[grid.part].controls:
        words.append(" ".join(["--controls", *grid.controls]))
    place = "" if data.name in ("digits", "shapes32") else "--data-dir DIR "
    command = f"python -m {MODULE} {' '.join(words)} --seeds {run.seed} {place}--out FILE"
    return provenance(DTYPE.__name__, command)


@adds_to_table
def join(files: Sequence[Path], out: Path) -> list[Row]:
    """Add the rows of all files to ``out``, each run once; returns all rows."""
    rows = sorted(join_records(out, files, identity, IDENTITY), key=identity)
    write_records(out, rows)
    return rows


# -- the command ---------------------------------------------------------------------------------


@reporting()
def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; see the module's text."""
    options = parse(arguments)
    if options.join:
        join(options.join, options.out)
        return
    dataset, plan = chosen_plan(options)
    run_study(options.out, chosen_grid(options), plan, load(dataset, options.data_dir))


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options; None where the part decides."""
    parser = Parser(prog=f"python -m {MODULE}", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--part", choices=tuple(PARTS), default="weights")
    parser.add_argument("--dataset", help="digits or mnist; for filters cifar10 or shapes32")
    for name in ("networks", "scores"):
        parser.add_argument(f"--{name}", nargs="+", help="default: those of the part")
    parser.add_argument("--starts", "--times", nargs="+", type=int, metavar="EPOCHS")
    parser.add_argument("--rounds", nargs="+", type=int)
    fraction = partial(parse_fraction, whole=True)
    parser.add_argument("--kept", nargs="+", type=fraction, help="fractions that are to stay")
    parser.add_argument("--seeds", nargs="+", type=parse_seed)
    parser.add_argument("--controls", nargs="*", help="of filters: widths, uniform, or nothing")
    parser.add_argument("--images", type=int, help="of the training set")
    parser.add_argument("--epochs", type=int, help="of the whole training")
    parser.add_argument("--data-dir", help="where MNIST or CIFAR lie")
    parser.add_argument("--join", nargs="+", type=Path, default=(), help="only take their runs")
    parser.add_argument("--out", type=Path, required=True, help="the CSV file, continued if there")
    return parser.parse_args(arguments)


def chosen_plan(options: argparse.Namespace) -> tuple[str, Plan]:
    """The data set, and its plan with the changes of the command line."""
    plans = PARTS[options.part].plans
    dataset = options.dataset or next(iter(plans))
    _require("dataset", [dataset], plans)
    names = ("images", "epochs")
    changes = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if any(value < 1 for value in changes.values()):
        raise UserError("--images and --epochs must be 1 or more")
    return dataset, dataclasses.replace(plans[dataset], **changes)


def chosen_grid(options: argparse.Namespace) -> Grid:
    """The runs that the command line asks for, each once."""
    part = PARTS[options.part]

    def choice(name: str, default: Sequence[Any]) -> Sequence[Any]:
        given = getattr(options, name)
        return default if given is None else list(dict.fromkeys(given))

    _require("networks", networks := choice("networks", tuple(part.networks)), part.networks)
    _require("scores", scores := choice("scores", part.scores), (DENSE, *part.rankings))
    _require("controls", controls := choice("controls", part.controls), part.controls)
    starts, rounds = choice("starts", part.starts), choice("rounds", ROUNDS)
    kept, seeds = choice("kept", part.kept), choice("seeds", part.seeds)
    return Grid(options.part, networks, scores, starts, rounds, kept, seeds, controls)


def _require(option: str, given: Sequence[str], known: Mapping[str, Any] | Sequence[str]) -> None:
    for name in given:
        if name not in known:
            there = f"choose from {', '.join(known)}" if known else "there are none in this part"
            raise UserError(f"--{option}: there is no {name!r}; {there}")


if __name__ == "__main__":
    main()
