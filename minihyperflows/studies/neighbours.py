"""Hyperflows and its neighbours side by side: the same network, data, steps and final size.

    python -m minihyperflows.studies.neighbours --networks conv-mnist --data-dir DIR --out FILE
    python -m minihyperflows.studies.neighbours --out FILE --table

Networks and schedules are experiments of :mod:`dhp_tasks`. All runs of a seed begin with the same
weights, read the same batches in the same order, and have the same number of steps, with the
experiment's learning rates in them; what a method does before the network has its final size is
part of its steps. In the end at most the fraction ``target`` is left, of the multiplications for
one image (``counted`` = "macs") or of the weights ("weights"); convolutions and linear layers
count.

    dense                   no pruning
    weight  hyperflows      pressure from a tenth of the steps to a half, regrowth to 60 % at most,
                            landing on the target by rank
            random, magnitude, loss, biased-loss, grasp-200, preserve-1
                            five rounds between a tenth and a half of the steps, with the scores of
                            :mod:`gradient_flow_weights`; "magnitude" is iterative magnitude pruning
    filter  random, magnitude, loss, biased-loss, grasp-200, preserve-1
                            the same with the scores of :mod:`gradient_flow_filters`
            dhp, dhp-free   search from initial latents, with biases in the hypernetworks and
                            without, cut, and the whole schedule in the steps that are left
            uniform         the same fraction of each layer's filters, from initial weights, all
                            steps: what filter pruning has to beat

A method of level "weight" leaves zeros, one of level "filter" a narrow network. Nothing is
selected: ``score`` is the test accuracy after the last step. Where a search of DHP has not reached
its target when its time is up (``reached`` 0, ``search_ratio``), the channels with the largest
latents stay. All groups of channels can be pruned, in DHP those that the classifier reads as well.

Other columns: ``macs_ratio`` and ``weights_ratio``, what is left of both; ``widths`` (filters) or
``densities`` by layer (weights); ``steps``, of which ``search_steps`` before a search ended;
``cpu_seconds`` of the processor for the whole run; ``steering_error``: by how much of all that is
counted the pressure missed what it aims at, before regrowth. The file is the state: a run that has
its row is not repeated; ``--join FILE...`` takes over those of others.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
import statistics
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from minihyperflows.errors import UserError
from minihyperflows.flows.law import mean_half_width
from minihyperflows.lab.console import Parser
from minihyperflows.lab.records import adds_to_table, join_records, read_records, write_records
from minihyperflows.lab.runs import provenance
from minihyperflows.nn import Module, weighted_layers
from minihyperflows.related.channels import channel_groups, sizes
from minihyperflows.studies.command import DIGITS, parse_fraction, parse_seed, reporting
from minihyperflows.studies.dhp_runs import MACS, WEIGHTS
from minihyperflows.studies.dhp_tables import text_of
from minihyperflows.studies.dhp_tasks import DTYPE, EXPERIMENTS, Experiment, Task
from minihyperflows.studies.neighbour_methods import (
    FILTER,
    METHOD_OF,
    METHODS,
    WHOLE,
    Contest,
    Row,
    Run,
    price_of,
    prices,
    require_possible,
)

MODULE = "minihyperflows.studies.neighbours"
COUNTED = (MACS, WEIGHTS)
TARGETS = (0.3, 0.1)
SEEDS = (0, 1, 2, 3, 4)

COLUMNS = tuple(field.name for field in dataclasses.fields(Run))
TABLE = (*COLUMNS, "score", "cpu_seconds")  # what the reader of a record needs


# -- rows ----------------------------------------------------------------------------------------


def do(run: Run, experiment: Experiment, task: Task) -> Row:
    """Do a run: its row."""
    contest, began = Contest(experiment, task, run), time.process_time()
    net = METHOD_OF[run.level, run.method](contest)
    seconds = time.process_time() - began
    image, whole = task.input_shape, contest.network()
    row = dataclasses.asdict(run) | {"dataset": experiment.dataset, "score": task.score(net)}
    for counted in COUNTED:
        row[f"{counted}_ratio"] = cost_of(net, image, counted) / cost_of(whole, image, counted)
    if run.level == FILTER:
        row["widths"] = text_of(sizes(channel_groups(net, image)))
    else:
        layers = weighted_layers(net).items()
        row["densities"] = ", ".join(f"{n} {(m.weight.data != 0).mean():.4f}" for n, m in layers)
    row |= {"steps": contest.steps, "cpu_seconds": seconds} | contest.report
    return row | provenance(np.dtype(DTYPE).name, command_of(run))


def cost_of(net: Module, image: tuple[int, ...], counted: str) -> int:
    """The multiplications with weights that are not 0, or the number of these weights."""
    price = prices(net, image, counted)
    return price_of({n: m.weight.data != 0 for n, m in weighted_layers(net).items()}, price)


def command_of(run: Run) -> str:
    """The command that repeats a run."""
    words = [f"--networks {run.network} --levels {run.level or 'whole'} --methods {run.method}"]
    if run.level:
        words.append(f"--counted {run.counted} --targets {run.target:g}")
    words.append(f"--seeds {run.seed}")
    if EXPERIMENTS[run.network].dataset != "digits":
        words.append("--data-dir DIR")
    return f"python -m {MODULE} {' '.join(words)} --out FILE"


def identity(row: Row) -> Run:
    """The run that a row belongs to."""
    return Run(*(row[name] for name in COLUMNS))


# -- reading the table ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Cell:
    """The score of one method at one target: mean over ``seeds`` seeds, half the width of its 95 %
    interval (Student's t; NaN for one seed), and the processor's time over the dense network's (NaN
    if there is none)."""

    mean: float
    half_width: float
    seeds: int
    cost: float


def cells(rows: Sequence[Row]) -> dict[tuple[Any, ...], Cell]:
    """By network, level, method, counted and target."""
    time_of = {(r["network"], r["seed"]): r["cpu_seconds"] for r in rows if r["level"] == WHOLE}
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        key = tuple(row[name] for name in COLUMNS if name != "seed")
        found.setdefault(key, []).append(row)
    return {
        key: Cell(
            mean=statistics.mean(row["score"] for row in same),
            half_width=mean_half_width([row["score"] for row in same]),
            seeds=len(same),
            cost=_median(
                r["cpu_seconds"] / time_of.get((r["network"], r["seed"]), math.nan) for r in same
            ),
        )
        for key, same in found.items()
    }


def markdown(rows: Sequence[Row]) -> str:
    """The table of all networks: scores in per cent, mean and half an interval."""
    found, columns = cells(rows), columns_of(rows)
    names = [f"{n}, {100 * t:g}% of {counted}" if counted else n for n, counted, t in columns]
    lines = [f"| level | method | {' | '.join(names)} | time |", "|---" * (len(names) + 3) + "|"]
    for level, methods in METHODS.items():
        for method in methods:
            goals = ((n, (c, t) if level else ("", "")) for n, c, t in columns)
            own = [found.get((n, level, method, *goal)) for n, goal in goals]
            if any(own):
                cost = _median(cell.cost for cell in own if cell)
                texts = [*map(_text, own), "" if math.isnan(cost) else f"{cost:.1f}"]
                lines.append(f"| {level} | {method} | {' | '.join(texts)} |")
    return "\n".join(lines)


def columns_of(rows: Sequence[Row]) -> list[tuple[Any, ...]]:
    """The columns of the table: every network with what may be left of it; a network of which there
    are only whole ones, with empty places for these."""
    pruned = dict.fromkeys((r["network"], r["counted"], r["target"]) for r in rows if r["level"])
    networks = {network for network, *_ in pruned}
    whole = dict.fromkeys((r["network"], "", "") for r in rows if r["network"] not in networks)
    return [*pruned, *whole]


def _text(cell: Cell | None) -> str:
    if cell is None:
        return ""
    spread = "" if math.isnan(cell.half_width) else f" ± {100 * cell.half_width:.2f}"
    return f"{100 * cell.mean:.2f}{spread}"


def _median(values: Iterable[float]) -> float:
    """Of those that are not NaN; NaN if there are none."""
    numbers = [value for value in values if not math.isnan(value)]
    return statistics.median(numbers) if numbers else math.nan


# -- the command ---------------------------------------------------------------------------------


def plan(options: argparse.Namespace) -> list[Run]:
    """The runs that were asked for, each once, seed by seed."""
    found = []
    for network, seed in itertools.product(options.networks, options.seeds):
        for level in options.levels:
            for method in METHODS[level]:
                if options.methods and method not in options.methods:
                    continue
                goals = itertools.product(options.counted, options.targets)
                for counted, target in goals if level else [("", "")]:
                    found.append(Run(network, level, method, counted, target, seed))
    return list(dict.fromkeys(found))


def experiment_of(network: str) -> Experiment:
    """The experiment; all channels can be pruned, and a search of DHP ends with the first step that
    brings it to its target."""
    return dataclasses.replace(EXPERIMENTS[network], classifier_keeps=0.0, check_every=1)


@adds_to_table
def run_study(options: argparse.Namespace) -> list[Row]:
    """Do the runs that are not in the table yet; returns all rows."""
    rows = join_records(options.out, options.join, identity, TABLE)
    if options.join:
        write_records(options.out, rows, digits=DIGITS)
        return rows
    wanted = plan(options)
    if not wanted:
        raise UserError("no run was asked for: none of these levels has one of these methods")
    done = {identity(row) for row in rows}
    missing = [run for run in wanted if run not in done]
    names = dict.fromkeys(run.network for run in missing)
    tasks = {name: experiment_of(name).load(options.data_dir) for name in names}
    for run in dict.fromkeys(dataclasses.replace(run, seed=0) for run in missing):
        require_possible(Contest(experiment_of(run.network), tasks[run.network], run))
    for run in tqdm(missing, unit="run", disable=options.quiet):
        rows.append(do(run, experiment_of(run.network), tasks[run.network]))
        write_records(options.out, rows, digits=DIGITS)
    return rows


@reporting()
def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; see the module's text."""
    options = parse(arguments)
    if options.table:
        print(markdown(read_records(options.out, TABLE)))
    else:
        run_study(options)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = Parser(prog=f"python -m {MODULE}", description=(__doc__ or "").splitlines()[0])
    methods = tuple(dict.fromkeys(itertools.chain(*METHODS.values())))
    levels = tuple(level or "whole" for level in METHODS)
    add = parser.add_argument
    classifiers = [name for name, e in EXPERIMENTS.items() if not name.startswith("dncnn")]
    add("--networks", nargs="+", choices=classifiers, default=["conv-digits"])
    add("--levels", nargs="+", choices=levels, default=levels)
    add("--methods", nargs="+", choices=methods, help="some methods only")
    add("--counted", nargs="+", choices=COUNTED, default=COUNTED)
    add("--targets", nargs="+", type=parse_fraction, default=TARGETS, help="fractions left")
    add("--seeds", nargs="+", type=parse_seed, default=SEEDS)
    add("--data-dir", help="where MNIST and CIFAR lie")
    add("--join", nargs="+", type=Path, default=(), metavar="FILE", help="take over their runs")
    add("--table", action="store_true", help="print what FILE holds, in Markdown")
    add("--quiet", action="store_true", help="no progress bar")
    add("--out", type=Path, required=True, metavar="FILE", help="the CSV file, continued if there")
    options = parser.parse_args(arguments)
    options.levels = tuple(WHOLE if level == "whole" else level for level in options.levels)
    return options


if __name__ == "__main__":
    main()
