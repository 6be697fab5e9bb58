"""A training that pruning interrupts, and what the pruning does to it.

All runs of a seed begin with the same network and read the same batches in the same order, by
stochastic gradient descent at one learning rate, for the same number of epochs. Pruning begins
after some of these epochs: with one round all at once, with several at even distances in the next
``window`` epochs. The optimiser is new after every round, as in Lubana & Dick 2021. The last epochs
belong to the survivors. Nothing is selected: the accuracy is that after the last epoch.

What a run leaves (:func:`prune_and_train`):

    loss_before, loss_after        L on ``probed`` training images around the first round
    gradient_norm_before, _after   |g| of all parameters
    gradient_ratio                 after / before
    overlap_before, _after         theta.g of all parameters, -1/2 d|theta|^2/dt
    overlap_error                  |after - before| / |before|: what is lost of this rate
    last_pruning                   the epoch of the last round
    loss_one_epoch                 L one epoch after the last round
    loss_area                      the loss of the batches of the ``tail`` epochs after it, summed,
                                   in units of loss times epochs
    train_loss, test_accuracy      L and the accuracy at the end
    diverged                       1 if the loss became infinite; then the others are empty
    cpu_seconds                    of the processor, without the epochs before the first round

L is the mean cross-entropy in evaluation mode, without weight decay.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import numpy as np

from minihyperflows import functional as F
from minihyperflows.data.datasets import Dataset, normalise
from minihyperflows.engine import NonFiniteLossError, Tensor
from minihyperflows.errors import UserError
from minihyperflows.lab.training import evaluate
from minihyperflows.nn import Module, optim
from minihyperflows.related.derivatives import Landscape
from minihyperflows.related.rounds import Round, Scores, Train
from minihyperflows.related.scores import importance

Row: TypeAlias = dict[str, Any]
Build: TypeAlias = Callable[[Dataset, np.random.Generator], Module]
DTYPE = np.float32
PROBE_BATCH = 500
DIVERGED: Row = {"diverged": 1}

# -- what to do ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Plan:
    """The budget of a run.

    Attributes:
        images, test_images: how many of each to use, the first ones.
        epochs: of the whole training.
        batch_size, lr, momentum, weight_decay: of the training.
        window: the epochs from the first of several rounds to the last.
        tail: the epochs after the last round that there are in any case.
        scored: how many training images a score is computed from, new ones each round.
        probed: how many training images losses and gradients are measured on.
    """

    images: int
    test_images: int
    epochs: int
    batch_size: int
    lr: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 1e-4
    window: int = 3
    tail: int = 3
    scored: int = 512
    probed: int = 2000

    def check(self, start: int, rounds: int) -> None:
        """Raise UserError unless pruning from epoch ``start`` on leaves the tail."""
        if start < 0 or rounds < 1:
            raise UserError(f"{rounds} rounds from epoch {start} on: there is no such pruning")
        last = start + (self.window if rounds > 1 else 0)
        if last + self.tail > self.epochs:
            raise UserError(
                f"pruning from epoch {start} to {last} leaves less than {self.tail} of "
                f"{self.epochs} epochs for the survivors: choose an earlier time or more epochs"
            )

    def moments(self, start: int, rounds: int, steps: int) -> list[int]:
        """The steps at which the rounds come, if an epoch has ``steps``."""
        gaps = max(rounds - 1, 1)
        return [start * steps + round(k * self.window * steps / gaps) for k in range(rounds)]


@dataclasses.dataclass(frozen=True)
class Ranking:
    """A score of :mod:`minihyperflows.related.scores` and the temperature of its loss."""

    score: str
    temperature: float = 1.0


class Task:
    """What all runs share: the images, and the dense networks that pruning begins with.

    Attributes:
        data: the images that the plan uses.
        x, labels: the training images, normalised, and their labels.
        steps: how many an epoch has.
    """

    def __init__(self, data: Dataset, plan: Plan, build: Build) -> None:
        self.data = dataclasses.replace(
            data,
            train_x=data.train_x[: plan.images],
            train_y=data.train_y[: plan.images],
            test_x=data.test_x[: plan.test_images],
            test_y=data.test_y[: plan.test_images],
        )
        self.plan, self.build = plan, build
        self.x, self.labels = normalise(self.data.train_x, data, DTYPE), self.data.train_y
        self.steps = -(-len(self.labels) // plan.batch_size)
        self._dense: dict[tuple[int, int], Module] = {}

    def network(self, seed: int) -> Module:
        """The seed's network with its initial weights."""
        return self.build(self.data, np.random.default_rng(seed))

    def dense(self, seed: int, epochs: int) -> Module:
        """A copy of the seed's network after so many epochs, trained once for all runs of the
        seed.

        Raises:
            NonFiniteLossError: the loss became NaN or infinite.
        """
        if (seed, epochs) not in self._dense:
            net = self.network(seed)
            Course(self, seed).advance(net, epochs * self.steps)
            net.zero_grad()
            others = {key: other for key, other in self._dense.items() if key[0] == seed}
            self._dense = others | {(seed, epochs): net}
        return copy.deepcopy(self._dense[seed, epochs])

    def scores(self, ranking: Ranking, level: str, seed: int) -> Scores:
        """A function that scores a network in evaluation mode, each time with other images."""
        images, draws = np.random.default_rng([seed, 1]), np.random.default_rng([seed, 2])
        return scorer(
            ranking,
            level,
            lambda chosen: self.x[chosen],
            self.labels,
            number=self.plan.scored,
            batch_size=self.plan.batch_size,
            images=images,
            draws=draws,
        )

    def landscape(self, net: Module) -> Landscape:
        """The loss on the probed images."""
        probed = slice(self.plan.probed)
        x, labels = self.x[probed], self.labels[probed]
        return Landscape(net, x, labels, mode="eval", batch_size=PROBE_BATCH)


