"""Convolution and pooling of images (N, H, W, C): N images, H rows, W columns, C channels.

Both slide a window (the kernel) over the image. Two helpers say what that means: ``windows`` gives
all the windows of an image as one array, ``shifted`` gives, for each place in the window, the
pixels that come to lie there. Chapter 04 derives the rest.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from minihyperflows.engine.backend import Array, xp_of
from minihyperflows.engine.errors import ShapeError
from minihyperflows.engine.graph import Function

# One number for rows and columns alike, or (rows, columns).
Pair = int | tuple[int, int]

# -- windows -------------------------------------------------------------------------------------


def pair(value: Pair, name: str, least: int) -> tuple[int, int]:
    """``value`` as (rows, columns); ``name`` and the ``least`` allowed number are for the error."""
    both = tuple(value) if isinstance(value, tuple | list) else (value, value)
    if len(both) != 2 or not all(isinstance(v, int | np.integer) and v >= least for v in both):
        raise ValueError(f"{name} must be a whole number >= {least}, or two of them, not {value!r}")
    return both


def window_positions(
    image: tuple[int, ...],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int] = (0, 0),
) -> tuple[int, int]:
    """(H', W'), how many windows fit: H' = (H + 2p - kH) // s + 1, and W' likewise.

    ``image`` is (N, H, W, C). Rows and columns left over at the end belong to no window. A result
    below 1 means that the kernel does not fit at all.
    """
    sides = zip(image[1:3], kernel, stride, padding, strict=True)
    rows, columns = ((n + 2 * p - k) // s + 1 for n, k, s, p in sides)
    return rows, columns


def windows(x: Array, kernel: tuple[int, int], stride: tuple[int, int]) -> Array:
    """All windows of x (N, H, W, C) as a read-only view (N, H', W', kH, kW, C); no copy.

    windows[n, i, j, u, v, c] = x[n, i s + u, j s + v, c].
    """
    sliding = xp_of(x).lib.stride_tricks.sliding_window_view
    view = sliding(x, kernel, axis=(1, 2))[:, :: stride[0], :: stride[1]]  # (N, H', W', C, kH, kW)
    return view.transpose(0, 1, 2, 4, 5, 3)


def shifted(x: Array, kernel: tuple[int, int], stride: tuple[int, int]) -> Iterator[Array]:
    """For each place (u, v) in the window, row by row, the pixels there: a view (N, H', W', C).

    The item for (u, v) is windows[:, :, :, u, v], but writable.
    """
    rows, columns = window_positions(x.shape, kernel, stride)
    for u, v in np.ndindex(*kernel):
        yield x[:, u : u + stride[0] * rows : stride[0], v : v + stride[1] * columns : stride[1]]


def pad(x: Array, padding: tuple[int, int]) -> Array:
    """x (N, H, W, C) with zeros around each image; x itself if there are none to add."""
    if not any(padding):
        return x
    return xp_of(x).pad(x, ((0, 0), *((p, p) for p in padding), (0, 0)))


# -- convolution ---------------------------------------------------------------------------------


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
    x = pad(x, pair(padding, "padding", 0))
    y = np.zeros((len(x), *positions, len(weight)), np.result_type(x, weight))
    for n, i, j, o in np.ndindex(*y.shape):
        first = o * groups // len(weight) * depth  # the first channel of this filter's group
        window = x[n, i * s : i * s + kh, j * t : j * t + kw, first : first + depth]
        y[n, i, j, o] = (window * weight[o]).sum()
    return y if bias is None else y + bias


class Conv2d(Function):
    """y[n, i, j, o] = b[o] + sum over u, v, c of x[n, i s + u - p, j s + v - p, c] W[o, u, v, c].

    x (N, H, W, C_in), W (C_out, kH, kW, C_in / groups), b (C_out,) or none -> (N, H', W', C_out).

    With all windows of x as the rows of a matrix X (:func:`im2col`) and each filter as a row of W,
    this is one matrix product per group, and its gradients are those of a product:

        Y = X W^T + b,   dL/dX = c W,   dL/dW = c^T X,   dL/db = sum of c over images and pixels.

    A pixel stands in X once for each window that it lies in, so dL/dx adds up those entries of
    dL/dX (:func:`col2im`). X is larger than x by the size of the kernel: it is built again in
    ``backward`` instead of being kept.
    """

    def __init__(self, stride: Pair = 1, padding: Pair = 0, groups: int = 1) -> None:
        if groups < 1:
            raise ValueError(f"Conv2d: groups must be at least 1, not {groups}")
        self.stride = pair(stride, "Conv2d: stride", 1)
        self.padding = pair(padding, "Conv2d: padding", 0)
        self.groups = groups

    def forward(self, x: Array, weight: Array, bias: Array | None = None) -> Array:
        self.check(x.shape, weight.shape, None if bias is None else bias.shape)
        self.x, self.weight = x, weight
        y = self.columns() @ self.filters().swapaxes(1, 2)  # (groups, N H' W', C_out / groups)
        positions = window_positions(x.shape, weight.shape[1:3], self.stride, self.padding)
        y = y.swapaxes(0, 1).reshape(len(x), *positions, len(weight))  # (N, H', W', C_out)
        return y if bias is None else y + bias

    def backward(self, c: Array) -> tuple[Array | None, ...]:
        size = c.shape[0] * c.shape[1] * c.shape[2]
        rows = c.reshape(size, self.groups, -1).swapaxes(0, 1)  # (groups, N H' W', C_out / groups)
        return (
            self.image_gradient(rows @ self.filters()) if self.needs[0] else None,
            self.filter_gradient(rows) if self.needs[1] else None,
            *(c.sum(axis=(0, 1, 2)) if needed else None for needed in self.needs[2:]),
        )

    def columns(self) -> Array:
        """X, (groups, N H' W', kH kW C_in / groups)."""
        kernel = self.weight.shape[1:3]
        return im2col(pad(self.x, self.padding), kernel, self.stride, self.groups)

    def filters(self) -> Array:
        """W as matrices, (groups, C_out / groups, kH kW C_in / groups)."""
        return self.weight.reshape(self.groups, len(self.weight) // self.groups, -1)

    def filter_gradient(self, rows: Array) -> Array:
        return (rows.swapaxes(1, 2) @ self.columns()).reshape(self.weight.shape)

    def image_gradient(self, columns: Array) -> Array:
        n, h, w, c = self.x.shape
        p, q = self.padding
        padded = (n, h + 2 * p, w + 2 * q, c)
        return col2im(columns, padded, self.weight.shape[1:3], self.stride)[:, p : p + h, q : q + w]

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


def im2col(x: Array, kernel: tuple[int, int], stride: tuple[int, int], groups: int = 1) -> Array:
    """The windows of x (N, H, W, C) as rows: (groups, N H' W', kH kW C / groups).

    One copy; none for a 1x1 kernel with stride 1 and one group, whose windows are the pixels.
    """
    view = windows(x, kernel, stride)  # (N, H', W', kH, kW, C)
    n, rows, columns, kh, kw, c = view.shape
    view = view.reshape(n, rows, columns, kh, kw, groups, c // groups).transpose(
        5, 0, 1, 2, 3, 4, 6
    )
    return view.reshape(groups, n * rows * columns, kh * kw * c // groups)


def col2im(
    columns: Array, shape: tuple[int, ...], kernel: tuple[int, int], stride: tuple[int, int]
) -> Array:
    """The adjoint of :func:`im2col`: an image of ``shape`` in which every pixel is the sum of its
    copies in ``columns``, <im2col(x), columns> = <x, col2im(columns)>."""
    n, _, _, c = shape
    groups = len(columns)
    positions = window_positions(shape, kernel, stride)
    columns = columns.reshape(groups, n, *positions, *kernel, c // groups)
    columns = columns.transpose(4, 5, 1, 2, 3, 0, 6)  # (kH, kW, N, H', W', groups, C / groups)
    if kernel == stride == (1, 1):
        return columns.reshape(shape)  # every pixel has one copy
    x = xp_of(columns).zeros(shape, dtype=columns.dtype)
    for (u, v), pixels in zip(np.ndindex(*kernel), shifted(x, kernel, stride), strict=True):
        pixels += columns[u, v].reshape(pixels.shape)
    return x


# -- pooling -------------------------------------------------------------------------------------


class Pool2d(Function):
    """Reduces each window of x (N, H, W, C) to one number per channel: -> (N, H', W', C)."""

    def __init__(self, size: Pair, stride: Pair | None = None) -> None:
        self.size = pair(size, f"{self.name}: size", 1)
        self.stride = self.size if stride is None else pair(stride, f"{self.name}: stride", 1)

    def shifted(self, x: Array) -> Iterator[Array]:
        """The pixels at each place in the window; see :func:`shifted`."""
        return shifted(x, self.size, self.stride)

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

    def forward(self, x: Array) -> Array:
        self.check(x.shape)
        self.shape, xp = x.shape, xp_of(x)
        first, *others = self.shifted(x)
        y = first
        self.place = xp.zeros(y.shape, np.min_scalar_type(len(others)))  # of the largest so far
        for k, pixels in enumerate(others, start=1):
            larger = (pixels.real > y.real) | xp.isnan(pixels)
            y = xp.where(larger, pixels, y)
            self.place[larger] = k
        return y

    def backward(self, c: Array) -> Array:
        dx = xp_of(c).zeros(self.shape, dtype=c.dtype)
        for k, pixels in enumerate(self.shifted(dx)):
            pixels += c * (self.place == k)
        return dx


class AvgPool2d(Pool2d):
    """y = the mean of each window's kH kW numbers;  dL/dx = c / (kH kW) for each of them."""

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
