"""Training a network through the stages of a recipe: one record per epoch, nothing printed."""

from __future__ import annotations

import dataclasses
import statistics
import time
import warnings
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from typing import Any

import numpy as np

from minihyperflows import flows
from minihyperflows import functional as F
from minihyperflows.data.augment import crop_and_flip
from minihyperflows.data.datasets import Dataset, normalise
from minihyperflows.data.prefetch import prefetch
from minihyperflows.engine import DoubtfulResultWarning, NonFiniteLossError, Tensor, no_grad
from minihyperflows.engine.backend import to_device
from minihyperflows.errors import UserError
from minihyperflows.flows.gates import counts
from minihyperflows.flows.gpu.update import Counter
from minihyperflows.flows.recorder import FlowRecorder, LayerFlow
from minihyperflows.flows.stages import DENSE, PRUNING, REGROWTH, far_landing, land
from minihyperflows.lab.checks import gateable, require_dtype, require_trainable
from minihyperflows.lab.gpu_epochs import GpuEpochs, Steering
from minihyperflows.lab.networks import build
from minihyperflows.lab.recipes import PresenceTraining, Recipe, WeightTraining, find
from minihyperflows.nn import BatchNorm2d, Module, Parameter, optim, weight_groups
from minihyperflows.nn.counting import kept_weights
from minihyperflows.nn.restore import in_mode

EVALUATION_BATCH = 500
FLUX_SAMPLES = 8  # times per epoch that the recorder reads the flux


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


def evaluate(net: Module, data: Dataset) -> float:
    """The fraction of the test set that ``net`` classifies correctly, in evaluation mode.

    Afterwards each module is in the mode in which it was.
    """
    like = next(iter(net.named_parameters().values()))
    correct = 0
    with no_grad(), in_mode(net, training=False):
        for start in range(0, len(data.test_y), EVALUATION_BATCH):
            batch = slice(start, start + EVALUATION_BATCH)
            images = normalise(data.test_x[batch], data, like.dtype)
            logits = net(Tensor(to_device(images, like.device)))
            correct += int((logits.numpy().argmax(axis=1) == data.test_y[batch]).sum())
    return correct / len(data.test_y)


