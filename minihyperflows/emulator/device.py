"""The context in which the emulated GPU is there."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

from minihyperflows.emulator import recording
from minihyperflows.emulator.compilation import cublas, require_compiler
from minihyperflows.emulator.module import make_cupy

CUPY = make_cupy()


@contextmanager
def emulated_gpu(blocks_backwards: bool = False) -> Iterator[None]:
    """Context with an emulated GPU in the place of a real one, if there is any.

    Args:
        blocks_backwards: run the blocks of every grid from the last to the first. A GPU runs them
            in any order, so nothing may change.

    Raises:
        CompilerMissingError: there is no C++ compiler that could play the GPU's.
    """
    require_compiler()
    pathfinder = _pathfinder()
    cuda: Any = ModuleType("cuda")
    cuda.pathfinder = pathfinder
    before = recording.blocks_backwards
    recording.blocks_backwards = blocks_backwards
    try:
        with _modules({"cupy": CUPY, "cuda": cuda, "cuda.pathfinder": pathfinder}):
            yield
    finally:
        recording.blocks_backwards = before
        recording.abandon()


@contextmanager
def _modules(modules: dict[str, ModuleType]) -> Iterator[None]:
    """Context in which ``import`` finds these instead of what is installed."""
    before = {name: sys.modules.get(name) for name in modules}
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                sys.modules.pop(name, None)
            else:
                sys.modules[name] = module


def _pathfinder() -> ModuleType:
    """``cuda.pathfinder``, which says where NVIDIA's libraries are: cuBLAS's stand-in here."""
    module: Any = ModuleType("cuda.pathfinder")
    library = SimpleNamespace(abs_path=cublas()[0]._name)
    module.load_nvidia_dynamic_lib = {"cublas": library}.__getitem__
    return module
