"""The differentiable functions a reader calls: ``from minihyperflows import functional as F``.

Activations are (N, H, W, C): N images of H rows, W columns and C channels. Convolution weights are
(C_out, kH, kW, C_in / groups), linear weights (out, in). Every function takes and returns
:class:`~minihyperflows.Tensor`; the operations behind them are in ``minihyperflows.engine``, where
``numbers`` says what integers, half precision and mixed dtypes mean.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from minihyperflows.engine import conv, norm, ops, pooling
from minihyperflows.engine.backend import device_of
from minihyperflows.engine.tensor import Tensor, apply
from minihyperflows.engine.windows import Pair


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x W^T + b.  x (..., in), weight (out, in), bias (out,) -> (..., out)."""
    inputs = (x, weight) if bias is None else (x, weight, bias)
    return apply(ops.Linear(), *inputs)


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Pair = 1,
    padding: Pair = 0,
    groups: int = 1,
) -> Tensor:
    """Cross-correlation of each image with each filter (chapter 04).

    y[n, i, j, o] = b[o] + sum over u, v, c of x[n, i s + u - p, j s + v - p, c] W[o, u, v, c]

    Args:
        x: (N, H, W, C_in).
        weight: (C_out, kH, kW, C_in / groups).
        bias: (C_out,).
        stride: s, one number or (rows, columns).
        padding: p zeros on each side, one number or (rows, columns).
        groups: the channels fall into this many groups, each with its own filters.

    Returns:
        (N, H', W', C_out) with H' = (H + 2p - kH) // s + 1.
    """
    inputs = (x, weight) if bias is None else (x, weight, bias)
    return apply(conv.Conv2d(stride, padding, groups), *inputs)


def max_pool2d(x: Tensor, size: Pair, stride: Pair | None = None) -> Tensor:
    """The largest value in each window of ``size``; windows ``stride`` apart (default: size)."""
    return apply(pooling.MaxPool2d(size, stride), x)


def avg_pool2d(x: Tensor, size: Pair, stride: Pair | None = None) -> Tensor:
    """The mean of each window of ``size``; windows ``stride`` apart (default: size)."""
    return apply(pooling.AvgPool2d(size, stride), x)


def batch_norm(
    x: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    running_mean: Any = None,
    running_var: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    relu: bool = False,
    num_batches_tracked: Any = None,
) -> Tensor:
    """y = scale (x - mean) / sqrt(var + eps) + shift, per channel (the last axis).

    With ``residual`` (of the shape of x) that is added to y; with ``relu`` the result is cut off at
    0. ``F.relu(F.batch_norm(x, ...) + residual)`` is the same, with more passes over memory.

    With ``training`` the mean and the (biased) variance are those of the batch, and the running
    statistics, arrays of shape (C,), are updated in place as in PyTorch:
    running <- (1 - momentum) running + momentum batch, with the *unbiased* batch variance, and 1 is
    added to ``num_batches_tracked``, an integer array of shape (). Otherwise the running statistics
    are used. Source: Ioffe & Szegedy 2015; chapter 05.
    """
    statistics = (running_mean, running_var, training, momentum, eps)
    return norm.batch_norm(x, scale, shift, *statistics, residual, relu, num_batches_tracked)


def relu(x: Tensor) -> Tensor:
    """max(x, 0), element by element."""
    return apply(ops.ReLU(), x)


def tanh(x: Tensor) -> Tensor:
    """(e^x - e^-x) / (e^x + e^-x), element by element."""
    return apply(ops.Tanh(), x)


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + e^-x), element by element."""
    return apply(ops.Sigmoid(), x)


def softmax(x: Tensor, axis: int = -1) -> Tensor:
    """e^x / sum(e^x) along ``axis``."""
    return apply(ops.Softmax(axis), x)


def log_softmax(x: Tensor, axis: int = -1) -> Tensor:
    """x - ln sum(e^x) along ``axis``."""
    return apply(ops.LogSoftmax(axis), x)


def cross_entropy(logits: Tensor, labels: Any, label_smoothing: float = 0.0) -> Tensor:
    """The mean over the batch of -sum_k q_k ln softmax(logits)_k.

    Args:
        logits: (N, K) scores of K classes.
        labels: (N,) integers in [0, K).
        label_smoothing: s; q is 1 - s at the label plus s / K everywhere.

    Raises:
        ShapeError, TypeError, ValueError: labels of the wrong shape, kind or range.
    """
    array = labels.data if isinstance(labels, Tensor) else labels
    array = array if device_of(array) == "cuda" else np.asarray(array)
    return apply(ops.CrossEntropy(array, label_smoothing), logits)


def concatenate(tensors: Sequence[Tensor], axis: int = 0) -> Tensor:
    """The tensors one after another along ``axis``."""
    return apply(ops.Concatenate(axis), *tensors)


def flatten(x: Tensor) -> Tensor:
    """(N, ...) -> (N, everything else)."""
    return x.reshape(*x.shape[:1], math.prod(x.shape[1:]))
