"""What the claims about DHP are tested on: small networks, what they learn, for how long.

An :class:`Experiment` is a network with its task and its schedule, by name. Two kinds of task:
images to classify, and images to free of noise.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from minihyperflows import functional as F
from minihyperflows import nn
from minihyperflows.data.augment import crop_and_flip, flip
from minihyperflows.data.datasets import Dataset, channel_statistics, load, normalise
from minihyperflows.engine import Tensor, no_grad
from minihyperflows.engine.backend import to_device
from minihyperflows.lab.epochs import EVALUATION_BATCH, evaluate
from minihyperflows.lab.recipes import WeightTraining
from minihyperflows.nn import Module, models
from minihyperflows.nn.models.blocks import conv
from minihyperflows.nn.models.resnets import BasicBlock, ResNet
from minihyperflows.nn.restore import in_mode

DTYPE = np.float32
LUMINANCE = (0.299, 0.587, 0.114)  # of red, green and blue, ITU-R BT.601
NOISE = 70.0  # standard deviation of the noise, where pixels go to 255

# -- tasks ---------------------------------------------------------------------------------------


@dataclass
class Task(ABC):
    """What a network learns.

    Attributes:
        data: the images.
        batch_size: of every batch; what is left over at the end of an epoch is not used.
        device: where batches are put.
        tick: called for every batch, for a progress bar.
    """

    data: Dataset
    batch_size: int = 64
    device: str = "cpu"
    tick: Callable[[], Any] = lambda: None
    metric: ClassVar[str]  # what score measures: the more the better

    @property
    def epoch(self) -> int:
        """The steps of one epoch."""
        return len(self.data.train_x) // self.batch_size

    @property
    def input_shape(self) -> tuple[int, ...]:
        return self.data.train_x.shape[1:]

    def batches(self, rng: np.random.Generator) -> Iterator[tuple[Tensor, Any]]:
        """Inputs and what is to come out, without end: epoch after epoch in a new order."""
        while True:
            order = rng.permutation(len(self.data.train_x))
            for k in range(self.epoch):
                chosen = order[k * self.batch_size : (k + 1) * self.batch_size]
                self.tick()
                yield self._batch(chosen, rng)

    @abstractmethod
    def _batch(self, chosen: np.ndarray, rng: np.random.Generator) -> tuple[Tensor, Any]:
        """The images with these numbers."""

    @abstractmethod
    def loss(self, output: Tensor, wanted: Any) -> Tensor:
        """What is minimised."""

    @abstractmethod
    def score(self, net: Module) -> float:
        """How good ``net`` is on the test set."""

    def _tensor(self, values: np.ndarray) -> Tensor:
        return Tensor(to_device(values.astype(DTYPE, copy=False), self.device))


@dataclass
class Classification(Task):
    """Images and their classes; ``augment``: with random crops and flips."""

    augment: bool = False
    metric: ClassVar[str] = "accuracy"

    def _batch(self, chosen: np.ndarray, rng: np.random.Generator) -> tuple[Tensor, Any]:
        images = self.data.train_x[chosen]
        if self.augment:
            images = crop_and_flip(images, rng)
        labels = to_device(self.data.train_y[chosen], self.device)
        return self._tensor(normalise(images, self.data, DTYPE)), labels

    def loss(self, output: Tensor, wanted: Any) -> Tensor:
        return F.cross_entropy(output, wanted)

    def score(self, net: Module) -> float:
        return evaluate(net, self.data)


@dataclass
class Denoising(Task):
    """Images in grey under Gaussian noise, a new one at every step, to be made what they were.

    Trained on random patches, half of them mirrored, and tested on whole images, always under the
    same noise. Pixels lie in [0, 1]; the noisy ones are not clipped, the network's are, as usual.

    Attributes:
        patch: the side of the patches.
        images: how many of the test set are used.
    """

    patch: int = 16
    images: int = 500
    metric: ClassVar[str] = "psnr"

    @property
    def input_shape(self) -> tuple[int, ...]:
        return (self.patch, self.patch, 1)

    def _batch(self, chosen: np.ndarray, rng: np.random.Generator) -> tuple[Tensor, Any]:
        patches = random_patches(self.data.train_x[chosen], self.patch, rng)
        flip(patches, np.less(rng.random(len(patches)), 0.5))
        clean = luminance(patches)
        return self._tensor(with_noise(clean, rng)), self._tensor(clean)

    def loss(self, output: Tensor, wanted: Any) -> Tensor:
        difference = output - wanted
        return (difference * difference).mean()

    def score(self, net: Module) -> float:
        """Mean over the images of 10 log10(1 / mean squared error), in decibels."""
        clean = luminance(self.data.test_x[: self.images])
        noisy = with_noise(clean, np.random.default_rng(0))
        ratios = []
        with no_grad(), in_mode(net, training=False):
            for start in range(0, len(clean), EVALUATION_BATCH):
                part = slice(start, start + EVALUATION_BATCH)
                ratios.append(psnr(net(self._tensor(noisy[part])).numpy(), clean[part]))
        return float(np.concatenate(ratios).mean())


def random_patches(images: np.ndarray, side: int, rng: np.random.Generator) -> np.ndarray:
    """A square of each image, (N, side, side, C), from anywhere in it."""
    corners = rng.integers(0, images.shape[1] - side + 1, (len(images), 2))
    squares = [x[i : i + side, j : j + side] for x, (i, j) in zip(images, corners, strict=True)]
    return np.stack(squares)


def luminance(images: np.ndarray) -> np.ndarray:
    """Grey in [0, 1], (N, H, W, 1), of uint8 images of three channels, or of one."""
    weights = np.array(LUMINANCE if images.shape[-1] == 3 else (1.0,), DTYPE)
    return (images / DTYPE(255) @ weights)[..., None]


def with_noise(clean: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Images in [0, 1] with independent Gaussian noise of ``NOISE`` / 255 on every pixel."""
    return clean + (NOISE / 255) * rng.standard_normal(clean.shape, DTYPE)


