"""The basic operations: element-wise arithmetic, reductions, shapes, products, losses.

In every class ``c`` is the cotangent dL/d(output). Each docstring gives the forward formula and the
gradients that ``backward`` returns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np

from minihyperflows.engine.backend import Array, contiguous, device_of, xp_of
from minihyperflows.engine.errors import DeviceError, ShapeError
from minihyperflows.engine.graph import Function
from minihyperflows.engine.memory import empty
from minihyperflows.engine.numbers import Arithmetic, computing_dtype, number, rounded
from minihyperflows.engine.products import matmul
from minihyperflows.engine.threads import add, elementwise

# -- helpers -------------------------------------------------------------------------------------


def unbroadcast(gradient: Array, shape: tuple[int, ...]) -> Array:
    """Sum ``gradient`` down to ``shape``: the adjoint of NumPy's broadcasting.

    Broadcasting uses an element several times, so its gradient is the sum over those uses: over
    every leading axis that broadcasting added, and every axis that it stretched from length 1.
    """
    if gradient.shape == shape:
        return gradient
    added = gradient.ndim - len(shape)
    stretched = [i for i, n in enumerate(shape, start=added) if n == 1 and gradient.shape[i] != 1]
    axes = (*range(added), *stretched)
    summed = gradient.sum(axis=axes, keepdims=True, dtype=computing_dtype(gradient.dtype))
    return rounded(summed, gradient.dtype).reshape(shape)


def one_tuple(values: Sequence[Any]) -> tuple[int, ...]:
    """``f(2, 3)`` and ``f((2, 3))`` alike: the arguments as one flat tuple."""
    if len(values) == 1 and isinstance(values[0], tuple | list):
        return tuple(values[0])
    return tuple(values)


def axes_of(axis: int | tuple[int, ...] | None, ndim: int, name: str) -> tuple[int, ...]:
    """``axis`` in NumPy's notation as a tuple of non-negative axes (None means all of them).

    Raises:
        numpy.exceptions.AxisError (a ValueError): an axis that is not there; names the operation.
        ValueError: an axis given twice.
    """
    axes = range(ndim) if axis is None else axis
    return np.lib.array_utils.normalize_axis_tuple(axes, ndim, name)


def _shape(x: Any) -> tuple[int, ...]:
    return getattr(x, "shape", ())


def require_broadcast(name: str, a: tuple[int, ...], b: tuple[int, ...]) -> None:
    """Raise a ShapeError that names the operation unless the two shapes broadcast together."""
    try:
        np.broadcast_shapes(a, b)
    except ValueError:
        raise ShapeError(f"{name}: shapes {a} and {b} do not broadcast together") from None


# -- element-wise, two inputs --------------------------------------------------------------------


class Elementwise(Function):
    """A broadcasting operation of two inputs: checks the shapes, sums the gradients back."""

    def forward(self, a: Array, b: Array) -> Array:
        self.shapes = _shape(a), _shape(b)
        require_broadcast(self.name, *self.shapes)
        return self.combine(a, b)

    def backward(self, c: Array) -> tuple[Array | None, Array | None]:
        return (
            unbroadcast(self.gradient_a(c), self.shapes[0]) if self.needs[0] else None,
            unbroadcast(self.gradient_b(c), self.shapes[1]) if self.needs[1] else None,
        )

    def combine(self, a: Array, b: Array) -> Array:
        raise NotImplementedError

    def gradient_a(self, c: Array) -> Array:
        raise NotImplementedError

    def gradient_b(self, c: Array) -> Array:
        raise NotImplementedError


class Add(Elementwise):
    """y = a + b;  dL/da = c,  dL/db = c."""

    arithmetic = Arithmetic.WHOLE

    def combine(self, a: Array, b: Array) -> Array:
        return add(a, b) if self.shapes[0] == self.shapes[1] != () else a + b

    def gradient_a(self, c: Array) -> Array:
        return c

    def gradient_b(self, c: Array) -> Array:
        return c


class Subtract(Elementwise):
    """y = a - b;  dL/da = c,  dL/db = -c."""

    arithmetic = Arithmetic.WHOLE

    def combine(self, a: Array, b: Array) -> Array:
        return a - b

    def gradient_a(self, c: Array) -> Array:
        return c

    def gradient_b(self, c: Array) -> Array:
        return -c


class Multiply(Elementwise):
    """y = a b;  dL/da = b c,  dL/db = a c."""

    arithmetic = Arithmetic.WHOLE

    def combine(self, a: Array, b: Array) -> Array:
        self.a, self.b = a, b
        return a * b

    def gradient_a(self, c: Array) -> Array:
        return self.b * c

    def gradient_b(self, c: Array) -> Array:
        return self.a * c


class Divide(Elementwise):
    """y = a / b;  dL/da = c / b,  dL/db = -c a / b^2."""

    arithmetic = Arithmetic.FLOAT

    def combine(self, a: Array, b: Array) -> Array:
        self.a, self.b = a, b
        return a / b

    def gradient_a(self, c: Array) -> Array:
        return c / self.b

    def gradient_b(self, c: Array) -> Array:
        return -c * self.a / (self.b * self.b)


# -- element-wise, one input ---------------------------------------------------------------------


class Negate(Function):
    """y = -x;  dL/dx = -c."""

    arithmetic = Arithmetic.WHOLE

    def forward(self, x: Array) -> Array:
        return -x

    def backward(self, c: Array) -> Array:
        return -c


class Power(Function):
    """y = x^p for a constant number p;  dL/dx = p x^(p-1) c."""

    def __init__(self, exponent: float) -> None:
        exponent = number(exponent)  # Python's, which does not change x's dtype
        if not isinstance(exponent, Real):
            raise TypeError(f"the exponent must be a real number, not {type(exponent).__name__}")
        self.exponent: float = int(exponent) if isinstance(exponent, Integral) else float(exponent)
        whole = isinstance(self.exponent, int) and self.exponent >= 0
        self.arithmetic = Arithmetic.WHOLE if whole else Arithmetic.FLOAT

    def forward(self, x: Array) -> Array:
        self.x = x
        return x**self.exponent

    def backward(self, c: Array) -> Array:
        if self.exponent == 0:
            return 0 * c  # the formula would give 0 times infinity at x = 0
        return self.exponent * self.x ** (self.exponent - 1) * c


class Exp(Function):
    """y = e^x;  dL/dx = y c."""

    arithmetic = Arithmetic.FLOAT

    def forward(self, x: Array) -> Array:
        self.y = xp_of(x).exp(x)
        return self.y

    def backward(self, c: Array) -> Array:
        return self.y * c


class Log(Function):
    """y = ln x;  dL/dx = c / x."""

    arithmetic = Arithmetic.FLOAT

    def forward(self, x: Array) -> Array:
        self.x = x
        return xp_of(x).log(x)

    def backward(self, c: Array) -> Array:
        return c / self.x


class Tanh(Function):
    """y = tanh x;  dL/dx = (1 - y^2) c."""

    arithmetic = Arithmetic.FLOAT

    def forward(self, x: Array) -> Array:
        self.y = xp_of(x).tanh(x)
        return self.y

    def backward(self, c: Array) -> Array:
        return (1 - self.y * self.y) * c


class Sigmoid(Function):
    """y = 1 / (1 + e^-x);  dL/dx = y (1 - y) c.

    Computed as (1 + tanh(x/2)) / 2, the same function, which cannot overflow.
    """

    arithmetic = Arithmetic.FLOAT

    def forward(self, x: Array) -> Array:
        self.y = 0.5 * (1 + xp_of(x).tanh(0.5 * x))
        return self.y

    def backward(self, c: Array) -> Array:
        return self.y * (1 - self.y) * c


def rectify(x: Array, out: Array) -> None:
    """out = x where its real part is positive, else 0; a NaN stays one. ``out`` may be x itself."""
    xp = xp_of(x)
    if x.dtype.kind == "c":
        out[...] = xp.where(x.real <= 0, 0, x)
    else:  # the maximum of two arrays takes a third of the time of that of an array and a number
        xp.maximum(x, xp.zeros(x.shape, x.dtype), out=out)


def rectified(x: Array) -> Array:
    """max(x, 0), in C order."""
    x = contiguous(x)
    y = empty(xp_of(x), x.shape, x.dtype)
    elementwise(rectify, x, y)
    return y


def where_positive(y: Array, c: Array) -> Array:
    """c where the real part of y is positive, else 0. y is in C order, and so is the result."""
    xp, c = xp_of(c), contiguous(c)
    chosen = empty(xp, c.shape, c.dtype)
    elementwise(lambda y, c, chosen: xp.multiply(c, y.real > 0, out=chosen), y, c, chosen)
    return chosen


class ReLU(Function):
    """y = max(x, 0);  dL/dx = c where x > 0, else 0 (at the kink x = 0 too, as in PyTorch).

    x > 0 where y > 0, so y is all that ``backward`` needs, and the next operation keeps it anyway.
    """

    arithmetic = Arithmetic.NONE

    def forward(self, x: Array) -> Array:
        self.y = rectified(x)
        return self.y

    def backward(self, c: Array) -> Array:
        return where_positive(self.y, c)


# -- reductions ----------------------------------------------------------------------------------


class Reduction(Function):
    """An operation that removes axes (or keeps them with length 1)."""

    shape: tuple[int, ...]  # of x, set by forward

    def __init__(self, axis: int | tuple[int, ...] | None = None, keepdims: bool = False) -> None:
        self.axis, self.keepdims = axis, keepdims

    def axes(self, ndim: int) -> tuple[int, ...]:
        return axes_of(self.axis, ndim, self.name)

    def with_axes(self, reduced: Array) -> Array:
        """``reduced`` with the removed axes back, of length 1, so that it broadcasts over x."""
        axes = self.axes(len(self.shape))
        return reduced.reshape([1 if i in axes else n for i, n in enumerate(self.shape)])


class Sum(Reduction):
    """y = sum of x over ``axis``;  dL/dx = c for every summand."""

    arithmetic = Arithmetic.WHOLE

    def forward(self, x: Array) -> Array:
        self.shape = x.shape
        return x.sum(axis=self.axes(x.ndim), keepdims=self.keepdims)

    def backward(self, c: Array) -> Array:
        return xp_of(c).broadcast_to(self.with_axes(c), self.shape)


class Mean(Reduction):
    """y = mean of x over ``axis``;  dL/dx = c / n for every one of the n summands."""

    arithmetic = Arithmetic.FLOAT

    def forward(self, x: Array) -> Array:
        self.shape = x.shape
        return x.mean(axis=self.axes(x.ndim), keepdims=self.keepdims)

    def backward(self, c: Array) -> Array:
        n = math.prod(self.shape[a] for a in self.axes(len(self.shape)))
        return xp_of(c).broadcast_to(self.with_axes(c) / max(1, n), self.shape)


class Max(Reduction):
    """y = max of x over ``axis``;  dL/dx = c at the maximum, shared equally where several tie."""

    arithmetic = Arithmetic.NONE

    def forward(self, x: Array) -> Array:
        self.shape, axes = x.shape, self.axes(x.ndim)
        if 0 in [x.shape[a] for a in axes]:
            raise ShapeError(f"Max: shape {x.shape} has nothing to choose from over axes {axes}")
        y = x.real.max(axis=axes, keepdims=True)
        self.at_maximum = x.real == y
        self.ties = self.at_maximum.sum(axis=axes, keepdims=True, dtype=computing_dtype(y.dtype))
        if x.dtype.kind == "c":  # ordered by the real part; the imaginary part is the ties' mean
            y = xp_of(x).where(self.at_maximum, x, 0).sum(axis=axes, keepdims=True) / self.ties
        return y if self.keepdims else y.squeeze(axes)

    def backward(self, c: Array) -> Array:
        return self.at_maximum * (self.with_axes(c) / self.ties)


# -- shapes --------------------------------------------------------------------------------------


class Reshape(Function):
    """y = x in another shape;  dL/dx = c in x's shape."""

    arithmetic = Arithmetic.NONE

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.new_shape = shape

    def forward(self, x: Array) -> Array:
        self.shape = x.shape
        try:
            return x.reshape(self.new_shape)
        except ValueError:
            raise ShapeError(
                f"Reshape: {x.size} elements of shape {x.shape} do not fill {self.new_shape}"
            ) from None

    def backward(self, c: Array) -> Array:
        return c.reshape(self.shape)


