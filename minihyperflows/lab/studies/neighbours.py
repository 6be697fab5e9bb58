"""Hyperflows and its neighbours side by side: the same network, data, steps and final size.

    python -m minihyperflows.lab.studies.neighbours --networks conv-mnist --data-dir DIR --out FILE
    python -m minihyperflows.lab.studies.neighbours --out FILE --table

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
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from tqdm import tqdm

from minihyperflows import flows, optim
from minihyperflows.flows.gate import counts, gated_layers
from minihyperflows.flows.law import mean_half_width
from minihyperflows.lab.data import normalise
from minihyperflows.lab.errors import UserError
from minihyperflows.lab.records import join_records, read_records, write_records
from minihyperflows.lab.runs import provenance
from minihyperflows.lab.studies import gradient_flow_filters as filters
from minihyperflows.lab.studies import gradient_flow_weights as weights
from minihyperflows.lab.studies.command import reporting
from minihyperflows.lab.studies.dhp_runs import (
    MACS,
    NETWORK,
    WEIGHTS,
    Course,
    Settings,
    finish,
    from_scratch,
    search,
    stream,
)
from minihyperflows.lab.studies.dhp_tables import text_of
from minihyperflows.lab.studies.dhp_tasks import DTYPE, EXPERIMENTS, Experiment, Task, steps_of
from minihyperflows.lab.studies.gradient_flow_runs import Ranking, scorer
from minihyperflows.nn import Module, weighted_layers
from minihyperflows.related import dhp, rounds
from minihyperflows.related.channels import ChannelGroup, channel_groups, sizes
from minihyperflows.related.dhp.cost import LayerCost
from minihyperflows.related.filters import channel_scores, remove_filters, safeguard
from minihyperflows.related.pruners import attach_masks
from minihyperflows.related.ranking import Masks, keep_within, kept_fraction
from minihyperflows.related.rounds import Scores

MODULE = "minihyperflows.lab.studies.neighbours"
COUNTED = (MACS, WEIGHTS)
TARGETS = (0.3, 0.1)
SEEDS = (0, 1, 2, 3, 4)

WEIGHT, FILTER, WHOLE = "weight", "filter", ""
SCORES = ("random", "magnitude", "loss", "biased-loss", "grasp-200", "preserve-1")
METHODS = {
    WHOLE: ("dense",),
    WEIGHT: ("hyperflows", *SCORES),
    FILTER: (*SCORES, "dhp", "dhp-free", "uniform"),
}

# fractions of the steps
START, END, LANDING = 0.1, 0.5, 0.6  # of pruning; of it; when the last weights have come back
ROUNDS = 5
SCORED = 512  # images for a score

# Hyperflows. Tried with seed 100 of conv-mnist, which is not in the record: t learning half or
# twice as fast, or half the pressure step, changed its accuracy by 0.4 points at most.
PERIODS = 40  # of the scheduler
PRESSURE_STEP = 0.2
PRESENCE_LR = 0.01
SHARE = 0.1  # of the final weights, left to regrowth

PRESENCES, IMAGES, DRAWS = range(10, 13)  # streams of random numbers of a seed

Row: TypeAlias = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Run:
    """What identifies a run. The dense network counts nothing and has no target: "" for both."""

    network: str
    level: str
    method: str
    counted: str
    target: float | str
    seed: int

    @property
    def goal(self) -> float:
        """The target of a run that prunes."""
        assert not isinstance(self.target, str)
        return self.target


COLUMNS = tuple(field.name for field in dataclasses.fields(Run))
TABLE = (*COLUMNS, "score", "cpu_seconds")  # what the reader of a record needs


# -- what is counted -----------------------------------------------------------------------------


def prices(net: Module, image: tuple[int, ...], counted: str) -> dict[str, int]:
    """What one weight of each layer costs: the multiplications that it takes part in, or 1."""
    if counted == WEIGHTS:
        return dict.fromkeys(weighted_layers(net), 1)
    return dhp.output_pixels(net, image)


def price_of(masks: Mapping[str, np.ndarray], price: Mapping[str, int]) -> int:
    """What the weights cost that are True in ``masks``."""
    return sum(price[name] * int(mask.sum()) for name, mask in masks.items())


def layer_costs(
    net: Module, image: tuple[int, ...], groups: Mapping[str, ChannelGroup], counted: str
) -> list[LayerCost]:
    """The same for channels: costs as functions of the widths."""
    if counted == WEIGHTS:
        return dhp.layer_weights(net, groups)
    return dhp.layer_costs(net, image, groups)


# -- the methods ---------------------------------------------------------------------------------


@dataclasses.dataclass
class Contest:
    """What all methods are given: a network, its task, so many steps, and what may be left.

    Attributes:
        experiment, task: network, data, schedule.
        run: which of the runs this is.
        report: what a method has to say about itself, for its row.
    """

    experiment: Experiment
    task: Task
    run: Run
    report: Row = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        self.steps = steps_of(self.experiment.budget, self.task)
        self.course = Course(self.experiment, self.task, self.steps, self.run.seed)

    def network(self) -> Module:
        """The network of the seed with its initial weights."""
        return self.experiment.build(stream(self.run.seed, NETWORK))

    def at(self, fraction: float) -> int:
        """The step at which this fraction of all is over."""
        return round(fraction * self.steps)

    def rounds(self, whole: float) -> Iterator[tuple[int, float]]:
        """For each round of pruning its step, and how much may be left then of ``whole``."""
        for k in range(1, ROUNDS + 1):
            when = START + (END - START) * (k - 1) / (ROUNDS - 1)
            yield self.at(when), kept_fraction(k, ROUNDS, 1 - self.run.goal) * whole

    def scores(self, rankings: Mapping[str, Ranking]) -> Scores:
        """The method's scores, each time on other images."""
        data = self.task.data
        images, draws = (stream(self.run.seed, what) for what in (IMAGES, DRAWS))
        return scorer(
            rankings[self.run.method],
            self.run.level,
            lambda chosen: normalise(data.train_x[chosen], data, DTYPE),
            data.train_y,
            number=SCORED,
            batch_size=self.task.batch_size,
            images=images,
            draws=draws,
        )


