"""Windows of images: what convolution and pooling have in common.

Both slide a window (the kernel) over the image. Two helpers say what that means: ``windows`` gives
all the windows of an image as one array, ``shifted`` gives, for each place in the window, the
pixels that come to lie there. Images are (N, H, W, C): N images, H rows, W columns, C channels.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from minihyperflows.engine.backend import Array, xp_of

# One number for rows and columns alike, or (rows, columns).
Pair = int | tuple[int, int]


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
    n, h, w, c = x.shape
    p, q = padding
    padded = xp_of(x).zeros((n, h + 2 * p, w + 2 * q, c), dtype=x.dtype)
    padded[:, p : p + h, q : q + w] = x
    return padded
