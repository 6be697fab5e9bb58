"""Recipes: everything that defines an experiment, as plain data.

A recipe is a frozen dataclass; it is saved as ``recipe.json`` in every run's folder and read back
from there. Where a recipe differs from the authors' code, its ``deviations`` say so, once.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from minihyperflows.flows.scheduler import cosine
from minihyperflows.flows.stages import Timeline
from minihyperflows.lab.errors import UserError

SCHEDULES = ("constant", "cosine", "multistep")

# Fields of a recipe that do not bear on its dense stage.
AFTER_DENSE = (
    *("name", "target_sparsity", "pruning", "regrowth", "presence", "pressure"),
    *("authors_timeline", "deviations"),
)

# Fields with a number or nothing.
OPTIONAL = ("target_sparsity", "pressure.floor", "pressure.gamma")


def scheduled_lr(schedule: str, start: float, end: float, done: float) -> float:
    """The learning rate after the fraction ``done`` of a stage."""
    if schedule == "cosine":
        return cosine(start, end, done)
    if schedule == "multistep":
        return start * (1 if done < 1 / 2 else 0.1 if done < 3 / 4 else 0.01)
    if schedule == "constant":
        return start
    raise UserError(f"unknown schedule {schedule!r}: choose one of {', '.join(SCHEDULES)}")


@dataclass(frozen=True)
class WeightTraining:
    """How the weights are trained during one stage.

    ``schedule``: "constant" at ``lr``; "cosine" from ``lr`` to ``end_lr``; "multistep", ``lr``
    divided by ten after half and again after three quarters of the epochs.
    """

    epochs: int
    lr: float
    end_lr: float = 0.0
    schedule: str = "constant"
    optimizer: str = "adam"
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 0.0
    label_smoothing: float = 0.0

    def lr_at(self, epoch: int) -> float:
        """The learning rate of ``epoch`` (from 1) of this stage."""
        done = (epoch - 1) / self.epochs
        return scheduled_lr(self.schedule, self.lr, self.end_lr, done)


@dataclass(frozen=True)
class PresenceTraining:
    """How the presence parameters t are drawn and trained."""

    init: tuple[float, float] = (0.2, 0.5)
    optimizer: str = "adam"
    lr: float = 1e-3
    momentum: float = 0.9


@dataclass(frozen=True)
class PressureSettings:
    """The scheduler's settings (:class:`minihyperflows.flows.PressureScheduler`) and the floor.

    ``floor``: t at or below it feel no pressure; None for no floor. ``gamma``: a constant pressure
    instead of the scheduler.

    ``updates_per_epoch``: how often in an epoch, evenly spaced, the density is measured and the
    pressure changed. The scheduler needs some 20 to 50 updates to find the pressure; a recipe with
    few pruning epochs gets them by steering within the epochs. Its trajectory then counts periods
    of 1 / ``updates_per_epoch`` epochs.
    """

    step: float = 0.2
    exponent: float = 1.5
    aggressivity: float = 6.0
    floor: float | None = None
    gamma: float | None = None
    updates_per_epoch: int = 1

    def __post_init__(self) -> None:
        updates = self.updates_per_epoch
        if not isinstance(updates, int) or updates < 1:
            raise UserError(f"updates_per_epoch must be a whole number from 1 on, not {updates!r}")
        if self.gamma is not None and not 0 <= self.gamma < math.inf:
            raise UserError(f"a pressure gamma is a number from 0 on, not {self.gamma:g}")


@dataclass(frozen=True)
class Regrowth:
    """The stage without pressure; the weights' optimiser is that of the pruning stage.

    The learning rate of t is ``lr_scale * lr_decay ** k`` times that of the pruning stage in epoch
    k = 0, 1, ..., and 0 after ``freeze_after`` epochs.

    ``land``: end on the target (:func:`minihyperflows.flows.land`). The pruning stage then aims at
    the density (1 - share) (1 - target), so ``share`` is the fraction of the final weights that is
    left to regrowth; t is frozen as soon as the target is reached, at the latest after half of the
    epochs. With ``land`` False the pruning stage aims at the target itself, as in the authors'
    code, and regrowth overshoots it.
    """

    epochs: int
    lr: float
    end_lr: float
    schedule: str = "cosine"
    land: bool = True
    share: float = 0.1
    lr_scale: float = 1.0
    lr_decay: float = 0.75
    freeze_after: int = 50

    def lr_at(self, epoch: int, offset: int = 0) -> float:
        """The weights' learning rate in ``epoch`` (from 1); the authors start one step later."""
        done = (epoch - 1 + offset) / self.epochs
        return scheduled_lr(self.schedule, self.lr, self.end_lr, done)

    def presence_lr_factor(self, epoch: int, offset: int = 0) -> float:
        """The factor on the learning rate of t in ``epoch`` (from 1)."""
        k = epoch - 1 + offset
        return 0.0 if k >= self.freeze_after else self.lr_scale * self.lr_decay**k


