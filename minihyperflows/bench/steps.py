"""How fast, side by side: the same training step here and in PyTorch, on the CPU."""

from __future__ import annotations

import json
import math
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np

from minihyperflows import flows
from minihyperflows import functional as F
from minihyperflows.bench.contenders import (
    FORMATS,
    OURS,
    Progress,
    Timed,
    faster_format,
    format_of,
    ratio,
    take_turns,
    torch_available,
    torch_name,
    torch_peers,
    torch_version,
    use_threads,
)
from minihyperflows.bench.layers import distinct_convolutions, measure_convolution
from minihyperflows.bench.machine import describe_machine, peak_memory
from minihyperflows.engine import Tensor
from minihyperflows.errors import UserError
from minihyperflows.lab.recipes import Recipe, find
from minihyperflows.lab.runs import commit, versions
from minihyperflows.lab.training import make_optimizer
from minihyperflows.nn import Module, models

LR = 1e-3  # of all optimisers: nothing is to be learned here, so nothing may diverge
GAMMA = 1.0
PRESENCE = (-0.5, 0.5)  # half of the weights are removed


@dataclass(frozen=True)
class Workload:
    """What is measured of a network: the pruning step of ``recipe`` on ``batch`` images."""

    recipe: str
    batch: int
    image: tuple[int, int, int]  # (H, W, C)
    convolutional: bool = True  # has a width, and layers for ``--layers``


NETWORKS = {
    "lenet300": Workload("lenet300-mnist", 128, (28, 28, 1), convolutional=False),
    "vgg19": Workload("vgg19-cifar10", 64, (32, 32, 3)),
    "resnet50": Workload("resnet50-cifar10", 32, (32, 32, 3)),
}


@dataclass(frozen=True)
class BenchSettings:
    """What to measure.

    Attributes:
        networks: names of ``NETWORKS``.
        layers: also measure every distinct convolution of these networks.
        rounds: how many samples of each contender.
        batch: images in a step; None for each network's own.
        width: scales the channels of the convolutional networks.
        threads: of our operations, BLAS and PyTorch; None for two (one on a single core).
        torch: compare with PyTorch, if it is installed.

    Raises:
        UserError: an unknown network, or a number that is not positive.
    """

    networks: tuple[str, ...] = tuple(NETWORKS)
    layers: bool = False
    rounds: int = 7
    batch: int | None = None
    width: float = 1.0
    threads: int | None = None
    torch: bool = True

    def __post_init__(self) -> None:
        for name in self.networks:
            if name not in NETWORKS:
                raise UserError(f"unknown network {name!r}: choose one of {', '.join(NETWORKS)}")
        for name in ("rounds", "batch", "width", "threads"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"{name} must be a positive number, not {value:g}")

    @property
    def thread_count(self) -> int:
        """``threads`` with its default."""
        return self.threads or min(2, os.cpu_count() or 1)

    @property
    def formats(self) -> tuple[str, ...]:
        """The memory formats in which PyTorch takes part."""
        return FORMATS if self.torch and torch_available() else ()

    @property
    def contenders(self) -> tuple[str, ...]:
        """Whose steps are measured."""
        return (OURS, *map(torch_name, self.formats))

    def batch_of(self, network: str) -> int:
        """How many images a step of ``network`` has."""
        return self.batch or NETWORKS[network].batch

    def options_of(self, network: str) -> dict[str, float]:
        """The arguments that build ``network``."""
        return {"width": self.width} if NETWORKS[network].convolutional else {}

    def command(self) -> str:
        """The command line that measures this."""
        words = ["minihyperflows", "bench", *self.networks, "--rounds", str(self.rounds)]
        words += ["--width", f"{self.width:g}", "--threads", str(self.thread_count)]
        words += ["--batch", str(self.batch)] if self.batch else []
        words += ["--layers"] * self.layers + ["--no-torch"] * (not self.torch)
        return shlex.join(words)


