"""How an epoch runs: what it is told, the protocol of a device, and the epochs of a CPU.

Those of a GPU are in :mod:`minihyperflows.lab.gpu_epochs`.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from minihyperflows.data.datasets import Dataset, normalise
from minihyperflows.data.prefetch import prefetch
from minihyperflows.engine import NonFiniteLossError, Tensor, no_grad
from minihyperflows.engine.backend import to_device
from minihyperflows.flows.recorder import FlowRecorder, LayerFlow
from minihyperflows.nn import Module
from minihyperflows.nn.optim import Optimizer
from minihyperflows.nn.restore import in_mode

EVALUATION_BATCH = 500


@dataclass(frozen=True)
class Epoch:
    """What an epoch is told.

    Attributes:
        weights, presences: the optimisers, with the learning rates of this epoch; None without
            gates.
        smoothing: of the labels.
        rng: draws the order of the samples and the augmentation.
        gamma: the pressure now.
        floor: t at or below it feel none; None for no floor.
        after_step: called with the number of each step, from 0.
        freeze_at_density: on a GPU, presences stop moving in the step that reaches it; None for
            never. (On a CPU the trainer looks at the density after each step.)
        flux_samples: how often in the epoch the flux is observed.
    """

    weights: Optimizer
    presences: Optimizer | None
    smoothing: float
    rng: np.random.Generator
    gamma: Callable[[], float]
    floor: float | None = None
    after_step: Callable[[int], None] = lambda step: None
    freeze_at_density: float | None = None
    flux_samples: int = 0

    def observes(self, step: int, steps: int) -> bool:
        """Whether the flux of ``step`` is one of the samples."""
        return bool(self.flux_samples) and step % max(1, steps // self.flux_samples) == 0


class Epochs(Protocol):
    """Trains and evaluates a network, epoch by epoch, on one kind of device."""

    def train(self, epoch: Epoch) -> tuple[float, list[float]]:
        """One pass over the training set: the mean loss, and the pressure in each step.

        Raises:
            NonFiniteLossError: the loss became NaN or infinite; names the step.
        """

    def accuracy(self) -> float:
        """The fraction of the test set that the network classifies correctly."""

    def record(self) -> None:
        """The network has gates from now on: note what they do."""

    def layer_flows(self) -> dict[str, LayerFlow]:
        """What each gated layer did since the last call."""

    def density(self) -> float:
        """The fraction of the gated weights present after the last step."""

    def reached(self) -> bool:
        """Whether presences were frozen because ``freeze_at_density`` was reached."""

    def refresh(self) -> None:
        """Take note of presences that have moved otherwise than by a step."""

    def release(self) -> None:
        """Give the network back to whoever wants to use it."""

    def state_dict(self) -> dict[str, float] | None:
        """What a later epoch depends on, besides the network, the optimisers and ``rng``."""

    def load_state_dict(self, state: dict[str, float] | None) -> None:
        """Continue where the epochs that wrote ``state`` stopped."""


class Hooks(Protocol):
    """The parts of a training step, which a subclass of ``Trainer`` may replace."""

    def batches(self) -> Generator[tuple[Tensor, np.ndarray]]: ...

    def backward(self, x: Tensor, y: np.ndarray) -> float: ...

    def step(self) -> None: ...


class CpuEpochs:
    """:class:`Epochs` on a CPU: batch by batch, as the hooks say.

    Args:
        hooks: the trainer.
        net: the network.
        data: the data set.
        batch_size: images in a step.
        ahead: make the batches ahead, in a second thread. That pays with augmentation; without it
            a batch is made in less time than it takes to change threads.
    """

    def __init__(
        self, hooks: Hooks, net: Module, data: Dataset, batch_size: int, ahead: bool
    ) -> None:
        self.hooks, self.net, self.data = hooks, net, data
        self.steps, self.ahead = -(-len(data.train_y) // batch_size), ahead
        self.recorder: FlowRecorder | None = None

    def train(self, epoch: Epoch) -> tuple[float, list[float]]:
        total, images, gammas = 0.0, 0, []
        batches = self.hooks.batches()
        with closing(prefetch(batches) if self.ahead else batches) as prepared:
            for step, (x, y) in enumerate(prepared):
                gammas.append(epoch.gamma())
                try:
                    total += self.hooks.backward(x, y) * len(y)
                except NonFiniteLossError as error:
                    raise NonFiniteLossError(f"step {step + 1}: {error}") from None
                images += len(y)
                if self.recorder and epoch.observes(step, self.steps):
                    self.recorder.observe_flux(gammas[-1], epoch.floor)
                self.hooks.step()
                epoch.after_step(step)
        return total / images, gammas

    def accuracy(self) -> float:
        return evaluate(self.net, self.data)

    def record(self) -> None:
        self.recorder = FlowRecorder(self.net)

    def layer_flows(self) -> dict[str, LayerFlow]:
        return self.recorder.take() if self.recorder else {}

    def density(self) -> float:
        assert self.recorder
        return self.recorder.density

    def reached(self) -> bool:
        return False

    def refresh(self) -> None:
        if self.recorder:
            self.recorder.observe_step()

    def release(self) -> None:
        pass

    def state_dict(self) -> None:
        return None

    def load_state_dict(self, state: Any) -> None:
        pass


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
