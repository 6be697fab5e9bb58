"""How fast, side by side on a GPU: steps and epochs of Hyperflows training, here and in PyTorch."""

from __future__ import annotations

import gc
import shlex
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, TypeVar

import numpy as np

from minihyperflows import flows
from minihyperflows.bench.contenders import (
    Progress,
    torch_available,
    torch_gpu_peers,
    torch_peers,
)
from minihyperflows.bench.machine import describe_gpu, describe_machine, gpu_memory, gpu_state
from minihyperflows.bench.steps import GAMMA, LR, PRESENCE
from minihyperflows.data.datasets import Dataset, load
from minihyperflows.engine.backend import cupy, require_gpu
from minihyperflows.errors import UserError
from minihyperflows.lab.epochs import Epoch
from minihyperflows.lab.gpu_epochs import GpuEpochs
from minihyperflows.lab.recipes import Recipe, find
from minihyperflows.lab.runs import commit, gpu_versions, versions
from minihyperflows.lab.training import make_optimizer
from minihyperflows.nn import Module, models

RECIPES = {"vgg19": "vgg19-cifar10", "resnet50": "resnet50-cifar10"}
T = TypeVar("T")

CIFAR = (50_000, 10_000)  # images to train with, to test with
STEPS = 50  # of a sample of the part "steps"
STEP_ROUNDS = 7
PARTS = ("steps", "epochs")
SAFE_SCALE = 16.0  # of the loss, at first: small networks overflow with the usual one
TINY = 1 / 64  # the width of a network whose first step loads libraries

# name in the record -> how the network computes here
OURS = {"ours": "float16", "ours_float32": "float32"}


@dataclass(frozen=True)
class Peer:
    """A way to train in PyTorch; see ``torch_gpu_peers.Training``."""

    memory_format: str
    half: bool = True
    way: str = "eager"


PEERS = {
    "torch_amp_contiguous": Peer("contiguous"),
    "torch_amp_channels_last": Peer("channels_last"),
    "torch_graph": Peer("channels_last", way="graph"),
    "torch_compile": Peer("channels_last", way="compile"),
    "torch_float32": Peer("contiguous", half=False),
}
COMPILER = {"mode": "reduce-overhead"}  # torch.compile's fastest without minutes of search


@dataclass(frozen=True)
class GpuBenchSettings:
    """What to measure.

    Attributes:
        networks: names of ``RECIPES``.
        parts: of ``PARTS``.
        rounds: of epochs; of the shorter samples of the part "steps" there are ``STEP_ROUNDS``.
        batch: images in a step.
        width: scales the channels.
        images: how many to train with; a fifth of that to test with.
        contenders: names of ``OURS`` and ``PEERS``; None for all.
        torch: compare with PyTorch, if it is installed.
        data_dir: a folder with CIFAR-10; None for random images.
        seconds: no round begins after that time.
        torch_device: where PyTorch computes; another one than "cuda" is for tests.

    Raises:
        UserError: an unknown name, or a number that is not positive.
    """

    networks: tuple[str, ...] = tuple(RECIPES)
    parts: tuple[str, ...] = PARTS
    rounds: int = 3
    batch: int = 128
    width: float = 1.0
    images: int = CIFAR[0]
    contenders: tuple[str, ...] | None = None
    torch: bool = True
    data_dir: Path | None = None
    seconds: float = float("inf")
    torch_device: str = "cuda"
    compiler: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        known = {"network": RECIPES, "part": PARTS, "contender": {**OURS, **PEERS}}
        for name, choices in known.items():
            for value in getattr(self, f"{name}s") or ():
                if value not in choices:
                    words = ", ".join(choices)
                    raise UserError(f"unknown {name} {value!r} on a GPU: choose one of {words}")
        for name in ("rounds", "batch", "width", "images", "seconds"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name} must be a positive number, not {getattr(self, name):g}")
        if self.images < self.batch:
            raise UserError(f"{self.images} images are less than a batch of {self.batch}")

    @property
    def names(self) -> tuple[str, ...]:
        """The contenders that take part."""
        with_torch = self.torch and torch_available()
        everybody = (*OURS, *PEERS) if with_torch else tuple(OURS)
        return tuple(n for n in everybody if self.contenders is None or n in self.contenders)

    def command(self) -> str:
        """The command line that measures this."""
        words = ["minihyperflows", "bench", *self.networks, "--device", "cuda"]
        words += ["--rounds", str(self.rounds), "--batch", str(self.batch)]
        words += ["--width", f"{self.width:g}", "--images", str(self.images)]
        words += ["--no-torch"] * (not self.torch)
        words += ["--data-dir", str(self.data_dir)] if self.data_dir else []
        return shlex.join(words)


