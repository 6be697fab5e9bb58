"""Epochs on a GPU: the data set lies there, and a training step is a graph that is replayed.

Within an epoch the host does nothing but start one graph after another; it waits for the GPU at the
end, and where a recipe changes the pressure within the epoch (chapter 14).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from minihyperflows import functional as F
from minihyperflows.data.datasets import Dataset
from minihyperflows.data.gpu.batches import DeviceData, device_data, load_batch
from minihyperflows.engine import NonFiniteLossError, Tensor, no_grad
from minihyperflows.engine.backend import cupy, to_numpy
from minihyperflows.engine.gpu.capture import Replay, new_stream, on_stream
from minihyperflows.flows.gpu.flat import FlatTraining
from minihyperflows.flows.gpu.update import Counter
from minihyperflows.flows.recorder import LayerFlow
from minihyperflows.lab.epochs import Epoch
from minihyperflows.nn import Module
from minihyperflows.nn.optim import Optimizer
from minihyperflows.nn.restore import in_mode

EVALUATION_BATCH = 1000


class GpuEpochs:
    """:class:`minihyperflows.lab.epochs.Epochs` on a GPU, to which the data set is moved.

    Args:
        net: the network, with float32 parameters.
        data: the data set.
        batch_size: images in a step; the last one of an epoch may be smaller.
        augment: crop and flip the training images.
        dtype: in which the network computes, "float32" or "float16".
    """

    def __init__(
        self, net: Module, data: Dataset, batch_size: int, augment: bool, dtype: str
    ) -> None:
        self.net, self.batch_size, self.augment = net, batch_size, augment
        self.dtype = np.dtype(dtype)
        self._train = device_data(data.train_x, data.train_y, data.mean, data.std)
        self._test = device_data(data.test_x, data.test_y, data.mean, data.std)
        self._order = cupy().zeros(len(data.train_y), np.int32)
        self._key = cupy().zeros(2, np.uint32)
        self._stream = new_stream()
        self._flat: FlatTraining | None = None
        self._scale: dict[str, float] | None = None  # the loss scale to go on with
        self._known: set[tuple[int, float]] = set()  # kinds of steps that have run
        self._replays: dict[tuple[int, float], Replay] = {}

    @property
    def flat(self) -> FlatTraining:
        """The parameters in flat arrays; there from the first epoch on."""
        assert self._flat is not None
        return self._flat

    def train(self, epoch: Epoch) -> tuple[float, list[float]]:
        with on_stream(self._stream):
            self._prepare(epoch.weights, epoch.presences)
            samples = len(self._order)
            self._order.set(epoch.rng.permutation(samples).astype(np.int32))
            if self.augment:
                self._key.set(epoch.rng.integers(0, 2**32, 2, np.uint32))
            self.flat.begin_epoch(epoch.freeze_at_density)
            gammas = self._steps(epoch)
            self._require_finite()
            self.flat.read_steps()
            return float(to_numpy(self.flat.arrays.loss_sum)[0]) / samples, gammas

    def _steps(self, epoch: Epoch) -> list[float]:
        samples = len(self._order)
        gammas: list[float] = []
        steps = -(-samples // self.batch_size)
        for step in range(steps):
            gamma = epoch.gamma()
            if not gammas or gamma != gammas[-1]:
                self.flat.set_rates(gamma, epoch.floor)
            gammas.append(gamma)
            self._step(min(self.batch_size, samples - step * self.batch_size), epoch.smoothing)
            if epoch.observes(step, steps):
                self.flat.arrays.observe_flux()
            epoch.after_step(step)
        return gammas

    def _step(self, batch: int, smoothing: float) -> None:
        """The first step of a kind runs as it is written, the second is recorded and replayed."""
        kind = (batch, smoothing)
        if kind in self._known and kind not in self._replays:
            cupy().get_default_memory_pool().free_all_blocks()  # the recording has its own memory
            self._replays[kind] = Replay(lambda: self.training_step(batch, smoothing))
        if kind in self._replays:
            self._replays[kind]()
        else:
            self.training_step(batch, smoothing)
            self._known.add(kind)

    def training_step(self, batch: int, smoothing: float) -> None:
        """The next batch, forward, backward, and the step of all parameters."""
        xp, shape = cupy(), self._train.images.shape[1:]
        x, labels = xp.empty((batch, *shape), self.dtype), xp.empty(batch, np.int32)
        position = self.flat.arrays.position
        load_batch(self._train, position, self._order, self._key, x, labels, self.augment)
        loss = F.cross_entropy(self.net(Tensor(x)), labels, smoothing)
        self.flat.zero_grad()
        loss.backward(self.flat.scale)
        self.flat.step(loss, batch)

    def _prepare(self, weights: Optimizer, presences: Optimizer | None) -> None:
        """Lay the parameters out, unless they lie there already."""
        flat = self._flat
        if flat is not None and flat.weights is weights and flat.presences is presences:
            return
        self.release()
        self._flat = FlatTraining(self.net, weights, presences, self.dtype)
        if self._scale is not None:
            self._flat.load_state_dict(self._scale)

    def _require_finite(self) -> None:
        flat = self.flat
        bad, skipped = flat.counter(Counter.FIRST_BAD), flat.counter(Counter.SKIPPED)
        if bad >= 0:
            raise NonFiniteLossError(f"step {bad + 1}: the loss is not finite")
        if skipped == flat.counter(Counter.BATCHES) and flat.state_dict()["scale"] <= 1:
            raise NonFiniteLossError("step 1: no gradient of this epoch is finite")

    # -- evaluation ------------------------------------------------------------------------------

    def accuracy(self) -> float:
        """The fraction of the test set that the network, as it computes now, classifies
        correctly."""
        with on_stream(self._stream), no_grad(), in_mode(self.net, training=False):
            correct = sum(self._correct(start) for start in range(0, self._test_size, self._chunk))
            return int(correct) / self._test_size  # the host waits here

    @property
    def _test_size(self) -> int:
        return len(self._test.labels)

    @property
    def _chunk(self) -> int:
        return min(EVALUATION_BATCH, self._test_size)

    def _correct(self, start: int) -> Any:
        """How many images from ``start`` on, of a chunk, are classified correctly: on the GPU."""
        x, labels = images_at(
            self._test, start, min(self._chunk, self._test_size - start), self.dtype
        )
        return (self.net(Tensor(x)).data.argmax(axis=1) == labels).sum()

    # -- the gates -------------------------------------------------------------------------------

    def record(self) -> None:
        """The kernel that steps the parameters records what they do."""

    def layer_flows(self) -> dict[str, LayerFlow]:
        return {} if self.flat.presences is None else self.flat.layer_flows()

    def density(self) -> float:
        """As in the protocol; the host waits for it."""
        return self.flat.density

    def reached(self) -> bool:
        return bool(self.flat.counter(Counter.FROZEN))

    def refresh(self) -> None:
        if self._flat is not None:
            self._flat.refresh()

    # -- when the parameters are somebody else's again --------------------------------------------

    def release(self) -> None:
        """Give the network back: it then computes in the precision of its parameters."""
        if self._flat is not None:
            self._scale = self.state_dict()
            self._flat.release()
            self._flat = None
            self._known.clear()
            self._replays.clear()

    def state_dict(self) -> dict[str, float] | None:
        """The loss scale and how it came about; None before the first epoch."""
        return self._scale if self._flat is None else self._flat.state_dict()

    def load_state_dict(self, state: dict[str, float] | None) -> None:
        """Continue with the loss scale of the run that wrote ``state``."""
        self._scale = state


def images_at(data: DeviceData, start: int, count: int, dtype: Any) -> tuple[Any, Any]:
    """``count`` images of a data set from ``start`` on, normalised, and their labels."""
    xp = cupy()
    x = xp.empty((count, *data.images.shape[1:]), dtype)
    labels = xp.empty(count, np.int32)
    position = xp.zeros(1, np.int64) + start
    order = xp.arange(len(data.labels), dtype=np.int32)
    load_batch(data, position, order, xp.zeros(2, np.uint32), x, labels, augment=False)
    return x, labels
