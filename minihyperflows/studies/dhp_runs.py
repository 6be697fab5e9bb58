"""One search, one training, the controls: the runs behind the claims about DHP.

A run is a function of an experiment, its settings and a seed. Networks of one seed begin with the
same weights, and are trained on the same batches in the same order.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from minihyperflows.engine import Tensor
from minihyperflows.engine.backend import Array, to_numpy, xp_of
from minihyperflows.errors import UserError
from minihyperflows.lab.recipes import scheduled_lr
from minihyperflows.lab.training import make_optimizer
from minihyperflows.nn import Module
from minihyperflows.related import dhp
from minihyperflows.related.cutting import set_widths
from minihyperflows.studies.dhp_tasks import Experiment, Task, steps_of

Widths = dict[str, int]
MACS, WEIGHTS = "macs", "weights"

AIM = 0.5  # of a search's time: when latents that the data leave alone reach the target
STOP_LIMIT = 0.02
STATISTICS = 20  # batches that batch-norm statistics are estimated from
SMALLEST_SHARE = 0.1  # of random widths

# The authors' weight decay multiplies a latent by exp(-1e-4) in each of the 781 steps of an epoch.
# A search here is too short for that: see :func:`strong_decay`.
AUTHORS_DECAY = 1e-4 * 781 * 20

# Streams of random numbers of one seed
NETWORK, HYPERNETWORK, SEARCH, TRAINING, CHANNELS = range(5)


def stream(seed: int, what: int) -> np.random.Generator:
    """Random numbers that do not depend on what else was drawn with the seed."""
    return np.random.default_rng([seed, what])


# -- searching -----------------------------------------------------------------------------------


def keep_all(z: Array, tau: float) -> Array:
    """No proximal step."""
    return z


def subgradient_step(z: Array, tau: float) -> Array:
    """z - tau sign(z): a step along the subgradient of tau |z|_1, which passes through zero."""
    return z - tau * xp_of(z).sign(z)


# How latents shrink: all three pull with the same strength on a latent that is not near zero.
RULES: dict[str, Callable[[Array, float], Array]] = {
    "proximal": dhp.soft_threshold,
    "subgradient": subgradient_step,
    "loss": keep_all,  # lambda (1 - momentum) |z|_1 is added to the loss instead
}


@dataclass(frozen=True)
class Settings:
    """Of a search.

    Attributes:
        target: the fraction of the multiplications to keep.
        hyper_bias: whether the hypernetworks have biases.
        pull: lambda over the one that is chosen for the target.
        rule: one of ``RULES``.
        latent_decay: the weight decay of the latents; None: that of everything else.
        stops: at the target; otherwise it uses up its time.
        counted: what the target is a fraction of: "macs", multiplications, or "weights".
    """

    target: float
    hyper_bias: bool = True
    pull: float = 1.0
    rule: str = "proximal"
    latent_decay: float | None = None
    stops: bool = True
    counted: str = MACS


@dataclass(frozen=True)
class Look:
    """A search after ``step`` steps.

    Attributes:
        ratio: multiplications with the latents above T, over those of the whole network.
        free_ratio: the same if no latent had had a gradient from the loss.
        below, free_below: the fraction of the prunable latents with |z| < T.
        zero: the fraction that is exactly 0.
        loss: of the last batch.
    """

    step: int
    ratio: float
    free_ratio: float
    below: float
    free_below: float
    zero: float
    loss: float


@dataclass
class Searched:
    """What a search has found.

    Attributes:
        network: as it is now.
        initial: |z| of all latents at the beginning.
        free: how they would have shrunk by themselves.
        looks: in the course of it.
        steps: how many it has taken.
        reached: whether it has come to its target.
    """

    network: dhp.HyperNetwork
    initial: dict[str, np.ndarray]
    free: dhp.FreeShrinkage
    looks: list[Look] = field(default_factory=list)
    steps: int = 0
    reached: bool = False


def new_network(
    experiment: Experiment, task: Task, hyper_bias: bool, seed: int
) -> dhp.HyperNetwork:
    """The network of a seed with its hypernetworks."""
    return dhp.HyperNetwork(
        experiment.build(stream(seed, NETWORK)).to(task.device),
        task.input_shape,
        hyper_bias=hyper_bias,
        classifier_keeps=experiment.classifier_keeps,
        rng=stream(seed, HYPERNETWORK),
    )


def prunable(network: dhp.HyperNetwork) -> list[str]:
    """The names of the latents that may lose entries."""
    return [name for name, z in network.latents.items() if network.floors[name] < z.size]


def require_reachable(target: float, least: float, who: str) -> None:
    """Raise UserError, in the name of ``who``, if more than ``target`` stays in any case."""
    if least > target:
        raise UserError(
            f"{who}: {least:.3g} stays in any case, so choose a larger target than {target:g}"
        )


def strong_decay(experiment: Experiment, task: Task) -> float:
    """The weight decay that shrinks latents in a search here as the authors' does in 20 epochs."""
    steps, training = steps_of(experiment.search, task), experiment.training
    return AUTHORS_DECAY * (1 - training.momentum) / (training.lr * steps)


