"""Element-wise passes on a GPU (kernels: ``elementwise.cu``). Arrays are float32 or float16."""

from __future__ import annotations

from itertools import product

import numpy as np

from minihyperflows.engine import ops, threads
from minihyperflows.engine.backend import Array, contiguous, cupy, xp_of
from minihyperflows.engine.gpu.launch import (
    C_TYPES,
    PACK_BYTES,
    THREADS,
    Source,
    blocks_for,
    c_type,
    takes,
)
from minihyperflows.engine.gpu.scratch import shared_width
from minihyperflows.engine.twins import on_gpu

# The packs of a kernel that moves these types: 16 bytes of the wider one, or single numbers.
WIDTHS = {("float",): (1, 4), ("__half",): (1, 8), ("__half", "__half"): (1, 8)}
SUMS = ("float, float, float", "float, __half, float", "__half, __half, __half")

SOURCE = Source(
    "elementwise.cu",
    [
        *(f"{k}<{t}, {v}>" for k in ("relu", "relu_backward") for t in C_TYPES.values()
          for v in WIDTHS[t,]),
        *(f"add<{t}, {v}>" for t in SUMS for v in ((1, 4) if "float" in t else (1, 8))),
        *(f"convert<{a}, {b}, {v}>" for a, b in product(C_TYPES.values(), repeat=2)
          for v in WIDTHS.get((a, b), (1, 4))),
    ],
)  # fmt: skip


@on_gpu(ops.ReLU)
class ReLU(ops.ReLU):
    """y = max(x, 0);  dL/dx = c where x > 0, else 0."""

    def takes(self, x: Array) -> bool:
        """In any layout."""
        return x.dtype.name in C_TYPES

    def forward(self, x: Array) -> Array:
        self.y = relu(contiguous(x))
        return self.y

    def backward(self, c: Array) -> Array:
        if takes(c) and c.dtype == self.y.dtype:
            return relu_backward(c, self.y)
        return super().backward(c)


@on_gpu(threads.add)
def add(a: Array, b: Array, out: Array | None = None) -> Array:
    """a + b for arrays of one shape, into ``out`` if given, which may be one of them."""
    return _sum(a, b, out) if _takes_sum(a, b, out) else xp_of(a).add(a, b, out=out)


@on_gpu(threads.copy)
def copy(a: Array, out: Array) -> None:
    """out = a, rounded to the type of ``out``."""
    if takes(a, out):
        convert(a, out)
    else:
        out[...] = a


# -- the kernels -----------------------------------------------------------------------------------


def relu(x: Array) -> Array:
    """y = x where x > 0, else 0; a NaN stays one."""
    y = cupy().empty(x.shape, x.dtype)
    _launch("relu", (c_type(x),), x, y)
    return y


def relu_backward(c: Array, y: Array) -> Array:
    """dx = c where y > 0, else 0."""
    dx = cupy().empty(c.shape, c.dtype)
    _launch("relu_backward", (c_type(c),), c, y, dx)
    return dx


def _takes_sum(a: Array, b: Array, out: Array | None) -> bool:
    """Whether the kernel adds these: of one shape, with a sum of the type that NumPy gives it."""
    if not takes(a, b, out) or a.shape != b.shape:
        return False
    wider = a if a.dtype.itemsize > b.dtype.itemsize else b
    return out is None or (out.shape == a.shape and out.dtype == wider.dtype)


def _sum(a: Array, b: Array, out: Array | None) -> Array:
    """a + b, computed in float32; float16 if both are."""
    if a.dtype.itemsize < b.dtype.itemsize:
        a, b = b, a
    out = cupy().empty(a.shape, a.dtype) if out is None else out
    _launch("add", (c_type(a), c_type(b), c_type(out)), a, b, out)
    return out


def convert(a: Array, out: Array) -> None:
    """out = a, rounded to the type of ``out``."""
    _launch("convert", (c_type(a), c_type(out)), a, out)


def _launch(name: str, types: tuple[str, ...], *arrays: Array) -> None:
    """Start a kernel on arrays of one shape."""
    size = arrays[0].size
    if size == 0:
        return
    widest = PACK_BYTES // max(a.dtype.itemsize for a in arrays)
    width = widest if shared_width(widest, *arrays) == widest else 1
    kernel = f"{name}<{', '.join(types)}, {width}>"
    SOURCE.launch(kernel, blocks_for(-(-size // width)), THREADS, *arrays, np.int64(size))