def psnr(images: np.ndarray, clean: np.ndarray) -> np.ndarray:
    """10 log10(1 / mean squared error) of each image, clipped to [0, 1] before: (N,)."""
    errors = np.clip(images, 0, 1) - clean
    return -10 * np.log10(np.square(errors).mean(axis=(1, 2, 3)))


def halved(data: Dataset) -> Dataset:
    """Images of half the side: the rounded means of 2 x 2 pixels."""
    train_x, test_x = (_halved(x) for x in (data.train_x, data.test_x))
    mean, std = channel_statistics(train_x)
    return dataclasses.replace(data, train_x=train_x, test_x=test_x, mean=mean, std=std)


def _halved(images: np.ndarray) -> np.ndarray:
    n, h, w, c = images.shape
    sums = images.reshape(n, h // 2, 2, w // 2, 2, c).sum(axis=(2, 4), dtype=np.int64)
    return ((sums + 2) // 4).astype(np.uint8)


def first(data: Dataset, images: int | None) -> Dataset:
    """The same with the first ``images`` of the training set; None: all."""
    train_x, train_y = data.train_x[:images], data.train_y[:images]
    return dataclasses.replace(data, train_x=train_x, train_y=train_y)


# -- networks ------------------------------------------------------------------------------------

Build = Callable[[np.random.Generator], Module]


def mlp(inputs: int, hidden: int) -> Build:
    """Three hidden layers of ``hidden`` units with batch norm, ten outputs."""

    def build(rng: np.random.Generator) -> Module:
        layers: list[Module] = [nn.Flatten()]
        for width in (inputs, hidden, hidden):
            linear = nn.Linear(width, hidden, bias=False, rng=rng, dtype=DTYPE)
            layers += [linear, nn.BatchNorm2d(hidden, dtype=DTYPE), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(hidden, 10, rng=rng, dtype=DTYPE))

    return build


def convnet(side: int, inputs: int = 1, times: int = 1) -> Build:
    """For images of ``inputs`` channels: four 3x3 convolutions with batch norm, of ``times`` 16 to
    64 channels; the average of a map of side / 4; a linear layer."""

    def build(rng: np.random.Generator) -> Module:
        layers: list[Module] = []
        channels = inputs
        for size, stride in ((16, 2), (32, 1), (32, 2), (64, 1)):
            width = times * size
            layers.append(conv(channels, width, 3, stride, rng=rng, dtype=DTYPE))
            layers += [nn.BatchNorm2d(width, dtype=DTYPE), nn.ReLU()]
            channels = width
        end = [nn.AvgPool2d(-(-side // 4)), nn.Flatten()]
        return nn.Sequential(*layers, *end, nn.Linear(channels, 10, rng=rng, dtype=DTYPE))

    return build


def resnet20(stem_stride: int = 1) -> Build:
    """ResNet-20 for ten classes; the stride of the first convolution makes all maps smaller."""

    def build(rng: np.random.Generator) -> Module:
        if stem_stride == 1:
            return models.resnet(20, rng=rng, dtype=DTYPE)
        return ResNet(BasicBlock, ((3, 16), (3, 32), (3, 64)), 10, 1.0, rng, DTYPE, stem_stride)

    return build


class DnCNN(Module):
    """x - f(x): convolutions that find the noise in x (Zhang et al. 2017).

    f: a 3x3 convolution with ReLU, ``depth`` - 2 with batch norm and ReLU, one more. For grey x.
    """

    def __init__(self, depth: int, width: int, rng: np.random.Generator, dtype: Any) -> None:
        options = {"rng": rng, "dtype": dtype}
        self.head = nn.Conv2d(1, width, 3, padding=1, **options)
        self.body = [conv(width, width, 3, **options) for _ in range(depth - 2)]
        self.norms = [nn.BatchNorm2d(width, dtype=dtype) for _ in self.body]
        self.tail = nn.Conv2d(width, 1, 3, padding=1, **options)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.head(x))
        for convolution, norm in zip(self.body, self.norms, strict=True):
            y = norm.then_relu(convolution(y))
        return x - self.tail(y)


def dncnn(depth: int, width: int) -> Build:
    return lambda rng: DnCNN(depth, width, rng, DTYPE)


# -- experiments ---------------------------------------------------------------------------------

SGD = WeightTraining(epochs=0, lr=0.1, schedule="multistep", optimizer="sgd", weight_decay=1e-4)
ADAM = WeightTraining(epochs=0, lr=2e-3, schedule="multistep", optimizer="adam")


@dataclass(frozen=True)
class Experiment:
    """A network, its task and its schedule.

    Attributes:
        dataset: the name of the images.
        build: the network, from a generator of random numbers.
        budget: epochs that every method has; for DHP those of the search are among them.
        search: epochs after which a search ends whether it has reached its target or not.
        task: of the data.
        training: optimiser, learning rate, its schedule (over the budget; in DHP over what the
            search has left of it) and weight decay. The search has the first learning rate.
        targets: the fractions of the multiplications that DHP is to keep.
        images: how many of the training set; None: all.
        classifier_keeps, check_every: as in ``dhp.HyperNetwork`` and ``dhp.Search``.
        l1: lambda; None: by the closed form (``dhp_runs.chosen_l1``).
        bias_free: by how much lambda is larger where the hypernetworks have no biases.
    """

    dataset: str
    build: Build
    budget: int
    search: int
    task: type[Task] = Classification
    training: WeightTraining = SGD
    targets: tuple[float, ...] = (0.5, 0.3)
    images: int | None = None
    options: tuple[tuple[str, Any], ...] = ()
    classifier_keeps: float = 1.0
    check_every: int = 10
    l1: float | None = None
    bias_free: float = 3.0

    def load(self, data_dir: Path | None = None, device: str = "cpu") -> Task:
        """The task with its data.

        Raises:
            UserError: the data set is not there.
        """
        data = first(load(self.dataset, data_dir), self.images)
        if self.dataset == "mnist":
            data = halved(data)
        return self.task(data, device=device, **dict(self.options))


_AUGMENT = (("augment", True),)
_DENOISING: dict[str, Any] = {"task": Denoising, "training": ADAM, "targets": (0.6, 0.4, 0.2)}

EXPERIMENTS = {
    "mlp-digits": Experiment("digits", mlp(64, 64), budget=60, search=30, classifier_keeps=0),
    "conv-digits": Experiment("digits", convnet(8), budget=60, search=30),
    "mlp-mnist": Experiment(
        "mnist", mlp(196, 128), budget=15, search=7, images=10_000, classifier_keeps=0
    ),
    "conv-mnist": Experiment("mnist", convnet(14), budget=10, search=5, images=10_000),
    "conv-cifar10": Experiment(
        "cifar10", convnet(32, 3), budget=6, search=3, images=10_000, options=_AUGMENT
    ),
    "resnet20-small-cifar10": Experiment(
        "cifar10", resnet20(stem_stride=4), budget=8, search=3, targets=(0.5,), options=_AUGMENT
    ),
    "resnet20-cifar10": Experiment(
        "cifar10",
        resnet20(),
        budget=320,
        search=100,
        targets=(0.5,),
        options=_AUGMENT,
        check_every=100,
        l1=2e-4,
    ),
    "dncnn-digits": Experiment(
        "digits", dncnn(4, 16), budget=40, search=20, options=(("patch", 8),), **_DENOISING
    ),
    "dncnn-cifar10": Experiment("cifar10", dncnn(6, 24), budget=2, search=1, **_DENOISING),
}
# Twice as wide: what is to be left costs at most as much as the plain network, whole.
EXPERIMENTS |= {
    f"{name}-wide": dataclasses.replace(
        EXPERIMENTS[name], build=build, targets=(0.23,), classifier_keeps=0.0
    )
    for name, build in (
        ("conv-mnist", convnet(14, times=2)),
        ("conv-cifar10", convnet(32, 3, times=2)),
    )
}


def steps_of(epochs: float, task: Task) -> int:
    """The steps of so many epochs."""
    return math.ceil(epochs * task.epoch)
