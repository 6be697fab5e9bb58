"""Matrix products; the threads share large ones."""

from __future__ import annotations

import math

import numpy as np

from minihyperflows.engine.backend import Array, device_of
from minihyperflows.engine.blas import one_blas_thread
from minihyperflows.engine.memory import empty
from minihyperflows.engine.threads import for_blocks

# Multiplications of a block, at least: half a millisecond or more, so that waking a second thread
# pays. With 2^23 a step of LeNet-300, whose largest product has 2^25, took a quarter longer on two
# threads than on one.
BLOCK = 1 << 25

# Rows or columns of a block, at least: with fewer, reading the other matrix costs more than
# multiplying by it.
LEAST_SIDE = 128

# Stacks of fewer matrices are cut through every matrix instead.
LEAST_STACK = 16


@one_blas_thread
def matmul(a: Array, b: Array) -> Array:
    """a b for arrays (..., n, k) and (..., k, m), broadcast as NumPy does it: (..., n, m).

    A large product is cut along one axis of the result, so each entry is one sum over all k, and
    there are no partial sums to keep.
    """
    if device_of(a) != "cpu" or not _is_large(a, b):
        return a @ b
    shape = (*np.broadcast_shapes(a.shape[:-2], b.shape[:-2]), a.shape[-2], b.shape[-1])
    axis = _axis_to_cut(shape)
    y = empty(np, shape, np.result_type(a, b))

    def work(part: slice) -> None:
        left = a if axis == -1 else _part(a, axis, part)
        right = b if axis == -2 else _part(b, axis, part)
        np.matmul(left, right, out=_part(y, axis, part))

    for_blocks(work, shape[axis], _block_length(shape, axis, a.shape[-1]), a)
    return y


def _is_large(a: Array, b: Array) -> bool:
    """Whether the product makes two blocks or more: a bound, which is exact for two matrices."""
    kinds = a.dtype.kind + b.dtype.kind
    if min(a.ndim, b.ndim) < 2 or not set(kinds) <= set("fc"):
        return False
    return a.size * b.size >= 2 * BLOCK * a.shape[-1] > 0


def _axis_to_cut(shape: tuple[int, ...]) -> int:
    """The longest axis of the stack, or of the matrices if there are few; counted from the end."""
    stack = max(range(-len(shape), -2), key=shape.__getitem__, default=None)
    if stack is not None and shape[stack] >= LEAST_STACK:
        return stack
    return -2 if shape[-2] >= shape[-1] else -1


def _block_length(shape: tuple[int, ...], axis: int, k: int) -> int:
    """How much of ``axis`` a block has. The blocks are a power of two: two threads have the same
    to do then."""
    blocks = max(1, math.prod(shape) * k // BLOCK)
    even = -(-shape[axis] // (1 << (blocks.bit_length() - 1)))
    return max(even, LEAST_SIDE if axis >= -2 else 1)


def _part(x: Array, axis: int, part: slice) -> Array:
    """``part`` of x along ``axis``; all of x where it is the same for the whole axis."""
    if x.ndim < -axis or x.shape[axis] == 1:
        return x
    return x[(..., part, *[slice(None)] * (-axis - 1))]