def chosen_l1(
    experiment: Experiment, network: dhp.HyperNetwork, settings: Settings, steps: int
) -> float:
    """The lambda for a search of at most ``steps`` steps.

    Unless the experiment says which: the one that brings latents without a gradient to the target
    in the fraction ``AIM`` of the steps. Without biases latents have gradients that hold them, so
    it is ``bias_free`` times as much.
    """
    l1, training = experiment.l1, experiment.training
    if l1 is None:
        widths = dhp.widths_at(settings.target, network.costs, network.groups, network.floors)
        names = prunable(network)
        kept = sum(widths[n] for n in names) / sum(network.latents[n].size for n in names)
        l1 = dhp.FreeShrinkage.losing(
            1 - kept,
            AIM * steps,
            threshold=network.threshold,
            lr=training.lr,
            weight_decay=training.weight_decay,
            momentum=training.momentum,
        ).l1
    return settings.pull * l1 * (1 if settings.hyper_bias else experiment.bias_free)


def begin(
    experiment: Experiment, task: Task, settings: Settings, seed: int
) -> tuple[dhp.Search, Searched]:
    """A search before its first step, at the first learning rate of the experiment's schedule."""
    network = new_network(experiment, task, settings.hyper_bias, seed)
    if settings.counted == WEIGHTS:
        network.costs = dhp.layer_weights(network.net, network.groups)
    training = experiment.training
    decay = training.weight_decay if settings.latent_decay is None else settings.latent_decay
    l1 = chosen_l1(experiment, network, settings, steps_of(experiment.search, task))
    run = dhp.Search(
        network,
        settings.target,
        l1,
        lr=training.lr,
        momentum=training.momentum,
        weight_decay=training.weight_decay,
        latent_decay=decay,
        stop_limit=STOP_LIMIT,
        check_every=experiment.check_every,
        proximal=RULES[settings.rule],
    )
    if training.optimizer != "sgd":
        run.weight_optimizer = make_optimizer(network.parameters(), training)
        run.latent_optimizer = make_optimizer(list(network.latents.values()), training)
    free = dhp.FreeShrinkage(l1, training.lr, decay, training.momentum)
    initial = {name: abs(to_numpy(z.data)) for name, z in network.latents.items()}
    return run, Searched(network, initial, free)


def search(experiment: Experiment, task: Task, settings: Settings, seed: int) -> Searched:
    """Search until the target is reached, or the experiment's time is up."""
    run, found = begin(experiment, task, settings, seed)
    found.looks.append(look(found, math.nan))
    limit = steps_of(experiment.search, task)
    for x, wanted in itertools.islice(task.batches(stream(seed, SEARCH)), limit):
        found.network.zero_grad()
        loss = task.loss(found.network(x), wanted)
        loss.backward()
        if settings.rule == "loss":
            add_subgradient(found.network, run.l1 * (1 - run.momentum))
        run.step()
        found.steps, found.reached = run.steps, run.reached
        if run.steps % run.check_every == 0:
            found.looks.append(look(found, loss.item()))
        if settings.stops and run.reached:
            break
    return found


def add_subgradient(network: dhp.HyperNetwork, strength: float) -> None:
    """Add the gradient of ``strength`` |z|_1 to those of the prunable latents."""
    for name in prunable(network):
        z = network.latents[name]
        assert z.grad is not None
        z.grad = z.grad + strength * xp_of(z.data).sign(z.data)


def look(found: Searched, loss: float) -> Look:
    """Where a search is now."""
    network, names = found.network, prunable(found.network)
    counts, free = network.latent_counts(), free_latents(found)
    size = sum(counts[name].size for name in names)
    return Look(
        step=found.steps,
        ratio=network.flops_ratio(),
        free_ratio=ratio_of(network, network.sizes() | free_widths(found)),
        below=sum(counts[name].below for name in names) / size,
        free_below=sum(int((free[name] < network.threshold).sum()) for name in names) / size,
        zero=sum(counts[name].zero for name in names) / size,
        loss=loss,
    )


def free_latents(found: Searched) -> dict[str, np.ndarray]:
    """|z| after as many steps if the data had said nothing, by the closed form."""
    after = found.free.size_after
    return {name: np.asarray(after(found.steps, z)) for name, z in found.initial.items()}