@dataclass(frozen=True)
class Recipe:
    """One experiment: a network, a data set, and the three stages.

    ``target_sparsity`` is None under a constant pressure (``pressure.gamma``), which leads to a
    density but aims at none.

    ``dtype`` is that of the weights and of everything on the CPU; ``gpu_dtype`` that of activations
    and weights in use on a GPU, "float16" or "float32".
    """

    name: str
    model: str
    dataset: str
    dense: WeightTraining
    pruning: WeightTraining
    regrowth: Regrowth
    target_sparsity: float | None
    model_options: dict[str, Any] = field(default_factory=dict)
    batch_size: int = 128
    augment: bool = False
    dtype: str = "float32"
    gpu_dtype: str = "float16"
    presence: PresenceTraining = field(default_factory=PresenceTraining)
    pressure: PressureSettings = field(default_factory=PressureSettings)
    train_bn_scale: bool = True
    authors_timeline: bool = False
    deviations: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.target_sparsity is None:
            self._require_no_need_of_a_target()
        elif not 0 < self.target_sparsity < 1:
            raise UserError(
                f"the target sparsity is the fraction of weights to remove, between 0 and 1 "
                f"(0.95, say), not {self.target_sparsity:g}"
            )
        if self.gpu_dtype not in ("float16", "float32"):
            raise UserError(f"a GPU computes in float16 or float32, not in {self.gpu_dtype}")

    def _require_no_need_of_a_target(self) -> None:
        if self.pressure.gamma is None:
            raise UserError("a recipe needs a target_sparsity, or a constant pressure.gamma")
        if self.regrowth.epochs and self.regrowth.land:
            raise UserError(
                "regrowth lands on a target: set target_sparsity, or regrowth.land to false"
            )

    @property
    def timeline(self) -> Timeline:
        """The lengths of the three stages as they run."""
        late = self.late_epochs
        return Timeline(self.dense.epochs, self.pruning.epochs + late, self.regrowth.epochs - late)

    @property
    def late_epochs(self) -> int:
        """By how many epochs the pressure outlasts its stage: 1 in the authors' code, else 0."""
        return int(self.authors_timeline)

    def with_target(self, sparsity: float) -> Recipe:
        """The same experiment with another target sparsity.

        Raises:
            UserError: it has none.
        """
        if self.target_sparsity is None:
            raise UserError(f"{self.name} has a constant pressure, which aims at no sparsity")
        return dataclasses.replace(self, target_sparsity=sparsity)

    def with_gamma(self, gamma: float) -> Recipe:
        """The same network under the constant pressure ``gamma``: no target, no regrowth stage.

        Raises:
            UserError: the recipe has no stage under pressure.
        """
        if self.pruning.epochs < 1:
            raise UserError(f"{self.name} has no stage under pressure: choose a recipe that has")
        return dataclasses.replace(
            self,
            target_sparsity=None,
            pressure=dataclasses.replace(self.pressure, gamma=float(gamma)),
            regrowth=dataclasses.replace(self.regrowth, epochs=0),
        )

    def with_fields(self, fields: Mapping[str, Any]) -> Recipe:
        """The same experiment with other values of some fields.

        Args:
            fields: by dotted name, ``{"presence.optimizer": "sgd", "pressure.floor": -0.3}``.

        Raises:
            UserError: there is no such field, or the value is of another type.
        """
        values = json.loads(json.dumps(self.to_json()))
        for name, value in fields.items():
            *path, last = name.split(".")
            part = values
            for step in path:
                part = part.get(step) if isinstance(part, dict) else None
            known = flat(values)
            if not isinstance(part, dict) or (name not in known and path != ["model_options"]):
                raise UserError(f"a recipe has no field {name!r}; it has {', '.join(known)}")
            if last in part and not _same_kind(name, part[last], value):
                raise UserError(f"{name} is {part[last]!r}; {value!r} is no value of that kind")
            part[last] = value
        return Recipe.from_json(values)

    def scaled(self, factor: float) -> Recipe:
        """The same experiment with every stage ``factor`` times as long (at least one epoch)."""
        if not factor > 0:
            raise UserError(f"the epochs can only be scaled by a positive factor, not {factor:g}")

        def longer(stage: Any) -> Any:
            epochs = max(1, round(stage.epochs * factor)) if stage.epochs else 0
            return dataclasses.replace(stage, epochs=epochs)

        return dataclasses.replace(
            self,
            dense=longer(self.dense),
            pruning=longer(self.pruning),
            regrowth=longer(self.regrowth),
        )

    def to_json(self) -> dict[str, Any]:
        """The recipe as plain JSON types."""
        return dataclasses.asdict(self)

    def dense_settings(self) -> dict[str, Any]:
        """The part of :meth:`to_json` that decides, with the seed, what the dense network is."""
        return {name: v for name, v in self.to_json().items() if name not in AFTER_DENSE}

    @staticmethod
    def from_json(values: dict[str, Any]) -> Recipe:
        """The recipe that :meth:`to_json` was called on.

        Fields that are missing, because an older version wrote the file, have their defaults.

        Raises:
            UserError: an unknown field, so a newer version wrote the file.
        """
        parts = {
            "dense": WeightTraining,
            "pruning": WeightTraining,
            "regrowth": Regrowth,
            "presence": PresenceTraining,
            "pressure": PressureSettings,
        }
        try:
            values = {k: parts[k](**v) if k in parts else v for k, v in values.items()}
            presence = values["presence"]
            values["presence"] = dataclasses.replace(presence, init=tuple(presence.init))
            return Recipe(**values | {"deviations": tuple(values["deviations"])})
        except (TypeError, KeyError) as error:
            raise UserError(f"this recipe is not one of this version: {error}") from error


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one: {"dense": {"lr": 0.1}} -> {"dense.lr": 0.1}."""
    result: dict[str, Any] = {}
    for name, value in values.items():
        nested = isinstance(value, dict)
        result |= flat(value, f"{prefix}{name}.") if nested else {prefix + name: value}
    return result


def _same_kind(name: str, old: Any, new: Any) -> bool:
    """Whether ``new`` can stand where ``old`` does in a recipe's JSON file."""
    if new is None:
        return name in OPTIONAL
    if old is None or isinstance(old, float):
        return isinstance(new, int | float) and not isinstance(new, bool) and math.isfinite(new)
    return type(old) is type(new)


