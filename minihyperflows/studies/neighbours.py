"""Hyperflows and its neighbours side by side: the same network, data, steps and final size.

    minihyperflows study neighbours --network conv-mnist --data-dir DIR --out FILE
    minihyperflows study neighbours --out FILE --table

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
counted the pressure missed what it aims at, before regrowth.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
import time
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from minihyperflows.flows.law import mean_half_width
from minihyperflows.nn import Module, weighted_layers
from minihyperflows.related.channels import channel_groups, sizes
from minihyperflows.studies.dhp_tables import text_of
from minihyperflows.studies.dhp_tasks import DTYPE, EXPERIMENTS, Experiment, Task
from minihyperflows.studies.frame import Bench, Study, main
from minihyperflows.studies.neighbour_methods import (
    COUNTED,
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
from minihyperflows.studies.options import DIGITS

COLUMNS = tuple(field.name for field in dataclasses.fields(Run))
TABLE = (*COLUMNS, "score", "cpu_seconds")  # what the reader of a record needs


# -- rows ----------------------------------------------------------------------------------------


def do(run: Run, experiment: Experiment, task: Task) -> Row:
    """Do a run: what it came to."""
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
    return row | {"steps": contest.steps, "cpu_seconds": seconds} | contest.report


def cost_of(net: Module, image: tuple[int, ...], counted: str) -> int:
    """The multiplications with weights that are not 0, or the number of these weights."""
    price = prices(net, image, counted)
    return price_of({n: m.weight.data != 0 for n, m in weighted_layers(net).items()}, price)


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


# -- the study -----------------------------------------------------------------------------------


def experiment_of(network: str) -> Experiment:
    """The experiment; all channels can be pruned, and a search of DHP ends with the first step that
    brings it to its target."""
    return dataclasses.replace(EXPERIMENTS[network], classifier_keeps=0.0, check_every=1)


class Neighbours(Study[Run]):
    """Hyperflows and its neighbours side by side: the same network, data, steps and final size."""

    name, Setting, digits = "neighbours", Run, DIGITS
    columns = TABLE

    def plan(self, chosen: dict[str, tuple[Any, ...]]) -> Iterable[Run]:
        for network, seed in itertools.product(chosen["network"], chosen["seed"]):
            for level in chosen["level"]:
                for method in (m for m in METHODS[level] if m in chosen["method"]):
                    goals = itertools.product(chosen["counted"], chosen["target"])
                    for counted, target in goals if level else [("", "")]:
                        yield Run(network, level, method, counted, target, seed)

    def dataset(self, s: Run) -> str:
        return EXPERIMENTS[s.network].dataset

    def dtype(self, s: Run) -> str:
        return np.dtype(DTYPE).name

    def task(self, s: Run, bench: Bench) -> Task:
        """The data and what is done with them."""
        load = experiment_of(s.network).load
        return bench.shared(("task", s.network), lambda: load(bench.data_dir))

    def check(self, s: Run, bench: Bench) -> None:
        first, task = dataclasses.replace(s, seed=0), self.task(s, bench)
        contest = Contest(experiment_of(s.network), task, first)
        bench.shared((first,), lambda: require_possible(contest))

    def run(self, s: Run, bench: Bench) -> Row:
        return do(s, experiment_of(s.network), self.task(s, bench))

    def report(self, rows: Sequence[Row]) -> str:
        return markdown(rows)


STUDY = Neighbours()

if __name__ == "__main__":
    main(STUDY, listed=True)
