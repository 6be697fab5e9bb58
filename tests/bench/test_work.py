"""The work of a step, counted: bytes allocated at once, and passes over memory.

Seconds depend on the machine and on what else it does; these numbers do not. They grow when
somebody adds a temporary array, keeps values in the graph that ``backward`` does not need, or
walks through an activation once more. ``minihyperflows bench`` measures the seconds.
"""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from support.lanes import large

from minihyperflows import Tensor, flows, models, nn, optim
from minihyperflows import functional as F
from minihyperflows.engine import conv, im2col, memory, norm, ops, pooling, threads, winograd
from minihyperflows.engine.graph import Function, reverse_topological_order


@pytest.fixture(autouse=True)
def _no_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every array is a new one: what is asked for counts, not what the pool has to give."""
    monkeypatch.setattr(memory, "LEAST", 1 << 62)


def peak_of(work: Callable[[], Any]) -> int:
    """The most bytes that ``work`` holds at once beyond what was there, its result included."""
    tracemalloc.start()
    try:
        kept = work()
        peak = tracemalloc.get_traced_memory()[1]
        del kept
    finally:
        tracemalloc.stop()
    return peak


def activation_bytes(loss: Tensor) -> int:
    """The bytes of all the convolutions' outputs behind ``loss``."""
    assert loss.creator is not None
    functions = reverse_topological_order(loss.creator)
    sizes = [math.prod(f.output_shape) for f in functions if isinstance(f, conv.Conv2d)]
    return sum(sizes) * loss.dtype.itemsize


# A layer keeps the convolution's output (for batch norm) and batch norm's (for the next layer's
# filters): two sets of activations. The peak comes before the last of them are made or after the
# first of them are gone, and some cotangents are in flight.
PEAK = {"vgg19": 2.4, "resnet50": 2.1}


@pytest.mark.parametrize("name", ["vgg19", *large("resnet50")])
def test_peak_of_a_training_step(name: str) -> None:
    threads.set_threads(1)
    rng = np.random.default_rng(0)
    net = getattr(models, name)(width=0.25, rng=rng)
    x, y = rng.standard_normal((32, 32, 32, 3)).astype(np.float32), rng.integers(0, 10, 32)

    def forward() -> Tensor:
        return F.cross_entropy(net(Tensor(x)), y)

    activations = activation_bytes(forward())
    peak = peak_of(lambda: forward().backward())
    gradients = sum(p.data.nbytes for p in net.parameters())
    threads.set_threads(None)
    print(f"{name}: {(peak - gradients) / activations:.2f} sets of activations")
    assert peak - gradients < PEAK[name] * activations


def applied(function: Function, *arrays: np.ndarray) -> tuple[Function, np.ndarray]:
    """``function`` after its forward pass, needing all gradients, and a cotangent."""
    function.needs = (True,) * len(arrays)
    return function, np.ones_like(function.forward(*arrays))


def image_and_filters(kernel: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((64, 16, 16, 64)).astype(np.float32)  # 4 MiB
    return x, rng.standard_normal((64, kernel, kernel, 64)).astype(np.float32)


# Beyond the results: blocks of half a MiB a thread, filters, and Winograd's transformed arrays,
# bounded by threads.LARGEST_SCRATCH.
SCRATCH = {"im2col": 20, "winograd2": 36, "winograd4": 24}  # MiB


@pytest.mark.parametrize("way", conv.WAYS)
def test_scratch_of_a_convolution(way: str) -> None:
    threads.set_threads(1)
    x, w = image_and_filters(3)
    function, c = applied(conv.Conv2d(padding=1, way=way), x, w)
    forward = peak_of(lambda: function.forward(x, w)) - c.nbytes
    backward = peak_of(lambda: function.backward(c)) - x.nbytes - w.nbytes
    threads.set_threads(None)
    print(f"{way}: {forward / 2**20:.1f} MiB forward, {backward / 2**20:.1f} MiB backward")
    assert forward < 3 * 2**20
    assert backward < SCRATCH[way] * 2**20


def test_a_pointwise_convolution_needs_its_results_only() -> None:
    threads.set_threads(1)
    x, w = image_and_filters(1)
    function, c = applied(conv.Conv2d(), x, w)
    assert peak_of(lambda: function.forward(x, w)) < c.nbytes + 2**17
    assert peak_of(lambda: function.backward(c)) < x.nbytes + 2**17
    threads.set_threads(None)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the number of rows, elements or images at every pass of the engine's blocks."""
    counted: list[int] = []
    through = threads.for_blocks

    def counting(work: Any, length: int, block: int, array: Any = None) -> Any:
        counted.append(length)
        return through(work, length, block, array)

    for module in (threads, norm, im2col, winograd, pooling):
        monkeypatch.setattr(module, "for_blocks", counting)
    return counted


BIG = (64, 32, 32, 64)  # many blocks


@pytest.mark.parametrize("relu", [False, True])
def test_batch_norm_passes_twice_each_way(passes: list[int], relu: bool) -> None:
    x = np.random.default_rng(0).standard_normal(BIG).astype(np.float32)
    scale = np.ones(64, np.float32)
    function, c = applied(norm.BatchNorm(relu=relu), x, scale, scale)
    assert len(passes) == 2  # statistics; normalise
    function.backward(c)
    assert len(passes) == 4  # sums; dL/dx


def test_relu_and_the_residual_sum_pass_once_each_way(passes: list[int]) -> None:
    x = np.ones(BIG, np.float32)
    function, c = applied(ops.ReLU(), x)
    assert len(passes) == 1
    function.backward(c)
    assert len(passes) == 2
    function, c = applied(ops.Add(), x, x)
    assert len(passes) == 3
    function.backward(c)  # hands c on
    assert len(passes) == 3


def test_optimisers_and_gates_pass_once(passes: list[int]) -> None:
    layer = nn.Linear(1024, 1024, rng=np.random.default_rng(0))
    flows.attach(layer, rng=np.random.default_rng(1))
    weight = layer.effective_weight()
    assert len(passes) == 1
    weight.backward(np.ones_like(weight.data))
    assert len(passes) == 2
    optim.SGD([layer.weight], lr=0.1, momentum=0.9).step()
    assert len(passes) == 3
    optim.Adam([layer.presence], lr=0.1).step()
    assert len(passes) == 4
