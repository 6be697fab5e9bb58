"""Biases of convolutions and linear layers, and their gradients, on the GPU (chapter 14)."""

from __future__ import annotations

import numpy as np

from minihyperflows.engine.backend import Array, xp_of
from minihyperflows.engine.gpu.launch import (
    MOST_BLOCKS,
    THREADS,
    Source,
    c_type,
    every_type_and_width,
    pack_width,
)

SOURCE = Source(
    "bias.cu", [*every_type_and_width("add_bias"), *every_type_and_width("column_sums")]
)

ROWS_PER_THREAD = 16  # at least, before another block shares the rows of a sum
MOST_PARTS = 128  # as many rows are added up by one block


def add_bias(y: Array, bias: Array) -> Array:
    """y (..., C) + b (C,), in place of y; the bias is float32. Returns y."""
    rows, channels, v, (wide, high), across = _layout(y)
    blocks = min(MOST_BLOCKS, -(-rows // high))
    SOURCE.launch(
        f"add_bias<{c_type(y)}, {v}>",
        *((blocks, across), (wide, high)),
        *(y, bias, np.int64(rows), channels),
    )
    return y


def bias_gradient(c: Array, out: Array | None = None) -> Array:
    """dL/db (C,) = sum of c (..., C) over all axes but the last, in float32.

    In two stages, if there are many rows: parts of the rows, then the parts' sums.

    Args:
        out: where to write it, float32.
    """
    xp = xp_of(c)
    rows, channels, v, (wide, high), across = _layout(c)
    parts = 1 if rows <= MOST_PARTS else min(MOST_PARTS, -(-rows // (high * ROWS_PER_THREAD)))
    length = -(-rows // parts)
    parts = -(-rows // length)
    out = xp.empty(channels, np.float32) if out is None else out
    sums = out if parts == 1 else xp.empty((parts, channels), np.float32)
    SOURCE.launch(
        f"column_sums<{c_type(c)}, {v}>",
        *((parts, across), (wide, high)),
        *(c, sums, np.int64(rows), channels, np.int64(length)),
    )
    return out if parts == 1 else bias_gradient(sums, out)


def _layout(x: Array) -> tuple[int, int, int, tuple[int, int], int]:
    """Rows and channels of x (..., C), the width of a pack, the shape of a block (packs, rows), and
    the number of blocks side by side."""
    channels = x.shape[-1]
    v = pack_width(x, channels)
    packs = channels // v
    wide = min(THREADS // 8, 1 << (packs - 1).bit_length())  # a power of two
    return x.size // channels, channels, v, (wide, THREADS // wide), -(-packs // wide)
