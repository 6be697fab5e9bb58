"""Pooling: each window of an image becomes one number per channel (chapter 04)."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from minihyperflows.engine.backend import Array, xp_of
from minihyperflows.engine.errors import ShapeError
from minihyperflows.engine.graph import Function
from minihyperflows.engine.memory import empty
from minihyperflows.engine.numbers import Arithmetic
from minihyperflows.engine.threads import for_blocks, rows_per_block
from minihyperflows.engine.windows import Pair, pair, shifted, window_positions


class Pool2d(Function):
    """Reduces each window of x (N, H, W, C) to one number per channel: -> (N, H', W', C)."""

    def __init__(self, size: Pair, stride: Pair | None = None) -> None:
        self.size = pair(size, f"{self.name}: size", 1)
        self.stride = self.size if stride is None else pair(stride, f"{self.name}: stride", 1)

    def shifted(self, x: Array) -> Iterator[Array]:
        """The pixels at each place in the window; see :func:`shifted`."""
        return shifted(x, self.size, self.stride)

    def images_per_block(self, x: Array) -> int:
        """How many images a thread takes at a time."""
        return rows_per_block(math.prod(x.shape[1:]))

    def check(self, shape: tuple[int, ...]) -> None:
        if len(shape) != 4:
            raise ShapeError(f"{self.name}: input of shape {shape} must be (N, H, W, C)")
        if min(window_positions(shape, self.size, self.stride)) < 1:
            raise ShapeError(
                f"{self.name}: a window of shape {self.size} is larger than the image in an input "
                f"of shape {shape}"
            )


class MaxPool2d(Pool2d):
    """y = the largest number in each window;  dL/dx = c at the first place that has it.

    "First" is row by row, as in PyTorch. Complex numbers are compared by their real parts. A window
    with a NaN gives NaN.
    """

    arithmetic = Arithmetic.NONE

    def forward(self, x: Array) -> Array:
        self.check(x.shape)
        self.shape, xp = x.shape, xp_of(x)
        y_shape = (len(x), *window_positions(x.shape, self.size, self.stride), x.shape[3])
        y = empty(xp, y_shape, x.dtype)
        self.place = xp.zeros(y_shape, np.min_scalar_type(math.prod(self.size)))  # of the largest

        def work(images: slice) -> None:
            largest, place = y[images], self.place[images]
            for k, pixels in enumerate(self.shifted(x[images])):
                if k == 0:
                    largest[...] = pixels
                    continue
                larger = (pixels.real > largest.real) | xp.isnan(pixels)
                xp.copyto(largest, pixels, where=larger)
                xp.copyto(place, k, where=larger)

        for_blocks(work, len(x), self.images_per_block(x), x)
        return y

    def backward(self, c: Array) -> Array:
        dx = xp_of(c).zeros(self.shape, dtype=c.dtype)

        def work(images: slice) -> None:
            for k, pixels in enumerate(self.shifted(dx[images])):
                pixels += c[images] * (self.place[images] == k)

        for_blocks(work, len(c), self.images_per_block(dx), c)
        return dx


class AvgPool2d(Pool2d):
    """y = the mean of each window's kH kW numbers;  dL/dx = c / (kH kW) for each of them."""

    arithmetic = Arithmetic.FLOAT

    def forward(self, x: Array) -> Array:
        self.check(x.shape)
        self.shape = x.shape
        first, *others = self.shifted(x)
        return sum(others, start=first) / (self.size[0] * self.size[1])

    def backward(self, c: Array) -> Array:
        share = c / (self.size[0] * self.size[1])
        dx = xp_of(c).zeros(self.shape, dtype=share.dtype)
        for pixels in self.shifted(dx):
            pixels += share
        return dx
