"""Matrix products on the GPU by cuBLAS, called directly.

CuPy's own products go through cuBLAS as well, but not while a graph is captured, and not from half
precision to float32 (chapter 14). Here every stream has a workspace of its own, so cuBLAS neither
allocates memory nor waits for the GPU, and a product can be part of a graph. Only the very first
product of a process, which makes the handle, must come before the capture.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_float, c_int, c_size_t, c_void_p
from functools import cache
from threading import Lock
from types import ModuleType
from typing import Any

import numpy as np

from minihyperflows.engine.backend import Array, cuda_library, cupy, device_of
from minihyperflows.engine.errors import DeviceError, ShapeError

WORKSPACE_BYTES = 32 << 20  # what NVIDIA recommends for Hopper

# cuBLAS's numbers, from cublas_api.h and library_types.h.
DATA_TYPES = {"float32": 0, "float16": 2}  # CUDA_R_32F, CUDA_R_16F
KEEP, TRANSPOSE = 0, 1  # CUBLAS_OP_N, CUBLAS_OP_T
COMPUTE_32F = 68  # sums in float32; float32 factors are not rounded to TF32
ALGORITHM = -1  # CUBLAS_GEMM_DEFAULT: cuBLAS chooses, tensor cores included
# CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION: where several blocks share a sum, their parts
# are added up in float32 too, whatever the type of the result.
MATH_MODE = 16

STATUS = {
    1: "NOT_INITIALIZED",
    3: "ALLOC_FAILED",
    7: "INVALID_VALUE",
    8: "ARCH_MISMATCH",
    11: "MAPPING_ERROR",
    13: "EXECUTION_FAILED",
    14: "INTERNAL_ERROR",
    15: "NOT_SUPPORTED",
    16: "LICENSE_ERROR",
}

_MATRIX = (c_void_p, c_int, c_int)  # address, type, leading dimension
FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "cublasCreate_v2": (POINTER(c_void_p),),
    "cublasSetMathMode": (c_void_p, c_int),
    "cublasSetStream_v2": (c_void_p, c_void_p),
    "cublasSetWorkspace_v2": (c_void_p, c_void_p, c_size_t),
    "cublasGemmEx": (
        *(c_void_p, c_int, c_int),  # handle, operations
        *(c_int, c_int, c_int),  # m, n, k
        *(POINTER(c_float), *_MATRIX, *_MATRIX),  # alpha, A, B
        *(POINTER(c_float), *_MATRIX),  # beta, C
        *(c_int, c_int),  # how to compute, algorithm
    ),
}

_ZERO, _ONE = c_float(0), c_float(1)


class CublasError(RuntimeError):
    """A function of cuBLAS that failed."""


def multiply(
    a: Array,
    b: Array,
    out: Array,
    transpose_a: bool = False,
    transpose_b: bool = False,
    accumulate: bool = False,
) -> Array:
    """out = op(a) op(b), or out += op(a) op(b), where op is the transposition or nothing.

    op(a) is (M, K), op(b) (K, N), out (M, N). All lie row by row; a row may be a part of a longer
    one (``columns[:, :27]``), so that the next begins further on: cuBLAS calls that distance the
    leading dimension.

    cuBLAS expects matrices column by column. What we store as the rows of X, it reads as the
    columns of a matrix: of X^T. So it is asked for out^T = op(b)^T op(a)^T: the factors change
    places, and their flags stay as they are, since what it reads of each is transposed already.

    a and b have one dtype, float32 or float16; out has that too, or float32. Sums are in float32.

    Args:
        accumulate: add the product to what ``out`` holds.

    Returns:
        ``out``.

    Raises:
        DeviceError, ShapeError, TypeError: arrays that are not such matrices.
        CublasError: cuBLAS refuses.
    """
    matrices = {"a": a, "b": b, "out": out}
    leading = [_leading_dimension(name, matrix) for name, matrix in matrices.items()]
    m, k = reversed(a.shape) if transpose_a else a.shape
    inner, n = reversed(b.shape) if transpose_b else b.shape
    words = (
        f"a {a.shape}{' transposed' * transpose_a}, b {b.shape}{' transposed' * transpose_b} "
        f"and out {out.shape}"
    )
    if inner != k or out.shape != (m, n):
        raise ShapeError(f"multiply: {words} do not fit: op(a) op(b) is (M, K) (K, N) -> (M, N)")
    names = [matrix.dtype.name for matrix in matrices.values()]
    if names[0] != names[1] or names[2] not in (names[0], "float32"):
        raise TypeError(
            f"multiply: a is {names[0]}, b {names[1]} and out {names[2]}: a and b must have one "
            "dtype, and out that or float32"
        )
    if k == 0:
        raise ShapeError(f"multiply: {words} leave nothing to add up")
    if max(m, n, k, *leading) > np.iinfo(np.int32).max:
        raise ShapeError(f"multiply: {words} are too large for cuBLAS's 32-bit sizes")
    if m == 0 or n == 0:
        return out
    types = [DATA_TYPES[name] for name in names]
    xp = cupy()
    _cublas(xp, xp.cuda.Device().id).gemm(
        *(TRANSPOSE if transpose_b else KEEP, TRANSPOSE if transpose_a else KEEP, n, m, k),
        *(_ONE, b.data.ptr, types[1], leading[1], a.data.ptr, types[0], leading[0]),
        *(_ONE if accumulate else _ZERO, out.data.ptr, types[2], leading[2]),
        words=f"{words} of {', '.join(names)}",
    )
    return out


def _leading_dimension(name: str, matrix: Array) -> int:
    """The distance of two rows of ``matrix``, in numbers; raise unless cuBLAS can take it."""
    if device_of(matrix) != "cuda":
        raise DeviceError(f"multiply: {name} lies on the {device_of(matrix)}, not on a GPU")
    if matrix.dtype.name not in DATA_TYPES:
        raise TypeError(f"multiply: {name} is {matrix.dtype}, not {' or '.join(DATA_TYPES)}")
    if matrix.ndim != 2:
        raise ShapeError(f"multiply: {name} of shape {matrix.shape} is not a matrix")
    rows, width = matrix.shape
    size = matrix.dtype.itemsize
    row, column = matrix.strides
    if rows < 2 or width == 0:  # there is no next row
        row, column = size * max(1, width), size
    if row < size * width or row % size or (width > 1 and column != size):
        raise ShapeError(
            f"multiply: {name} of shape {matrix.shape} and strides {matrix.strides} does not lie "
            "row by row: pass the array behind a transposed view, and a flag"
        )
    return max(1, row // size)


class Cublas:
    """A handle of cuBLAS and its workspaces, for one device.

    A workspace for each stream: products on two streams may run at the same time. (So the graphs
    that were captured on one stream must not.) It also keeps cuBLAS's results the same bit for bit
    while several streams are busy.
    """

    def __init__(self) -> None:
        self._library = cuda_library("cublas")
        for name, types in FUNCTIONS.items():
            function = getattr(self._library, name)
            function.argtypes, function.restype = types, c_int
        self._lock = Lock()  # between choosing the stream and the product on it
        self._workspaces: dict[int, Array] = {}
        self._stream: int | None = None
        self._handle = c_void_p()
        self._call("cublasCreate_v2", ctypes.byref(self._handle))
        self._call("cublasSetMathMode", self._handle, MATH_MODE)

    def gemm(self, *arguments: Any, words: str) -> None:
        """``cublasGemmEx`` on CuPy's current stream; ``words`` are for an error."""
        with self._lock:
            self._use_stream(cupy().cuda.get_current_stream().ptr)
            self._call(
                "cublasGemmEx", self._handle, *arguments, COMPUTE_32F, ALGORITHM, words=words
            )

    def _use_stream(self, stream: int) -> None:
        if stream == self._stream:
            return
        if stream not in self._workspaces:
            self._workspaces[stream] = cupy().empty(WORKSPACE_BYTES, np.uint8)
        self._stream = None  # unknown, should one of the calls fail
        self._call("cublasSetStream_v2", self._handle, stream)
        # Each change of the stream brings back cuBLAS's own workspace.
        workspace = self._workspaces[stream].data.ptr
        self._call("cublasSetWorkspace_v2", self._handle, workspace, WORKSPACE_BYTES)
        self._stream = stream

    def _call(self, function: str, *arguments: Any, words: str = "") -> None:
        status = getattr(self._library, function)(*arguments)
        if status:
            name = STATUS.get(status, "unknown")
            raise CublasError(f"{function}: status {status} ({name}){' for ' * bool(words)}{words}")


@cache
def _cublas(xp: ModuleType, device: int) -> Cublas:
    """cuBLAS for a device of ``xp``, which is CuPy or its emulator."""
    return Cublas()