def train_whole(contest: Contest) -> Module:
    """No pruning."""
    net = contest.network()
    contest.course.advance(net, contest.steps)
    return net


def prune_weights(contest: Contest) -> Module:
    """Rounds of pruning single weights by a score."""
    net, score = contest.network(), contest.scores(weights.RANKINGS)
    price = prices(net, contest.task.input_shape, contest.run.counted)
    masks = attach_masks(net)
    whole = price_of({name: mask.present for name, mask in masks.items()}, price)
    for step, limit in contest.rounds(whole):
        contest.course.advance(net, step)
        found = score(net)
        scores = {name: found[f"{name}.weight"] for name in masks}
        present = {name: mask.present for name, mask in masks.items()}
        keep = keep_within(scores, limit, lambda masks: price_of(masks, price), present=present)
        for name, mask in masks.items():
            mask.present = keep[name]
    contest.course.advance(net, contest.steps)
    rounds.finish(net)
    return net


def prune_filters(contest: Contest) -> Module:
    """Rounds of removing filters by a score."""
    net, image = contest.network(), contest.task.input_shape
    score, counted = contest.scores(filters.RANKINGS), contest.run.counted
    groups = channel_groups(net, image)
    least = safeguard(groups)
    whole = dhp.macs(layer_costs(net, image, groups, counted), sizes(groups))
    for step, limit in contest.rounds(whole):
        contest.course.advance(net, step)
        groups = channel_groups(net, image)
        costs = layer_costs(net, image, groups, counted)
        scores = channel_scores(score(net), groups)
        keep = widest(scores, limit, costs, groups, least)
        net = remove_filters(net, keep, image)
    contest.course.advance(net, contest.steps)
    return net


def widest(
    scores: Mapping[str, np.ndarray],
    limit: float,
    costs: Sequence[LayerCost],
    groups: Mapping[str, ChannelGroup],
    least: Mapping[str, int],
) -> Masks:
    """The best channels, as many as may be kept within ``limit``."""

    def cost(keep: Masks) -> float:
        return dhp.macs(costs, sizes(groups) | {n: int(mask.sum()) for n, mask in keep.items()})

    return keep_within(scores, limit, cost, least)


