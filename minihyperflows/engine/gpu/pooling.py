"""Pooling on a GPU (kernels: ``pooling.cu``).

Images x (N, H, W, C) and results y (N, H', W', C), float32 or float16. ``size`` and ``stride`` of
the windows are (rows, columns).
"""

from __future__ import annotations

import math

import numpy as np

from minihyperflows.engine import pooling
from minihyperflows.engine.backend import Array, cupy
from minihyperflows.engine.gpu.launch import Source, c_type, every_type_and_width, takes
from minihyperflows.engine.gpu.scratch import as_kernels_take, shared_width
from minihyperflows.engine.twins import on_gpu
from minihyperflows.engine.windows import window_positions

NAMES = ("max_pool", "max_pool_gradient", "avg_pool", "avg_pool_gradient")
SOURCE = Source("pooling.cu", [k for name in NAMES for k in every_type_and_width(name)])

THREADS = 128  # of a block: a row of a small map has few packs
LARGEST_WINDOW = 256  # whose places fit into a byte
MOST_ROWS = (1 << 31) - 1  # of a grid

Sizes = tuple[int, int]


class Pool2d(pooling.Pool2d):
    """What the two have in common."""

    dtype: np.dtype  # of x, set by forward

    def takes(self, x: Array) -> bool:
        return takes(x) and x.ndim == 4 and x.size > 0 and len(x) * x.shape[1] <= MOST_ROWS

    def keep(self, x: Array) -> None:
        """Raise ShapeError unless x can be pooled; else note what ``backward`` needs."""
        self.check(x.shape)
        self.shape, self.dtype = x.shape, x.dtype


@on_gpu(pooling.MaxPool2d)
class MaxPool2d(Pool2d, pooling.MaxPool2d):
    """y = the largest number in each window;  dL/dx = c at the first place that has it."""

    def takes(self, x: Array) -> bool:
        return super().takes(x) and math.prod(self.size) <= LARGEST_WINDOW

    def forward(self, x: Array) -> Array:
        self.keep(x)
        y, self.place = max_pool(x, self.size, self.stride)
        return y

    def backward(self, c: Array) -> Array:
        c = as_kernels_take(c, self.dtype)
        return max_pool_gradient(c, self.place, self.shape, self.size, self.stride)


@on_gpu(pooling.AvgPool2d)
class AvgPool2d(Pool2d, pooling.AvgPool2d):
    """y = the mean of each window's kH kW numbers;  dL/dx = c / (kH kW) for each of them."""

    def forward(self, x: Array) -> Array:
        self.keep(x)
        return avg_pool(x, self.size, self.stride)

    def backward(self, c: Array) -> Array:
        c = as_kernels_take(c, self.dtype)
        return avg_pool_gradient(c, self.shape, self.size, self.stride)


# -- the kernels -----------------------------------------------------------------------------------


def max_pool(x: Array, size: Sizes, stride: Sizes) -> tuple[Array, Array]:
    """The first of the largest numbers in each window, and its place u kW + v there, uint8."""
    y = _results(x, size, stride)
    place = cupy().empty(y.shape, "uint8")
    _launch("max_pool", y, (x, y, place), x.shape, y.shape, size, stride)
    return y, place


def max_pool_gradient(
    c: Array, place: Array, shape: tuple[int, ...], size: Sizes, stride: Sizes
) -> Array:
    """dx, of ``shape``: c summed over the windows whose largest number was here."""
    dx = cupy().empty(shape, c.dtype)
    _launch("max_pool_gradient", dx, (c, place, dx), shape, c.shape, size, stride)
    return dx


def avg_pool(x: Array, size: Sizes, stride: Sizes) -> Array:
    """The mean of each window."""
    y = _results(x, size, stride)
    _launch("avg_pool", y, (x, y), x.shape, y.shape, size, stride)
    return y


def avg_pool_gradient(c: Array, shape: tuple[int, ...], size: Sizes, stride: Sizes) -> Array:
    """dx, of ``shape``: c / (kH kW) summed over the windows that contain the pixel."""
    dx = cupy().empty(shape, c.dtype)
    _launch("avg_pool_gradient", dx, (c, dx), shape, c.shape, size, stride)
    return dx


def _results(x: Array, size: Sizes, stride: Sizes) -> Array:
    n, *_, channels = x.shape
    return cupy().empty((n, *window_positions(x.shape, size, stride), channels), x.dtype)


def _launch(
    name: str,
    written: Array,
    arrays: tuple[Array, ...],
    shape: tuple[int, ...],
    y_shape: tuple[int, ...],
    size: Sizes,
    stride: Sizes,
) -> None:
    """Start a kernel with a row of ``written`` for each block, or for several side by side."""
    n, height, width, channels = written.shape
    pack = shared_width(channels, *(a for a in arrays if takes(a)))
    packs = width * channels // pack
    SOURCE.launch(
        f"{name}<{c_type(written)}, {pack}>",
        (n * height, -(-packs // THREADS)),
        THREADS,
        *arrays,
        *(*shape[1:], *y_shape[1:3], *size, *stride),
    )
