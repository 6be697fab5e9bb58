"""The claims of DHP, tested: how the search shrinks, what the cut destroys, what widths are worth.

    minihyperflows study dhp_claims --network mlp-digits --out FILE

Networks, schedules and data sets are the experiments of :mod:`dhp_tasks`; the runs are defined in
:mod:`dhp_runs`. Four parts, each with variants:

    search      x0.25, x1, x4: a search that does not stop, with these multiples of the chosen
                lambda, beside what latents do that the data leave alone
    rules       proximal, subgradient, loss: three ways to pull a latent towards zero, equally hard
    decay       neither, decay, l1, both: weight decay of the latents (as much in one search as the
                authors' in 20 epochs) and lambda, on and off
    controls    all at the same number of steps, those of the search counted:
                dhp         search to the target, cut, train with the rest of the steps
                permuted    the same, but as many channels of every group, at random
                scratch     a new network of the widths found, trained with all steps
                short       the same, trained only with as many steps as dhp after its search
                uniform     a new network with the same fraction of every group's channels
                random      a new network with fractions drawn at random
                dense       the whole network

Uniform and random widths cost at most as many multiplications as the widths that dhp found with
the same seed; ``ratio`` says how many. All parts are done with biases in the hypernetworks, as
published, and without. A search of the other parts than ``controls`` uses up its time; its lambda
is the one for the first target.

Three tables, which belong together by the columns part, network, hyper_bias, variant, target and
seed. FILE has a row for every run; FILE-looks the course of every search (:class:`dhp_runs.Look`);
FILE-groups the groups of channels at its end. Columns of FILE: ``l1`` (lambda), ``search_steps``
and ``train_steps``, ``reached`` (1: the search came to its target), ``ratio`` of the
multiplications, ``free_ratio`` by the closed form at the last step, ``widths`` and ``parameters``
of the network that is left; ``full_score``, ``cut_score`` and ``reestimated_score``: of the
searched network, after the cut, and with batch-norm statistics estimated anew; ``score`` after
training. A score is an accuracy on the test set, or for ``dncnn-`` a PSNR in dB (``metric``).
Nothing is selected: scores are those of the last step. (Without biases a cut is exact where the
latents are 0, but in the perceptrons the classifier, which no hypernetwork makes, loses what batch
norm's shift gave it through dead channels.) Columns of FILE-groups: ``size``, ``floor``,
``width``, ``zero`` (entries that are exactly 0), ``free_width`` by the closed form, ``auc``: the
probability that a survivor began with a larger |z| than one that did not survive.

The files are the state: a run that is in them is not repeated. Parts, networks, variants, targets
and seeds can be chosen, so that several processes share the work; ``--join FILE...`` takes over
their rows, and does no runs.

On one core of a laptop's processor a run of ``mlp-digits`` takes some seconds, of ``conv-digits``,
``mlp-mnist`` and ``conv-mnist`` (10,000 images of 14 x 14) up to half a minute, of
``dncnn-cifar10`` two or three minutes, of ``resnet20-small-cifar10`` seven: that is a ResNet-20 of
full width whose first convolution has stride 4, with 8 epochs of all images. ``resnet20-cifar10``
is the authors' schedule, 300 epochs after a search of some 20: for a GPU (``--device cuda``), or
for days.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from minihyperflows.errors import UserError
from minihyperflows.nn import Module
from minihyperflows.related.ranking import shuffled
from minihyperflows.studies.dhp_runs import (
    CHANNELS,
    Searched,
    Settings,
    finish,
    free_widths,
    from_scratch,
    new_network,
    prunable,
    random_widths,
    ratio_of,
    require_reachable,
    search,
    stream,
    strong_decay,
    survival_auc,
    uniform_widths,
)
from minihyperflows.studies.dhp_tables import (
    BIAS,
    CONTROLS,
    DENSE,
    DHP,
    PARTS,
    PULLS,
    SEARCHED,
    Row,
    Run,
    text_of,
    widths_of,
)
from minihyperflows.studies.dhp_tasks import DTYPE, EXPERIMENTS, Experiment, Task, steps_of
from minihyperflows.studies.frame import Bench, Study, Tables, main

LOOKS = 30  # rows for the course of a search


# -- runs ----------------------------------------------------------------------------------------


class DhpClaims(Study[Run]):
    """The claims of DHP, tested: how the search shrinks, what the cut destroys, what widths do."""

    name, Setting, parts, digits = "dhp_claims", Run, ("looks", "groups"), 9
    devices, unit, shown = ("cpu", "cuda"), "step", ("ratio", "score")

    def plan(self, chosen: dict[str, tuple[Any, ...]]) -> Iterator[Run]:
        """The runs that were asked for, and those that they need."""
        for network in chosen["network"]:
            targets = chosen["target"] or EXPERIMENTS[network].targets
            if set(chosen["part"]) - set(parts_of(network)):
                raise UserError(f"rules and decay are for SGD, and {network} is trained with Adam")
            for part in chosen["part"] or parts_of(network):
                wanted = chosen["variant"] or PARTS[part]
                variants = [v for v in PARTS[part] if v in wanted]
                if set(variants) - {DHP, DENSE} and part == CONTROLS:
                    variants = [DHP, *(v for v in variants if v != DHP)]
                for seed in chosen["seed"]:
                    if DENSE in variants:
                        yield Run(part, network, "", DENSE, "", seed)
                    pruned = [v for v in variants if v != DENSE]
                    goals = targets if part == CONTROLS else targets[:1]
                    for bias, target in itertools.product(chosen["hyper_bias"], goals):
                        for variant in pruned:
                            yield Run(part, network, bias, variant, target, seed)

    def shares(self, s: Run) -> Any:
        return s.variation("")

    def dataset(self, s: Run) -> str:
        return s.experiment.dataset

    def dtype(self, s: Run) -> str:
        return np.dtype(DTYPE).name

    def task(self, s: Run, bench: Bench) -> Task:
        """The data and what is done with them."""
        load = s.experiment.load
        return bench.shared(("task", s.network), lambda: load(bench.data_dir, bench.device))

    def check(self, s: Run, bench: Bench) -> None:
        task = self.task(s, bench)
        if s.variant != DENSE:
            possible = partial(require_possible, s.network, s.target, task)
            bench.shared((("possible", s.network, s.target),), possible)

    def run(self, s: Run, bench: Bench) -> Tables:
        task, started = self.task(s, bench), time.perf_counter()
        task.tick = bench.tick
        looks: list[Row] = []
        groups: list[Row] = []
        if s.part != CONTROLS or s.variant in SEARCHED:
            found = self._search(s, task, bench)
            result = self._after_search(s, task, found)
            if s.variant != "permuted":
                looks = rows_of_looks(s, found, steps_of(s.experiment.search, task))
                groups = rows_of_groups(s, found)
        else:
            result = self._train(s, task, bench)
        head = {"dataset": s.experiment.dataset, "metric": task.metric}
        end = {"seconds": time.perf_counter() - started}
        return [looks, groups, [head | result | end]]

    def _search(self, run: Run, task: Task, bench: Bench) -> Searched:
        """The search of this run, which may have been done for the one before."""
        key = run.variation(DHP) if run.part == CONTROLS else run
        settings = settings_of(run, run.experiment, task)
        return bench.shared(
            ("search", key), lambda: search(run.experiment, task, settings, run.seed)
        )

    def _after_search(self, run: Run, task: Task, found: Searched) -> Row:
        """What a search has found; for a control the cut and the training after it, too."""
        network = found.network
        result = {
            "l1": found.free.l1,
            "search_steps": found.steps,
            "train_steps": 0,
            "reached": int(found.reached),
            "ratio": network.flops_ratio(),
            "free_ratio": ratio_of(network, network.sizes() | free_widths(found)),
            "widths": text_of(network.widths()),
        }
        if run.part != CONTROLS:
            return result | {"full_score": task.score(network)}
        keep = network.kept()
        if run.variant != DHP:  # as many of every group, at random
            keep = shuffled(keep, stream(run.seed, CHANNELS))
        net, gap = finish(found, keep, run.experiment, task, run.seed)
        return (
            result
            | {"train_steps": steps_of(run.epochs, task) - found.steps}
            | {"full_score": gap.full, "cut_score": gap.cut}
            | {"reestimated_score": gap.reestimated}
            | {"parameters": size_of(net), "score": gap.trained}
        )

    def _train(self, run: Run, task: Task, bench: Bench) -> Row:
        """A network from scratch."""
        experiment, seed = run.experiment, run.seed
        network = new_network(experiment, task, True, seed)
        steps, widths = steps_of(run.epochs, task), network.sizes()
        if run.variant != DENSE:
            other = self.key(run.variation(DHP))
            found = next(row for row in bench.rows if self.key_of(row) == other)
            widths = widths_of(found["widths"])
            steps -= found["search_steps"] if run.variant == "short" else 0
        ratio = ratio_of(network, widths)
        if run.variant == "uniform":
            widths = uniform_widths(network, ratio)
        elif run.variant == "random":
            widths = random_widths(network, ratio, seed)
        net = from_scratch(widths, experiment, task, steps, seed)
        return {
            "search_steps": 0,
            "train_steps": steps,
            "ratio": ratio_of(network, widths),
            "widths": text_of(widths),
            "parameters": size_of(net),
            "score": task.score(net),
        }


def settings_of(run: Run, experiment: Experiment, task: Task) -> Settings:
    """Of the search that a run begins with."""
    target = run.target
    assert not isinstance(target, str)
    settings = Settings(target, BIAS[run.hyper_bias], stops=run.part == CONTROLS)
    if run.part == "search":
        return dataclasses.replace(settings, pull=PULLS[run.variant])
    if run.part == "rules":
        return dataclasses.replace(settings, rule=run.variant)
    if run.part == "decay":
        decay = strong_decay(experiment, task) if run.variant in ("decay", "both") else 0.0
        pull = 1.0 if run.variant in ("l1", "both") else 0.0
        return dataclasses.replace(settings, latent_decay=decay, pull=pull)
    return settings


def rows_of_looks(run: Run, found: Searched, limit: int) -> list[Row]:
    """The course of a search: about ``LOOKS`` rows if it took ``limit`` steps, and the last one."""
    every = run.experiment.check_every
    every *= -(-limit // (LOOKS * every))
    looks = [look for look in found.looks if look.step % every == 0 or look is found.looks[-1]]
    return [dataclasses.asdict(run) | dataclasses.asdict(look) for look in looks]


def rows_of_groups(run: Run, found: Searched) -> list[Row]:
    """The prunable groups of channels at the end of a search."""
    network, free = found.network, free_widths(found)
    counts, kept = network.latent_counts(), network.kept()
    return [
        dataclasses.asdict(run)
        | {
            "group": name,
            "size": counts[name].size,
            "floor": network.floors[name],
            "width": int(kept[name].sum()),
            "zero": counts[name].zero,
            "free_width": free[name],
            "auc": survival_auc(found.initial[name], kept[name]),
        }
        for name in prunable(network)
    ]


def size_of(net: Module) -> int:
    """The number of parameters."""
    return sum(parameter.size for parameter in net.parameters())


def parts_of(network: str) -> tuple[str, ...]:
    """The parts that there are for a network: rules and decay of latents are about SGD."""
    optimizer = EXPERIMENTS[network].training.optimizer
    return tuple(p for p in PARTS if optimizer == "sgd" or p not in ("rules", "decay"))


def require_possible(network: str, target: float | str, task: Task) -> None:
    """Raise UserError if the channels that no search removes cost more than ``target``."""
    assert not isinstance(target, str)
    whole = new_network(EXPERIMENTS[network], task, True, seed=0)
    require_reachable(target, ratio_of(whole, whole.sizes() | whole.floors), network)


STUDY = DhpClaims()

if __name__ == "__main__":
    main(STUDY, listed=True)