def hyperflows(contest: Contest) -> Module:
    """Pressure, steered by what is counted; regrowth; landing."""
    net, course, run = contest.network(), contest.course, contest.run
    price = prices(net, contest.task.input_shape, run.counted)
    begin, end, landing = (contest.at(part) for part in (START, END, LANDING))
    course.advance(net, begin)
    flows.attach(net, rng=stream(run.seed, PRESENCES))
    whole = sum(price[name] * total for name, (_, total) in counts(net).items())
    presence = optim.Adam(flows.presences(net).values(), PRESENCE_LR)
    scheduler = flows.PressureScheduler(1 - (1 - SHARE) * run.goal, PERIODS, PRESSURE_STEP)

    def left() -> float:
        return sum(price[name] * present for name, (present, _) in counts(net).items()) / whole

    def press(step: int) -> None:
        presence.step()
        before, after = (PERIODS * (s - begin) // (end - begin) for s in (step - 1, step))
        for period in range(before + 1, after + 1):
            scheduler.update(period, left())

    def regrow(step: int) -> None:
        if presence.lr and left() < run.goal:
            presence.step()
        else:
            presence.lr = 0.0

    course.advance(net, end, lambda loss: loss + scheduler.gamma * flows.pressure(net), press)
    contest.report["steering_error"] = left() - (1 - SHARE) * run.goal
    course.advance(net, landing, after_step=regrow)
    land_within(net, run.goal * whole, lambda masks: price_of(masks, price))
    course.advance(net, contest.steps)
    flows.to_dense(net)
    return net


def by_layer(net: Module) -> dict[str, Any]:
    """The presence parameters by the names of their layers."""
    return {name: layer.presence for name, layer in gated_layers(net).items()}


def land_within(net: Module, limit: float, cost: Callable[[Masks], float]) -> None:
    """Make the weights with the largest t present, as many as ``limit`` allows, and no others.

    :func:`minihyperflows.flows.land` with any cost in the place of a number.
    """
    presences = by_layer(net)
    keep = keep_within({name: t.data for name, t in presences.items()}, limit, cost)
    for name, t in presences.items():
        below = -np.finfo(t.dtype).tiny
        t.data[...] = np.where(keep[name], np.maximum(t.data, 0), np.minimum(t.data, below))


def search_widths(contest: Contest) -> Module:
    """DHP: search, cut, train."""
    experiment, run = contest.experiment, contest.run
    settings = Settings(run.goal, hyper_bias=run.method == "dhp", counted=run.counted)
    found = search(experiment, contest.task, settings, run.seed)
    network, keep = found.network, found.network.kept()
    if network.flops_ratio() > run.goal:
        size = {n: abs(network.latents[n].data) for n in keep}
        least = {n: network.floors[n] for n in keep}
        limit = run.goal * dhp.macs(network.costs, network.sizes())
        keep = widest(size, limit, network.costs, network.groups, least)
    contest.report |= {"search_steps": found.steps, "reached": int(found.reached)}
    contest.report["search_ratio"] = network.flops_ratio()
    return finish(found, keep, experiment, contest.task, run.seed)[0]


def train_uniform(contest: Contest) -> Module:
    """The same fraction of every layer's filters, from the beginning."""
    net, image, run = contest.network(), contest.task.input_shape, contest.run
    groups = channel_groups(net, image)
    costs = layer_costs(net, image, groups, run.counted)
    widths = dhp.widths_at(run.goal, costs, groups)
    return from_scratch(widths, contest.experiment, contest.task, contest.steps, run.seed)


METHOD_OF: dict[tuple[str, str], Callable[[Contest], Module]] = {
    (WHOLE, "dense"): train_whole,
    (WEIGHT, "hyperflows"): hyperflows,
    (FILTER, "dhp"): search_widths,
    (FILTER, "dhp-free"): search_widths,
    (FILTER, "uniform"): train_uniform,
    **{(WEIGHT, score): prune_weights for score in SCORES},
    **{(FILTER, score): prune_filters for score in SCORES},
}


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
    interval (Student's t; NaN for one seed), and the processor's time over the dense network's."""

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
            cost=statistics.median(
                r["cpu_seconds"] / time_of[r["network"], r["seed"]] for r in same
            ),
        )
        for key, same in found.items()
    }