def scorer(
    ranking: Ranking,
    level: str,
    look: Callable[[np.ndarray], np.ndarray],
    labels: np.ndarray,
    *,
    number: int,
    batch_size: int,
    images: np.random.Generator,
    draws: np.random.Generator,
) -> Scores:
    """A function that scores a network in evaluation mode, each time with other images.

    Args:
        ranking, level: which score, of weights or of filters.
        look: the images with given numbers, normalised.
        labels: of all images.
        number: how many images a score is computed from; at most all.
        batch_size: how many at once.
        images: chooses them.
        draws: for random scores.

    The function raises NonFiniteLossError if a score is NaN, as it is once a weight is.
    """

    def score(net: Module) -> dict[str, np.ndarray]:
        chosen = images.choice(len(labels), min(number, len(labels)), replace=False)
        options: dict[str, Any] = {"batch_size": batch_size, "dtype": DTYPE}
        kind = ranking.score, level, ranking.temperature, "eval"
        found = importance(net, look(chosen), labels[chosen], *kind, rng=draws, **options)
        if any(np.isnan(values).any() for values in found.values()):
            raise NonFiniteLossError("a score is NaN: the training has diverged")
        return found

    return score


# -- training ------------------------------------------------------------------------------------


class Course:
    """The training of one seed, step by step, whatever network it is that is trained.

    Attributes:
        step: steps done.
        losses: the loss of each step's batch, by step; NaN for those that somebody else has done.
    """

    def __init__(self, task: Task, seed: int, step: int = 0) -> None:
        self.task, self.seed, self.step = task, seed, step
        self.losses = [math.nan] * step
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, int))

    def advance(self, net: Module, until: int) -> None:
        """Train ``net`` by a new optimiser up to the step ``until``.

        Raises:
            NonFiniteLossError: the loss became NaN or infinite.
        """
        plan = self.task.plan
        optimizer = optim.SGD(net.parameters(), plan.lr, plan.momentum, plan.weight_decay)
        with np.errstate(over="ignore", invalid="ignore"):
            while self.step < until:
                batch = self._batch()
                net.zero_grad()
                logits = net(Tensor(self.task.x[batch]))
                loss = F.cross_entropy(logits, self.task.labels[batch])
                loss.backward()
                optimizer.step()
                self.losses.append(loss.item())
                self.step += 1

    def _batch(self) -> np.ndarray:
        """The images of the next step. The order of an epoch depends on nothing but the seed."""
        epoch, i = divmod(self.step, self.task.steps)
        if self._order[0] != epoch:
            rng = np.random.default_rng([self.seed, 3, epoch])
            self._order = epoch, rng.permutation(len(self.task.labels))
        size = self.task.plan.batch_size
        return self._order[1][i * size : (i + 1) * size]


