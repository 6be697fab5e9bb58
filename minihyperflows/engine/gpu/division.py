"""Division in kernels by numbers that are known when they are launched."""

from __future__ import annotations

import numpy as np


def divisor(d: int) -> tuple[np.uint32, np.uint32]:
    """The multiplier and the shift that ``divide`` of ``division.cuh`` needs to divide by ``d``."""
    if not 1 <= d < 1 << 31:
        raise ValueError(f"a divisor must lie between 1 and 2^31 - 1, not {d}")
    shift = (d - 1).bit_length()  # ceil(log2 d)
    return np.uint32((1 << 32) * ((1 << shift) - d) // d + 1), np.uint32(shift)
