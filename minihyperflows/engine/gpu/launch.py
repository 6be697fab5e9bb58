"""Compiling and launching kernels (chapter 14): the engine's lie in ``engine/gpu/kernels``."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib import resources
from importlib.resources.abc import Traversable
from types import ModuleType
from typing import Any

import numpy as np

from minihyperflows.engine.backend import Array, cupy, device_of

# NumPy's name of a dtype -> the kernels' name. All else is computed by CuPy's own operations.
C_TYPES = {"float32": "float", "float16": "__half"}

THREADS = 256  # of a block, unless a kernel says otherwise
PACK_BYTES = 16  # the most that one instruction moves

# No more blocks than this for a kernel whose threads share the items in turn: enough to fill any
# GPU of today several times over.
MOST_BLOCKS = 4096

OPTIONS = ("-std=c++17",)

# Every source by file name, so that a test can compile them all.
SOURCES: dict[str, Source] = {}


def kernel_folder() -> Traversable:
    """Where the engine's ``.cu`` files are, and the headers that all share."""
    return resources.files("minihyperflows.engine.gpu") / "kernels"


def takes(*arrays: Array | None) -> bool:
    """Whether the kernels compute with these arrays: C-contiguous float32 or float16, on a GPU."""
    return all(
        device_of(a) == "cuda" and a.dtype.name in C_TYPES and a.flags.c_contiguous
        for a in arrays
        if a is not None
    )


def c_type(array: Array) -> str:
    """The kernels' name of the array's dtype."""
    return C_TYPES[array.dtype.name]


def pack_width(array: Array, length: int) -> int:
    """How many neighbours one instruction can move in rows of ``length`` numbers: 1, 2, 4 or 8.

    The largest power of two that divides the row and is no more than 16 bytes.
    """
    width = PACK_BYTES // array.dtype.itemsize
    while length % width:
        width //= 2
    return width


def pack_widths(c_type: str) -> tuple[int, ...]:
    """All that :func:`pack_width` can return for a type."""
    return (1, 2, 4) if c_type == "float" else (1, 2, 4, 8)


def every_type_and_width(name: str) -> list[str]:
    """``name<T, V>`` for all types and the widths of their packs."""
    return [f"{name}<{t}, {v}>" for t in C_TYPES.values() for v in pack_widths(t)]


def blocks_for(items: int, threads: int = THREADS) -> int:
    """How many blocks share ``items`` in turn."""
    return max(1, min(MOST_BLOCKS, -(-items // threads)))


class Source:
    """One file of kernels.

    Args:
        file: its name.
        kernels: the instances of its templates that may be launched, as C++ writes them:
            ``"im2col<float, 4>"``.
        package: where the file lies; by default it is one of the engine's.
    """

    def __init__(self, file: str, kernels: Sequence[str], package: str | None = None) -> None:
        self.file, self.kernels, self.package = file, tuple(kernels), package
        SOURCES[file] = self

    def text(self) -> str:
        """The CUDA C++ of the file."""
        return (self.folder() / self.file).read_text(encoding="utf-8")

    def folder(self) -> Traversable:
        """Where the file lies."""
        return kernel_folder() if self.package is None else resources.files(self.package)

    def options(self) -> tuple[str, ...]:
        """The compiler's options; headers are looked for beside the file too."""
        return (*OPTIONS, f"-I{kernel_folder()}", f"-I{self.folder()}")

    def launch(
        self,
        kernel: str,
        blocks: int | tuple[int, ...],
        threads: int | tuple[int, ...],
        *arguments: Any,
    ) -> None:
        """Start a kernel on the current stream; it runs when those before it are done.

        Args:
            kernel: one of ``kernels``.
            blocks, threads: the grid and the block, one to three numbers each.
            arguments: arrays (their addresses are passed), Python integers (as 32-bit ``int``),
                Python floats (as ``float``), NumPy scalars (as they are), None (a null pointer).
        """
        device = cupy().cuda.Device().id
        function = _function(cupy(), device, self, kernel)
        function(_dimensions(blocks), _dimensions(threads), tuple(_passed(a) for a in arguments))


@cache
def _module(xp: ModuleType, device: int, source: Source) -> Any:
    code, names = source.text(), source.kernels
    return xp.RawModule(code=code, options=source.options(), name_expressions=names)


@cache
def _function(xp: ModuleType, device: int, source: Source, kernel: str) -> Any:
    return _module(xp, device, source).get_function(kernel)


def _dimensions(numbers: int | tuple[int, ...]) -> tuple[int, ...]:
    return numbers if isinstance(numbers, tuple) else (numbers,)


def _passed(argument: Any) -> Any:
    """``argument`` with the size that the kernel's parameter has."""
    if argument is None:
        return np.uint64(0)
    if isinstance(argument, bool):
        return np.bool_(argument)
    if isinstance(argument, int):
        return np.int32(argument)  # OverflowError if it does not fit
    if isinstance(argument, float):
        return np.float32(argument)
    return argument