class Transpose(Function):
    """y[i_p(0), i_p(1), ...] = x[i_0, i_1, ...];  dL/dx = c with the axes put back."""

    arithmetic = Arithmetic.NONE

    def __init__(self, axes: tuple[int, ...] | None = None) -> None:
        self.axes = axes

    def forward(self, x: Array) -> Array:
        axes = self.axes or tuple(reversed(range(x.ndim)))
        self.order = axes_of(axes, x.ndim, self.name)
        if len(axes) != x.ndim:
            raise ShapeError(f"Transpose: axes {axes} do not permute those of shape {x.shape}")
        return x.transpose(self.order)

    def backward(self, c: Array) -> Array:
        return c.transpose(sorted(range(c.ndim), key=self.order.__getitem__))


class GetItem(Function):
    """y = x[index];  dL/dx = c at the chosen places (added up if chosen twice), 0 elsewhere."""

    arithmetic = Arithmetic.NONE

    def __init__(self, index: Any) -> None:
        self.index = index

    def forward(self, x: Array) -> Array:
        self.shape = x.shape
        return x[self.index]

    def backward(self, c: Array) -> Array:
        xp = xp_of(c)
        gradient = xp.zeros(self.shape, dtype=c.dtype)
        xp.add.at(gradient, self.index, c)
        return gradient


