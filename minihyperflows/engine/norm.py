"""Batch normalisation (Ioffe & Szegedy 2015; chapter 05)."""

from __future__ import annotations

import math
from typing import Any

from minihyperflows.engine.backend import Array, xp_of
from minihyperflows.engine.errors import ShapeError
from minihyperflows.engine.graph import Function
from minihyperflows.engine.tensor import Tensor, apply


def batch_norm(
    x: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    running_mean: Array | None = None,
    running_var: Array | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """y = scale (x - mean) / sqrt(var + eps) + shift, per channel (the last axis of x).

    With ``training`` the statistics are the batch's, and the running ones (arrays, if given) are
    updated in place, under ``no_grad`` too; otherwise they are the running ones.

    Args:
        x: (..., C).
        scale, shift: (C,); left out, 1 and 0.
        running_mean, running_var: (C,).
        momentum: the weight of this batch in the running statistics.
        eps: keeps the square root away from 0.

    Raises:
        ShapeError: scale, shift or a running statistic is not (C,), or x is (C,) itself.
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
    scale_or_1: Any = 1.0 if scale is None else scale  # constants, so they get no gradient
    shift_or_0: Any = 0.0 if shift is None else shift
    if not training:
        return normalise(x, scale_or_1, shift_or_0, running_mean, running_var, eps)
    function = BatchNorm(eps)
    y = apply(function, x, scale_or_1, shift_or_0)
    n = function.count
    update_running(running_mean, function.mean, momentum)
    update_running(running_var, function.var * (n / (n - 1)), momentum)  # unbiased, as in PyTorch
    return y


def batch_norm_simple(x: Tensor, scale: Any = 1.0, shift: Any = 0.0, eps: float = 1e-5) -> Tensor:
    """The definition, in training: what :class:`BatchNorm` does, from basic operations."""
    axes = tuple(range(x.ndim - 1))
    centred = x - x.mean(axis=axes, keepdims=True)
    var = (centred * centred).mean(axis=axes, keepdims=True)
    return scale * (centred / (var + eps) ** 0.5) + shift


class BatchNorm(Function):
    """y = scale z + shift, z = (x - mean) / sqrt(var + eps), with statistics of the batch.

    x (..., C) counts as M rows of C channels; mean and var (biased: divided by M) are over the
    rows. Since every x moves the mean and the variance, with sums over the M rows,

        dL/dshift = sum of c,    dL/dscale = sum of c z,
        dL/dx = scale / sqrt(var + eps) (c - sum(c) / M - z sum(c z) / M).

    The two subtractions take out of c what a constant and a multiple of z would add: a change of
    x that only shifts or stretches a channel does not change z.
    """

    def __init__(self, eps: float = 1e-5) -> None:
        self.eps = eps

    def forward(self, x: Array, scale: Array, shift: Array) -> Array:
        rows = x.reshape(-1, x.shape[-1])  # (M, C)
        self.scale, self.count = scale, len(rows)
        if self.count < 2:
            raise ValueError(
                f"BatchNorm: an input of shape {x.shape} has {self.count} value(s) per channel, "
                "and training needs at least 2 to have a variance"
            )
        self.mean = channel_sum(rows) / self.count
        z = rows - self.mean
        self.var = channel_sum(z * z) / self.count
        self.inverse_std = 1 / xp_of(x).sqrt(self.var + self.eps)
        z *= self.inverse_std
        self.z = z
        return (z * scale + shift).reshape(x.shape)

    def backward(self, c: Array) -> tuple[Array | None, ...]:
        rows = c.reshape(self.z.shape)  # (M, C)
        shift_gradient = channel_sum(rows)
        scale_gradient = channel_sum(rows * self.z)
        x_gradient = None
        if self.needs[0]:
            x_gradient = rows - self.z * (scale_gradient / self.count)
            x_gradient -= shift_gradient / self.count
            x_gradient = x_gradient * (self.scale * self.inverse_std)
            x_gradient = x_gradient.reshape(c.shape)
        gradients = (x_gradient, scale_gradient, shift_gradient)
        return tuple(g if n else None for g, n in zip(gradients, self.needs, strict=True))


def channel_sum(rows: Array) -> Array:
    """The sum of each column of (M, C), in two stages of about sqrt(M) additions each.

    A row of ones times a matrix sums its columns, faster than ``rows.sum(axis=0)``. Adding M
    numbers one after another loses up to M times the round-off of one addition; two stages lose
    2 sqrt(M) times. Batch norm needs that: an error in a channel's mean moves all its values.
    """
    per_sum = math.isqrt(len(rows))
    whole = per_sum * (len(rows) // per_sum)
    blocks = rows[:whole].reshape(-1, per_sum * rows.shape[1])  # (M / per_sum, per_sum C)
    partial = _column_sum(blocks).reshape(per_sum, rows.shape[1])
    return _column_sum(partial) + _column_sum(rows[whole:])


def _column_sum(rows: Array) -> Array:
    return xp_of(rows).ones(len(rows), dtype=rows.dtype) @ rows


def normalise(
    x: Tensor, scale: Any, shift: Any, mean: Array | None, var: Array | None, eps: float
) -> Tensor:
    """scale (x - mean) / sqrt(var + eps) + shift for given statistics, as one multiply-add of x."""
    if mean is None or var is None:
        raise ValueError("batch_norm: outside training it needs running_mean and running_var")
    factor = scale * (var + eps) ** -0.5
    return x * factor + (shift - mean * factor)


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