def measure_on_gpu(
    settings: GpuBenchSettings,
    progress: Progress = lambda line: None,
    save: Callable[[dict[str, Any]], None] = lambda record: None,
) -> dict[str, Any]:
    """Measure what ``settings`` ask for; returns the record, plain JSON types.

    The record has ``date``, ``commit``, ``command``, ``versions``, ``gpu`` (see
    :func:`describe_gpu`), the machine's ``cpu``, ``cores``, ``load`` and so on, and ``networks``
    (see :class:`_Measurement`).

    Args:
        settings: what to measure.
        progress: called with a line that says what is being measured.
        save: called with the record as it is so far, whenever something was added to it.

    Raises:
        DeviceError: there is no GPU.
    """
    require_gpu()
    started = time.monotonic()
    record = {**head(settings.torch), "command": settings.command(), "networks": []}
    if any(name in PEERS for name in settings.names):
        torch_gpu_peers().configure()
    data = cifar_like(settings.images, settings.data_dir)
    record["data"] = "random" if settings.data_dir is None else data.name
    for number, network in enumerate(settings.networks):
        left = settings.seconds - (time.monotonic() - started)
        deadline = time.monotonic() + left / (len(settings.networks) - number)
        entry: dict[str, Any] = {}
        record["networks"].append(entry)
        _Measurement(network, settings, data, entry, deadline, progress, lambda: save(record)).run()
    return record


def head(with_torch: bool) -> dict[str, Any]:
    """Date, commit, versions and the machine: what every record begins with."""
    peers = torch_gpu_peers().versions() if with_torch and torch_available() else {"torch": None}
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "versions": versions() | gpu_versions() | peers,
        "gpu": describe_gpu(),
        **describe_machine(),
    }


