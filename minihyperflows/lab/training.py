"""Training a network through the stages of a recipe: one record per epoch, nothing printed."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import time
import warnings
from collections.abc import Callable, Generator, Iterator
from typing import Any

import numpy as np

from minihyperflows import flows
from minihyperflows import functional as F
from minihyperflows.data.augment import crop_and_flip
from minihyperflows.data.datasets import Dataset, normalise
from minihyperflows.engine import DoubtfulResultWarning, NonFiniteLossError, Tensor
from minihyperflows.errors import UserError
from minihyperflows.flows.gates import counts
from minihyperflows.flows.recorder import LayerFlow
from minihyperflows.flows.stages import DENSE, PRUNING, REGROWTH, far_landing, land
from minihyperflows.lab import registry
from minihyperflows.lab.checks import gateable, require_kernels, require_trainable
from minihyperflows.lab.epochs import CpuEpochs, Epoch, Epochs
from minihyperflows.lab.epochs import evaluate as evaluate
from minihyperflows.lab.gpu_epochs import GpuEpochs
from minihyperflows.lab.networks import build
from minihyperflows.lab.recipes import PresenceTraining, Recipe, WeightTraining, find
from minihyperflows.lab.registry import Scheduler
from minihyperflows.nn import BatchNorm2d, Module, Parameter, optim, weight_groups
from minihyperflows.nn.counting import kept_weights

FLUX_SAMPLES = 8  # times per epoch that the recorder reads the flux
CPU_HOOKS = ("batches", "backward", "step")  # which the recorded step of a GPU has no place for


@dataclasses.dataclass(frozen=True)
class EpochRecord:
    """What one epoch did: a row of ``metrics.csv``. ``record["density"]`` works too.

    Attributes:
        epoch: counted from 1 over the whole run.
        stage: "dense", "pruning" or "regrowth".
        gamma: the pressure during the epoch, in units of the mean of t; its mean over the batches
            if the recipe changes it within an epoch.
        lr_weights, lr_presence: learning rates of the weights and of t (0: frozen or absent).
        train_loss: mean over the batches of the cross-entropy, without the pressure term.
        test_accuracy: fraction of the test set classified correctly after the epoch.
        density: fraction of the gated weights present after the epoch.
        expected_density: what the pressure scheduler (or the regrowth controller) aimed at; None
            under a constant pressure.
        flips: how often a weight was removed or came back, over all steps of the epoch.
        seconds: wall time of the epoch with its evaluation.
        layers: the same by layer, with flux; not part of ``metrics.csv``.
    """

    epoch: int
    stage: str
    gamma: float
    lr_weights: float
    lr_presence: float
    train_loss: float
    test_accuracy: float
    density: float
    expected_density: float | None
    flips: int
    seconds: float
    layers: dict[str, LayerFlow] = dataclasses.field(default_factory=dict, repr=False)

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)

    def row(self) -> dict[str, Any]:
        """The fields of ``metrics.csv``."""
        return {name: getattr(self, name) for name in METRICS}


METRICS = tuple(f.name for f in dataclasses.fields(EpochRecord) if f.name != "layers")


def train(
    net: Module, data: Dataset, recipe: Recipe | str, *, rng: np.random.Generator
) -> Iterator[EpochRecord]:
    """Train ``net`` through the dense, pruning and regrowth stages of ``recipe``.

    A generator: each epoch runs when its record is asked for. ``net`` is changed in place and has
    gates from the first pruning epoch on.

    Args:
        net: a network without gates, for example from :func:`build_network`.
        data: what :func:`minihyperflows.lab.load` returns.
        recipe: a :class:`Recipe` or the name of one.
        rng: draws the order of the samples, the augmentation and the first t.

    Raises:
        NonFiniteLossError: the loss became NaN or infinite; names the epoch and the step.
    """
    trainer = Trainer(net, data, recipe if isinstance(recipe, Recipe) else find(recipe), rng)
    while not trainer.finished:
        yield trainer.run_epoch()


def build_network(recipe: Recipe, data: Dataset, rng: np.random.Generator) -> Module:
    """The recipe's network for the images and classes of ``data``, with fresh weights."""
    return build(recipe, len(data.classes), data.train_x.shape[1:], rng)