def free_widths(found: Searched) -> Widths:
    """How many entries of each prunable latent would survive then."""
    network, free = found.network, free_latents(found)
    return {
        name: int(dhp.survivors(free[name], network.threshold, network.floors[name]).sum())
        for name in prunable(network)
    }


def ratio_of(network: dhp.HyperNetwork, widths: Mapping[str, int]) -> float:
    """Multiplications with these widths over those of the whole network."""
    return dhp.macs(network.costs, widths) / dhp.macs(network.costs, network.sizes())


def survival_auc(initial: np.ndarray, kept: np.ndarray) -> float:
    """The probability that a survivor began larger than one that did not survive.

    1/2 if the beginning tells nothing, 1 if it decides; NaN if all survive or none does.
    """
    if kept.all() or not kept.any():
        return math.nan
    alive, dead = initial[kept][:, None], initial[~kept]
    return float(np.mean((alive > dead) + 0.5 * (alive == dead)))


# -- training ------------------------------------------------------------------------------------


class Course:
    """The training of an ordinary network, step by step, with the whole schedule in all its steps.

    The network may be exchanged on the way, for what pruning has left of it: the batches go on, a
    new optimiser begins.

    Attributes:
        step: how many steps are done.
        steps: how many there are.
    """

    def __init__(self, experiment: Experiment, task: Task, steps: int, seed: int) -> None:
        self.training, self.task, self.step, self.steps = experiment.training, task, 0, steps
        self._batches = task.batches(stream(seed, TRAINING))
        self._net: Module | None = None

    def advance(
        self,
        net: Module,
        until: int,
        penalised: Callable[[Tensor], Tensor] = lambda loss: loss,
        after_step: Callable[[int], object] = lambda step: None,
    ) -> None:
        """Train ``net`` up to the step ``until``.

        Args:
            net: all its parameters are trained.
            until: a number of steps.
            penalised: what to minimise, given the loss of a batch.
            after_step: called with the number of each step, when its gradients are still there.
        """
        training = self.training
        if net is not self._net:
            self._net, self._optimizer = net, make_optimizer(net.parameters(), training)
        for x, wanted in itertools.islice(self._batches, until - self.step):
            done = self.step / self.steps
            self._optimizer.lr = scheduled_lr(training.schedule, training.lr, training.end_lr, done)
            net.zero_grad()
            penalised(self.task.loss(net(x), wanted)).backward()
            self._optimizer.step()
            self.step += 1
            after_step(self.step)


def train(net: Module, experiment: Experiment, task: Task, steps: int, seed: int) -> None:
    """Train an ordinary network for ``steps`` steps, with the whole schedule in them."""
    Course(experiment, task, steps, seed).advance(net, steps)


def reestimate(net: Module, task: Task, seed: int) -> None:
    """Batch-norm statistics of training images, in place."""
    batches = itertools.islice(task.batches(stream(seed, SEARCH)), STATISTICS)
    dhp.reestimate_norms(net, (x for x, _ in batches))


@dataclass(frozen=True)
class Gap:
    """What a cut does to a network: its score with all channels, without those that were cut, then
    with new batch-norm statistics, and after training."""

    full: float
    cut: float
    reestimated: float
    trained: float


def finish(
    found: Searched,
    keep: Mapping[str, np.ndarray],
    experiment: Experiment,
    task: Task,
    seed: int,
) -> tuple[Module, Gap]:
    """Cut the searched network to ``keep`` and train it with what is left of the budget."""
    full = task.score(found.network)
    net = dhp.extract(found.network, keep)
    cut = task.score(net)
    reestimate(net, task, seed)
    reestimated = task.score(net)
    train(net, experiment, task, steps_of(experiment.budget, task) - found.steps, seed)
    return net, Gap(full, cut, reestimated, task.score(net))


def from_scratch(
    widths: Mapping[str, int], experiment: Experiment, task: Task, steps: int, seed: int
) -> Module:
    """An ordinary network of these widths, with initial weights, trained."""
    net = experiment.build(stream(seed, NETWORK))
    set_widths(net, task.input_shape, widths)
    net.to(task.device)
    train(net, experiment, task, steps, seed)
    return net


def uniform_widths(network: dhp.HyperNetwork, ratio: float) -> Widths:
    """The same fraction of every group's channels, at most ``ratio`` of the multiplications."""
    return dhp.widths_at(ratio, network.costs, network.groups, network.floors)


def random_widths(network: dhp.HyperNetwork, ratio: float, seed: int) -> Widths:
    """Fractions drawn for every group, scaled to at most ``ratio`` of the multiplications."""
    rng = stream(seed, CHANNELS)
    shares = {name: rng.uniform(SMALLEST_SHARE, 1) for name in prunable(network)}
    return dhp.widths_at(ratio, network.costs, network.groups, network.floors, shares)
