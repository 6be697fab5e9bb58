"""The claims of DHP, tested: how the search shrinks, what the cut destroys, what widths are worth.

    python -m minihyperflows.studies.dhp_claims --networks mlp-digits --out FILE

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

import argparse
import dataclasses
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from minihyperflows.errors import UserError
from minihyperflows.lab.console import Parser
from minihyperflows.lab.records import adds_to_table
from minihyperflows.lab.runs import gpu_versions, provenance
from minihyperflows.nn import Module
from minihyperflows.related.ranking import shuffled
from minihyperflows.studies.command import parse_fraction, parse_seed, reporting
from minihyperflows.studies.dhp_runs import (
    CHANNELS,
    RULES,
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
    CONTROLS,
    DENSE,
    DHP,
    Row,
    Run,
    Tables,
    text_of,
    widths_of,
)
from minihyperflows.studies.dhp_tasks import DTYPE, EXPERIMENTS, Experiment, Task, steps_of

MODULE = "minihyperflows.studies.dhp_claims"
SEARCHED = (DHP, "permuted")  # begin with a search
PULLS = {"x0.25": 0.25, "x1": 1.0, "x4": 4.0}
PARTS: dict[str, tuple[str, ...]] = {
    "search": tuple(PULLS),
    "rules": tuple(RULES),
    "decay": ("neither", "decay", "l1", "both"),
    CONTROLS: (*SEARCHED, "scratch", "short", "uniform", "random", DENSE),
}
BIAS = {"yes": True, "no": False}
SEEDS = (0, 1, 2, 3, 4)
LOOKS = 30  # rows for the course of a search


# -- runs ----------------------------------------------------------------------------------------


class Study:
    """Does runs, and remembers the last search, which several of them begin with."""

    def __init__(self, tables: Tables, experiment: Experiment, task: Task) -> None:
        self.tables, self.experiment, self.task = tables, experiment, task
        self._last: tuple[Run, Searched] | None = None

    def do(self, run: Run) -> None:
        """Do a run and write its rows."""
        started = time.perf_counter()
        looks: list[Row] = []
        groups: list[Row] = []
        if run.part != CONTROLS or run.variant in SEARCHED:
            found = self._search(run)
            result = self._after_search(run, found)
            if run.variant != "permuted":
                looks = rows_of_looks(run, found, steps_of(self.experiment.search, self.task))
                groups = rows_of_groups(run, found)
        else:
            result = self._train(run)
        head = {"dataset": self.experiment.dataset, "metric": self.task.metric}
        end = {"seconds": time.perf_counter() - started} | source(run, self.task.device)
        self.tables.add(looks, groups, [dataclasses.asdict(run) | head | result | end])

    def _search(self, run: Run) -> Searched:
        """The search of this run, which may have been done for the one before."""
        key = run.variation(DHP) if run.part == CONTROLS else run
        if self._last is None or self._last[0] != key:
            self._last = None  # its memory is free for the next one
            settings = settings_of(run, self.experiment, self.task)
            self._last = key, search(self.experiment, self.task, settings, run.seed)
        return self._last[1]

    def _after_search(self, run: Run, found: Searched) -> Row:
        """What a search has found; for a control the cut and the training after it, too."""
        network, task = found.network, self.task
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
        net, gap = finish(found, keep, self.experiment, task, run.seed)
        return (
            result
            | {"train_steps": steps_of(run.epochs, task) - found.steps}
            | {"full_score": gap.full, "cut_score": gap.cut}
            | {"reestimated_score": gap.reestimated}
            | {"parameters": size_of(net), "score": gap.trained}
        )

    def _train(self, run: Run) -> Row:
        """A network from scratch."""
        experiment, task, seed = self.experiment, self.task, run.seed
        network = new_network(experiment, task, True, seed)
        steps, widths = steps_of(run.epochs, task), network.sizes()
        if run.variant != DENSE:
            found = self.tables.runs[run.variation(DHP)]
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


def source(run: Run, device: str) -> Row:
    """Where a row comes from; the command repeats it."""
    words = f"--parts {run.part} --networks {run.network} --variants {run.variant}"
    if run.variant != DENSE:
        words += f" --hyper-bias {run.hyper_bias} --targets {run.target}"
    words += f" --seeds {run.seed}"
    if run.experiment.dataset != "digits":
        words += " --data-dir DIR"
    if device != "cpu":
        words += f" --device {device}"
    row = provenance(np.dtype(DTYPE).name, f"python -m {MODULE} {words} --out FILE")
    return row | {"device": device} | (gpu_versions() if device == "cuda" else {})


# -- the study -----------------------------------------------------------------------------------


def parts_of(network: str) -> tuple[str, ...]:
    """The parts that there are for a network: rules and decay of latents are about SGD."""
    optimizer = EXPERIMENTS[network].training.optimizer
    return tuple(p for p in PARTS if optimizer == "sgd" or p not in ("rules", "decay"))


def plan(options: argparse.Namespace) -> Iterator[Run]:
    """The runs that were asked for, and those that they need."""
    for network in options.networks:
        targets = options.targets or EXPERIMENTS[network].targets
        for part in options.parts or parts_of(network):
            variants = [v for v in PARTS[part] if not options.variants or v in options.variants]
            if set(variants) - {DHP, DENSE} and part == CONTROLS:
                variants = [DHP, *(v for v in variants if v != DHP)]
            for seed in options.seeds:
                if DENSE in variants:
                    yield Run(part, network, "", DENSE, "", seed)
                for bias in options.hyper_bias:
                    for target in targets if part == CONTROLS else targets[:1]:
                        for variant in variants:
                            if variant != DENSE:
                                yield Run(part, network, bias, variant, target, seed)


def require_possible(network: str, target: float | str, task: Task) -> None:
    """Raise UserError if the channels that no search removes cost more than ``target``."""
    assert not isinstance(target, str)
    whole = new_network(EXPERIMENTS[network], task, True, seed=0)
    require_reachable(target, ratio_of(whole, whole.sizes() | whole.floors), network)


@adds_to_table
def run_study(options: argparse.Namespace) -> None:
    """Do the runs that are not in the tables yet; or take over those of other files."""
    tables = Tables(options.out)
    for file in options.join:
        tables.join(file)
    if options.join:
        return
    wanted = dict.fromkeys(plan(options))
    if not wanted:
        raise UserError("no run was asked for: none of these parts has one of these variants")
    missing = [run for run in wanted if run not in tables.done]
    tasks: dict[str, Task] = {}
    for run in missing:  # what cannot be loaded or reached is noticed before anything is done
        if run.network not in tasks:
            tasks[run.network] = run.experiment.load(options.data_dir, options.device)
    pruned = (run for run in missing if run.variant != DENSE)
    for network, target in dict.fromkeys((run.network, run.target) for run in pruned):
        require_possible(network, target, tasks[network])
    steps = {run: steps_of(run.epochs, tasks[run.network]) for run in missing}
    with tqdm(total=sum(steps.values()), unit="step", dynamic_ncols=True) as bar:
        done = 0
        for network, task in tasks.items():
            task.tick = bar.update
            study = Study(tables, EXPERIMENTS[network], task)
            for run in (run for run in missing if run.network == network):
                study.do(run)
                done += steps[run]
                bar.update(done - bar.n)  # it may have had fewer steps than planned


@reporting()
def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = Parser(prog=f"python -m {MODULE}", description=(__doc__ or "").splitlines()[0])
    names = [name for variants in PARTS.values() for name in variants]
    add = parser.add_argument
    add("--networks", nargs="+", choices=tuple(EXPERIMENTS), default=["mlp-digits"])
    add("--parts", nargs="+", choices=tuple(PARTS), help="all by default")
    add("--variants", nargs="+", choices=names, help="some variants of the parts only")
    add("--hyper-bias", nargs="+", choices=tuple(BIAS), default=list(BIAS))
    fractions = "fractions of the multiplications to keep"
    add("--targets", nargs="+", type=parse_fraction, help=fractions)
    add("--seeds", nargs="+", type=parse_seed, default=SEEDS)
    add("--data-dir", help="where MNIST and CIFAR lie")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--join", nargs="+", type=Path, default=(), metavar="FILE", help="only take their runs")
    add("--out", type=Path, required=True, help="the CSV file, continued if it is there")
    options = parser.parse_args(arguments)
    for network in options.networks:
        if set(options.parts or ()) - set(parts_of(network)):
            raise UserError(f"rules and decay are for SGD, and {network} is trained with Adam")
    run_study(options)


if __name__ == "__main__":
    main()