class Concatenate(Function):
    """y = the inputs one after another along ``axis``;  dL/dx_i = its part of c."""

    arithmetic = Arithmetic.NONE

    def __init__(self, axis: int = 0) -> None:
        self.axis = axis

    def forward(self, *arrays: Array) -> Array:
        if not arrays:
            raise ShapeError("Concatenate: there is nothing to concatenate")
        try:
            y = xp_of(arrays[0]).concatenate(arrays, axis=self.axis)
        except ValueError:
            shapes = ", ".join(str(_shape(a)) for a in arrays)
            raise ShapeError(
                f"Concatenate: shapes {shapes} must have axis {self.axis} and agree on all others"
            ) from None
        self.ends = np.cumsum([a.shape[self.axis] for a in arrays])
        return y

    def backward(self, c: Array) -> tuple[Array | None, ...]:
        parts = xp_of(c).split(c, self.ends[:-1].tolist(), axis=self.axis)
        return tuple(p if n else None for p, n in zip(parts, self.needs, strict=True))


# -- products ------------------------------------------------------------------------------------


class MatMul(Function):
    """y = a b, matrices on the last two axes;  dL/da = c b^T,  dL/db = a^T c."""

    arithmetic = Arithmetic.FLOAT

    def forward(self, a: Array, b: Array) -> Array:
        a_shape, b_shape = _shape(a), _shape(b)
        if min(len(a_shape), len(b_shape)) < 2 or a_shape[-1] != b_shape[-2]:
            raise ShapeError(
                f"MatMul: shapes {a_shape} and {b_shape} are not (..., n, k) and (..., k, m)"
            )
        require_broadcast(self.name, a_shape[:-2], b_shape[:-2])
        self.a, self.b = a, b
        return matmul(a, b)

    def backward(self, c: Array) -> tuple[Array | None, Array | None]:
        return (
            unbroadcast(matmul(c, self.b.swapaxes(-1, -2)), self.a.shape)
            if self.needs[0]
            else None,
            unbroadcast(matmul(self.a.swapaxes(-1, -2), c), self.b.shape)
            if self.needs[1]
            else None,
        )