class Trainer:
    """The state of a run between epochs, and the step from one epoch to the next."""

    def __init__(
        self, net: Module, data: Dataset, recipe: Recipe, rng: np.random.Generator
    ) -> None:
        self.net, self.data, self.recipe, self.rng = net, data, recipe, rng
        self.epoch = 0  # epochs finished
        self.density = 1.0
        self.density_before_regrowth = 1.0
        self.landed_by: int | None = None  # weights moved by flows.land; None until it has run
        self.warnings: list[str] = []  # of this run, each once
        if flows.presences(net):
            raise ValueError("the network has gates already: training starts with a dense one")
        require_trainable(net, recipe, data.train_x.shape[1:], len(data.train_y))
        self._warn(few_weights(net, recipe))
        self.weight_optimizer = make_optimizer(trainable(net, recipe), recipe.dense)
        self.presence_optimizer: optim.Optimizer | None = None
        self.recorder: FlowRecorder | None = None
        self.scheduler = pressure_scheduler(recipe)
        self.gpu = gpu_epochs(net, data, recipe)

    @property
    def _target_density(self) -> float | None:
        target = self.recipe.target_sparsity
        return None if target is None else 1 - target

    @property
    def finished(self) -> bool:
        return self.epoch >= self.recipe.timeline.epochs

    def run_epoch(self) -> EpochRecord:
        """Train for one epoch, evaluate, and let the controllers draw their conclusions."""
        started = time.perf_counter()
        stage, k = self.recipe.timeline.locate(self.epoch + 1)
        self._enter(stage, k)
        lr_weights, lr_presence = self._learning_rates(stage, k)
        expected = self._expected_density(stage, k)
        with np.errstate(over="ignore", invalid="ignore"):  # _backward reports what comes of it
            loss, gamma = self._train_one_epoch(stage, k)
        self.epoch += 1
        accuracy = self.gpu.accuracy() if self.gpu else evaluate(self.net, self.data)
        layers = self._layer_flows()
        if stage != DENSE:
            self.density = flows.density(self.net)
        if self.finished:
            self._warn(empty_layers(self.net))
            if self.gpu:
                self.gpu.release()
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

    # -- between epochs --------------------------------------------------------------------------

    def _enter(self, stage: str, k: int) -> None:
        """What changes on the first epoch of a stage."""
        if k > 1:
            return
        if stage == PRUNING:
            flows.attach(self.net, init=self.recipe.presence.init, rng=self.rng)
            self._start_pruning()
        elif stage == REGROWTH:
            self.density_before_regrowth = self.density

    def _start_pruning(self) -> None:
        """Optimisers and recorder of the gated network; they serve the regrowth stage too.

        (On a GPU the kernel that steps the parameters records what they do.)
        """
        weights = trainable(self.net, self.recipe)
        self.weight_optimizer = make_optimizer(weights, self.recipe.pruning)
        presences = list(flows.presences(self.net).values())
        self.presence_optimizer = make_optimizer(presences, self.recipe.presence)
        self._record()

    def _record(self) -> None:
        self.recorder = None if self.gpu else FlowRecorder(self.net)

    def _layer_flows(self) -> dict[str, LayerFlow]:
        """What each gated layer did in this epoch."""
        if self.gpu and self.presence_optimizer:
            return self.gpu.flat.layer_flows()
        return self.recorder.take() if self.recorder else {}

    def _gamma(self, stage: str) -> float:
        if stage != PRUNING:
            return 0.0
        if self.scheduler is None:
            assert self.recipe.pressure.gamma is not None
            return self.recipe.pressure.gamma
        return self.scheduler.gamma

    def _learning_rates(self, stage: str, k: int) -> tuple[float, float]:
        """Set the learning rates of epoch ``k`` of ``stage``, and return them."""
        recipe, late = self.recipe, self.recipe.late_epochs
        presence = recipe.presence.lr
        if stage == DENSE:
            weights, presence = recipe.dense.lr_at(k), 0.0
        elif stage == PRUNING:
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

    def _expected_density(self, stage: str, k: int) -> float | None:
        if stage == DENSE:
            return 1.0
        if stage == PRUNING:
            if self.scheduler is None:
                return None
            return self.scheduler.expected(k * self.recipe.pressure.updates_per_epoch)
        return self._target_density

    # -- within an epoch -------------------------------------------------------------------------

    def _train_one_epoch(self, stage: str, k: int) -> tuple[float, float]:
        """One pass over the training set; returns the mean loss and the mean pressure."""
        recipe = self.recipe
        smoothing = recipe.dense.label_smoothing
        if stage != DENSE:
            smoothing = recipe.pruning.label_smoothing
        if self.gpu:
            return self._train_on_gpu(self.gpu, stage, k, smoothing)
        steps = -(-len(self.data.train_y) // recipe.batch_size)
        total, gammas = 0.0, []
        with closing(self._prepared_batches()) as batches:
            for step, (x, y) in enumerate(batches):
                gammas.append(self._gamma(stage))
                loss = F.cross_entropy(self.net(x), y, smoothing)
                total += loss.item() * len(y)
                self._backward(loss, gammas[-1], step)
                if self.recorder and step % max(1, steps // FLUX_SAMPLES) == 0:
                    self.recorder.observe_flux(gammas[-1], recipe.pressure.floor)
                self._step(stage)
                if stage == PRUNING:
                    self._steer(k, step, steps, self._recorded_density)
        if stage == REGROWTH and self.landed_by is None and 2 * k >= recipe.timeline.regrowth:
            self._land()
        # The mean of floats in `statistics` is exact: a constant pressure is its own mean.
        return total / len(self.data.train_y), statistics.mean(gammas)

    def _train_on_gpu(
        self, gpu: GpuEpochs, stage: str, k: int, smoothing: float
    ) -> tuple[float, float]:
        """The same on a GPU, where landing waits for the end of the epoch: a weight that reaches
        the target's density stops all presences, and their number is made exact then."""
        recipe, steps = self.recipe, -(-len(self.data.train_y) // self.recipe.batch_size)
        landing = stage == REGROWTH and recipe.regrowth.land and self.landed_by is None

        def after_step(step: int, density: Callable[[], float]) -> None:
            if stage == PRUNING:
                self._steer(k, step, steps, density)

        steering = Steering(
            gamma=lambda: self._gamma(stage),
            floor=recipe.pressure.floor,
            after_step=after_step,
            freeze_at_density=self._target_density if landing else None,
        )
        optimizers = (self.weight_optimizer, self.presence_optimizer)
        samples = FLUX_SAMPLES if self.presence_optimizer else 0
        try:
            loss, gammas = gpu.train(*optimizers, smoothing, steering, self.rng, samples)
        except NonFiniteLossError as error:
            raise _diverged(self.epoch + 1, error) from None
        if landing and (gpu.flat.counter(Counter.FROZEN) or 2 * k >= recipe.timeline.regrowth):
            self._land()
        return loss, statistics.mean(gammas)

    def _prepared_batches(self) -> Generator[tuple[Tensor, np.ndarray]]:
        """The batches of one epoch, those with augmentation made ahead in a second thread.

        The others are made in less time than a batch takes to change threads.
        """
        return prefetch(self._batches()) if self.recipe.augment else self._batches()

    def _batches(self) -> Generator[tuple[Tensor, np.ndarray]]:
        """The training set in a new random order; the last batch may be smaller."""
        recipe, data = self.recipe, self.data
        order = self.rng.permutation(len(data.train_y))
        for start in range(0, len(order), recipe.batch_size):
            chosen = order[start : start + recipe.batch_size]
            images = data.train_x[chosen]
            if recipe.augment:
                images = crop_and_flip(images, self.rng)
            yield Tensor(normalise(images, data, np.dtype(recipe.dtype))), data.train_y[chosen]

    def _backward(self, loss: Tensor, gamma: float, step: int) -> None:
        """Gradients of L = L_data + gamma P for the weights and for t."""
        self.net.zero_grad()
        if gamma:
            loss = loss + gamma * flows.pressure(self.net, self.recipe.pressure.floor)
        try:
            loss.backward()
        except NonFiniteLossError as error:
            raise _diverged(self.epoch + 1, f"step {step + 1}: {error}") from None

    def _step(self, stage: str) -> None:
        """Both optimisers step on the gradients of the same backward pass, weights first."""
        self.weight_optimizer.step()
        if self.presence_optimizer and self.recorder and self.presence_optimizer.lr > 0:
            self.presence_optimizer.step()
            self.recorder.observe_step()
            target = self._target_density
            if stage == REGROWTH and target is not None and self.recorder.density >= target:
                self._land()

    def _recorded_density(self) -> float:
        assert self.recorder
        return self.recorder.density

    def _steer(self, k: int, step: int, steps: int, density: Callable[[], float]) -> None:
        """Update the pressure if ``step`` (from 0) is the last of one of the scheduler's periods.

        Pruning epoch ``k`` has ``steps`` batches and ``updates_per_epoch`` periods, numbered on
        from those of the epochs before. (Should it have more periods than batches, several end
        with the same batch.) ``density`` measures it.
        """
        if self.scheduler is None:
            return
        updates = self.recipe.pressure.updates_per_epoch
        before, after = (n * updates // steps for n in (step, step + 1))  # periods that are over
        for period in range(before + 1, after + 1):
            self.scheduler.update((k - 1) * updates + period, density())

    def _land(self) -> None:
        """End the regrowth: bring the density to the target and freeze the topology."""
        target = self._target_density
        if self.recipe.regrowth.land and self.presence_optimizer and target is not None:
            self.landed_by = land(self.net, target)
            self._note(far_landing(self.landed_by, gateable(self.net)))
            self.presence_optimizer.lr = 0.0
            if self.recorder:
                self.recorder.observe_step()
            if self.gpu:
                self.gpu.refresh()

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
            "loss_scale": self.gpu.state_dict() if self.gpu else None,
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
            self._record()
        if self.gpu:
            self.gpu.load_state_dict(values["loss_scale"])
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


def gpu_epochs(net: Module, data: Dataset, recipe: Recipe) -> GpuEpochs | None:
    """What trains ``net`` if it is on a GPU; None on the CPU.

    Raises:
        UserError: the recipe's weights are not float32, which the GPU's kernels need.
    """
    device = net.parameters()[0].device
    if device == "cpu":
        return None
    require_dtype(recipe, device)
    return GpuEpochs(net, data, recipe.batch_size, recipe.augment, recipe.gpu_dtype)


def _diverged(epoch: int, what: object) -> NonFiniteLossError:
    return NonFiniteLossError(f"epoch {epoch}, {what}; a lower learning rate may help")


def _with_prefix(arrays: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}


def pressure_scheduler(recipe: Recipe) -> flows.PressureScheduler | None:
    """The scheduler of the pruning stage, aimed below the target if regrowth is to land on it;
    None if the pressure is constant."""
    if recipe.pressure.gamma is not None or recipe.target_sparsity is None:
        return None
    settings = recipe.pressure
    return flows.PressureScheduler(
        recipe.aim,
        recipe.pruning.epochs * settings.updates_per_epoch,
        settings.step,
        settings.exponent,
        settings.aggressivity,
    )


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
    if settings.optimizer == "adam":
        return optim.Adam(params, settings.lr, weight_decay=getattr(settings, "weight_decay", 0.0))
    if settings.optimizer == "sgd":
        return optim.SGD(
            params,
            settings.lr,
            momentum=settings.momentum,
            weight_decay=getattr(settings, "weight_decay", 0.0),
            nesterov=getattr(settings, "nesterov", False),
        )
    raise UserError(f"unknown optimizer {settings.optimizer!r}: choose adam or sgd")
