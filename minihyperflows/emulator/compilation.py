"""Kernels compiled for the CPU: CuPy's ``RawModule``, and a stand-in for cuBLAS."""

from __future__ import annotations

import atexit
import ctypes
import hashlib
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from minihyperflows.emulator import recording
from minihyperflows.emulator.array import ndarray, overrun
from minihyperflows.emulator.recording import perform

HERE = Path(__file__).parent
FLAGS = (
    *("-std=c++17", "-O2", "-shared", "-fPIC", "-w"),
    *("-fno-strict-aliasing", "-ffp-contract=off"),  # as CUDA, but for its fused multiply-adds
    "-U_FORTIFY_SOURCE",  # which takes a jump to another stack for a mistake
)

# The letters of shim.h for the types of NumPy's dtypes.
LETTERS = {"float32": "f", "float64": "d", "float16": "e", "bool": "?"}


class CompilerMissingError(RuntimeError):
    """There is no C++ compiler that could play the GPU's."""


def require_compiler() -> str:
    """The C++ compiler; CompilerMissingError if there is none."""
    command = compiler()
    if command is None:
        raise CompilerMissingError(
            "emulating a GPU needs g++ 12 (or clang++) on Linux: install one"
        )
    return command


def compiler() -> str | None:
    """The C++ compiler: a GCC from version 12 on or a Clang, on Linux. None if there is none.

    (They know half precision, and the C library has the fibers of ``ucontext.h``.)
    """
    if not sys.platform.startswith("linux"):
        return None
    return next((c for c in ("g++", "clang++", "c++") if _works(c)), None)


@cache
def _works(command: str) -> bool:
    """Whether ``command`` compiles half precision."""
    if shutil.which(command) is None:
        return False
    program = "_Float16 twice(_Float16 x) { return x + x; }"
    arguments = [command, "-x", "c++", "-fsyntax-only", "-"]
    return subprocess.run(arguments, input=program, text=True, capture_output=True).returncode == 0


