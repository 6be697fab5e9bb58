"""Convolution, three ways with one signature (chapter 04).

``conv2d_loop`` is the definition, ``conv2d_im2col`` one matrix product, ``conv2d_winograd`` fewer
multiplications; :class:`Conv2d` is the operation that networks use, and :func:`choose_way` picks
the way for a shape. Images are (N, H, W, C): N images, H rows, W columns, C channels.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np

from minihyperflows.engine.backend import Array
from minihyperflows.engine.errors import ShapeError
from minihyperflows.engine.graph import Function
from minihyperflows.engine.im2col import Im2col
from minihyperflows.engine.norm import channel_sum
from minihyperflows.engine.numbers import HALF, Arithmetic, as_floats, converted, float_dtype
from minihyperflows.engine.ops import add_to
from minihyperflows.engine.tensor import apply
from minihyperflows.engine.windows import Pair, pad, pair, window_positions
from minihyperflows.engine.winograd import Winograd

Algorithm: TypeAlias = Im2col | Winograd

# The ways of Conv2d; Winograd's are named by the size of their tiles, F(2x2, 3x3) and F(4x4, 3x3).
WAYS = ("im2col", "winograd2", "winograd4")


def conv2d_loop(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    stride: Pair = 1,
    padding: Pair = 0,
    groups: int = 1,
) -> Array:
    """The definition of convolution: one window times one filter for each number of the output.

    Shapes as for :class:`Conv2d`, which computes the same about a thousand times faster.
    """
    (s, t), (kh, kw), depth = pair(stride, "stride", 1), weight.shape[1:3], weight.shape[3]
    positions = window_positions(x.shape, (kh, kw), (s, t), pair(padding, "padding", 0))
    dtype = float_dtype(x, weight, bias)
    x, weight, bias = as_floats(pad(x, pair(padding, "padding", 0)), weight, bias)
    y = np.zeros((len(x), *positions, len(weight)), x.dtype)
    for n, i, j, o in np.ndindex(*y.shape):
        first = o * groups // len(weight) * depth  # the first channel of this filter's group
        window = x[n, i * s : i * s + kh, j * t : j * t + kw, first : first + depth]
        y[n, i, j, o] = (window * weight[o]).sum()
    return (y if bias is None else y + bias).astype(dtype, copy=False)


def conv2d_im2col(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    stride: Pair = 1,
    padding: Pair = 0,
    groups: int = 1,
) -> Array:
    """The same by one matrix product; see :class:`~minihyperflows.engine.im2col.Im2col`."""
    inputs = (x, weight) if bias is None else (x, weight, bias)
    return apply(Conv2d(stride, padding, groups, way="im2col"), *inputs).data


def conv2d_winograd(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    stride: Pair = 1,
    padding: Pair = 0,
    groups: int = 1,
    m: int = 4,
) -> Array:
    """The same for 3x3 filters with stride 1 and one group, by tiles of m x m outputs (2 or 4).

    See :class:`~minihyperflows.engine.winograd.Winograd`.
    """
    inputs = (x, weight) if bias is None else (x, weight, bias)
    return apply(Conv2d(stride, padding, groups, way=f"winograd{m}"), *inputs).data


def choose_way(
    x_shape: tuple[int, ...],
    weight_shape: tuple[int, ...],
    stride: tuple[int, int],
    padding: tuple[int, int],
    groups: int,
    dtype: np.dtype,
) -> str:
    """The fastest of ``WAYS`` for these shapes, as measured (chapter 04, ``bench --layers``).

    - Winograd needs 3x3 filters, stride 1 and one group. Its transforms cost as much for each
      channel as 36 multiplications do, so they pay from about 16 channels on both sides.
    - F(4x4) does 4 times fewer multiplications than the definition, F(2x2) 2.25 times. But F(4x4)
      also transforms every filter to 36 numbers instead of 16, for few tiles where the map is
      small: up to 4x4 pixels F(2x2) is faster. On a map of one pixel only the middle of a filter
      counts, and either wastes too much.
    - Half precision is too coarse for F(4x4)'s matrices.
    """
    if not can_winograd(weight_shape, stride, groups) or dtype.itemsize < 4:
        return "im2col"
    positions = window_positions(x_shape, (3, 3), stride, padding)
    if min(weight_shape[0], weight_shape[3]) < 16 or max(positions) < 2:
        return "im2col"
    return "winograd2" if max(positions) <= 4 else "winograd4"


def can_winograd(weight_shape: tuple[int, ...], stride: tuple[int, int], groups: int) -> bool:
    """Whether Winograd's way exists for this convolution."""
    return weight_shape[1:3] == (3, 3) and stride == (1, 1) and groups == 1


