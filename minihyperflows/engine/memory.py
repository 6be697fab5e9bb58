"""Memory for large arrays, used again.

A training step makes hundreds of large arrays and drops them, and the next step makes the same
ones. The C library gives memory of that size back to the operating system, which hands it out again
page by page, each page cleared. On a virtual machine with two cores that was a quarter of the time
of a step of ResNet-50 (measured by forbidding it to the C library: MALLOC_MMAP_MAX_=0 and a large
MALLOC_TRIM_THRESHOLD_). So :func:`empty` keeps what it has handed out, and hands it out again once
nobody refers to it.
"""

from __future__ import annotations

import math
import sys
from threading import Lock
from types import ModuleType
from typing import Any

import numpy as np

from minihyperflows.engine.backend import Array

LEAST = 1 << 16  # bytes; the C library keeps smaller arrays itself
LIFETIME = 20_000  # requests, some tens of steps; what lies idle for longer is given back

# The references to a buffer that lies idle in a list, counted as below: its place in the list and
# the argument of getrefcount, in the Pythons of today.
_probe = [np.empty(0, np.uint8)]
_IDLE = sys.getrefcount(_probe[0])


class Pool:
    """Buffers by size. A buffer is in use while any array, which is a view of it, exists.

    NumPy makes every view refer to the array that owns the memory, so CPython's count of the
    references to that array tells.
    """

    def __init__(self) -> None:
        self._buffers: dict[int, list[np.ndarray]] = {}
        self._last_use: dict[int, int] = {}  # of a size
        self._requests = 0
        self._lock = Lock()

    def buffer(self, size: int) -> np.ndarray:
        """``size`` bytes that nobody uses, with anything in them."""
        with self._lock:
            self._requests += 1
            if self._requests % LIFETIME == 0:
                self._forget_unused()
            self._last_use[size] = self._requests
            known = self._buffers.setdefault(size, [])
            for i in range(len(known)):
                if sys.getrefcount(known[i]) == _IDLE:
                    return known[i]
            known.append(np.empty(size, np.uint8))
            return known[-1]

    def references(self, buffer: np.ndarray) -> int:
        """How many references there are to a buffer of this pool; 0 if it is not one."""
        with self._lock:
            ours = any(known is buffer for known in self._buffers.get(buffer.nbytes, []))
            return sys.getrefcount(buffer) if ours else 0

    def clear(self) -> None:
        """Give back everything that is not in use."""
        with self._lock:
            self._buffers.clear()  # what is in use lives on in its views
            self._last_use.clear()

    def _forget_unused(self) -> None:
        for size, request in list(self._last_use.items()):
            if self._requests - request >= LIFETIME:
                del self._buffers[size], self._last_use[size]


def references(array: Array, pool: Pool) -> int:
    """The references to the buffer of ``pool`` behind ``array``, counted in one and the same way;
    0 if there is none."""
    return pool.references(array.base) if isinstance(array.base, np.ndarray) else 0


_pool = Pool()

# What ``references`` finds for an array that is the only view of its buffer.
_trial = Pool()
_ONE_VIEW = references(_trial.buffer(1).view(np.int8), _trial)


def empty(xp: ModuleType, shape: tuple[int, ...], dtype: Any) -> Array:
    """``xp.empty(shape, dtype)``; a large array of NumPy in memory that was used before.

    Other array modules have pools of their own.
    """
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    if xp is not np or size < LEAST:
        return xp.empty(shape, dtype)
    return _pool.buffer(size).view(dtype).reshape(shape)


def held_once(box: list[Array]) -> bool:
    """Whether ``box[0]`` is referred to by ``box`` alone, and no other array shares its memory:
    then it may be changed, and nobody notices.

    An array that owns its memory is counted by every view of it, so its count alone tells. A view
    must be the only one of a buffer of :func:`empty`. Any other view may overlap with something.
    """
    if sys.getrefcount(box[0]) != _IDLE or not _writeable(box[0]):
        return False
    return box[0].base is None or references(box[0], _pool) == _ONE_VIEW


def _writeable(array: Array) -> bool:
    flags = getattr(array, "flags", None)  # only NumPy's say; all others are
    return getattr(flags, "writeable", True)


def clear() -> None:
    """Give back the memory of large arrays that are not in use."""
    _pool.clear()