def measure(settings: BenchSettings, progress: Progress = lambda line: None) -> dict[str, Any]:
    """Measure what ``settings`` ask for; returns the record, plain JSON types.

    The number of threads that ``settings`` ask for stays set in this process.

    The record has ``date``, ``commit``, ``command``, ``versions``, ``threads``, ``cpu``, ``cores``,
    ``load``, ``blas``, ``environment``, and the lists ``networks`` (see :func:`measure_network`)
    and ``layers`` (see :func:`measure_convolution`).

    Args:
        settings: what to measure.
        progress: called with a line that says what is being measured.
    """
    use_threads(settings.thread_count, with_torch=bool(settings.formats))
    head = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "command": settings.command(),
        "versions": versions() | {"torch": torch_version() if settings.formats else None},
        "threads": settings.thread_count,
        **describe_machine(),
    }
    networks = [measure_network(name, settings, progress) for name in settings.networks]
    layers = measure_layers(settings, progress) if settings.layers else []
    return head | {"networks": networks, "layers": layers}


# -- the training step ---------------------------------------------------------------------------


class TrainingStep:
    """One Hyperflows step on one batch: call it to run it. PyTorch's is in ``torch_peers``.

    Args:
        net: a gated network.
        x: images (N, H, W, C).
        labels: (N,).
        recipe: its pruning stage says which optimisers, and how smooth the labels.
        lr: of both optimisers.
        gamma: the pressure.
    """

    def __init__(
        self,
        net: Module,
        x: np.ndarray,
        labels: np.ndarray,
        recipe: Recipe,
        lr: float,
        gamma: float,
    ) -> None:
        self.net, self.x, self.labels = net, Tensor(x), labels
        self.gamma, self.smoothing = gamma, recipe.pruning.label_smoothing
        self.optimizers = [
            make_optimizer(net.parameters(), recipe.pruning),
            make_optimizer(list(flows.presences(net).values()), recipe.presence),
        ]
        for optimizer in self.optimizers:
            optimizer.lr = lr

    def gradients(self) -> float:
        """The loss with the pressure; leaves the gradients of weights and presences."""
        self.net.zero_grad()
        loss = F.cross_entropy(self.net(self.x), self.labels, self.smoothing)
        loss = loss + self.gamma * flows.pressure(self.net)
        loss.backward()
        return loss.item()

    def __call__(self) -> None:
        self.gradients()
        for optimizer in self.optimizers:
            optimizer.step()


def our_step(network: str, settings: BenchSettings) -> TrainingStep:
    """Our training step of ``network``; the same numbers every time."""
    rng = np.random.default_rng(0)
    net = getattr(models, network)(rng=rng, **settings.options_of(network))
    flows.attach(net, init=PRESENCE, rng=rng)
    return TrainingStep(net, *_task(network, settings))


def torch_step(network: str, memory_format: str, settings: BenchSettings) -> Any:
    """PyTorch's training step of ``network``, with weights of its own."""
    peers = torch_peers()
    twin = getattr(peers, network)(**settings.options_of(network))
    peers.attach(twin, PRESENCE)
    return peers.TrainingStep(twin, *_task(network, settings), memory_format)


def make_step(contender: str, network: str, settings: BenchSettings) -> Callable[[], None]:
    """The training step of "ours", "torch_contiguous" or "torch_channels_last"."""
    if contender == OURS:
        return our_step(network, settings)
    step: Callable[[], None] = torch_step(network, format_of(contender), settings)
    return step


def _task(network: str, settings: BenchSettings) -> tuple[Any, ...]:
    """A random batch and how to train on it."""
    workload, batch = NETWORKS[network], settings.batch_of(network)
    rng = np.random.default_rng(1)
    x = rng.standard_normal((batch, *workload.image), dtype=np.float32)
    return x, rng.integers(0, 10, batch), find(workload.recipe), LR, GAMMA


# -- its time ------------------------------------------------------------------------------------