class Conv2d(Function):
    """y[n, i, j, o] = b[o] + sum over u, v, c of x[n, i s + u - p, j s + v - p, c] W[o, u, v, c].

    x (N, H, W, C_in), W (C_out, kH, kW, C_in / groups), b (C_out,) or none -> (N, H', W', C_out).

    Convolution is linear in x and in W. Its gradients are the transposed maps, which the chosen
    algorithm has beside its forward pass; dL/db = sum of c over images and pixels.

    Args:
        stride, padding: one number or (rows, columns).
        groups: the channels fall into this many groups, each with its own filters.
        way: one of ``WAYS``; by default :func:`choose_way` decides.
    """

    arithmetic = Arithmetic.FLOAT

    def __init__(
        self, stride: Pair = 1, padding: Pair = 0, groups: int = 1, way: str | None = None
    ) -> None:
        if groups < 1:
            raise ValueError(f"Conv2d: groups must be at least 1, not {groups}")
        if way not in (None, *WAYS):
            raise ValueError(f"Conv2d: way must be one of {', '.join(WAYS)}, not {way!r}")
        self.stride = pair(stride, "Conv2d: stride", 1)
        self.padding = pair(padding, "Conv2d: padding", 0)
        self.groups, self.way = groups, way

    def forward(self, x: Array, weight: Array, bias: Array | None = None) -> Array:
        self.check(x.shape, weight.shape, None if bias is None else bias.shape)
        # The algorithms compute in one dtype. (Other devices get their arrays as they are.)
        self.x, self.weight = converted((x, weight), float_dtype(x, weight))
        y = self.algorithm().forward(self.x, self.weight)
        return y if bias is None else add_to(y, bias)

    def backward(self, c: Array) -> tuple[Array | None, ...]:
        algorithm = self.algorithm()
        return (
            algorithm.input_gradient(c, self.weight) if self.needs[0] else None,
            algorithm.weight_gradient(c, self.x) if self.needs[1] else None,
            *(channel_sum(c.reshape(-1, c.shape[3])) if n else None for n in self.needs[2:]),
        )

    def algorithm(self) -> Algorithm:
        """The chosen way, made for the shapes at hand."""
        shapes = self.x.shape, self.weight.shape
        way = self.way or choose_way(*shapes, self.stride, self.padding, self.groups, self.x.dtype)
        if way == "im2col":
            return Im2col(*shapes, self.stride, self.padding, self.groups)
        if not can_winograd(self.weight.shape, self.stride, self.groups):
            raise ValueError(
                f"Conv2d: {way} needs 3x3 filters, stride 1 and one group, not a weight of shape "
                f"{self.weight.shape} with stride {self.stride} and groups={self.groups}"
            )
        if self.x.dtype == HALF:
            raise TypeError(f"Conv2d: {way} needs float32 at least, not float16")
        return Winograd(*shapes, self.padding, m=int(way[-1]))

    def check(
        self, x: tuple[int, ...], weight: tuple[int, ...], bias: tuple[int, ...] | None
    ) -> None:
        """Raise ShapeError, with all the shapes, unless these can be convolved."""
        shapes = f"Conv2d: input of shape {x} and weight of shape {weight}"
        if len(x) != 4 or len(weight) != 4:
            raise ShapeError(f"{shapes} must be (N, H, W, C_in) and (C_out, kH, kW, C_in / groups)")
        if x[3] != weight[3] * self.groups or weight[0] % self.groups:
            raise ShapeError(
                f"{shapes} do not fit with groups={self.groups}: {x[3]} input channels against "
                f"{weight[3]} x {self.groups}, and {weight[0]} output channels in {self.groups}"
            )
        if min(window_positions(x, weight[1:3], self.stride, self.padding)) < 1:
            raise ShapeError(
                f"{shapes}: the kernel is larger than the image with padding {self.padding}"
            )
        if bias is not None and bias != weight[:1]:
            raise ShapeError(f"Conv2d: bias of shape {bias} does not fit weight of shape {weight}")