def add_to(y: Array, bias: Array) -> Array:
    """y + bias, in y's own memory unless the sum needs a wider dtype."""
    xp = xp_of(y)
    return xp.add(y, bias, out=y if xp.result_type(y, bias) == y.dtype else None)


class Linear(Function):
    """y = x W^T + b with x (..., in), W (out, in), b (out,).

    dL/dx = c W,  dL/dW = c^T x,  dL/db = sum of c over everything but the last axis.
    """

    arithmetic = Arithmetic.FLOAT

    def forward(self, x: Array, weight: Array, bias: Array | None = None) -> Array:
        self.check(x, weight, bias)
        self.x, self.weight = x, weight
        y = matmul(x, weight.T)
        return y if bias is None else add_to(y, bias)

    def backward(self, c: Array) -> tuple[Array | None, ...]:
        rows = math.prod(c.shape[:-1])
        flat_c = c.reshape(rows, c.shape[-1])  # (N, out)
        flat_x = self.x.reshape(rows, self.x.shape[-1])  # (N, in)
        gradients = (
            matmul(c, self.weight) if self.needs[0] else None,
            matmul(flat_c.T, flat_x) if self.needs[1] else None,
        )
        if len(self.needs) == 2:  # no bias
            return gradients
        return *gradients, flat_c.sum(axis=0) if self.needs[2] else None

    def check(self, x: Array, weight: Array, bias: Array | None) -> None:
        """Raise ShapeError unless these fit together."""
        if len(_shape(weight)) != 2 or _shape(x)[-1:] != weight.shape[1:]:
            raise ShapeError(
                f"Linear: input of shape {_shape(x)} does not fit a weight of shape "
                f"{_shape(weight)}, which must be (out, in)"
            )
        if bias is not None and bias.shape != weight.shape[:1]:
            raise ShapeError(
                f"Linear: bias of shape {bias.shape} does not fit a weight of shape {weight.shape}"
            )