def cifar_like(images: int = CIFAR[0], data_dir: Path | None = None) -> Dataset:
    """CIFAR-10 from ``data_dir``, or random images of its shape; the first ``images`` of them."""
    test = max(1, images * CIFAR[1] // CIFAR[0])
    if data_dir is not None:
        data = load("cifar10", data_dir)
        return first_images(data, images, test)
    rng = np.random.default_rng(0)
    x = [rng.integers(0, 256, (n, 32, 32, 3), np.uint8) for n in (images, test)]
    y = [rng.integers(0, 10, n) for n in (images, test)]
    classes = tuple("0123456789")
    return Dataset("random", x[0], y[0], x[1], y[1], classes, (0.5,) * 3, (0.25,) * 3)


def first_images(data: Dataset, train: int, test: int) -> Dataset:
    """The beginnings of a data set's two parts."""
    parts = data.train_x[:train], data.train_y[:train], data.test_x[:test], data.test_y[:test]
    return Dataset(data.name, *parts, data.classes, data.mean, data.std)


# -- who is measured -----------------------------------------------------------------------------


class Training(Protocol):
    """What both sides can do; see ``torch_gpu_peers.Training``."""

    def use(self, data: Dataset) -> None: ...
    def prepare(self) -> None: ...
    def epoch(self) -> float: ...
    def evaluate(self) -> float: ...


class OurTraining:
    """Hyperflows training here: the counterpart of ``torch_gpu_peers.Training``.

    Args:
        net: a gated network; it is moved to the GPU.
        data: the data set.
        recipe: its pruning stage says which optimisers, and how smooth the labels.
        batch: images in a step; the last one of an epoch may be smaller.
        dtype: in which the network computes.
        augment: crop and flip the images.
    """

    def __init__(
        self,
        net: Module,
        data: Dataset,
        recipe: Recipe,
        batch: int,
        dtype: str,
        augment: bool = True,
    ) -> None:
        self.net, self.batch, self.dtype, self.augment = net.to("cuda"), batch, dtype, augment
        self.smoothing = recipe.pruning.label_smoothing
        self.weights = make_optimizer(net.parameters(), recipe.pruning)
        self.presences = make_optimizer(list(flows.presences(net).values()), recipe.presence)
        self.weights.lr = self.presences.lr = LR
        self.rng = np.random.default_rng(0)
        self.epochs: GpuEpochs | None = None
        self.use(data)
        self.set_loss_scale(SAFE_SCALE)

    def use(self, data: Dataset) -> None:
        """Train on ``data`` from now on."""
        if self.epochs is not None:
            self.epochs.release()
        self.epochs = self.epochs_on(data)

    def epochs_on(self, data: Dataset) -> GpuEpochs:
        return GpuEpochs(self.net, data, self.batch, self.augment, self.dtype)

    def set_loss_scale(self, scale: float) -> None:
        """Begin with this one, in half precision; call it before the first epoch."""
        assert self.epochs
        if self.dtype == "float16":
            self.epochs.load_state_dict({"scale": scale, "good_steps": 0})

    def prepare(self) -> None:
        """Everything that happens once: compiling kernels and recording the step."""
        self.epoch()

    def epoch(self) -> float:
        """One pass over the training set in a new order; returns the mean loss."""
        optimizers = (self.weights, self.presences)
        assert self.epochs
        epoch = Epoch(*optimizers, self.smoothing, self.rng, gamma=lambda: GAMMA)
        return self.epochs.train(epoch)[0]

    def evaluate(self) -> float:
        """The fraction of the test set that the network classifies correctly."""
        assert self.epochs
        return self.epochs.accuracy()


def our_network(network: str, width: float) -> Module:
    """A gated network; the same numbers every time."""
    rng = np.random.default_rng(0)
    net: Module = getattr(models, network)(rng=rng, width=width)
    flows.attach(net, init=PRESENCE, rng=rng)
    return net


def make_training(
    contender: str, network: str, data: Dataset, settings: GpuBenchSettings, width: float
) -> Training:
    """The training of one of ``OURS`` or ``PEERS``."""
    recipe = find(RECIPES[network])
    if contender in OURS:
        net = our_network(network, width)
        return OurTraining(net, data, recipe, settings.batch, OURS[contender])
    peer, cpu_peers, peers = PEERS[contender], torch_peers(), torch_gpu_peers()
    twin = getattr(cpu_peers, network)(width=width)
    cpu_peers.attach(twin, PRESENCE)
    training: Training = peers.Training(
        *(twin, data, recipe, settings.batch, LR, GAMMA, peer.memory_format),
        # a network that only loads libraries need not be compiled
        *(peer.half, "eager" if width == TINY else peer.way, settings.torch_device),
        compiler=dict(settings.compiler or COMPILER),
    )
    return training


# -- their time ----------------------------------------------------------------------------------


class _Measurement:
    """Measures one network into ``entry``, in the record's ``networks``.

    ``contenders`` has for each one the seconds ``start``, until the libraries and kernels are
    loaded, and ``preparation``, until its own step is compiled or recorded; ``memory``, the bytes
    of the GPU's that it then holds (everything it has asked for, so its peak); or ``error``.

    ``steps`` and ``epochs`` have ``medians``, ``ratios`` and ``samples`` (see :func:`summary`) of
    "milliseconds" a step, and of "seconds" and "evaluation" an epoch, and ``gpu_states`` before
    the first round and after each.
    """

    def __init__(
        self,
        network: str,
        settings: GpuBenchSettings,
        data: Dataset,
        entry: dict[str, Any],
        deadline: float,
        progress: Progress,
        save: Callable[[], None],
    ) -> None:
        self.network, self.settings, self.data, self.entry = network, settings, data, entry
        self.deadline, self.save = deadline, save
        self.title = f"{network}, batch {settings.batch}"
        self.progress: Progress = lambda line: progress(f"{self.title}: {line}")
        images = min(len(data.train_y), STEPS * settings.batch)
        self.sample = first_images(data, images, 1)
        self.trainings: dict[str, Training] = {}

    def run(self) -> None:
        settings = self.settings
        self.entry |= {
            "network": self.network,
            "width": settings.width,
            "batch": settings.batch,
            "images": len(self.data.train_y),
            "test_images": len(self.data.test_y),
            "contenders": {name: {} for name in settings.names},
        }
        for name in settings.names:
            self.progress(f"{name}: preparing")
            self.attempt(name, self.build, name)
        if "steps" in settings.parts:
            self.rounds("steps", STEP_ROUNDS, self.time_steps)
        if "epochs" in settings.parts:
            for name, training in list(self.trainings.items()):
                self.attempt(name, self.get_ready, training)
            self.rounds("epochs", settings.rounds, self.time_epoch)
        self.trainings.clear()
        _release_memory()

    def build(self, name: str) -> None:
        """A contender, ready to train on the short data set; what that took is in the entry."""
        tiny = first_images(self.data, 3 * self.settings.batch, 1)
        took = {"start": _seconds(self.make(name, tiny, TINY).prepare)}
        _release_memory()
        memory = gpu_memory()
        training = self.make(name, self.sample, self.settings.width)
        took["preparation"] = _seconds(training.prepare)
        took["memory"] = gpu_memory() - memory
        self.entry["contenders"][name] |= took
        self.trainings[name] = training

    def make(self, name: str, data: Dataset, width: float) -> Training:
        return make_training(name, self.network, data, self.settings, width)

    def get_ready(self, training: Training) -> None:
        training.use(self.data)
        training.prepare()

    def attempt(self, name: str, work: Callable[..., T], *arguments: Any) -> T | None:
        """``work(*arguments)``; if it fails the contender is out, and its error in the entry."""
        result = None
        try:
            result = work(*arguments)
        except Exception as error:  # whatever goes wrong in there: the others go on
            self.trainings.pop(name, None)
            message = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            self.entry["contenders"][name]["error"] = message
            self.progress(f"{name} failed: {message}")
        self.save()
        return result

    # -- rounds ----------------------------------------------------------------------------------

    def rounds(self, part: str, rounds: int, timed: Callable[[Training], dict[str, float]]) -> None:
        """Everybody in turn, again and again; the samples are in the entry after each round."""
        samples: dict[str, dict[str, list[float]]] = {name: {} for name in self.trainings}
        states = [gpu_state()]
        for number in range(1, rounds + 1 if self.trainings else 1):
            if number > 1 and time.monotonic() > self.deadline:
                self.progress(f"{part}: no time for round {number} of {rounds}")
                break
            self.progress(f"{part}: round {number} of {rounds}")
            for name, training in list(self.trainings.items()):
                for what, value in (self.attempt(name, timed, training) or {}).items():
                    samples[name].setdefault(what, []).append(value)
            states.append(gpu_state())
            self.entry[part] = summary(samples) | {"gpu_states": states}
            self.save()

    def time_steps(self, training: Training) -> dict[str, float]:
        """Milliseconds of a step: the mean over an epoch of the short data set."""
        seconds = _seconds(training.epoch)
        return {"milliseconds": 1000 * seconds * self.settings.batch / len(self.sample.train_y)}

    def time_epoch(self, training: Training) -> dict[str, float]:
        """Seconds of an epoch, and of an evaluation."""
        return {"seconds": _seconds(training.epoch), "evaluation": _seconds(training.evaluate)}


def summary(samples: Mapping[str, Mapping[str, list[float]]]) -> dict[str, Any]:
    """Of each contender the median of each kind of sample, the samples themselves, and the median
    over rounds of its time over ours: above 1 where ours is less."""
    answer: dict[str, Any] = {"medians": {}, "ratios": {}, "samples": dict(samples)}
    for name, kinds in samples.items():
        answer["medians"][name] = {kind: float(np.median(v)) for kind, v in kinds.items()}
        ours = samples.get(next(iter(OURS)))
        if ours and kinds and name != next(iter(OURS)):
            kind = next(iter(kinds))
            pairs = zip(kinds[kind], ours[kind], strict=False)
            answer["ratios"][name] = float(np.median([theirs / own for theirs, own in pairs]))
    return answer


def _seconds(work: Callable[[], Any]) -> float:
    """Wall time; ``work`` ends with reading a number from the GPU, for which it waits."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _release_memory() -> None:
    """Give back what nobody uses any more, ours and PyTorch's."""
    gc.collect()
    cupy().get_default_memory_pool().free_all_blocks()
    if torch_available():
        peers: ModuleType = torch_gpu_peers()
        peers.release_memory()
