"""How each of the neighbours prunes: the methods that
:mod:`~minihyperflows.studies.neighbours` compares, and what all of them are given.

That module tells what each of them does and when, and what may be left in the end.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, TypeAlias

import numpy as np

from minihyperflows import flows, optim
from minihyperflows.data.datasets import normalise
from minihyperflows.errors import UserError
from minihyperflows.flows.gates import counts, gated_layers
from minihyperflows.nn import Module, weighted_layers
from minihyperflows.related import dhp, rounds
from minihyperflows.related.channels import ChannelGroup, channel_groups, sizes
from minihyperflows.related.dhp.cost import LayerCost
from minihyperflows.related.filters import channel_scores, remove_filters, safeguard
from minihyperflows.related.pruners import attach_masks
from minihyperflows.related.ranking import Masks, keep_within, kept_fraction
from minihyperflows.related.rounds import Scores
from minihyperflows.studies import gradient_flow_filters as filters
from minihyperflows.studies import gradient_flow_weights as weights
from minihyperflows.studies.dhp_runs import (
    MACS,
    NETWORK,
    WEIGHTS,
    Course,
    Settings,
    finish,
    from_scratch,
    new_network,
    require_reachable,
    search,
    stream,
)
from minihyperflows.studies.dhp_tasks import DTYPE, EXPERIMENTS, Experiment, Task, steps_of
from minihyperflows.studies.gradient_flow_runs import Ranking, scorer
from minihyperflows.studies.options import choice, parse_fraction, seeds, values

WEIGHT, FILTER, WHOLE = "weight", "filter", ""
SCORES = ("random", "magnitude", "loss", "biased-loss", "grasp-200", "preserve-1")
METHODS = {
    WHOLE: ("dense",),
    WEIGHT: ("hyperflows", *SCORES),
    FILTER: (*SCORES, "dhp", "dhp-free", "uniform"),
}

COUNTED = (MACS, WEIGHTS)
CLASSIFIERS = [name for name in EXPERIMENTS if not name.startswith("dncnn")]

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


def parse_level(text: str) -> str:
    """The type of the option of a level; that of the dense network is "whole" there."""
    if text not in ("whole", WEIGHT, FILTER):
        raise UserError(f"there is no level {text!r}; choose from whole, {WEIGHT}, {FILTER}")
    return WHOLE if text == "whole" else text


@dataclasses.dataclass(frozen=True)
class Run:
    """What identifies a run. The dense network counts nothing and has no target: "" for both."""

    network: str = choice(*CLASSIFIERS, default=["conv-digits"], others=("--networks",))
    level: str = values(parse_level, *METHODS, others=("--levels",), help="whole, weight, filter")
    method: str = choice(*dict.fromkeys(chain(*METHODS.values())), others=("--methods",))
    counted: str = choice(*COUNTED)
    target: float | str = values(parse_fraction, 0.3, 0.1, others=("--targets",))
    seed: int = seeds(5)

    @property
    def goal(self) -> float:
        """The target of a run that prunes."""
        assert not isinstance(self.target, str)
        return self.target


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


# -- all of them ---------------------------------------------------------------------------------

METHOD_OF: dict[tuple[str, str], Callable[[Contest], Module]] = {
    (WHOLE, "dense"): train_whole,
    (WEIGHT, "hyperflows"): hyperflows,
    (FILTER, "dhp"): search_widths,
    (FILTER, "dhp-free"): search_widths,
    (FILTER, "uniform"): train_uniform,
    **{(WEIGHT, score): prune_weights for score in SCORES},
    **{(FILTER, score): prune_filters for score in SCORES},
}


def require_possible(contest: Contest) -> None:
    """Raise UserError if the method must keep more channels than its target allows."""
    run, net, image = contest.run, contest.network(), contest.task.input_shape
    if run.level != FILTER:
        return
    groups = channel_groups(net, image)
    floors: Mapping[str, int] = safeguard(groups)
    if run.method == "uniform":
        floors = dict.fromkeys(floors, 1)
    elif METHOD_OF[run.level, run.method] is search_widths:
        floors = new_network(contest.experiment, contest.task, True, run.seed).floors
    costs, whole = layer_costs(net, image, groups, run.counted), sizes(groups)
    least = dhp.macs(costs, whole | dict(floors)) / dhp.macs(costs, whole)
    require_reachable(run.goal, least, f"{run.method} of {run.network}, {run.counted}")
