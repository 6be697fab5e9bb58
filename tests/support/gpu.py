"""A GPU for tests: emulated wherever there is a C++ compiler, and the real one if there is one."""

from __future__ import annotations

import pytest

import minihyperflows as mh
from minihyperflows.emulator import compiler, emulated_gpu

NO_COMPILER = "emulating a GPU needs g++ 12 or clang++ on Linux"
needs_compiler = pytest.mark.skipif(compiler() is None, reason=NO_COMPILER)
needs_gpu = pytest.mark.skipif(not mh.cuda_available(), reason="needs CuPy and a GPU")


@pytest.fixture(
    params=[
        pytest.param("emulated", marks=needs_compiler),
        pytest.param("emulated, blocks backwards", marks=[needs_compiler, pytest.mark.slow]),
        pytest.param("cuda", marks=[pytest.mark.gpu, needs_gpu]),
    ]
)
def gpu(request):
    """A device on which "cuda" works: emulated, emulated with the blocks in reverse, and real."""
    if request.param == "cuda":
        yield request.param
        return
    with emulated_gpu(blocks_backwards="backwards" in request.param):
        yield request.param
