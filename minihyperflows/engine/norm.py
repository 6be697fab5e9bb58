"""Batch normalisation (Ioffe & Szegedy 2015; chapter 05)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from minihyperflows.engine.backend import Array, device_of, xp_of
from minihyperflows.engine.errors import DeviceError, ShapeError
from minihyperflows.engine.graph import Function
from minihyperflows.engine.memory import empty
from minihyperflows.engine.numbers import Arithmetic, computing_dtype, converted, float_dtype
from minihyperflows.engine.ops import rectified, rectify, unbroadcast, where_positive
from minihyperflows.engine.tensor import Tensor, apply
from minihyperflows.engine.threads import add, for_blocks, rows_per_block


def batch_norm(
    x: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    running_mean: Array | None = None,
    running_var: Array | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    relu: bool = False,
    num_batches_tracked: Array | None = None,
) -> Tensor:
    """y = scale (x - mean) / sqrt(var + eps) + shift, per channel (the last axis of x).

    With ``residual`` that is added to y, and with ``relu`` negative numbers become 0 after that: in
    training both cost no further pass over memory.

    With ``training`` the statistics are the batch's, and the running ones (arrays, if given) are
    updated in place and the batches counted, under ``no_grad`` too; otherwise they are the running
    ones.

    Args:
        x: (..., C).
        scale, shift: (C,); left out, 1 and 0.
        running_mean, running_var: (C,).
        momentum: the weight of this batch in the running statistics.
        eps: keeps the square root away from 0.
        residual: of the shape of x.
        num_batches_tracked: (), an integer: how many batches the running statistics have seen.

    Raises:
        DeviceError: not everything lies on the device of x.
        ShapeError: scale, shift or a running statistic is not (C,), x is (C,) itself, or the
            residual has another shape.
        ValueError: one value per channel, which has no variance, in training; or no running
            statistics otherwise.
    """
    given = {
        "scale": scale,
        "shift": shift,
        "running_mean": running_mean,
        "running_var": running_var,
    }
    check_shapes(x, **given)
    check_devices(x, **given, num_batches_tracked=num_batches_tracked)
    if residual is not None and residual.shape != x.shape:
        raise ShapeError(
            f"batch_norm: residual of shape {residual.shape} for an input of shape {x.shape}"
        )
    merged = () if residual is None else (residual,)
    scale_or_1: Any = 1.0 if scale is None else scale  # constants, so they get no gradient
    shift_or_0: Any = 0.0 if shift is None else shift
    if not training:
        if running_mean is None or running_var is None:
            raise ValueError("batch_norm: outside training it needs running_mean and running_var")
        given_statistics = Normalise(running_mean, running_var, eps, relu)
        return apply(given_statistics, x, scale_or_1, shift_or_0, *merged)
    running = RunningStatistics(running_mean, running_var, num_batches_tracked, momentum)
    return apply(BatchNorm(eps, relu, running), x, scale_or_1, shift_or_0, *merged)


def batch_norm_simple(x: Tensor, scale: Any = 1.0, shift: Any = 0.0, eps: float = 1e-5) -> Tensor:
    """The definition, in training: what :class:`BatchNorm` does, from basic operations."""
    axes = tuple(range(x.ndim - 1))
    centred = x - x.mean(axis=axes, keepdims=True)
    var = (centred * centred).mean(axis=axes, keepdims=True)
    return scale * (centred / (var + eps) ** 0.5) + shift


@dataclass
class RunningStatistics:
    """What batch norm remembers of the batches it was trained with: arrays, updated in place.

    Attributes:
        mean, var: (C,), or None.
        batches: (), an integer: how many there were; or None.
        momentum: the weight of a batch.
    """

    mean: Array | None = None
    var: Array | None = None
    batches: Array | None = None
    momentum: float = 0.1

    def update(self, mean: Array, var: Array, rows: int) -> None:
        """Take in a batch of ``rows`` rows with this mean and (biased) variance."""
        update_running(self.mean, mean, self.momentum)
        update_running(self.var, var * (rows / (rows - 1)), self.momentum)  # unbiased, as PyTorch's
        if self.batches is not None:
            self.batches += 1


class BatchNorm(Function):
    """y = scale z + shift [+ r], z = (x - mean) / sqrt(var + eps), with statistics of the batch.

    x (..., C) counts as M rows of C channels; mean and var (biased: divided by M) are over the
    rows. Since every x moves the mean and the variance, with sums over the M rows,

        dL/dshift = sum of c,    dL/dscale = sum of c z,
        dL/dx = scale / sqrt(var + eps) (c - sum(c) / M - z sum(c z) / M).

    The two subtractions take out of c what a constant and a multiple of z would add: a change of
    x that only shifts or stretches a channel does not change z.

    With ``relu`` y is cut off at 0 at the end, so that c counts only where y > 0. The residual r,
    an optional fourth input, receives that c.

    What is kept for ``backward`` is x itself, since z is one subtraction and one product away. So
    forward and backward read or write each array no more than twice.

    ``forward`` also updates the ``running`` statistics.
    """

    arithmetic = Arithmetic.FLOAT

    def __init__(
        self, eps: float = 1e-5, relu: bool = False, running: RunningStatistics | None = None
    ) -> None:
        self.eps, self.relu = eps, relu
        self.running = RunningStatistics() if running is None else running

    def forward(self, x: Array, scale: Array, shift: Array, residual: Array | None = None) -> Array:
        xp, rows = xp_of(x), self.rows_of(x)
        self.rows, self.scale, self.count = rows, scale, len(rows)
        self.mean, var = channel_statistics(rows)
        self.running.update(self.mean, var, self.count)
        self.inverse_std = 1 / xp.sqrt(var + self.eps)
        factor = scale * self.inverse_std
        offset = shift - self.mean * factor
        added = None if residual is None else residual.reshape(rows.shape)
        kinds = [a for a in (rows, factor, offset, added) if a is not None]
        y = empty(xp, rows.shape, xp.result_type(*kinds))

        def work(block: slice) -> None:
            xp.multiply(rows[block], factor, out=y[block])
            y[block] += offset
            if added is not None:
                y[block] += added[block]
            if self.relu:
                rectify(y[block], out=y[block])

        for_blocks(work, len(rows), rows_per_block(rows.shape[1]), rows)
        self.y = y if self.relu else None
        return y.reshape(x.shape)

    def backward(self, c: Array) -> tuple[Array | None, ...]:
        rows, shift_gradient, along_x = self.cotangent_sums(c.reshape(self.rows.shape))
        scale_gradient = along_x * self.inverse_std
        dx = None
        if self.needs[0]:
            dx = self.input_gradient(rows, scale_gradient, shift_gradient).reshape(c.shape)
        gradients = (dx, scale_gradient, shift_gradient, rows.reshape(c.shape))[: len(self.needs)]
        return tuple(g if n else None for g, n in zip(gradients, self.needs, strict=True))

    def rows_of(self, x: Array) -> Array:
        """x as (M, C); ValueError if there are too few rows for a variance."""
        rows = x.reshape(-1, x.shape[-1])
        if len(rows) < 2:
            raise ValueError(
                f"BatchNorm: an input of shape {x.shape} has {len(rows)} value(s) per channel, "
                "and training needs at least 2 to have a variance"
            )
        return rows

    def input_gradient(self, c: Array, scale_gradient: Array, shift_gradient: Array) -> Array:
        """dL/dx as rows (M, C)."""
        xp = xp_of(c)
        dx = empty(xp, c.shape, xp.result_type(c, self.rows, self.scale))
        factor = self.scale * self.inverse_std
        slope = factor * self.inverse_std * scale_gradient / self.count
        constant = factor * shift_gradient / self.count - slope * self.mean

        def work(block: slice) -> None:
            other = empty(xp, c[block].shape, dx.dtype)
            xp.multiply(self.rows[block], slope, out=other)
            other += constant
            xp.multiply(c[block], factor, out=dx[block])
            dx[block] -= other

        for_blocks(work, len(c), rows_per_block(c.shape[1]), c)
        return dx

    def cotangent_sums(self, c: Array) -> tuple[Array, Array, Array]:
        """The cotangent of what lies before the ReLU, and the sums of it and of it (x - mean).

        Shapes (M, C), (C,), (C,).
        """
        xp = xp_of(c)
        dtype = xp.result_type(c, self.rows)
        before = c if self.y is None else empty(xp, c.shape, c.dtype)

        def work(block: slice) -> tuple[Array, Array]:
            if self.y is not None:
                xp.multiply(c[block], self.y[block].real > 0, out=before[block])
            product = empty(xp, c[block].shape, dtype)
            xp.subtract(self.rows[block], self.mean, out=product)
            product *= before[block]
            return channel_sum(before[block]), channel_sum(product)

        sums = for_blocks(work, len(c), rows_per_block(c.shape[1]), c)
        return before, sum(s for s, _ in sums), sum(s for _, s in sums)


def channel_statistics(rows: Array) -> tuple[Array, Array]:
    """Mean and (biased) variance of each column of (M, C), in one pass over memory.

    A block's rows are centred on the block's own mean while they lie in the cache. Then, with m_b
    and s_b the mean and the sum of squares of block b, which has n_b rows,

        mean = 1/M sum_b n_b m_b,   var = 1/M sum_b (s_b + n_b (m_b - mean)^2).

    Unlike mean(x^2) - mean(x)^2 this subtracts no large numbers that nearly cancel. Source: Chan,
    Golub & LeVeque 1983.
    """

    def work(block: slice) -> tuple[int, Array, Array]:
        x = rows[block]
        mean = channel_sum(x) / len(x)
        centred = empty(xp_of(x), x.shape, x.dtype)
        xp_of(x).subtract(x, mean, out=centred)
        centred *= centred
        return len(x), mean, channel_sum(centred)

    blocks = for_blocks(work, len(rows), rows_per_block(rows.shape[1]), rows)
    mean = sum(n * m for n, m, _ in blocks) / len(rows)
    var = sum(s + n * (m - mean) ** 2 for n, m, s in blocks) / len(rows)
    return mean, var


def channel_sum(rows: Array) -> Array:
    """The sum of each column of (M, C), in two stages of about sqrt(M) additions each.

    A row of ones times a matrix sums its columns, faster than ``rows.sum(axis=0)``. Adding M
    numbers one after another loses up to M times the round-off of one addition; two stages lose
    2 sqrt(M) times. Batch norm needs that: an error in a channel's mean moves all its values.
    """
    per_sum = max(1, math.isqrt(len(rows)))
    whole = per_sum * (len(rows) // per_sum)
    blocks = rows[:whole].reshape(whole // per_sum, per_sum * rows.shape[1])
    partial = _column_sum(blocks).reshape(per_sum, rows.shape[1])
    return _column_sum(partial) + _column_sum(rows[whole:])


def _column_sum(rows: Array) -> Array:
    return xp_of(rows).ones(len(rows), dtype=rows.dtype) @ rows


class Normalise(Function):
    """y = scale z + shift [+ r], z = (x - mean) / sqrt(var + eps), with given statistics.

    x and r (..., C), all others (C,). With sums over all axes but the last,

        dL/dx = scale / sqrt(var + eps) c,   dL/dscale = sum of c z,   dL/dshift = sum of c,

    and dL/dr = c. With ``relu`` y is cut off at 0 at the end, so that c counts only where y > 0.
    The statistics do not choose the dtype of y, as they do not in training.
    """

    arithmetic = Arithmetic.FLOAT

    def __init__(self, mean: Array, var: Array, eps: float = 1e-5, relu: bool = False) -> None:
        self.mean, self.var, self.eps, self.relu = mean, var, eps, relu

    def forward(self, x: Array, scale: Array, shift: Array, residual: Array | None = None) -> Array:
        dtype = computing_dtype(float_dtype(x, scale, shift))
        self.mean, var = converted((self.mean, self.var), dtype)
        self.x, self.inverse_std = x, (var + self.eps) ** -0.5
        self.factor = scale * self.inverse_std
        y = x * self.factor + (shift - self.mean * self.factor)
        y = y if residual is None else add(y, residual)
        if self.relu:
            self.y = y = rectified(y)
        return y

    def backward(self, c: Array) -> tuple[Array | None, ...]:
        channels = c.shape[-1:]
        c = where_positive(self.y, c) if self.relu else c
        dx = dscale = dshift = None
        if self.needs[0]:
            dx = c * self.factor
        if self.needs[1]:
            dscale = unbroadcast(c * (self.x - self.mean), channels) * self.inverse_std
        if self.needs[2]:
            dshift = unbroadcast(c, channels)
        residual = c if any(self.needs[3:]) else None
        return (dx, dscale, dshift, residual)[: len(self.needs)]


def update_running(running: Array | None, batch: Array, momentum: float) -> None:
    """running <- (1 - momentum) running + momentum batch, in place; its real part if complex."""
    if running is not None:
        running *= 1 - momentum
        running += momentum * batch.real


def check_shapes(x: Tensor, **given: Any) -> None:
    """Raise ShapeError unless x is (..., C) and everything given is (C,)."""
    if x.ndim < 2:
        raise ShapeError(f"batch_norm: input of shape {x.shape} must be (..., C)")
    for name, array in given.items():
        if array is not None and array.shape != x.shape[-1:]:
            raise ShapeError(
                f"batch_norm: {name} of shape {array.shape} does not fit an input of shape "
                f"{x.shape}, which has {x.shape[-1]} channels"
            )


def check_devices(x: Tensor, **given: Any) -> None:
    """Raise DeviceError unless everything given lies where x lies."""
    for name, value in given.items():
        where = device_of(value.data if isinstance(value, Tensor) else value)
        if value is not None and where != x.device:
            raise DeviceError(
                f"batch_norm: {name} lies on the {where} device, its input on the {x.device} "
                "device: move one with .to"
            )