def markdown(rows: Sequence[Row]) -> str:
    """The table of all networks: scores in per cent, mean and half an interval."""
    found = cells(rows)
    columns = dict.fromkeys((r["network"], r["counted"], r["target"]) for r in rows if r["level"])
    names = [f"{network}, {target:.0%} of {counted}" for network, counted, target in columns]
    lines = [f"| level | method | {' | '.join(names)} | time |", "|---" * (len(names) + 3) + "|"]
    for level, methods in METHODS.items():
        for method in methods:
            goals = ((n, (c, t) if level else ("", "")) for n, c, t in columns)
            own = [found.get((n, level, method, *goal)) for n, goal in goals]
            if any(own):
                cost = statistics.median(cell.cost for cell in own if cell)
                texts = " | ".join(map(_text, own))
                lines.append(f"| {level} | {method} | {texts} | {cost:.1f} |")
    return "\n".join(lines)


def _text(cell: Cell | None) -> str:
    return f"{100 * cell.mean:.2f} ± {100 * cell.half_width:.2f}" if cell else ""


# -- the command ---------------------------------------------------------------------------------


def plan(options: argparse.Namespace) -> list[Run]:
    """The runs that were asked for, seed by seed."""
    found = []
    for network, seed in itertools.product(options.networks, options.seeds):
        for level in options.levels:
            for method in METHODS[level]:
                if options.methods and method not in options.methods:
                    continue
                goals = itertools.product(options.counted, options.targets)
                for counted, target in goals if level else [("", "")]:
                    found.append(Run(network, level, method, counted, target, seed))
    return found


def experiment_of(network: str) -> Experiment:
    """The experiment; all channels can be pruned, and a search of DHP ends with the first step that
    brings it to its target."""
    return dataclasses.replace(EXPERIMENTS[network], classifier_keeps=0.0, check_every=1)


def run_study(options: argparse.Namespace) -> list[Row]:
    """Do the runs that are not in the table yet; returns all rows."""
    rows = join_records(options.out, options.join, identity, TABLE)
    if options.join:
        write_records(options.out, rows, digits=6)
        return rows
    done = {identity(row) for row in rows}
    missing = [run for run in plan(options) if run not in done]
    names = dict.fromkeys(run.network for run in missing)
    tasks = {name: experiment_of(name).load(options.data_dir) for name in names}
    for run in tqdm(missing, unit="run", disable=options.quiet):
        rows.append(do(run, experiment_of(run.network), tasks[run.network]))
        write_records(options.out, rows, digits=6)
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
    parser = argparse.ArgumentParser(
        prog=f"python -m {MODULE}", description=(__doc__ or "").splitlines()[0]
    )
    methods = tuple(dict.fromkeys(itertools.chain(*METHODS.values())))
    levels = tuple(level or "whole" for level in METHODS)
    add = parser.add_argument
    classifiers = [name for name, e in EXPERIMENTS.items() if not name.startswith("dncnn")]
    add("--networks", nargs="+", choices=classifiers, default=["conv-digits"])
    add("--levels", nargs="+", choices=levels, default=levels)
    add("--methods", nargs="+", choices=methods, help="some methods only")
    add("--counted", nargs="+", choices=COUNTED, default=COUNTED)
    add("--targets", nargs="+", type=float, default=TARGETS, help="fractions that are left")
    add("--seeds", nargs="+", type=int, default=SEEDS)
    add("--data-dir", help="where MNIST and CIFAR lie")
    add("--join", nargs="+", type=Path, default=(), metavar="FILE", help="take over their runs")
    add("--table", action="store_true", help="print what FILE holds, in Markdown")
    add("--quiet", action="store_true", help="no progress bar")
    add("--out", type=Path, required=True, metavar="FILE", help="the CSV file, continued if there")
    options = parser.parse_args(arguments)
    options.levels = tuple(WHOLE if level == "whole" else level for level in options.levels)
    if not all(0 < target < 1 for target in options.targets):
        raise UserError("a target is a fraction, between 0 and 1")
    return options


if __name__ == "__main__":
    main()