# -- probabilities -------------------------------------------------------------------------------


def log_softmax(x: Array, axis: int = -1) -> Array:
    """x - ln sum(e^x) on raw arrays, shifted by the maximum so that no exponential overflows."""
    shifted = x - x.real.max(axis=axis, keepdims=True)
    xp = xp_of(x)
    return shifted - xp.log(xp.exp(shifted).sum(axis=axis, keepdims=True))


class Softmax(Function):
    """p = e^x / sum(e^x) over ``axis``;  dL/dx = p (c - sum(p c))."""

    arithmetic = Arithmetic.FLOAT

    def __init__(self, axis: int = -1) -> None:
        self.axis = axis

    def forward(self, x: Array) -> Array:
        self.p = xp_of(x).exp(log_softmax(x, self.axis))
        return self.p

    def backward(self, c: Array) -> Array:
        return self.p * (c - (self.p * c).sum(axis=self.axis, keepdims=True))


class LogSoftmax(Function):
    """y = x - ln sum(e^x) over ``axis``;  dL/dx = c - softmax(x) sum(c)."""

    arithmetic = Arithmetic.FLOAT

    def __init__(self, axis: int = -1) -> None:
        self.axis = axis

    def forward(self, x: Array) -> Array:
        self.y = log_softmax(x, self.axis)
        return self.y

    def backward(self, c: Array) -> Array:
        return c - xp_of(c).exp(self.y) * c.sum(axis=self.axis, keepdims=True)


class CrossEntropy(Function):
    """L = -1/N sum_n sum_k q_nk ln p_nk with p = softmax(logits) and smoothed labels q.

    q_nk = (1 - s) [k = label_n] + s / K for N samples, K classes and the label smoothing s.
    dL/dlogits = (p - q) / N.
    """

    arithmetic = Arithmetic.FLOAT

    def __init__(self, labels: Array, label_smoothing: float = 0.0) -> None:
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"label_smoothing must lie in [0, 1], not {label_smoothing}")
        self.labels, self.label_smoothing = labels, label_smoothing

    def forward(self, logits: Array) -> Array:
        if device_of(self.labels) != device_of(logits):
            raise DeviceError("CrossEntropy: labels and logits lie on different devices")
        check_labels_fit(self.labels, logits.shape)
        check_labels_exist(self.labels, logits.shape[1])
        self.log_p = log_softmax(logits)
        s, rows = self.label_smoothing, xp_of(logits).arange(len(logits))
        at_label = self.log_p[rows, self.labels].mean()
        return -((1 - s) * at_label + s * self.log_p.mean()) if s else -at_label

    def backward(self, c: Array) -> Array:
        xp = xp_of(self.log_p)
        n, k = self.log_p.shape
        difference = xp.exp(self.log_p)  # p - q, built in place
        difference -= self.label_smoothing / k
        difference[xp.arange(n), self.labels] -= 1 - self.label_smoothing
        return difference * (c / n)


def check_labels_fit(labels: Array, logits_shape: tuple[int, ...]) -> None:
    """Raise unless ``labels`` are N integers for logits of shape (N, K)."""
    if len(logits_shape) != 2 or labels.shape != logits_shape[:1]:
        raise ShapeError(
            f"CrossEntropy: labels of shape {labels.shape} do not fit logits of shape "
            f"{logits_shape}, which must be (N, K)"
        )
    if labels.dtype.kind not in "iu":
        raise TypeError(f"CrossEntropy: labels must be integers, not {labels.dtype}")
    if labels.size == 0:
        raise ShapeError("CrossEntropy: an empty batch has no mean loss")


def check_labels_exist(labels: Array, classes: int) -> None:
    """Raise unless all ``labels`` lie in [0, K)."""
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise ValueError(
            f"CrossEntropy: labels from {low} to {high} are out of range for "
            f"{classes} classes (0 to {classes - 1})"
        )