class Trainer:
    """The state of a run between epochs, and the step from one epoch to the next.

    A subclass changes how a network is trained by overriding one of these hooks; each does what it
    says here, and may call ``super()``. ``stage`` and ``stage_epoch`` say which epoch it is.

    =====================  ===========================================================  ==========
    :meth:`enter`          before each epoch: gates and optimisers at a stage's first   everywhere
    :meth:`learning_rates` before each epoch: sets and returns both learning rates      everywhere
    :meth:`gamma`          before each step: the pressure                               everywhere
    :meth:`batches`        the batches of an epoch                                      CPU
    :meth:`backward`       the gradients of one batch; returns its loss                 CPU
    :meth:`step`           both optimisers step                                         CPU
    =====================  ===========================================================  ==========

    A GPU replays one recorded step (chapter 14), which has no place for the last three: a subclass
    that overrides them is refused there.

    Attributes:
        epoch: epochs finished.
        density: of the gated weights; 1 without gates.
        weight_optimizer, presence_optimizer: None for the presences until there are gates.
        scheduler: steers the pressure; None under a constant one.
        loop: runs the epochs, on a CPU or a GPU.
        landed_by: weights moved by ``flows.land``; None until it has run.
        warnings: of this run, each once.

    Raises:
        UserError: a hook or a part of the recipe cannot run on the network's device.
    """

    def __init__(
        self, net: Module, data: Dataset, recipe: Recipe, rng: np.random.Generator
    ) -> None:
        self.net, self.data, self.recipe, self.rng = net, data, recipe, rng
        self.epoch = 0
        self.density = 1.0
        self.density_before_regrowth = 1.0
        self.landed_by: int | None = None
        self.warnings: list[str] = []
        if flows.presences(net):
            raise ValueError("the network has gates already: training starts with a dense one")
        if not net.training:
            net.train()
        require_trainable(net, recipe, data.train_x.shape[1:], len(data.train_y))
        self._warn(few_weights(net, recipe))
        self.weight_optimizer = make_optimizer(trainable(net, recipe), recipe.dense)
        self.presence_optimizer: optim.Optimizer | None = None
        self.scheduler, self._pressure = pressure_scheduler(recipe), pressure_of(recipe, net)
        self.loop = self._loop()

    def _loop(self) -> Epochs:
        """What runs the epochs on the network's device."""
        recipe, device = self.recipe, self.net.parameters()[0].device
        if device == "cpu":
            return CpuEpochs(self, self.net, self.data, recipe.batch_size, recipe.augment)
        changed = [n for n in CPU_HOOKS if getattr(type(self), n) is not getattr(Trainer, n)]
        if changed:
            raise UserError(
                f"{type(self).__name__} overrides {', '.join(changed)}, which a GPU does not call: "
                "train on the CPU, or override enter, learning_rates or gamma"
            )
        require_kernels(recipe, device)
        return GpuEpochs(self.net, self.data, recipe.batch_size, recipe.augment, recipe.gpu_dtype)

    @property
    def stage(self) -> str:
        """The stage of the epoch that runs, or is next: "dense", "pruning" or "regrowth"."""
        return self.recipe.timeline.locate(self.epoch + 1)[0]

    @property
    def stage_epoch(self) -> int:
        """The number of that epoch within its stage, from 1."""
        return self.recipe.timeline.locate(self.epoch + 1)[1]

    @property
    def _target_density(self) -> float | None:
        target = self.recipe.target_sparsity
        return None if target is None else 1 - target

    @property
    def finished(self) -> bool:
        return self.epoch >= self.recipe.timeline.epochs

    def run_epoch(self) -> EpochRecord:
        """Train for one epoch, evaluate, and let the controllers draw their conclusions.

        A network in evaluation mode is put in training mode; a module of it that was frozen by its
        own ``eval()`` stays so.
        """
        started, stage = time.perf_counter(), self.stage
        if not self.net.training:
            self.net.train()
        self.enter()
        lr_weights, lr_presence = self.learning_rates()
        expected = self._expected_density()
        loss, gamma = self._train_one_epoch()
        self.epoch += 1
        accuracy = self.loop.accuracy()
        layers = self.loop.layer_flows()
        if stage != DENSE:
            self.density = flows.density(self.net)
        if self.finished:
            self._warn(empty_layers(self.net))
            self.loop.release()
        return EpochRecord(
            epoch=self.epoch,
            stage=stage,
            gamma=gamma,
            lr_weights=lr_weights,
            lr_presence=lr_presence,
            train_loss=loss,
            test_accuracy=accuracy,
            density=self.density,
            expected_density=expected,
            flips=sum(layer.flips for layer in layers.values()),
            seconds=time.perf_counter() - started,
            layers=layers,
        )

    # -- hooks, between epochs -------------------------------------------------------------------

    def enter(self) -> None:
        """What changes before an epoch: at the first of the pruning stage the network gets gates,
        and both optimisers begin anew."""
        if self.stage_epoch > 1:
            return
        if self.stage == PRUNING:
            flows.attach(self.net, init=self.recipe.presence.init, rng=self.rng)
            self._start_pruning()
        elif self.stage == REGROWTH:
            self.density_before_regrowth = self.density

    def learning_rates(self) -> tuple[float, float]:
        """Set the learning rates of an epoch, of the weights and of t, and return them."""
        recipe, late, k = self.recipe, self.recipe.late_epochs, self.stage_epoch
        presence = recipe.presence.lr
        if self.stage == DENSE:
            weights, presence = recipe.dense.lr_at(k), 0.0
        elif self.stage == PRUNING:
            weights = recipe.pruning.lr_at(k)
        else:
            weights = recipe.regrowth.lr_at(k, late)
            presence *= recipe.regrowth.presence_lr_factor(k, late)
            if self.landed_by is not None:
                presence = 0.0
        self.weight_optimizer.lr = weights
        if self.presence_optimizer:
            self.presence_optimizer.lr = presence
        return weights, presence

    # -- hooks, within an epoch ------------------------------------------------------------------

    def gamma(self) -> float:
        """The pressure in the next step, in units of the mean of t. A step may ask more than once,
        so what counts steps does so in :meth:`step`."""
        if self.stage != PRUNING:
            return 0.0
        if self.scheduler is None:
            assert self.recipe.pressure.gamma is not None
            return self.recipe.pressure.gamma
        gamma = float(self.scheduler.gamma)
        if not math.isfinite(gamma):
            name = self.recipe.pressure.scheduler
            raise UserError(f"the scheduler {name!r} asks for a gamma of {gamma}")
        return gamma

    def batches(self) -> Generator[tuple[Tensor, np.ndarray]]:
        """The training set in a new random order; the last batch may be smaller."""
        recipe, data = self.recipe, self.data
        order = self.rng.permutation(len(data.train_y))
        for start in range(0, len(order), recipe.batch_size):
            chosen = order[start : start + recipe.batch_size]
            images = data.train_x[chosen]
            if recipe.augment:
                images = crop_and_flip(images, self.rng)
            yield Tensor(normalise(images, data, np.dtype(recipe.dtype))), data.train_y[chosen]

    def backward(self, x: Tensor, y: np.ndarray) -> float:
        """Gradients of L = L_data + gamma P for the weights and for t; returns L_data."""
        loss = F.cross_entropy(self.net(x), y, self.smoothing)
        total, gamma = loss, self.gamma()
        self.net.zero_grad()
        if gamma:
            total = loss + gamma * self._pressure()
        total.backward()
        return loss.item()

    def step(self) -> None:
        """Both optimisers step on the gradients of the same backward pass, weights first."""
        self.weight_optimizer.step()
        if self.presence_optimizer and self.presence_optimizer.lr > 0:
            self.presence_optimizer.step()
            self.loop.refresh()
            target = self._target_density
            if self.stage == REGROWTH and target is not None and self.loop.density() >= target:
                self._land()

    # -- an epoch --------------------------------------------------------------------------------

    @property
    def smoothing(self) -> float:
        """The label smoothing of the stage."""
        recipe = self.recipe
        return (recipe.dense if self.stage == DENSE else recipe.pruning).label_smoothing

    def _start_pruning(self) -> None:
        """Optimisers and recorder of the gated network; they serve the regrowth stage too."""
        weights = trainable(self.net, self.recipe)
        self.weight_optimizer = make_optimizer(weights, self.recipe.pruning)
        presences = list(flows.presences(self.net).values())
        self.presence_optimizer = make_optimizer(presences, self.recipe.presence)
        self.loop.record()

    @property
    def _observes_flux(self) -> bool:
        """Whether there is flux that can be told from the pressure: the mean's share is known."""
        return self.presence_optimizer is not None and self.recipe.pressure.kind == "mean"

    def _expected_density(self) -> float | None:
        if self.stage == DENSE:
            return 1.0
        if self.stage == PRUNING:
            if self.scheduler is None:
                return None
            period = self.stage_epoch * self.recipe.pressure.updates_per_epoch
            return float(self.scheduler.expected(period))
        return self._target_density

    def _train_one_epoch(self) -> tuple[float, float]:
        """One pass over the training set; returns the mean loss and the mean pressure."""
        regrowth = self.recipe.regrowth
        landing = self.stage == REGROWTH and regrowth.land and self.landed_by is None
        epoch = Epoch(
            self.weight_optimizer,
            self.presence_optimizer,
            self.smoothing,
            self.rng,
            gamma=self.gamma,
            floor=self.recipe.pressure.floor,
            after_step=self._steer,
            freeze_at_density=self._target_density if landing else None,
            flux_samples=FLUX_SAMPLES if self._observes_flux else 0,
        )
        try:
            with np.errstate(over="ignore", invalid="ignore"):  # the loss says what comes of it
                loss, gammas = self.loop.train(epoch)
        except NonFiniteLossError as error:
            raise NonFiniteLossError(
                f"epoch {self.epoch + 1}, {error}; a lower learning rate may help"
            ) from None
        halfway = 2 * self.stage_epoch >= self.recipe.timeline.regrowth
        if landing and self.landed_by is None and (halfway or self.loop.reached()):
            self._land()
        # The mean of floats in `statistics` is exact: a constant pressure is its own mean.
        return loss, statistics.mean(gammas)

    def _steer(self, step: int) -> None:
        """Update the pressure if ``step`` (from 0) is the last of one of the scheduler's periods.

        A pruning epoch has ``updates_per_epoch`` periods, numbered on from those of the epochs
        before. (Should it have more periods than batches, several end with the same batch.)
        """
        if self.scheduler is None or self.stage != PRUNING:
            return
        steps = -(-len(self.data.train_y) // self.recipe.batch_size)
        updates = self.recipe.pressure.updates_per_epoch
        before, after = (n * updates // steps for n in (step, step + 1))  # periods that are over
        for period in range(before + 1, after + 1):
            number = (self.stage_epoch - 1) * updates + period
            self.scheduler.update(number, self.loop.density())

    def _land(self) -> None:
        """End the regrowth: bring the density to the target and freeze the topology."""
        target = self._target_density
        if self.recipe.regrowth.land and self.presence_optimizer and target is not None:
            self.landed_by = land(self.net, target)
            self._note(far_landing(self.landed_by, gateable(self.net)))
            self.presence_optimizer.lr = 0.0
            self.loop.refresh()

    # -- warnings --------------------------------------------------------------------------------

    def _warn(self, text: str | None) -> None:
        """Give a warning, unless there is none or it has been given before."""
        if text and self._note(text):
            warnings.warn(text, DoubtfulResultWarning, stacklevel=3)

    def _note(self, text: str | None) -> bool:
        """Keep a warning for the run's summary; whether it is a new one."""
        is_new = text is not None and text not in self.warnings
        if text is not None and is_new:
            self.warnings.append(text)
        return is_new

    # -- saving and loading ----------------------------------------------------------------------

    def state_dict(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Everything that the next epoch depends on: arrays, and plain JSON values."""
        arrays = {f"net.{k}": v for k, v in self.net.state_dict().items()}
        arrays |= {f"weights.{k}": v for k, v in self.weight_optimizer.state_dict().items()}
        if self.presence_optimizer:
            state = self.presence_optimizer.state_dict()
            arrays |= {f"presences.{k}": v for k, v in state.items()}
        values = {
            "epoch": self.epoch,
            "density": self.density,
            "density_before_regrowth": self.density_before_regrowth,
            "landed_by": self.landed_by,
            "warnings": self.warnings,
            "gated": self.presence_optimizer is not None,
            "scheduler": self.scheduler.state_dict() if self.scheduler else None,
            "rng": self.rng.bit_generator.state,
            "loss_scale": self.loop.state_dict(),
        }
        return arrays, values

    def load_state_dict(self, arrays: dict[str, np.ndarray], values: dict[str, Any]) -> None:
        """Continue where the trainer whose :meth:`state_dict` this is stopped."""
        if values["gated"]:
            flows.attach(self.net, rng=np.random.default_rng(0))  # overwritten just below
            self._start_pruning()
        self.net.load_state_dict(_with_prefix(arrays, "net."))
        self.weight_optimizer.load_state_dict(_with_prefix(arrays, "weights."))
        if self.presence_optimizer:
            self.presence_optimizer.load_state_dict(_with_prefix(arrays, "presences."))
            self.loop.record()
        self.loop.load_state_dict(values["loss_scale"])
        if self.scheduler:
            self.scheduler.load_state_dict(values["scheduler"])
        self.rng.bit_generator.state = values["rng"]
        self.epoch, self.density = int(values["epoch"]), float(values["density"])
        self.density_before_regrowth = float(values["density_before_regrowth"])
        self.landed_by = values["landed_by"]
        for text in values.get("warnings", ()):  # older checkpoints have none
            self._note(text)


def few_weights(net: Module, recipe: Recipe) -> str | None:
    """What is doubtful about the recipe's target for so small a network; None if nothing."""
    if recipe.target_sparsity is None:
        return None
    kept = kept_weights(1 - recipe.target_sparsity, gateable(net))
    layers = len(weight_groups(net))
    if kept >= layers:
        return None
    return (
        f"target_sparsity {recipe.target_sparsity!r} leaves {kept} weights for {layers} layers: "
        "one of them at least will be empty"
    )


def empty_layers(net: Module) -> str | None:
    """Which layers of ``net`` have lost all their weights, in a sentence; None if none has."""
    per_layer = counts(net)
    empty = [name for name, (present, _) in per_layer.items() if not present]
    if not empty:
        return None
    if len(empty) == len(per_layer):
        return "no weight is left: the network gives the same answer whatever it sees"
    return (
        f"no weight is left in {', '.join(empty)}: nothing of what reaches a layer without weights "
        "gets through; a lower target or pressure leaves some"
    )


def _with_prefix(arrays: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}


def pressure_scheduler(recipe: Recipe) -> Scheduler | None:
    """The scheduler of the pruning stage, aimed below the target if regrowth is to land on it;
    None if the pressure is constant.

    Raises:
        UserError: there is none of that name, or it does not keep to the protocol.
    """
    settings = recipe.pressure
    if settings.gamma is not None or recipe.target_sparsity is None:
        return None
    epochs, given = recipe.pruning.epochs * settings.updates_per_epoch, settings.scheduler_options
    given = registry.settings_for("scheduler", settings.scheduler, settings) | given
    scheduler = registry.make("scheduler", settings.scheduler, recipe.aim, epochs, **given)
    try:
        json.dumps(scheduler.state_dict())
        for number in (scheduler.gamma, scheduler.expected(1)):
            float(number)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"the scheduler {settings.scheduler!r} has a gamma and expected densities that are "
            f"numbers, and a state_dict in JSON's types: {error}"
        ) from error
    return scheduler


def pressure_of(recipe: Recipe, net: Module) -> Callable[[], Tensor]:
    """The recipe's pressure on ``net``, a scalar.

    Raises:
        UserError: there is none of that name; or, when it is called, it is no scalar.
    """
    settings, kind = recipe.pressure, recipe.pressure.kind
    given = registry.settings_for("pressure", kind, settings) | settings.kind_options
    compute = registry.bound("pressure", kind, net, **given)

    def pressure() -> Tensor:
        result = registry.checked("pressure", kind, compute())
        if result.size != 1:
            raise UserError(f"the pressure {kind!r} has shape {result.shape}: it must be a scalar")
        return result

    return pressure


def trainable(net: Module, recipe: Recipe) -> list[Parameter]:
    """The parameters that the weights' optimiser trains: all, or all but the batch-norm scales."""
    frozen: set[int] = set()
    if not recipe.train_bn_scale:
        norms = (m for _, m in net.named_modules() if isinstance(m, BatchNorm2d))
        frozen = {id(norm.weight) for norm in norms}
    return [p for p in net.parameters() if id(p) not in frozen]


def make_optimizer(
    params: list[Parameter], settings: WeightTraining | PresenceTraining
) -> optim.Optimizer:
    """The optimiser that ``settings`` describe."""
    name = settings.optimizer
    given = registry.settings_for("optimizer", name, settings) | settings.optimizer_options
    return registry.make("optimizer", name, params, settings.lr, **given)