@dataclasses.dataclass(frozen=True)
class State:
    """Loss, norm of the gradient and theta.g of a network."""

    loss: float
    gradient_norm: float
    overlap: float

    @classmethod
    def of(cls, landscape: Landscape) -> State:
        """At the network's weights; removed weights have no gradient and do not count."""
        weights = landscape.weights
        gradient = landscape.gradient(weights).astype(np.float64)
        return cls(landscape.loss(), float(np.linalg.norm(gradient)), float(weights @ gradient))


def prune_and_train(
    task: Task,
    seed: int,
    start: int,
    rounds: int,
    prune: Callable[[Module, Train], Iterator[Round]],
) -> tuple[list[Round], Row]:
    """A whole run: the rounds, of which the last has the trained network, and the measurements.

    If the training diverges, the rounds that it has come to, maybe none.

    Args:
        task: what to train on.
        seed: of the network and its batches.
        start: the epoch after which pruning begins.
        rounds: how many there are.
        prune: makes the rounds, by calling what it is given to train a network before each.
    """
    course = Course(task, seed, start * task.steps)
    moments = iter(task.plan.moments(start, rounds, task.steps))
    done: list[Round] = []
    try:
        net, began = task.dense(seed, start), time.process_time()
        before = State.of(task.landscape(net))
        for pruned in prune(net, lambda net: course.advance(net, next(moments))):
            done.append(pruned)
            if pruned.number == 1:
                effects = _effects(before, State.of(task.landscape(pruned.net)))
        effects |= _recovery(task, course, done[-1].net)
    except NonFiniteLossError:
        return done, DIVERGED
    return done, effects | {"cpu_seconds": time.process_time() - began}


def train_dense(task: Task, seed: int) -> Row:
    """What the same training makes of the network without pruning."""
    try:
        return _end(task, task.dense(seed, task.plan.epochs))
    except NonFiniteLossError:
        return DIVERGED


def _effects(before: State, after: State) -> Row:
    """What the first round did."""
    return {
        "loss_before": before.loss,
        "loss_after": after.loss,
        "gradient_norm_before": before.gradient_norm,
        "gradient_norm_after": after.gradient_norm,
        "gradient_ratio": after.gradient_norm / before.gradient_norm,
        "overlap_before": before.overlap,
        "overlap_after": after.overlap,
        "overlap_error": abs(after.overlap - before.overlap) / abs(before.overlap),
    }


def _recovery(task: Task, course: Course, net: Module) -> Row:
    """The rest of the training, after the last round."""
    last, plan = course.step, task.plan
    course.advance(net, last + task.steps)
    one_epoch = task.landscape(net).loss()
    course.advance(net, last + plan.tail * task.steps)
    area = sum(course.losses[last:]) / task.steps
    course.advance(net, plan.epochs * task.steps)
    return {
        "last_pruning": last / task.steps,
        "loss_one_epoch": one_epoch,
        "loss_area": area,
    } | _end(task, net)


def _end(task: Task, net: Module) -> Row:
    """What the training has come to."""
    return {
        "train_loss": task.landscape(net).loss(),
        "test_accuracy": evaluate(net, task.data),
        "diverged": 0,
    }
