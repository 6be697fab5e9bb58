"""NVIDIA's runtime compiler, NVRTC, which compiles CUDA C++ on machines without a GPU or a driver.

Found in NVIDIA's wheels (``pip install -e ".[nvrtc]"``) or in a CUDA toolkit, and called through
ctypes.
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

MISSING = 'NVRTC is not installed: pip install -e ".[nvrtc]"'
HEADER = "cuda_fp16.h"  # what the kernels include


class CompileError(Exception):
    """NVRTC's objections to a program."""


@dataclass(frozen=True)
class Usage:
    """What the assembler says of a kernel."""

    kernel: str  # as C++ writes it
    registers: int
    spilled: int  # bytes stored to and loaded from local memory because registers ran out
    stack: int  # bytes of local memory: arrays that are indexed at run time, and what was spilled
    shared: int  # bytes of shared memory


@dataclass(frozen=True)
class Nvrtc:
    """The compiler's library and the folder of CUDA's headers."""

    library: ctypes.CDLL
    headers: Path

    def compile(
        self, text: str, kernels: Sequence[str], arch: str, options: Sequence[str] = ()
    ) -> list[Usage]:
        """The use of registers and memory of each of the ``kernels`` of a program.

        Args:
            text: CUDA C++.
            kernels: the instances to compile, as C++ writes them.
            arch: such as "sm_90".
            options: further options of the command line.

        Raises:
            CompileError: with the compiler's words.
        """
        program = ctypes.c_void_p()
        self._call(
            "CreateProgram", ctypes.byref(program), text.encode(), b"kernels.cu", 0, None, None
        )
        try:
            for kernel in kernels:
                self._call("AddNameExpression", program, kernel.encode())
            self._compile(program, [f"-arch={arch}", f"-I{self.headers}", *options])
            assert self._cubin_size(program) > 0
            usage = dict(parse_usage(self._log(program)))
            return [Usage(k, *usage[self._lowered(program, k)]) for k in kernels]
        finally:
            self._call("DestroyProgram", ctypes.byref(program))

    def _compile(self, program: ctypes.c_void_p, options: Sequence[str]) -> None:
        words = [o.encode() for o in (*options, "--ptxas-options=-v")]
        status = self.library.nvrtcCompileProgram(
            program, len(words), (ctypes.c_char_p * len(words))(*words)
        )
        if status:
            raise CompileError(f"{self._error(status)}\n{self._log(program)}")

    def _log(self, program: ctypes.c_void_p) -> str:
        size = ctypes.c_size_t()
        self._call("GetProgramLogSize", program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        self._call("GetProgramLog", program, log)
        return log.value.decode()

    def _cubin_size(self, program: ctypes.c_void_p) -> int:
        size = ctypes.c_size_t()
        self._call("GetCUBINSize", program, ctypes.byref(size))
        return size.value

    def _lowered(self, program: ctypes.c_void_p, kernel: str) -> str:
        """The kernel's name in the machine code."""
        name = ctypes.c_char_p()
        self._call("GetLoweredName", program, kernel.encode(), ctypes.byref(name))
        assert name.value is not None
        return name.value.decode()

    def _call(self, function: str, *arguments: object) -> None:
        status = getattr(self.library, f"nvrtc{function}")(*arguments)
        if status:
            raise CompileError(f"nvrtc{function}: {self._error(status)}")

    def _error(self, status: int) -> str:
        words = self.library.nvrtcGetErrorString
        words.restype = ctypes.c_char_p
        return words(status).decode()


def parse_usage(log: str) -> Iterator[tuple[str, tuple[int, int, int, int]]]:
    """Each kernel's name and its registers, spilled, stack and shared bytes, from the assembler's
    words: blocks that begin with "Compiling entry function 'NAME'"."""
    for block in re.split(r"Compiling entry function ", log)[1:]:
        numbers = {
            what: sum(int(n) for n in re.findall(rf"(\d+) {pattern}", block))
            for what, pattern in {
                "registers": "registers",
                "spilled": "bytes spill (?:stores|loads)",
                "stack": "bytes stack frame",
                "shared": "bytes smem",
            }.items()
        }
        yield block.split("'")[1], (*numbers.values(),)  # type: ignore[misc]


@cache
def find() -> Nvrtc | None:
    """NVRTC as it is installed here; None where it is not."""
    library = next(filter(None, map(_load, _libraries())), None)
    headers = next((folder for folder in _headers() if (folder / HEADER).is_file()), None)
    return Nvrtc(library, headers) if library and headers else None


def _wheels() -> list[Path]:
    """pip's folders of NVIDIA's wheels; those of CUDA 13 share one, those of CUDA 12 do not."""
    folders = [Path(p) / "nvidia" for p in sys.path if p]
    return [
        part
        for folder in folders
        for name in ("cu13", "cuda_nvrtc", "cuda_runtime")
        if (part := folder / name).is_dir()
    ]


def _toolkits() -> list[Path]:
    named = [os.environ[v] for v in ("CUDA_PATH", "CUDA_HOME") if os.environ.get(v)]
    return [Path(p) for p in (*named, "/usr/local/cuda") if Path(p).is_dir()]


def _headers() -> Iterator[Path]:
    return (folder / "include" for folder in (*_wheels(), *_toolkits()))


def _libraries() -> Iterator[Path]:
    """Files that may be NVRTC: not its parts (builtins) nor its variants (alt, static)."""
    for folder in (*_wheels(), *_toolkits()):
        for name in ("lib", "lib64", "bin", "bin/x64"):
            for file in sorted((folder / name).glob("*nvrtc*")):
                if re.fullmatch(r"libnvrtc\.so(\.\d+)*|nvrtc64_\d+_\d+\.dll", file.name):
                    yield file


def _load(file: Path) -> ctypes.CDLL | None:
    """The library, after the builtins that it will ask for by name, wherever it may look."""
    try:
        for builtins in file.parent.glob("*nvrtc-builtins*"):
            if ".alt." not in builtins.name and "static" not in builtins.name:
                ctypes.CDLL(str(builtins))
        return ctypes.CDLL(str(file))
    except OSError:
        return None
