"""Winograd's convolution with 3x3 filters: fewer multiplications (chapter 04).

Sources: Winograd 1980; Lavin & Gray 2016 (F(m x m, 3 x 3) for images); Toom and Cook for the
matrices, which interpolate a polynomial product.
"""

from __future__ import annotations

from functools import cache

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
from minihyperflows.engine.windows import windows

# Where the polynomials are evaluated, besides infinity: the first m + 1 of them for F(m x m).
# Near 1, so that no power of a point swamps the others, and fractions of powers of two. In float32
# these have less than half the error of the textbook's 0, 1, -1, 2, -2 (chapter 04).
POINTS = (0.0, 0.625, -0.625, 1.5, -1.5)
SMALL_POINTS = (0.0, 1.0, -1.0)

LEAST_TILES = 64  # of a block; with fewer, reading the filters costs more than multiplying by them


class Winograd:
    """The convolution of images with 3x3 filters at stride 1, by tiles of m x m outputs.

    An m x m tile of y depends on an (m + 2) x (m + 2) tile d of x. With the matrices of
    :func:`winograd_matrices`, for every pair of channels,

        y = A^T [(G w G^T) * (B^T d B)] A,

    where * multiplies element by element: (m + 2)^2 multiplications for m^2 outputs, where the
    definition has 9 m^2. Summed over input channels, the element-wise products are matrix
    products, one for each of the (m + 2)^2 elements p:

        U[p] = (G w G^T)[p] (C_out, C_in),  V[p] = (B^T d B)[p] (tiles, C_in),  M[p] = V[p] U[p]^T.

    Every step is linear, so the gradients are the transposed steps in reverse order: with
    dM = A c A^T for the tiles of the cotangent,

        dU[p] = dM[p]^T V[p],   dw = G^T dU G,   dV[p] = dM[p] U[p],   dd = B dV B^T,

    and dx adds up the overlapping tiles dd. Both sides of a transform are one product with a
    Kronecker product, vec(P d Q^T) = (P x Q) vec(d), a small matrix.

    Args:
        x_shape: (N, H, W, C_in).
        weight_shape: (C_out, 3, 3, C_in).
        padding: (rows, columns).
        m: 2 or 4.
    """

    def __init__(
        self,
        x_shape: tuple[int, ...],
        weight_shape: tuple[int, ...],
        padding: tuple[int, int],
        m: int,
    ) -> None:
        self.x_shape, self.padding, self.m = x_shape, padding, m
        n, h, w, self.channels = x_shape
        self.filters = weight_shape[0]
        rows, columns = h + 2 * padding[0] - 2, w + 2 * padding[1] - 2
        self.y_shape = (n, rows, columns, self.filters)
        self.tiles = (-(-rows // m), -(-columns // m))  # of an image; the last may stick out
        self.points = (m + 2) ** 2

    # -- the three products ----------------------------------------------------------------------

    def forward(self, x: Array, weight: Array) -> Array:
        """y (N, H', W', C_out)."""
        xp = xp_of(x)
        u = self.transform_filters(weight).swapaxes(1, 2)
        y = empty(xp, self.y_shape, xp.result_type(x, weight))

        def work(images: slice) -> None:
            v = self.transform_images(x[images])
            self.gather(xp.matmul(v, u), y[images])

        for_blocks(work, len(x), self.images_per_block(), x)
        return y

    def input_gradient(self, c: Array, weight: Array) -> Array:
        """dL/dx (N, H, W, C_in)."""
        xp = xp_of(c)
        u = self.transform_filters(weight)
        dx = empty(xp, self.x_shape, xp.result_type(c, weight))

        def work(images: slice) -> None:
            dm = self.transform_cotangents(c[images])
            self.add_tiles(xp.matmul(dm, u), dx[images])

        for_blocks(work, len(c), self.images_per_block(), c)
        return dx

    def weight_gradient(self, c: Array, x: Array) -> Array:
        """dL/dW (C_out, 3, 3, C_in)."""
        tiles = self.tiles[0] * self.tiles[1]
        step = LARGEST_SCRATCH // (self.points * tiles * max(self.channels, self.filters))
        return self.filter_gradients(
            sum_over_parts(
                lambda part: self.transformed_gradient(c[part], x[part]), len(x), max(1, step)
            )
        )

    def transformed_gradient(self, c: Array, x: Array) -> Array:
        """dU of some images, ((m + 2)^2, C_out, C_in)."""
        xp = xp_of(x)
        per_image = self.tiles[0] * self.tiles[1]
        v = empty(xp, (self.points, len(x) * per_image, self.channels), x.dtype)
        dm = empty(xp, (self.points, len(x) * per_image, self.filters), c.dtype)

        def transform(images: slice) -> None:
            part = slice(images.start * per_image, images.stop * per_image)
            self.transform_images(x[images], out=v[:, part])
            self.transform_cotangents(c[images], out=dm[:, part])

        for_blocks(transform, len(x), self.images_per_block(), x)
        du = empty(xp, (self.points, self.filters, self.channels), xp.result_type(x, c))

        def multiply(p: slice) -> None:
            xp.matmul(dm[p].swapaxes(1, 2), v[p], out=du[p])

        for_blocks(multiply, self.points, 1, x)
        return du

    # -- the transforms --------------------------------------------------------------------------

    def transform_filters(self, weight: Array) -> Array:
        """U = G w G^T of every filter: ((m + 2)^2, C_out, C_in)."""
        xp, g = xp_of(weight), self.matrix("G", weight)  # ((m + 2)^2, 9)
        w = weight.reshape(self.filters, 9, self.channels)
        u = empty(xp, (self.points, self.filters, self.channels), weight.dtype)

        def work(some: slice) -> None:
            xp.matmul(g, w[some], out=u[:, some].swapaxes(0, 1))

        for_blocks(work, self.filters, self.filters_per_block(), weight)
        return u

    def filter_gradients(self, du: Array) -> Array:
        """dw = G^T dU G of every filter: (C_out, 3, 3, C_in)."""
        xp, g = xp_of(du), self.matrix("G", du)
        dw = xp.empty((self.filters, 9, self.channels), du.dtype)

        def work(some: slice) -> None:
            xp.matmul(g.T, du[:, some].swapaxes(0, 1), out=dw[some])

        for_blocks(work, self.filters, self.filters_per_block(), du)
        return dw.reshape(self.filters, 3, 3, self.channels)

    def transform_images(self, x: Array, out: Array | None = None) -> Array:
        """V = B^T d B of every tile of some images: ((m + 2)^2, tiles, C_in)."""
        return self.transform(self.matrix("BT", x), self.tiles_of(x), out)

    def transform_cotangents(self, c: Array, out: Array | None = None) -> Array:
        """dM = A c A^T of every tile of some images: ((m + 2)^2, tiles, C_out)."""
        xp, m = xp_of(c), self.m
        n, rows, columns, channels = c.shape
        i, j = self.tiles
        if (rows, columns) != (i * m, j * m):  # the last tiles stick out
            whole = xp.zeros((n, i * m, j * m, channels), c.dtype)
            whole[:, :rows, :columns] = c
            c = whole
        tiles = c.reshape(n, i, m, j, m, channels).swapaxes(2, 3)  # (n, i, j, m, m, C)
        tiles = tiles.reshape(n * i * j, m * m, channels)
        return self.transform(self.matrix("AT", c).T, tiles, out)

    def transform(self, matrix: Array, tiles: Array, out: Array | None = None) -> Array:
        """``matrix`` times each of the tiles (tiles, P, C), as (rows of matrix, tiles, C)."""
        xp = xp_of(tiles)
        if out is None:
            out = xp.empty((len(matrix), len(tiles), tiles.shape[2]), tiles.dtype)
        xp.matmul(matrix, tiles, out=out.swapaxes(0, 1))
        return out

    def gather(self, products: Array, y: Array) -> None:
        """y = A^T M A of every tile, put in its place in some images."""
        xp, m = xp_of(y), self.m
        n, rows, columns, channels = y.shape
        i, j = self.tiles
        tiles = xp.matmul(self.matrix("AT", y), products.swapaxes(0, 1))  # (tiles, m^2, C_out)
        tiles = tiles.reshape(n, i, j, m, m, channels).swapaxes(2, 3)  # (n, i, m, j, m, C)
        if (rows, columns) == (i * m, j * m):
            y.reshape(tiles.shape)[...] = tiles
        else:
            y[...] = tiles.reshape(n, i * m, j * m, channels)[:, :rows, :columns]

    # -- tiles -----------------------------------------------------------------------------------

    def tiles_of(self, x: Array) -> Array:
        """The overlapping tiles of some images, (n tiles, (m + 2)^2, C_in): a copy."""
        xp, m = xp_of(x), self.m
        n, h, w, channels = x.shape
        (p, q), (i, j) = self.padding, self.tiles
        padded = xp.zeros((n, i * m + 2, j * m + 2, channels), x.dtype)
        padded[:, p : p + h, q : q + w] = x
        view = windows(padded, (m + 2, m + 2), (m, m))  # (n, i, j, m + 2, m + 2, C)
        return view.reshape(n * i * j, self.points, channels)

    def add_tiles(self, dv: Array, dx: Array) -> None:
        """dx = the sum of the overlapping tiles B dV B^T, without the padding.

        A tile is m + 2 wide and the next begins m further on. So its first m rows lie in its own
        cell of an m x m grid and its last two in the next cell, and columns likewise: four sums.
        """
        xp, m = xp_of(dx), self.m
        n, h, w, channels = dx.shape
        (p, q), (i, j) = self.padding, self.tiles
        tiles = xp.matmul(self.matrix("BT", dx).T, dv.swapaxes(0, 1))  # (tiles, (m + 2)^2, C_in)
        tiles = tiles.reshape(n, i, j, m + 2, m + 2, channels).swapaxes(2, 3)
        padded = xp.zeros((n, (i + 1) * m, (j + 1) * m, channels), dx.dtype)
        cells = padded.reshape(n, i + 1, m, j + 1, m, channels)
        own, rest = slice(0, m), slice(m, m + 2)
        cells[:, :i, :, :j, :] = tiles[:, :, own, :, own]
        cells[:, :i, :, 1:, :2] += tiles[:, :, own, :, rest]
        cells[:, 1:, :2, :j, :] += tiles[:, :, rest, :, own]
        cells[:, 1:, :2, 1:, :2] += tiles[:, :, rest, :, rest]
        dx[...] = padded[:, p : p + h, q : q + w]

    def images_per_block(self) -> int:
        tile = self.points * max(self.channels, self.filters)
        per_image = self.tiles[0] * self.tiles[1]
        return max(1, rows_per_block(tile, PRODUCT_BLOCK, LEAST_TILES) // per_image)

    def filters_per_block(self) -> int:
        return rows_per_block(self.points * self.channels, PRODUCT_BLOCK)

    def matrix(self, name: str, like: Array) -> Array:
        """The Kronecker square of B^T, G or A^T, with the dtype and on the device of ``like``."""
        kind = like.dtype if like.dtype.kind == "f" else np.dtype(like.real.dtype)
        return xp_of(like).asarray(_kronecker_square(name, self.m, kind))


@cache
def _kronecker_square(name: str, m: int, dtype: np.dtype) -> np.ndarray:
    a_t, g, b_t = winograd_matrices(m)
    matrix = {"AT": a_t, "G": g, "BT": b_t}[name]
    return np.kron(matrix, matrix).astype(dtype)


def winograd_matrices(m: int, r: int = 3) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(A^T, G, B^T) with y = A^T [(G w) * (B^T d)] for y_i = sum_u d_{i+u} w_u.

    Shapes (m, k), (k, r) and (k, k) with k = m + r - 1. Toom and Cook multiply two polynomials by
    their values at k points: V_m and V_r (the Vandermonde matrices, "infinity" picks the highest
    coefficient) give the values, the inverse of V_k the product's coefficients. Convolution as
    networks use it is the transpose of that product, so V_k^-1 comes to act on d, transposed.

    Raises:
        ValueError: there are too few ``POINTS`` for this m and r.
    """
    k = m + r - 1
    points = SMALL_POINTS if k == 4 else POINTS
    if k != len(points) + 1:
        raise ValueError(f"F({m}, {r}) needs {k - 1} points and infinity")
    values = {size: _vandermonde(points, size) for size in (m, r, k)}
    # A row of B^T may be divided by what that row of G is multiplied by. The largest entry of each
    # row of B^T becomes 1, so that no element of V is much larger than the image's numbers.
    inverse = np.linalg.inv(values[k]).T
    scale = np.abs(inverse).max(axis=1, keepdims=True)
    return values[m].T, values[r] * scale, inverse / scale


def _vandermonde(points: tuple[float, ...], size: int) -> np.ndarray:
    """Row i: the powers 0 ... size - 1 of point i; a last row picks the highest power."""
    matrix = np.vander(np.array(points), size, increasing=True)
    infinity = np.zeros((1, size))
    infinity[0, -1] = 1
    return np.vstack([matrix, infinity])
