"""Batch norm on a GPU (kernels: ``batch_norm.cu``).

x and all arrays of its shape are (..., C), which counts as M rows of C channels, and of one dtype,
float32 or float16. Everything that is (C,) is float32.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from minihyperflows.engine import norm
from minihyperflows.engine.backend import Array, cupy
from minihyperflows.engine.gpu.launch import (
    MOST_BLOCKS,
    THREADS,
    Source,
    c_type,
    every_type_and_width,
    takes,
)
from minihyperflows.engine.gpu.scratch import (
    arrivals,
    as_kernels_take,
    float32_buffer,
    is_float32,
    is_integer,
    shared_width,
)
from minihyperflows.engine.twins import on_gpu

NAMES = ("channel_statistics", "normalise", "evaluate", "cotangent_sums", "input_gradient")
SOURCE = Source("batch_norm.cu", [k for name in NAMES for k in every_type_and_width(name)])

COLUMNS = 32  # of packs in a block, at most: 512 bytes side by side
ROWS, FEWER_ROWS = 4, 2  # of a thread at a time, as in batch_norm.cu
SLAB_BLOCKS = 264  # of a pass that sums: two for each multiprocessor of an H200, all at a time


def takes_all(
    x: Array,
    scale: Any,
    shift: Any,
    residual: Array | None,
    running_mean: Array | None,
    running_var: Array | None,
    batches: Array | None = None,
) -> bool:
    """Whether the kernels compute with these: the docstring of the module says what they need."""
    vectors = (*(a for a in (scale, shift) if not _is_number(a)), running_mean, running_var)
    return (
        takes(x, residual)
        and x.size > 0
        and (residual is None or (residual.dtype, residual.shape) == (x.dtype, x.shape))
        and all(a is None or (is_float32(a) and a.shape == x.shape[-1:]) for a in vectors)
        and is_integer(batches, "int64")
    )


@on_gpu(norm.BatchNorm)
class BatchNorm(norm.BatchNorm):
    """y = scale z + shift [+ r] in two passes over memory, and dL/dx, dL/dscale, dL/dshift in two:
    see ``batch_norm.cu``."""

    def takes(self, x: Array, scale: Any, shift: Any, residual: Array | None = None) -> bool:
        running = self.running
        return takes_all(x, scale, shift, residual, running.mean, running.var, running.batches)

    def forward(self, x: Array, scale: Any, shift: Any, residual: Array | None = None) -> Array:
        self.rows, running = self.rows_of(x), self.running
        update = (running.mean, running.var, running.batches, running.momentum)
        self.statistics = channel_statistics(x, scale, shift, self.eps, *update)
        y = normalise(x, residual, self.statistics, self.relu)
        self.y = y if self.relu and residual is not None else None
        return y

    def backward(self, c: Array) -> tuple[Array | None, ...]:
        c = as_kernels_take(c, self.rows.dtype)
        x, saved = self.rows.reshape(c.shape), (self.y, self.statistics)
        vectors = (self.vector_for(1), self.vector_for(2))
        slopes = cotangent_sums(c, x, *saved, self.relu, *vectors)
        needs_residual = len(self.needs) == 4 and self.needs[3]
        dx, masked = input_gradient(
            *(c, x, *saved, slopes, self.relu),
            needs_x=self.needs[0],
            needs_residual=needs_residual and self.relu,
        )
        residual = masked if self.relu else c
        return (dx, *vectors, residual if needs_residual else None)[: len(self.needs)]

    def vector_for(self, i: int) -> Array | None:
        """Where the kernels write the gradient of input ``i``, of one float32 a channel."""
        if not self.needs[i]:
            return None
        buffer = float32_buffer(self.buffer_for(i))
        return cupy().empty(self.rows.shape[1:], "float32") if buffer is None else buffer


@on_gpu(norm.Normalise)
class Normalise(norm.Normalise):
    """y = scale (x - mean) / sqrt(var + eps) + shift [+ r] in one pass.

    Only where no gradient will be asked for, as in evaluation.
    """

    def takes(self, x: Array, scale: Any, shift: Any, residual: Array | None = None) -> bool:
        return not any(self.needs) and takes_all(x, scale, shift, residual, self.mean, self.var)

    def forward(self, x: Array, scale: Any, shift: Any, residual: Array | None = None) -> Array:
        return evaluate(x, scale, shift, residual, self.mean, self.var, self.eps, self.relu)


# -- the kernels -----------------------------------------------------------------------------------


def channel_statistics(
    x: Array,
    scale: Any,
    shift: Any,
    eps: float,
    running_mean: Array | None = None,
    running_var: Array | None = None,
    batches: Array | None = None,
    momentum: float = 0.1,
) -> Array:
    """statistics (4, C): mean, 1 / sqrt(var + eps), factor = scale / sqrt(var + eps), shift - mean
    factor, where mean and var (divided by M) are those of the rows.

    Also: running <- (1 - momentum) running + momentum batch, with the unbiased variance, and
    ``batches`` (() int64) += 1. ``scale`` and ``shift`` are (C,) or numbers.
    """
    rows, channels, width = _table(x)
    grid, block, slab = _slabs(rows, channels, width)
    statistics = cupy().empty((4, channels), "float32")
    SOURCE.launch(
        f"channel_statistics<{c_type(x)}, {width}>",
        grid,
        block,
        *(x, np.int64(rows), channels, np.int64(slab)),
        *(cupy().empty((grid[1], 2, channels), "float32"), arrivals(grid[0])),
        *(*_array_or_number(scale), *_array_or_number(shift), float(eps), float(momentum)),
        *(running_mean, running_var, batches, statistics),
    )
    return statistics


def normalise(x: Array, residual: Array | None, statistics: Array, relu: bool) -> Array:
    """y = relu(x factor + offset + residual), with and without residual and ReLU."""
    rows, channels, width = _table(x, residual)
    y = cupy().empty(x.shape, x.dtype)
    SOURCE.launch(
        f"normalise<{c_type(x)}, {width}>",
        *_rows_in_turn(rows, channels, width, ROWS),
        *(x, residual, y, np.int64(rows), channels, statistics, relu),
    )
    return y


def evaluate(
    x: Array,
    scale: Any,
    shift: Any,
    residual: Array | None,
    running_mean: Array,
    running_var: Array,
    eps: float,
    relu: bool,
) -> Array:
    """y = relu(scale (x - running_mean) / sqrt(running_var + eps) + shift + residual)."""
    rows, channels, width = _table(x, residual)
    y = cupy().empty(x.shape, x.dtype)
    SOURCE.launch(
        f"evaluate<{c_type(x)}, {width}>",
        *_rows_in_turn(rows, channels, width, ROWS),
        *(x, residual, y, np.int64(rows), channels),
        *(*_array_or_number(scale), *_array_or_number(shift)),
        *(running_mean, running_var, float(eps), relu),
    )
    return y


def cotangent_sums(
    c: Array,
    x: Array,
    y: Array | None,
    statistics: Array,
    relu: bool,
    scale_gradient: Array | None,
    shift_gradient: Array | None,
) -> Array:
    """Writes dL/dscale = sum of c z and dL/dshift = sum of c, where they are arrays (C,), over the
    rows and, with ``relu``, where y > 0.

    ``y`` is needed only if a residual went into it; else it follows from x. Returns slopes (2, C),
    for :func:`input_gradient`.
    """
    rows, channels, width = _table(x, c, y)
    grid, block, slab = _slabs(rows, channels, width)
    slopes = cupy().empty((2, channels), "float32")
    SOURCE.launch(
        f"cotangent_sums<{c_type(x)}, {width}>",
        grid,
        block,
        *(c, x, y, np.int64(rows), channels, np.int64(slab), statistics, relu),
        *(cupy().empty((grid[1], 2, channels), "float32"), arrivals(grid[0])),
        *(scale_gradient, shift_gradient, slopes),
    )
    return slopes


def input_gradient(
    c: Array,
    x: Array,
    y: Array | None,
    statistics: Array,
    slopes: Array,
    relu: bool,
    needs_x: bool = True,
    needs_residual: bool = False,
) -> tuple[Array | None, Array | None]:
    """dx = factor (c - sum(c) / M - z sum(c z) / M), and c where y > 0: the residual's cotangent.

    ``y`` as for :func:`cotangent_sums`; None for what is not needed.
    """
    rows, channels, width = _table(x, c, y)
    dx = cupy().empty(x.shape, x.dtype) if needs_x else None
    masked = cupy().empty(x.shape, x.dtype) if needs_residual else None
    SOURCE.launch(
        f"input_gradient<{c_type(x)}, {width}>",
        *_rows_in_turn(rows, channels, width, FEWER_ROWS),
        *(c, x, y, np.int64(rows), channels, statistics, slopes, relu, dx, masked),
    )
    return dx, masked


def _table(x: Array, *others: Array | None) -> tuple[int, int, int]:
    """Rows, channels, and the width of a pack of channels."""
    channels = x.shape[-1]
    return x.size // channels, channels, shared_width(channels, x, *others)


def _block(channels: int, width: int) -> tuple[int, tuple[int, int]]:
    """How many blocks lie side by side over the channels, and the shape of each: powers of two."""
    packs = channels // width
    columns = min(COLUMNS, 1 << (packs - 1).bit_length())
    return -(-packs // columns), (columns, THREADS // columns)


def _slabs(rows: int, channels: int, width: int) -> tuple[tuple[int, int], tuple[int, int], int]:
    """Grid, block and rows of a slab for a pass that sums over the rows."""
    strips, block = _block(channels, width)
    most = max(1, SLAB_BLOCKS // strips)
    per_turn = block[1] * ROWS  # what a block reads at a time
    slab = per_turn * -(-rows // (per_turn * most))
    return (strips, -(-rows // slab)), block, slab


def _rows_in_turn(
    rows: int, channels: int, width: int, at_a_time: int
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Grid and block for a pass in which every row is dealt with by itself."""
    strips, block = _block(channels, width)
    most = max(1, MOST_BLOCKS // strips)
    return (strips, min(most, -(-rows // (block[1] * at_a_time)))), block


def _array_or_number(value: Any) -> tuple[Array | None, float]:
    return (None, float(value)) if _is_number(value) else (value, 0.0)


def _is_number(value: Any) -> bool:
    return isinstance(value, bool | int | float)
