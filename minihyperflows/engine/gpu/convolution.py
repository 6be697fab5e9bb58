"""Convolution of (N, H, W, C) images with one group, as products of matrices (chapter 14).

With the windows of x as the rows of a matrix X and the filters as the rows of W,

    Y = X W^T + b,   dL/dX = c W,   dL/dW = c^T X,   dL/dx = the adjoint of im2col on dL/dX,

where Y and its cotangent c are (N H' W', C_out), X is (N H' W', kH kW C_in). The reference is
:class:`minihyperflows.engine.im2col.Im2col`. The functions take and return contiguous float32 or
float16 arrays of the GPU.

X is larger than x by the size of the kernel. It is kept from the forward pass for dL/dW, which
saves writing it again, unless it exceeds ``MOST_COLUMN_BYTES``: then it is made for some images at
a time, and again in the backward pass. For a 1x1 kernel with stride 1 and no padding X is x. dL/dX
lives only between two kernels, so it is made in parts that fit in the cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from minihyperflows.engine import conv
from minihyperflows.engine.backend import Array, xp_of
from minihyperflows.engine.gpu.bias import add_bias, bias_gradient
from minihyperflows.engine.gpu.division import divisor
from minihyperflows.engine.gpu.gemm import multiply
from minihyperflows.engine.gpu.launch import (
    C_TYPES,
    PACK_BYTES,
    THREADS,
    Source,
    c_type,
    every_type_and_width,
    pack_width,
    pack_widths,
)
from minihyperflows.engine.gpu.linear import takes_layer
from minihyperflows.engine.gpu.scratch import as_kernels_take, float32_buffer
from minihyperflows.engine.twins import on_gpu
from minihyperflows.engine.windows import window_positions

SIZES = (0, 3)  # the sides of windows for which im2col_adjoint is compiled; 0 is any

SOURCE = Source(
    "im2col.cu",
    [
        *every_type_and_width("im2col"),
        *(
            f"im2col_adjoint<{t}, {v}, {size}>"
            for t in C_TYPES.values()
            for v in pack_widths(t)
            for size in SIZES
        ),
    ],
)

PER_THREAD = 4  # packs that a thread of im2col moves, as im2col.cu has it
WARP = 32  # threads that run together

# The largest X of an operation. Of the networks of the book in half precision, the largest has
# 151 MB with batches of 128; in evaluation, with batches of 1000, and for large images it matters.
MOST_COLUMN_BYTES = 512 << 20

# The largest dL/dX, which nobody needs for long: half of the L2 cache of an H200, so that the
# adjoint finds there what the product has written. For the largest layer (151 MB) that should save
# 60 of 80 microseconds for memory, and cost 15 for launching more kernels: predicted, not measured.
MOST_CACHED_BYTES = 24 << 20

Pair = tuple[int, int]


@on_gpu(conv.Conv2d)
class Conv2d(conv.Conv2d):
    """y = x * W + b;  dL/dW, dL/dx and dL/db as above.

    With one group, and unless a way was asked for by name.
    """

    def takes(self, x: Array, weight: Array, bias: Array | None = None) -> bool:
        return self.way is None and self.groups == 1 and takes_layer(x, weight, bias)

    def forward(self, x: Array, weight: Array, bias: Array | None = None) -> Array:
        """Keeps x, or the matrix of its windows, only if dL/dW will be asked for."""
        self.check(x.shape, weight.shape, None if bias is None else bias.shape)
        y, columns = forward(x, weight, bias, self.stride, self.padding)
        needed = any(self.needs[1:2])
        self.weight, self.x_shape, self.columns = weight, x.shape, columns if needed else None
        self.x = x if needed and columns is None else None
        return y

    def backward(self, c: Array) -> tuple[Array | None, ...]:
        c, where = as_kernels_take(c, self.weight.dtype), (self.stride, self.padding)
        dx = dw = db = None
        if self.needs[0]:
            dx = input_gradient(c, self.weight, self.x_shape, *where)
        if self.needs[1]:
            saved, out = (self.x, self.columns), float32_buffer(self.buffer_for(1))
            dw = weight_gradient(c, *saved, self.weight.shape, *where, out=out)
        if any(self.needs[2:]):
            db = bias_gradient(c, float32_buffer(self.buffer_for(2)))
        return (dx, dw, db)[: len(self.needs)]


# -- its three products --------------------------------------------------------------------------


def forward(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
) -> tuple[Array, Array | None]:
    """y = X W^T + b (N, H', W', C_out), and X for :func:`weight_gradient`, or None if too large.

    Args:
        x: (N, H, W, C_in).
        weight: (C_out, kH, kW, C_in), of the dtype of x.
        bias: (C_out,), float32.
    """
    kernel = _kernel(weight.shape)
    positions = window_positions(x.shape, kernel, stride, padding)
    y = xp_of(x).empty((len(x), *positions, len(weight)), x.dtype)
    filters = _filters(weight)
    columns = None
    most_bytes = x.nbytes if _is_view(kernel, stride, padding) else MOST_COLUMN_BYTES
    for images in _parts(x, weight.shape, positions, most_bytes):
        columns = None  # so that the next can lie in the same memory
        columns = im2col(x[images], kernel, stride, padding, filters.shape[1])
        multiply(columns, filters, _rows(y[images]), transpose_b=True)
    if bias is not None:
        add_bias(y, bias)
    kept = columns is not None and len(columns) == y.size // len(weight)
    return y, columns if kept else None


def input_gradient(
    c: Array,
    weight: Array,
    x_shape: tuple[int, ...],
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
) -> Array:
    """dL/dx (N, H, W, C_in), in the dtype of c.

    The other way, X of the padded cotangent times filters turned by 180 degrees, moves as much
    memory (9 numbers for each of C_out, instead of C_in), needs the turned filters, and does not
    exist for strides.
    """
    xp = xp_of(c)
    kernel, filters = _kernel(weight.shape), weight.reshape(len(weight), -1)
    dx = xp.empty(x_shape, c.dtype)
    if _is_view(kernel, stride, padding):
        multiply(_rows(c), filters, _rows(dx))
        return dx
    for images in _parts(c, weight.shape, (c.shape[1], c.shape[2]), MOST_CACHED_BYTES):
        rows = _rows(c[images])
        columns = xp.empty((len(rows), filters.shape[1]), c.dtype)
        multiply(rows, filters, columns)
        im2col_adjoint(columns, dx[images], kernel, stride, padding)
        del columns  # so that the next can lie in the same memory
    return dx


def weight_gradient(
    c: Array,
    x: Array | None,
    columns: Array | None,
    weight_shape: tuple[int, ...],
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    out: Array | None = None,
) -> Array:
    """dL/dW = c^T X (C_out, kH, kW, C_in), in float32.

    Args:
        c: (N, H', W', C_out).
        x: (N, H, W, C_in); not needed if X is given.
        columns: X as :func:`forward` returned it.
        out: where to write the gradient, float32.
    """
    out = xp_of(c).empty(weight_shape, np.float32) if out is None else out
    kernel, flat = _kernel(weight_shape), out.reshape(weight_shape[0], -1)
    if columns is not None:
        _add_product(c, columns, flat, first=True)
        return out
    if x is None:
        raise ValueError("weight_gradient needs x or its columns")
    row = _row_length(weight_shape, x.dtype)
    for images in _parts(x, weight_shape, (c.shape[1], c.shape[2]), MOST_COLUMN_BYTES):
        columns = None  # so that the next can lie in the same memory
        columns = im2col(x[images], kernel, stride, padding, row)
        _add_product(c[images], columns, flat, first=images.start == 0)
    return out


def _add_product(c: Array, columns: Array, out: Array, first: bool) -> None:
    """out (C_out, kH kW C) = c^T X, or out += c^T X unless it is the ``first``."""
    width = out.shape[1]  # the rows of X may be longer
    multiply(_rows(c), columns[:, :width], out, transpose_a=True, accumulate=not first)


def _kernel(weight_shape: tuple[int, ...]) -> Pair:
    return weight_shape[1], weight_shape[2]


def _rows(images: Array) -> Array:
    """(N, H, W, C) as a matrix (N H W, C)."""
    return images.reshape(-1, images.shape[3])


def _is_view(kernel: Pair, stride: Pair, padding: Pair) -> bool:
    """Whether the windows are the pixels, as they lie in memory."""
    return kernel == stride == (1, 1) and not any(padding)


def _row_length(weight_shape: tuple[int, ...], dtype: np.dtype) -> int:
    """The length of a row of X: a window, rounded up to 16 bytes unless X might be x itself.

    cuBLAS reads rows that begin at multiples of 16 bytes several times faster. Only the first layer
    of a network has other windows, of 27 numbers for colour images.
    """
    window = math.prod(weight_shape[1:])
    unit = PACK_BYTES // dtype.itemsize
    return window if _kernel(weight_shape) == (1, 1) else -(-window // unit) * unit


def _filters(weight: Array) -> Array:
    """W as a matrix with rows as long as those of X: a copy if they must be filled up."""
    row = _row_length(weight.shape, weight.dtype)
    return im2col(weight.reshape(len(weight), 1, 1, -1), (1, 1), row=row)


def _parts(
    images: Array, weight_shape: tuple[int, ...], positions: Pair, most_bytes: int
) -> Iterator[slice]:
    """Equal parts of the images (N, ...), the largest whose windows, at (H', W') ``positions``, fit
    in ``most_bytes``: all images, if they do."""
    n = len(images)
    size = math.prod(positions) * math.prod(weight_shape[1:]) * images.dtype.itemsize
    parts = -(-n // max(1, most_bytes // size))
    step = -(-n // parts)
    return (slice(start, min(start + step, n)) for start in range(0, n, step))


# -- its kernels ---------------------------------------------------------------------------------


def im2col(
    x: Array, kernel: Pair, stride: Pair = (1, 1), padding: Pair = (0, 0), row: int | None = None
) -> Array:
    """X (N H' W', row): the windows of x (N, H, W, C) as rows, each kH kW C numbers and then zeros.

    x itself, reshaped, where the windows are its pixels.

    Args:
        row: the length of a row; by default kH kW C.
    """
    n, height, width, channels = x.shape
    window = kernel[0] * kernel[1] * channels
    row = window if row is None else row
    if _is_view(kernel, stride, padding) and row == window:
        return _rows(x)
    lines, windows = window_positions(x.shape, kernel, stride, padding)
    columns = xp_of(x).empty((n * lines * windows, row), x.dtype)
    v = min(pack_width(x, channels), pack_width(x, row))
    run, line = kernel[1] * channels // v, windows * row // v
    parts, threads = _divide(line, PER_THREAD)
    SOURCE.launch(
        f"im2col<{c_type(x)}, {v}>",
        (n * lines, parts),
        threads,
        *(x, columns, height, width * channels // v, lines, line, row // v, run, kernel[0]),
        *(stride[0], stride[1] * channels // v, padding[0], padding[1] * channels // v),
        *(*divisor(lines), *divisor(row // v), *divisor(run)),
    )
    return columns


def im2col_adjoint(
    columns: Array, x: Array, kernel: Pair, stride: Pair = (1, 1), padding: Pair = (0, 0)
) -> Array:
    """x (N, H, W, C) <- the sum of each pixel's copies in ``columns`` (N H' W', kH kW C).

    The adjoint of :func:`im2col`: <im2col(x), z> = <x, im2col_adjoint(z)> for all x and z. Returns
    x, which it overwrites.
    """
    n, height, width, channels = x.shape
    lines, windows = window_positions(x.shape, kernel, stride, padding)
    v = pack_width(x, channels)
    packs = channels // v
    parts, threads = _divide(width * packs, 1)
    size = kernel[0] if kernel[0] == kernel[1] and kernel[0] in SIZES else 0
    SOURCE.launch(
        f"im2col_adjoint<{c_type(x)}, {v}, {size}>",
        (n * height, parts),
        threads,
        *(columns, x, height, width * packs, packs, lines, windows, kernel[0] * kernel[1] * packs),
        *(*kernel, *stride, *padding),
        *(*divisor(height), *divisor(packs), *divisor(stride[0]), *divisor(stride[1])),
    )
    return x


def _divide(length: int, per_thread: int) -> Pair:
    """How many blocks share ``length`` packs, and how many threads each has: equal shares."""
    parts = -(-length // (THREADS * per_thread))
    threads = -(-length // (parts * per_thread))
    return parts, -(-threads // WARP) * WARP