def measure_network(network: str, settings: BenchSettings, progress: Progress) -> dict[str, Any]:
    """Time and memory of the training step of one network.

    ``milliseconds`` (medians), ``samples`` and ``memory`` (see :func:`step_memory`) have an entry
    for each contender, "ours", "torch_contiguous" and "torch_channels_last". ``ratio`` is PyTorch's
    time in its faster format, ``torch_format``, over ours; ``memory_ratio`` our increase of memory
    over its. None without PyTorch.
    """
    batch = settings.batch_of(network)
    title = f"{network}, batch {batch}"
    progress(f"{title}: memory")
    memory = {c: fresh_step_memory(c, network, settings) for c in settings.contenders}
    timed = {c: _timed(make_step(c, network, settings)) for c in settings.contenders}
    samples = take_turns(timed, settings.rounds, lambda line: progress(f"{title}: {line}"))
    medians = {c: float(np.median(times)) for c, times in samples.items()}
    rival = faster_format(medians)
    return {
        "network": network,
        "width": settings.options_of(network).get("width"),
        "batch": batch,
        "milliseconds": medians,
        "torch_format": rival,
        "ratio": ratio(samples, rival),
        "samples": {c: times[:, 0].tolist() for c, times in samples.items()},
        "memory": memory,
        "memory_ratio": _memory_ratio(memory, rival),
    }


def measure_layers(settings: BenchSettings, progress: Progress) -> list[dict[str, Any]]:
    """Every distinct convolution of the networks; see :func:`measure_convolution`."""
    found = []
    for network in settings.networks:
        if not NETWORKS[network].convolutional:
            continue
        net = getattr(models, network)(rng=np.random.default_rng(0), width=settings.width)
        images = (settings.batch_of(network), *NETWORKS[network].image)
        for shape, count in distinct_convolutions(net, images).items():
            progress(f"{network}: {shape}")
            times = measure_convolution(shape, settings.formats, settings.rounds)
            found.append({"network": network, "count": count, **times})
    return found


def _timed(step: Callable[[], None]) -> Timed:
    def run() -> tuple[float, ...]:
        started = time.perf_counter()
        step()
        return (time.perf_counter() - started,)

    return run


# -- its memory ----------------------------------------------------------------------------------

TINY = ("vgg19", BenchSettings(batch=2, width=1 / 64))  # all kinds of layers, in a megabyte


def step_memory(contender: str, network: str, settings: BenchSettings) -> dict[str, int] | None:
    """Run two training steps in this process, which should be a fresh one.

    Returns:
        Bytes: ``peak``, the most that was resident, and ``increase``, how much of that came after
        the libraries were loaded. None where the system does not tell.
    """
    use_threads(settings.thread_count, with_torch=contender != OURS)
    make_step(contender, *TINY)()  # PyTorch loads much of itself at its first step
    before = peak_memory()
    step = make_step(contender, network, settings)
    step()
    step()  # now with the optimisers' moments
    peak = peak_memory()
    if before is None or peak is None:
        return None
    return {"peak": peak, "increase": peak - before}


def fresh_step_memory(
    contender: str, network: str, settings: BenchSettings
) -> dict[str, int] | None:
    """:func:`step_memory` in a process of its own.

    Raises:
        UserError: the process failed; perhaps memory ran out.
    """
    program = (
        "import json; from minihyperflows.bench.steps import BenchSettings, step_memory; "
        f"print(json.dumps(step_memory({contender!r}, {network!r}, {settings!r})))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.splitlines() or [f"exit status {done.returncode}"])[-1]
        raise UserError(f"cannot measure the memory of {network} ({contender}): {reason}")
    found: dict[str, int] | None = json.loads(done.stdout)
    return found


def _memory_ratio(memory: Mapping[str, dict[str, int] | None], rival: str | None) -> float | None:
    """Our increase of memory over PyTorch's in the format ``rival``: below 1 where ours is less."""
    ours = memory[OURS]
    theirs = memory[torch_name(rival)] if rival else None
    return ours["increase"] / theirs["increase"] if ours and theirs else None
