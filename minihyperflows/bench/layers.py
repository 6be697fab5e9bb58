"""How fast each convolution of a network is, in every way that there is to compute it."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from minihyperflows.bench.contenders import (
    Timed,
    faster_format,
    take_turns,
    torch_name,
    torch_peers,
)
from minihyperflows.engine import Tensor, apply, conv
from minihyperflows.engine.graph import reverse_topological_order
from minihyperflows.nn import Module


@dataclass(frozen=True)
class ConvolutionShape:
    """A convolution without a bias, by its shapes.

    Attributes:
        images: (N, H, W, C_in).
        weight: (C_out, kH, kW, C_in / groups).
        positions: (H', W'), the size of the map that comes out.
        stride, padding: (rows, columns).
        groups: number of groups of channels.
        first: it reads the images themselves, which need no gradient.
    """

    images: tuple[int, ...]
    weight: tuple[int, ...]
    positions: tuple[int, ...]
    stride: tuple[int, int]
    padding: tuple[int, int]
    groups: int
    first: bool

    def __str__(self) -> str:
        kernel = "x".join(map(str, self.weight[1:3]))
        maps = "x".join(map(str, self.images[1:3]))
        stride = f", stride {self.stride[0]}" if self.stride != (1, 1) else ""
        return f"{kernel}, {self.images[3]} to {self.weight[0]} channels, {maps} maps{stride}"

    @property
    def flops(self) -> tuple[int, int]:
        """Operations forward and backward: 2 K per output with K = kH kW C_in / groups.

        A gradient costs as much as the forward pass, and there are two of them, or one. So counted
        for every way to compute it; Winograd does fewer, and may exceed what a processor can do.
        """
        outputs = self.images[0] * math.prod(self.positions) * self.weight[0]
        forward = 2 * outputs * math.prod(self.weight[1:])
        return forward, forward * (1 if self.first else 2)

    @property
    def chosen_way(self) -> str:
        """The way that our engine takes if nobody tells it."""
        return conv.choose_way(
            *(self.images, self.weight, self.stride, self.padding, self.groups),
            np.dtype(np.float32),
        )

    @property
    def ways(self) -> tuple[str, ...]:
        """The ways that our engine could take."""
        if conv.can_winograd(self.weight, self.stride, self.groups):
            return conv.WAYS
        return (self.chosen_way,)


def distinct_convolutions(net: Module, images: tuple[int, ...]) -> dict[ConvolutionShape, int]:
    """The shapes of the convolutions of ``net``, in order, and how often each occurs.

    Args:
        net: the network; one image of zeros is sent through it.
        images: the shape of a batch, (N, H, W, C).
    """
    output = net.eval()(Tensor(np.zeros((1, *images[1:]), np.float32)))
    assert output.creator is not None
    functions = reversed(reverse_topological_order(output.creator))
    return Counter(
        ConvolutionShape(
            images=(images[0], *function.inputs[0].shape[1:]),
            weight=function.inputs[1].shape,
            positions=function.output_shape[1:3],
            stride=function.stride,
            padding=function.padding,
            groups=function.groups,
            first=function.inputs[0].creator is None,
        )
        for function in functions
        if isinstance(function, conv.Conv2d)
    )


def measure_convolution(
    shape: ConvolutionShape, formats: Sequence[str], rounds: int
) -> dict[str, Any]:
    """Forward and backward pass of one convolution in each of our ways and PyTorch's ``formats``.

    ``times`` has an entry for each: our ways by name, "torch_contiguous", "torch_channels_last";
    in it ``forward`` and ``backward`` with ``milliseconds`` (median) and ``gflops``, 10^9
    operations per second as :attr:`ConvolutionShape.flops` counts them. ``way`` is the one that
    our engine chooses, ``torch_format`` the faster one of PyTorch's.
    """
    rng = np.random.default_rng(0)
    x = rng.standard_normal(shape.images, dtype=np.float32)
    weight = rng.standard_normal(shape.weight, dtype=np.float32)
    settings = (x, weight, shape.stride, shape.padding, shape.groups, not shape.first)
    contenders: dict[str, Any] = {way: Convolution(*settings, way) for way in shape.ways}
    for memory_format in formats:
        contender = torch_peers().Convolution(*settings, memory_format)
        contenders[torch_name(memory_format)] = contender
    samples = take_turns({n: _timed(c) for n, c in contenders.items()}, rounds, lambda line: None)
    medians = {name: np.median(times, axis=0) for name, times in samples.items()}
    return {
        "images": list(shape.images),
        "weight": list(shape.weight),
        "stride": list(shape.stride),
        "padding": list(shape.padding),
        "groups": shape.groups,
        "way": shape.chosen_way,
        "torch_format": faster_format({name: float(m.sum()) for name, m in medians.items()}),
        "times": {name: _speed(shape, median) for name, median in medians.items()},
    }


def _speed(shape: ConvolutionShape, milliseconds: np.ndarray) -> dict[str, dict[str, float]]:
    passes = zip(("forward", "backward"), milliseconds.tolist(), shape.flops, strict=True)
    return {name: {"milliseconds": t, "gflops": count / t / 1e6} for name, t, count in passes}


class Convolution:
    """Our convolution and its gradients in one of the engine's ways; PyTorch's has the same form.

    Args:
        x: (N, H, W, C_in); weight: (C_out, kH, kW, C_in / groups).
        stride, padding, groups: of the convolution.
        image_gradient: whether dL/dx is wanted.
        way: one of ``conv.WAYS``.
    """

    def __init__(
        self,
        x: np.ndarray,
        weight: np.ndarray,
        stride: tuple[int, int],
        padding: tuple[int, int],
        groups: int,
        image_gradient: bool,
        way: str,
    ) -> None:
        self.x, self.weight = Tensor(x, image_gradient), Tensor(weight, requires_grad=True)
        self.options = (stride, padding, groups, way)
        self.cotangent = np.ones_like(self.forward().data)

    def forward(self) -> Tensor:
        """y (N, H', W', C_out)."""
        self.x.grad = self.weight.grad = None
        return apply(conv.Conv2d(*self.options), self.x, self.weight)

    def backward(self, y: Tensor) -> None:
        """Gradients of the sum of ``y``."""
        y.backward(self.cotangent)


def _timed(convolution: Any) -> Timed:
    def run() -> tuple[float, ...]:
        started = time.perf_counter()
        y = convolution.forward()
        between = time.perf_counter()
        convolution.backward(y)
        return between - started, time.perf_counter() - between

    return run