def find(name: str) -> Recipe:
    """The recipe called ``name``.

    Raises:
        UserError: there is none of that name.
    """
    if name not in RECIPES:
        raise UserError(f"unknown recipe {name!r}: choose one of {', '.join(RECIPES)}")
    return RECIPES[name]


# How every recipe departs from the authors' code unless told otherwise.
_DEVIATIONS = (
    "regrowth ends on the target (the authors' overshoots it; regrowth.land=False)",
    "the pressure ends with the pruning stage (the authors' lasts one epoch longer; "
    "authors_timeline=True)",
)

_LENET_DEVIATIONS = (
    *_DEVIATIONS,
    "target_sparsity is a sparsity (the authors' LeNet script passes 0.30, a density, for one)",
    "the dense network is trained here (the authors start from a checkpoint they do not describe)",
)

_CIFAR_DEVIATIONS = (
    *_DEVIATIONS,
    "batch-norm scales are trained (the authors' stay at 1 by accident; train_bn_scale=False)",
    "float32 on the CPU (the authors, and gpu_dtype here, have half precision where it is safe)",
)


def _cifar(name: str, model: str, dataset: str, regrowth_lr_scale: float = 1.0) -> Recipe:
    """The authors' settings for VGG-19 and ResNet-50 on CIFAR, common to all four pairs."""
    return Recipe(
        name=name,
        model=model,
        dataset=dataset,
        augment=True,
        target_sparsity=0.98,
        dense=WeightTraining(
            epochs=160,
            lr=0.1,
            schedule="multistep",
            optimizer="sgd",
            nesterov=True,
            weight_decay=5e-4,
            label_smoothing=0.05,
        ),
        pruning=WeightTraining(
            epochs=100,
            lr=0.1,
            end_lr=0.00333,
            schedule="cosine",
            optimizer="sgd",
            weight_decay=5e-4,
            label_smoothing=0.1,
        ),
        regrowth=Regrowth(epochs=60, lr=0.001, end_lr=0.0001, lr_scale=regrowth_lr_scale),
        deviations=_CIFAR_DEVIATIONS,
    )


