"""Convolution as a matrix product of windows and filters (chapter 04)."""

from __future__ import annotations

import math

import numpy as np

from minihyperflows.engine.backend import Array, xp_of
from minihyperflows.engine.memory import empty
from minihyperflows.engine.threads import (
    LARGEST_SCRATCH,
    PRODUCT_BLOCK,
    for_blocks,
    rows_per_block,
    sum_over_parts,
)
from minihyperflows.engine.windows import pad, shifted, window_positions, windows

# Fewer rows than this in a product, and reading the filters costs more than multiplying by them.
LEAST_ROWS = 256


class Im2col:
    """The convolution of images by the matrix of their windows.

    With all windows of x as the rows of a matrix X (:func:`im2col`) and each filter as a row of W,
    convolution is one matrix product per group, and its gradients are those of a product:

        Y = X W^T,   dL/dX = c W,   dL/dW = c^T X.

    A pixel stands in X once for each window that it lies in, so dL/dx adds up those entries of
    dL/dX (:func:`col2im`). X is larger than x by the size of the kernel. So it is built for a few
    images at a time, used while it is still in the cache, and built again for dL/dW.

    Args:
        x_shape: (N, H, W, C_in).
        weight_shape: (C_out, kH, kW, C_in / groups).
        stride, padding: (rows, columns).
    """

    def __init__(
        self,
        x_shape: tuple[int, ...],
        weight_shape: tuple[int, ...],
        stride: tuple[int, int],
        padding: tuple[int, int],
        groups: int,
    ) -> None:
        self.x_shape, self.weight_shape = x_shape, weight_shape
        self.stride, self.padding, self.groups = stride, padding, groups
        self.kernel = (weight_shape[1], weight_shape[2])
        self.positions = window_positions(x_shape, self.kernel, stride, padding)
        self.y_shape = (x_shape[0], *self.positions, weight_shape[0])

    def forward(self, x: Array, weight: Array) -> Array:
        """y (N, H', W', C_out)."""
        xp = xp_of(x)
        filters = self.filters(weight).swapaxes(1, 2)
        y = empty(xp, self.y_shape, xp.result_type(x, weight))

        def work(images: slice) -> None:
            self.product(self.columns(x[images]), filters, y[images])

        for_blocks(work, len(x), self.images_per_block(), x)
        return y

    def input_gradient(self, c: Array, weight: Array) -> Array:
        """dL/dx (N, H, W, C_in)."""
        xp = xp_of(c)
        filters = self.filters(weight)
        dx = empty(xp, self.x_shape, xp.result_type(c, weight))
        pointwise = self.kernel == self.stride == (1, 1) and self.groups == 1

        def work(images: slice) -> None:
            if pointwise and not any(self.padding):  # a pixel lies in one window: no sum
                self.product(self.rows(c[images]), filters, dx[images])
            else:
                self.add_windows(self.rows(c[images]) @ filters, dx[images])

        for_blocks(work, len(c), self.images_per_block(), c)
        return dx

    def weight_gradient(self, c: Array, x: Array) -> Array:
        """dL/dW (C_out, kH, kW, C_in / groups)."""
        if self.is_view():
            step = len(x)
        else:
            depth = math.prod(self.weight_shape[1:]) * self.groups
            step = max(1, LARGEST_SCRATCH // (self.positions[0] * self.positions[1] * depth))

        def work(part: slice) -> Array:
            return cross_product(self.rows(c[part]), self.all_columns(x[part]))

        return sum_over_parts(work, len(x), step).reshape(self.weight_shape)

    def is_view(self) -> bool:
        """Whether the windows are the pixels as they lie in memory, so that X costs nothing."""
        plain = self.kernel == self.stride == (1, 1) and not any(self.padding)
        return plain and self.groups == 1

    def images_per_block(self) -> int:
        pixels = self.positions[0] * self.positions[1]
        depth = math.prod(self.weight_shape[1:]) * self.groups
        return max(1, rows_per_block(depth, PRODUCT_BLOCK, LEAST_ROWS) // pixels)

    def columns(self, x: Array) -> Array:
        """X of some images, (groups, n H' W', kH kW C_in / groups)."""
        return im2col(pad(x, self.padding), self.kernel, self.stride, self.groups)

    def all_columns(self, x: Array) -> Array:
        """The same, built by all threads."""
        if self.is_view():
            return self.columns(x)
        pixels = self.positions[0] * self.positions[1]
        depth = math.prod(self.weight_shape[1:])
        columns = empty(xp_of(x), (self.groups, len(x) * pixels, depth), x.dtype)

        def work(images: slice) -> None:
            columns[:, images.start * pixels : images.stop * pixels] = self.columns(x[images])

        for_blocks(work, len(x), self.images_per_block(), x)
        return columns

    def filters(self, weight: Array) -> Array:
        """W as matrices, (groups, C_out / groups, kH kW C_in / groups)."""
        depth = math.prod(self.weight_shape[1:])
        return weight.reshape(self.groups, len(weight) // self.groups, depth)

    def rows(self, c: Array) -> Array:
        """c of some images as matrices, (groups, n H' W', C_out / groups)."""
        size = c.shape[0] * c.shape[1] * c.shape[2]
        return c.reshape(size, self.groups, c.shape[3] // self.groups).swapaxes(0, 1)

    def product(self, a: Array, b: Array, out: Array) -> None:
        """The products a b of the groups, side by side in the last axis of ``out``."""
        rows = out.reshape(a.shape[1], self.groups, -1).swapaxes(0, 1)  # a view
        if self.groups == 1:
            xp_of(a).matmul(a[0], b[0], out=rows[0])
        else:
            rows[...] = a @ b

    def add_windows(self, columns: Array, dx: Array) -> None:
        """dx = col2im(columns) without the padding."""
        n, h, w, channels = dx.shape
        p, q = self.padding
        padded = (n, h + 2 * p, w + 2 * q, channels)
        dx[...] = col2im(columns, padded, self.kernel, self.stride)[:, p : p + h, q : q + w]


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


def cross_product(a: Array, b: Array) -> Array:
    """a^T b of each group: a (groups, M, O), b (groups, M, K) -> (groups, O, K).

    The threads share the longer side of the result: each entry is one sum over all M rows, so
    there are no partial sums to keep.
    """
    xp = xp_of(a)
    product = xp.empty((len(a), a.shape[2], b.shape[2]), xp.result_type(a, b))
    wide = b.shape[2] > a.shape[2]

    def work(part: slice) -> None:
        left, right = (a, b[..., part]) if wide else (a[..., part], b)
        xp.matmul(left.swapaxes(1, 2), right, out=product[:, :, part] if wide else product[:, part])

    longer = max(product.shape[1:])
    for_blocks(work, longer, max(32, -(-longer // 4)), a)
    return product