@cache
def _folder() -> Path:
    """Where this process compiles; several may share one."""
    folder = tempfile.mkdtemp(prefix="minihyperflows-emulator-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


@cache
def compiled(text: str, include: tuple[str, ...] = ()) -> ctypes.CDLL:
    """The C++ ``text`` as a loaded library.

    Raises:
        CompilerMissingError: there is no compiler.
        ValueError: it does not compile; with the compiler's words.
    """
    command = require_compiler()
    name = hashlib.sha256("\0".join((text, *include)).encode()).hexdigest()[:16]
    library = _folder() / f"{name}.so"
    if not library.exists():  # else another process has compiled it
        new = _folder() / f"{name}-{os.getpid()}-{threading.get_ident()}.so"
        folders = [f"-I{folder}" for folder in (str(HERE), *include)]
        arguments = [command, *FLAGS, *folders, "-o", str(new), "-x", "c++", "-"]
        result = subprocess.run(arguments, input=text, capture_output=True, text=True)
        if result.returncode:
            raise ValueError(f"the kernels do not compile:\n{result.stderr}")
        os.replace(new, library)
    return ctypes.CDLL(str(library))


class RawModule:
    """CuPy's class of that name: kernels made from a text of CUDA C++."""

    def __init__(
        self, *, code: str, options: Sequence[str] = (), name_expressions: Sequence[str] = ()
    ) -> None:
        self._names = list(name_expressions)
        include = tuple(o.removeprefix("-I") for o in options if o.startswith("-I"))
        self._barriers = any("__syncthreads" in text for text in _with_headers(code, include))
        entries = [ENTRY.format(i=i, name=name) for i, name in enumerate(self._names)]
        text = "\n".join(['#include "shim.h"', "#line 1", code, 'extern "C" {', *entries, "}"])
        self._library = compiled(text, include)

    def get_function(self, name: str) -> RawKernel:
        """The kernel that one of ``name_expressions`` names."""
        if name not in self._names:
            raise ValueError(f"{name} is not among the name_expressions: {', '.join(self._names)}")
        return RawKernel(self._library, self._names.index(name), name, self._barriers)


# How the library lets itself be called, for kernel number i.
ENTRY = """
int run_{i}(const unsigned* grid, const unsigned* block, void** arguments, bool barriers,
            bool backwards) {{
    return emulator::launch(&{name}, grid, block, arguments, barriers, backwards);
}}
const char* signature_{i}() {{
    static const std::string emulated = emulator::signature(&{name});
    return emulated.c_str();
}}"""


def _with_headers(text: str, folders: tuple[str, ...]) -> Iterator[str]:
    """``text`` and whatever it includes from these folders."""
    yield text
    for name in re.findall(r'^\s*#\s*include\s*"(.+?)"', text, re.MULTILINE):
        for file in (Path(folder) / name for folder in folders):
            if file.is_file():
                yield from _with_headers(file.read_text(encoding="utf-8"), folders)


# What shim.h returns if not all of a block's threads wait at the same barrier.
DIVERGED = {
    1: "some threads ended while others wait at a barrier",
    2: "some threads wait at one barrier and some at another",
}


class RawKernel:
    """One kernel; call it with the grid, the block and the arguments."""

    def __init__(self, library: ctypes.CDLL, number: int, name: str, barriers: bool) -> None:
        self.name, self._barriers = name, barriers
        self._run = getattr(library, f"run_{number}")
        signature = getattr(library, f"signature_{number}")
        signature.restype = ctypes.c_char_p
        self._parameters = signature().decode().split()

    def __call__(self, grid: tuple, block: tuple, args: tuple, shared_mem: int = 0) -> None:
        if len(args) != len(self._parameters):
            raise TypeError(f"{self.name} takes {len(self._parameters)} arguments, not {len(args)}")
        for i, (argument, letter) in enumerate(zip(args, self._parameters, strict=True)):
            self._check(i, argument, letter)
        grid, block = (tuple(n) + (1,) * (3 - len(n)) for n in (grid, block))
        if not _can_start(grid, block):
            raise ValueError(f"{self.name}: no GPU starts a grid of {grid} blocks of {block}")
        values = [_value(a) for a in args]
        addresses = (ctypes.c_void_p * len(args))(*(ctypes.addressof(v) for v in values))
        sizes = (ctypes.c_uint * 3)(*grid), (ctypes.c_uint * 3)(*block)
        arrays = {i: a for i, a in enumerate(args) if isinstance(a, ndarray)}

        def work(keep: list[Any] = values) -> None:  # addresses point into values
            self._launch(*sizes, addresses, arrays)

        perform(work)

    def _launch(self, grid: Any, block: Any, addresses: Any, arrays: dict[int, ndarray]) -> None:
        """Run the kernel. ``arrays`` are those of the arguments."""
        barriers = ctypes.c_bool(self._barriers)
        backwards = ctypes.c_bool(recording.blocks_backwards)
        if result := self._run(grid, block, addresses, barriers, backwards):
            raise RuntimeError(f"{self.name}: {DIVERGED[result]}")
        for i, array in arrays.items():
            if overrun(array):
                raise RuntimeError(f"{self.name}: wrote outside of argument {i}")

    def _check(self, i: int, argument: Any, wanted: str) -> None:
        """Raise unless the argument has the type of parameter ``i``."""
        if isinstance(argument, ndarray):
            found = "*" + _letter(argument.dtype)
        elif isinstance(argument, np.generic):
            found = _letter(argument.dtype)
            if found == "u8" and argument == 0 and wanted.startswith("*"):
                return  # a null pointer
        else:
            raise TypeError(f"{self.name}: argument {i} is a {type(argument).__name__}")
        if found != wanted:
            raise TypeError(f"{self.name}: argument {i} is {_words(found)}, not {_words(wanted)}")


def _can_start(grid: tuple[int, ...], block: tuple[int, ...]) -> bool:
    """Whether CUDA takes these sizes."""
    return (
        all(1 <= n <= most for n, most in zip(grid, (2**31 - 1, 65535, 65535), strict=True))
        and all(1 <= n <= most for n, most in zip(block, (1024, 1024, 64), strict=True))
        and math.prod(block) <= 1024
    )


def _letter(dtype: np.dtype) -> str:
    """What shim.h calls the type of a parameter."""
    if dtype.kind in "iu":
        return f"{dtype.kind}{dtype.itemsize}"
    return LETTERS.get(dtype.name, "x")


def _words(letter: str) -> str:
    """A type of shim.h for a reader: "an array of float32"."""
    if letter.startswith("*"):
        return "an array of " + _words(letter[1:])
    names = {letter: name for name, letter in LETTERS.items()}
    if letter[0] in "iu" and letter[1:].isdigit():
        return f"{'u' * (letter[0] == 'u')}int{8 * int(letter[1:])}"
    return names.get(letter, "of another type")


def _value(argument: Any) -> Any:
    """The argument as ctypes passes it, by address or by value."""
    if isinstance(argument, ndarray):
        return ctypes.c_void_p(argument.data.ptr)
    return ctypes.create_string_buffer(argument.tobytes(), argument.nbytes)


class _Gemm(ctypes.Structure):
    """``Gemm`` of cublas.cpp."""

    _fields_ = (
        *((name, ctypes.c_int) for name in ("transa", "transb", "m", "n", "k")),
        *((name, ctypes.c_float) for name in ("alpha", "beta")),
        *((name, ctypes.c_void_p) for name in ("a", "b", "c")),
        *((name, ctypes.c_int) for name in ("a_type", "b_type", "c_type", "lda", "ldb", "ldc")),
    )


@cache
def cublas() -> tuple[ctypes.CDLL, Any]:
    """The stand-in for cuBLAS, and the hook that lets a graph record its calls."""
    library = compiled((HERE / "cublas.cpp").read_text(encoding="utf-8"))

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(_Gemm))
    def hook(gemm: Any) -> int:
        call = _Gemm.from_buffer_copy(gemm.contents)
        perform(lambda: library.emulator_gemm(ctypes.byref(call)))
        return 1

    library.emulator_set_hook(hook)
    return library, hook