# The digits have 45 batches an epoch where MNIST has 469. So t moves three times as fast, and the
# scheduler's steps are smaller, or the pressure would wind up before the first weight could leave.
_LENET_DIGITS = Recipe(
    name="lenet300-digits",
    model="lenet300",
    dataset="digits",
    batch_size=32,
    target_sparsity=0.95,
    dense=WeightTraining(epochs=30, lr=1e-3, label_smoothing=0.05),
    pruning=WeightTraining(epochs=80, lr=1e-3, label_smoothing=0.1),
    regrowth=Regrowth(epochs=40, lr=1e-3, end_lr=1e-6, lr_scale=0.5),
    presence=PresenceTraining(lr=3e-3),
    pressure=PressureSettings(step=0.1),
    deviations=_LENET_DEVIATIONS,
)

_LENET_MNIST = Recipe(
    name="lenet300-mnist",
    model="lenet300",
    dataset="mnist",
    target_sparsity=0.98,
    dense=WeightTraining(epochs=6, lr=1e-3, label_smoothing=0.05),
    pruning=WeightTraining(epochs=40, lr=1e-3, label_smoothing=0.1),
    regrowth=Regrowth(epochs=20, lr=3e-4, end_lr=1e-6, lr_scale=0.1, lr_decay=0.95),
    pressure=PressureSettings(step=0.3),
    deviations=(
        *_LENET_DEVIATIONS,
        "6 + 40 + 20 epochs (the authors' 30 + 30 follow a checkpoint)",
        "regrowth starts at learning rate 0.0003 (the authors' at 0.001, where the small network "
        "overfits: 97.8 instead of 98.0 % on two seeds)",
    ),
)


# Density against a constant pressure, as in the authors' curves. They start from random weights, so
# there is no dense stage; and no regrowth, since the question is where the pressure itself leads.
_LENET_MNIST_GAMMA = Recipe(
    name="lenet300-mnist-gamma",
    model="lenet300",
    dataset="mnist",
    target_sparsity=None,
    dense=WeightTraining(epochs=0, lr=5e-3),
    pruning=WeightTraining(epochs=35, lr=5e-3, end_lr=1e-7, schedule="cosine", label_smoothing=0.1),
    regrowth=Regrowth(epochs=0, lr=0.0, end_lr=0.0),
    pressure=PressureSettings(gamma=1.0),
    deviations=(
        "35 epochs (the authors' curves have 300; pruning.epochs)",
        "the pressure has no floor, as in the authors' code since January 2025 (their curves are "
        "older: it ends at t = -0.3; pressure.floor=-0.3)",
        "t learns at 0.001, as in that code (in their curves at 0.00075; presence.lr)",
        "no dense stage: it starts from random weights, since the authors' LeNet curves do (their "
        "ResNet-18 curves start from a trained network)",
    ),
)

