"""What kernels share beside their arguments: the width of their accesses, counters of blocks."""

from __future__ import annotations

from functools import cache
from types import ModuleType

from minihyperflows.engine.backend import Array, cupy, device_of
from minihyperflows.engine.gpu.launch import pack_width, takes

# Counters in one array. Kernels that run at the same time must not share one; as calls take them
# in turn, that could happen to two only if thousands of others were started between them.
ARRIVALS = 1 << 16


def shared_width(length: int, *arrays: Array | None) -> int:
    """How many neighbours one instruction can move in rows of ``length``, in all of the ``arrays``.

    Like :func:`~minihyperflows.engine.gpu.launch.pack_width`; less where the memory of an array
    that is a part of another one begins at an odd place.
    """
    width = min(pack_width(a, length) for a in arrays if a is not None)
    for a in arrays:
        while a is not None and a.data.ptr % (width * a.dtype.itemsize):
            width //= 2
    return width


def as_kernels_take(c: Array, dtype: object) -> Array:
    """The cotangent ``c`` as C-contiguous numbers of ``dtype``: itself if it is that."""
    if c.dtype.kind == "c":
        raise TypeError(f"a {c.dtype} cotangent of a {dtype} operation: make its inputs {c.dtype}")
    return cupy().ascontiguousarray(c, dtype=dtype)


def is_float32(array: Array | None) -> bool:
    """Whether it is a C-contiguous float32 array on a GPU; None is fine too."""
    return array is None or (takes(array) and array.dtype == "float32")


def float32_buffer(buffer: Array | None) -> Array | None:
    """``buffer`` if a gradient can be written there, else None."""
    return buffer if is_float32(buffer) else None


def is_integer(array: Array | None, *dtypes: str) -> bool:
    """Whether it is a C-contiguous array of one of the dtypes on a GPU; None is fine too."""
    return array is None or (
        device_of(array) == "cuda" and array.dtype.name in dtypes and array.flags.c_contiguous
    )


def arrivals(number: int) -> Array:
    """``number`` uint32 zeros, in which the blocks of a kernel count how many have come.

    The last block sets its counter back to 0, so nobody has to clear them. The first call of all
    must not be part of a recorded graph.
    """
    counters = _counters(cupy(), cupy().cuda.Device().id)
    return counters.take(number)


class _Counters:
    def __init__(self, xp: ModuleType) -> None:
        self._zeros = xp.zeros(ARRIVALS, "uint32")
        self._next = 0

    def take(self, number: int) -> Array:
        first = self._next if self._next + number <= ARRIVALS else 0
        self._next = first + number
        return self._zeros[first : first + number]


@cache
def _counters(xp: ModuleType, device: int) -> _Counters:
    return _Counters(xp)
