"""Every kernel compiles for real GPUs, without a spill: checked with NVRTC, which needs no GPU.

The table of registers: ``pytest tests/gpu/test_kernels_nvrtc.py -rP``.
"""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path

import pytest
from support import nvrtc
from support.lanes import large

import minihyperflows
from minihyperflows.engine.gpu import launch

ARCHITECTURES = ("sm_80", "sm_90")  # A100, and H100 and H200
OPTIONS = (*launch.OPTIONS, f"-I{launch.kernel_folder()}")

for _module in pkgutil.walk_packages(minihyperflows.__path__, "minihyperflows."):
    if ".gpu" in _module.name:  # so that all of them register their kernels
        importlib.import_module(_module.name)
SOURCES = dict(launch.SOURCES)

needs_nvrtc = pytest.mark.skipif(nvrtc.find() is None, reason=nvrtc.MISSING)
every_architecture = pytest.mark.parametrize("arch", ARCHITECTURES)


def usage(text: str, kernels: list[str], arch: str, *options: str) -> list[nvrtc.Usage]:
    compiler = nvrtc.find()
    assert compiler is not None
    return compiler.compile(text, kernels, arch, (*OPTIONS, *options))


def assert_in_registers(kernels: list[nvrtc.Usage]) -> None:
    """Fail if a kernel keeps something in local memory, which is slow global memory."""
    wrong = [k for k in kernels if k.spilled or k.stack]
    assert not wrong, "\n".join(
        f"{k.kernel}: {k.spilled} bytes spilled, {k.stack} bytes of local memory" for k in wrong
    )


def table(kernels: list[nvrtc.Usage]) -> str:
    width = max(len(k.kernel) for k in kernels)
    rows = [f"{k.kernel:{width}}  {k.registers:9}  {k.shared:6}" for k in kernels]
    return "\n".join([f"{'kernel':{width}}  registers  shared", *rows])


def test_nvrtc_has_kernels_to_compile() -> None:
    assert SOURCES
    assert all(source.kernels for source in SOURCES.values())


def test_nvrtc_will_see_every_file_of_kernels() -> None:
    package = Path(minihyperflows.__file__).parent
    assert {file.name for file in package.rglob("*.cu")} == set(SOURCES)


@pytest.mark.slow
@needs_nvrtc
@every_architecture
@pytest.mark.parametrize("file", ["bias.cu", *large(*sorted({*SOURCES} - {"bias.cu"}))])
def test_nvrtc_compiles_without_spills(file: str, arch: str, record_property) -> None:
    source = SOURCES[file]
    kernels = usage(source.text(), list(source.kernels), arch, f"-I{source.folder()}")
    print(f"{file}, {arch}\n{table(kernels)}")
    for k in kernels:
        record_property(f"{k.kernel}, registers for {arch}", k.registers)
    assert_in_registers(kernels)
    assert all(k.registers <= 255 and k.shared <= 48 * 1024 for k in kernels)


# -- checks that can fail --------------------------------------------------------------------------

SCALE = """
#include "common.cuh"
template <typename T>
__global__ void scale(T* x) {
    x[first_item()] = T(2.0f * float(x[first_item()]));
}
"""

INDEXED = """
__global__ void indexed(float* x, int n) {
    float a[512];
    for (int i = 0; i < n; ++i) a[i * 7 % 512] = x[i];
    for (int i = 0; i < n; ++i) x[i] = a[i * 3 % 512];
}
"""

HUNGRY = """
__global__ void hungry(float* x) {
    float a[128];
    #pragma unroll
    for (int i = 0; i < 128; ++i) a[i] = x[i];
    __syncthreads();
    #pragma unroll
    for (int i = 0; i < 128; ++i) x[i] = a[127 - i] * a[i];
}
"""


@needs_nvrtc
@every_architecture
def test_nvrtc_reports_each_instance(arch: str) -> None:
    kernels = usage(SCALE, ["scale<float>", "scale<__half>"], arch)
    assert [k.kernel for k in kernels] == ["scale<float>", "scale<__half>"]
    assert all(0 < k.registers < 32 for k in kernels)
    assert_in_registers(kernels)


@needs_nvrtc
@pytest.mark.parametrize(
    ("text", "kernel", "words"),
    [
        ("__global__ void f() { g(); }", "f", '"g" is undefined'),
        ("__global__ void f(float* x) { __syncthreads() }", "f", 'expected a ";"'),
        ("template <typename T> __global__ void f(T* x) {}", "f<int, int>", "f<int, int>"),
        ("__global__ void f() {}", "g", "g"),
        ('#include "nowhere.cuh"\n__global__ void f() {}', "f", "nowhere.cuh"),
    ],
)
def test_nvrtc_objects_to_a_broken_kernel(text: str, kernel: str, words: str) -> None:
    with pytest.raises(nvrtc.CompileError) as error:
        usage(text, [kernel], "sm_90")
    assert words in str(error.value)


@needs_nvrtc
def test_nvrtc_finds_an_array_in_local_memory() -> None:
    kernels = usage(INDEXED, ["indexed"], "sm_90")
    assert kernels[0].stack >= 2048
    with pytest.raises(AssertionError, match="indexed"):
        assert_in_registers(kernels)


@needs_nvrtc
def test_nvrtc_finds_spilled_registers() -> None:
    assert_in_registers(usage(HUNGRY, ["hungry"], "sm_90"))
    kernels = usage(HUNGRY, ["hungry"], "sm_90", "--maxrregcount=32")
    assert kernels[0].spilled > 0
    with pytest.raises(AssertionError, match="hungry"):
        assert_in_registers(kernels)