# The same in twenty seconds. t learns at three times the rate, as in lenet300-digits.
_LENET_DIGITS_GAMMA = dataclasses.replace(
    _LENET_MNIST_GAMMA,
    name="lenet300-digits-gamma",
    dataset="digits",
    batch_size=32,
    pruning=dataclasses.replace(_LENET_MNIST_GAMMA.pruning, epochs=80),
    presence=PresenceTraining(lr=3e-3),
    deviations=(
        "the digits, 80 epochs of 45 batches of 32 (the authors' curves: MNIST, 300 of 469 of 128)",
        *_LENET_MNIST_GAMMA.deviations[1:2],
        "t learns at 0.003, since there are so few batches (presence.lr)",
        *_LENET_MNIST_GAMMA.deviations[3:],
    ),
)


def _small(
    name: str,
    model: str,
    dataset: str,
    stem_stride: int,
    presence_lr: float = 5e-3,
    regrowth_lr_scale: float = 1.0,
) -> Recipe:
    """A narrow network on small maps: all stages in some ten minutes on two cores.

    A quarter of the width makes a layer up to sixteen times cheaper, a stem with stride s makes
    every map s^2 times smaller. Five epochs of pruning are too few for a scheduler that moves once
    an epoch: it moves four times, and t moves five times as fast as in the paper's recipes (20
    times on shapes32, which has a fifth of CIFAR's batches).
    """
    return Recipe(
        name=name,
        model=model,
        dataset=dataset,
        model_options={"width": 0.25, "stem_stride": stem_stride},
        augment=True,
        target_sparsity=0.95,
        dense=WeightTraining(
            epochs=3,
            lr=0.05,
            end_lr=0.01,
            schedule="cosine",
            optimizer="sgd",
            nesterov=True,
            weight_decay=5e-4,
            label_smoothing=0.05,
        ),
        pruning=WeightTraining(
            epochs=5,
            lr=0.03,
            end_lr=0.01,
            schedule="cosine",
            optimizer="sgd",
            weight_decay=5e-4,
            label_smoothing=0.1,
        ),
        regrowth=Regrowth(epochs=2, lr=0.01, end_lr=0.0, lr_scale=regrowth_lr_scale),
        presence=PresenceTraining(lr=presence_lr),
        pressure=PressureSettings(step=0.3, updates_per_epoch=4),
        deviations=(
            *_CIFAR_DEVIATIONS,
            "a quarter of the width, a stem with stride: a network for two CPU cores",
            "3 + 5 + 2 epochs (the paper's 160 + 100 + 60), the learning rates scaled down",
            f"the scheduler updates the pressure four times an epoch, t learns at {presence_lr:g}",
        ),
    )


RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        _LENET_DIGITS,
        _LENET_MNIST,
        _LENET_DIGITS_GAMMA,
        _LENET_MNIST_GAMMA,
        _cifar("vgg19-cifar10", "vgg19", "cifar10"),
        _cifar("vgg19-cifar100", "vgg19", "cifar100", regrowth_lr_scale=5.0),
        _cifar("resnet50-cifar10", "resnet50", "cifar10"),
        _cifar("resnet50-cifar100", "resnet50", "cifar100"),
        _small("vgg19-small-cifar10", "vgg19", "cifar10", stem_stride=2),
        _small("resnet50-small-cifar10", "resnet50", "cifar10", stem_stride=4),
        _small("vgg19-small-shapes32", "vgg19", "shapes32", 2, 0.02, regrowth_lr_scale=0.2),
    )
}
