"""The emulated GPU: what works there works on a GPU, and what does not work there says so."""

from __future__ import annotations

import ast
import ctypes
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from support.gpu import needs_compiler

import minihyperflows as mh
from minihyperflows.emulator import CompilerMissingError, compilation, emulated_gpu
from minihyperflows.emulator.array import ndarray
from minihyperflows.emulator.recording import CaptureError
from minihyperflows.engine.backend import cuda_library, cupy, device_of, to_device, to_numpy
from minihyperflows.engine.errors import DeviceError

PACKAGE = Path(mh.__file__).parent
MODULES = ("cupy", "cuda", "cuda.pathfinder")

pytestmark = needs_compiler


@pytest.fixture
def xp() -> Iterator[ModuleType]:
    with emulated_gpu():
        yield cupy()


# All kernels of the tests in one program, which is compiled once.
KERNELS = """
#include <cuda_fp16.h>
#include <cuda_bf16.h>

template <typename T, int N>
__global__ void reverse(const T* x, T* y) {
    __shared__ T block[N];
    const int i = blockIdx.x * N + threadIdx.x;
    block[threadIdx.x] = x[i];
    __syncthreads();
    y[i] = block[N - 1 - threadIdx.x];
    __syncthreads();
    if (threadIdx.x == 0) y[i] = T(float(block[N - 1]) + 100.0f);
}

__global__ void places(int* out) {
    const int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    const int thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
    out[block * blockDim.x * blockDim.y * blockDim.z + thread] +=
        100000 * blockIdx.z + 10000 * blockIdx.y + 1000 * blockIdx.x
        + 100 * threadIdx.z + 10 * threadIdx.y + threadIdx.x;
}

__global__ void some_wait(float* x) {
    if (threadIdx.x < 3) __syncthreads();
}
__global__ void one_returns(float* x) {
    if (threadIdx.x == 7) return;
    __syncthreads();
}
__global__ void unequally_often(float* x) {
    for (int i = 0; i < threadIdx.x; ++i) __syncthreads();
}
__global__ void two_places(float* x) {
    if (threadIdx.x % 2)
        __syncthreads();
    else
        __syncthreads();
}

__global__ void add_one(float* x, int absent) {
    if (threadIdx.x < absent) return;
    __syncthreads();
    x[threadIdx.x] += 1;
}

__global__ void arrive(int* counter, int* place) {
    if (threadIdx.x == 0) place[blockIdx.x] = atomicAdd(counter, 1);
}

__global__ void all(int* a, unsigned* b, float* f) {
    atomicMax(&a[0], int(threadIdx.x));
    atomicMin(&a[1], -int(threadIdx.x));
    atomicOr(&b[0], 1u << threadIdx.x);
    __threadfence();
    if (threadIdx.x == 0) {
        b[1] = __umulhi(0xD2511F53u, 0xFFFFFFFFu);
        f[0] = rsqrtf(16.0f);
        f[1] = isfinite(f[0] / 0.0f) ? 1.0f : 0.0f;
    }
}

__global__ void take(const float* x, __half* h, int n, float factor, long long large, bool flag) {
    if (x) h[0] = __half(x[0] * factor + n + large + flag);
}

__global__ void write(float* x, int i) { x[i] = 1; }
__global__ void read(const float* x, float* y, int i) { y[0] = x[i]; }

__global__ void widen(const __half* h, float* x, int n) {
    for (int i = 0; i < n; ++i) x[i] = float(h[i]);
}
__global__ void narrow(const float* x, __half* h, int n) {
    for (int i = 0; i < n; ++i) h[i] = __half(x[i]);
}
__global__ void narrow_brain(const float* x, float* y, int n) {
    for (int i = 0; i < n; ++i) y[i] = float(__nv_bfloat16(x[i]));
}

__global__ void twice(float* x, int n) {
    if (threadIdx.x < n) x[threadIdx.x] *= 2;
}
"""
PARTING = ("some_wait", "one_returns", "unequally_often", "two_places")
NAMES = (
    *("reverse<float, 64>", "reverse<__half, 64>", "places", *PARTING, "add_one", "arrive", "all"),
    *("take", "write", "read", "widen", "narrow", "narrow_brain", "twice"),
)


def kernel(name: str) -> Any:
    return cupy().RawModule(code=KERNELS, name_expressions=NAMES).get_function(name)


def one_kernel(text: str, name: str, *options: str) -> Any:
    module = cupy().RawModule(code=text, options=options, name_expressions=(name,))
    return module.get_function(name)


# -- kernels ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("c_type", "dtype"), [("float", "float32"), ("__half", "float16")])
def test_threads_wait_for_each_other_at_barriers(xp, c_type: str, dtype: str) -> None:
    x = xp.asarray(np.arange(5 * 64, dtype=dtype))
    y = xp.empty(5 * 64, dtype)
    kernel(f"reverse<{c_type}, 64>")((5,), (64,), (x, y))
    expected = np.arange(5 * 64).reshape(5, 64)[:, ::-1].copy()
    expected[:, 0] += 100
    np.testing.assert_array_equal(to_numpy(y), expected.reshape(-1))


@pytest.mark.slow
def test_grids_and_blocks_have_three_dimensions(xp) -> None:
    out = xp.zeros((2, 3, 4, 2, 3, 5), np.int32)
    kernel("places")((4, 3, 2), (5, 3, 2), (out,))
    places = np.indices(out.shape)
    digits = (100_000, 10_000, 1000, 100, 10, 1)
    np.testing.assert_array_equal(
        to_numpy(out), sum(d * p for d, p in zip(digits, places, strict=True))
    )


@pytest.mark.slow
def test_a_barrier_in_a_header_counts(xp, tmp_path: Path) -> None:
    (tmp_path / "outer.cuh").write_text('#pragma once\n#include "inner.cuh"\n', encoding="utf-8")
    (tmp_path / "inner.cuh").write_text(
        "inline float left(float* s, float x, int i) {\n"
        "  s[i] = x; __syncthreads(); return s[(i + 1) % 8]; }\n",
        encoding="utf-8",
    )
    text = """
    #include "outer.cuh"
    __global__ void shift(float* x) {
        __shared__ float s[8];
        x[threadIdx.x] = left(s, x[threadIdx.x], threadIdx.x);
    }"""
    x = xp.asarray(np.arange(8, dtype=np.float32))
    one_kernel(text, "shift", f"-I{tmp_path}")((1,), (8,), (x,))
    np.testing.assert_array_equal(to_numpy(x), np.roll(np.arange(8), -1))


@pytest.mark.parametrize("name", PARTING)
def test_threads_that_part_at_a_barrier_are_reported(xp, name: str) -> None:
    words = "one barrier and some at another" if name == "two_places" else "ended while others wait"
    with pytest.raises(RuntimeError, match=f"{name}: some threads .*{words}"):
        kernel(name)((1,), (32,), (xp.zeros(32, np.float32),))


def test_a_kernel_works_again_after_threads_have_parted(xp) -> None:
    add_one, x = kernel("add_one"), xp.zeros(32, np.float32)
    for _ in range(3):
        with pytest.raises(RuntimeError, match="add_one"):
            add_one((2,), (32,), (x, np.int32(5)))
        x.fill(0)
        add_one((2,), (32,), (x, np.int32(0)))
        assert (to_numpy(x) == 2).all()


@pytest.mark.parametrize("backwards", [False, True])
def test_the_order_of_blocks(backwards: bool) -> None:
    with emulated_gpu(blocks_backwards=backwards):
        counter, place = cupy().zeros(1, np.int32), cupy().zeros(10, np.int32)
        kernel("arrive")((10,), (4,), (counter, place))
        found = to_numpy(place).tolist()
    assert found == (list(range(10))[::-1] if backwards else list(range(10)))


def test_atomics_fences_and_other_functions(xp) -> None:
    a, b, f = xp.zeros(2, np.int32), xp.zeros(2, np.uint32), xp.zeros(2, np.float32)
    kernel("all")((1,), (20,), (a, b, f))
    assert to_numpy(a).tolist() == [19, -19]
    assert to_numpy(b).tolist() == [2**20 - 1, 0xD2511F53 * 0xFFFFFFFF >> 32]
    assert to_numpy(f).tolist() == [0.25, 0.0]


def arguments(**other: Any) -> tuple:
    xp = cupy()
    usual = {"x": xp.zeros(3, np.float32), "h": xp.zeros(3, np.float16), "n": np.int32(1)}
    usual |= {"factor": np.float32(2), "large": np.int64(3), "flag": np.bool_(True)}
    return tuple((usual | other).values())


def test_arguments_of_all_kinds(xp) -> None:
    h = xp.zeros(3, np.float16)
    x = xp.asarray(np.array([1.5], np.float32))
    kernel("take")((1,), (1,), arguments(x=x, h=h))
    assert to_numpy(h).tolist() == [8, 0, 0]
    kernel("take")((1,), (1,), arguments(x=np.uint64(0)))  # a null pointer


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("x", "float64", "argument 0 is an array of float64, not an array of float32"),
        ("x", "int32", "argument 0 is an array of int32, not an array of float32"),
        ("h", "float32", "argument 1 is an array of float32, not an array of float16"),
        ("n", np.int64(1), "argument 2 is int64, not int32"),
        ("n", np.uint32(1), "argument 2 is uint32, not int32"),
        ("n", 1, "argument 2 is a int"),
        ("factor", np.float64(1), "argument 3 is float64, not float32"),
        ("x", np.uint64(8), "argument 0 is uint64, not an array of float32"),
        ("x", np.zeros(3, np.float32), "argument 0 is a ndarray"),
        ("flag", np.int32(1), "argument 5 is int32, not bool"),
    ],
)
def test_arguments_of_the_wrong_type(xp, name: str, value: Any, words: str) -> None:
    wrong = xp.zeros(3, value) if isinstance(value, str) else value
    with pytest.raises(TypeError) as error:
        kernel("take")((1,), (1,), arguments(**{name: wrong}))
    assert words in str(error.value)


def test_the_number_of_arguments(xp) -> None:
    with pytest.raises(TypeError, match="take takes 6 arguments, not 5"):
        kernel("take")((1,), (1,), arguments()[:5])


@pytest.mark.parametrize(
    ("grid", "block"),
    [
        *(((0,), (1,)), ((1, 65536), (1,)), ((1, 1, 65536), (1,))),
        *(((1,), (0,)), ((1,), (1025,)), ((1,), (64, 32)), ((1,), (1, 1, 65))),
    ],
)
def test_sizes_that_no_gpu_starts(xp, grid: tuple, block: tuple) -> None:
    with pytest.raises(ValueError, match="no GPU starts"):
        kernel("twice")(grid, block, (xp.zeros(1, np.float32), np.int32(0)))


def test_a_name_that_was_not_asked_for(xp) -> None:
    with pytest.raises(ValueError, match=r"reverse<float, 9> .* reverse<float, 64>"):
        kernel("reverse<float, 9>")


@needs_compiler
def test_threads_that_compile_the_same_kernels() -> None:
    """Each writes a file of its own, and the last one's stays."""
    text = 'extern "C" int answer() { return 42; }  // for four threads'
    compile_again = compilation.compiled.__wrapped__
    with ThreadPoolExecutor(4) as pool:
        libraries = list(pool.map(lambda _: compile_again(text), range(4)))
    assert [library.answer() for library in libraries] == [42] * 4


@pytest.mark.slow
def test_the_words_of_the_compiler_are_shown(xp) -> None:
    text = "\n__global__ void f(float* x) {\n    x[0] = nothing_of_that_name;\n}"
    with pytest.raises(ValueError, match=r"do not compile[\s\S]*:3:[\s\S]*nothing_of_that_name"):
        one_kernel(text, "f")


def test_writing_outside_an_array_is_reported(xp) -> None:
    write, x = kernel("write"), xp.zeros(10, np.float32)
    for i in (0, 9):
        write((1,), (1,), (x, np.int32(i)))
    for i in (-1, 10, 40):
        with pytest.raises(RuntimeError, match="write: wrote outside of argument 0"):
            write((1,), (1,), (x[2:], np.int32(i - 2)))
    assert to_numpy(x).tolist() == [1, *[0] * 8, 1]


def test_reading_outside_an_array_gives_nan(xp) -> None:
    x, y = xp.zeros(10, np.float32), xp.zeros(1, np.float32)
    for i in (-1, 10):
        kernel("read")((1,), (1,), (x, y, np.int32(i)))
        assert np.isnan(y.item())


# -- half precision --------------------------------------------------------------------------------


def test_every_half_is_numpys(xp) -> None:
    halves = np.arange(65536, dtype=np.uint16).view(np.float16)
    x = xp.empty(65536, np.float32)
    kernel("widen")((1,), (1,), (xp.asarray(halves), x, np.int32(65536)))
    np.testing.assert_array_equal(to_numpy(x), halves.astype(np.float32))
    assert (np.signbit(to_numpy(x)) == np.signbit(halves))[~np.isnan(halves)].all()


def test_floats_round_to_the_nearest_half(xp, rng) -> None:
    """Ties go to even: all midpoints of neighbours, their neighbours, and random floats."""
    finite = np.arange(0, 0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    middle = (finite[1:] + finite[:-1]) / 2  # exact in float32
    around = [np.nextafter(middle, np.float32(s)) for s in (-np.inf, np.inf)]
    wild = rng.integers(0, 2**32, 50_000, np.uint32).view(np.float32)
    largest = np.float32([65504, 65519.996, 65520, 65536, 1e30, np.inf, np.nan, 0, -0.0, 1e-45])
    floats = np.concatenate([finite, middle, *around, -middle, wild, largest])
    h = xp.empty(floats.size, np.float16)
    kernel("narrow")((1,), (1,), (xp.asarray(floats), h, np.int32(floats.size)))
    with np.errstate(over="ignore"):
        expected = floats.astype(np.float16)
    np.testing.assert_array_equal(to_numpy(h), expected)
    known = ~np.isnan(expected)
    np.testing.assert_array_equal(np.signbit(to_numpy(h))[known], np.signbit(expected)[known])


def test_floats_round_to_the_nearest_bfloat16(xp, rng) -> None:
    """The upper half of a float; ties go to even."""
    upper = rng.integers(0, 0x7F00, 1000, np.uint32) << 16
    words = np.concatenate([upper, upper + 0x7FFF, upper + 0x8000, upper + 0x8001])
    expected = np.concatenate([upper, upper, upper + (upper & 0x10000), upper + 0x10000])
    y = xp.empty(words.size, np.float32)
    arguments = (xp.asarray(words.view(np.float32)), y, np.int32(words.size))
    kernel("narrow_brain")((1,), (1,), arguments)
    np.testing.assert_array_equal(to_numpy(y), expected.view(np.float32))


# -- arrays ----------------------------------------------------------------------------------------


def test_an_array_lives_on_the_gpu(xp) -> None:
    x = to_device(np.arange(6.0).reshape(2, 3), "cuda")
    assert device_of(x) == "cuda"
    assert (x.shape, x.ndim, x.size, x.dtype, len(x)) == ((2, 3), 2, 6, np.float64, 2)
    assert x.T.shape == (3, 2)
    assert to_numpy(x.T.reshape(-1)).tolist() == [0, 3, 1, 4, 2, 5]
    assert float(x[1, 2]) == 5
    assert x[1].tolist() == [3, 4, 5]
    assert x[1].base is x
    assert (x + 1).base is None
    assert isinstance(x.sum(), ndarray)  # no scalars, as in CuPy
    np.testing.assert_array_equal(to_numpy(xp.exp(-x) * 2), 2 * np.exp(-to_numpy(x)))
    x[0] = x[1]
    x += 1
    assert x.tolist() == [[4, 5, 6]] * 2


@pytest.mark.parametrize(
    "mix",
    [
        lambda g, n: g + n,
        lambda g, n: n + g,
        lambda g, n: n @ g,
        lambda g, n: np.add(g, n),
        lambda g, n: g.__iadd__(n),
        lambda g, n: g.__setitem__(0, n[0:1]),
        lambda g, n: np.concatenate([g, n]),
        lambda g, n: cupy().stack([g, n]),
        lambda g, n: cupy().exp(n),
        lambda g, n: np.asarray(g),
        lambda g, n: np.array([g, g]),
        lambda g, n: n.__setitem__(slice(None), g),
    ],
)
def test_arrays_do_not_mix_with_numpys(xp, mix: Callable[[Any, Any], Any]) -> None:
    with pytest.raises(TypeError, match=r"Unsupported type|Implicit conversion"):
        mix(xp.ones(3), np.ones(3))


def test_what_an_array_does_not_have(xp) -> None:
    for name in ("tofile", "newbyteorder", "no_such_name", "host_of"):
        with pytest.raises(AttributeError, match=name):
            getattr(xp.ones(3), name)
    with pytest.raises(AttributeError, match="no_such_function"):
        xp.no_such_function  # noqa: B018
    with pytest.raises(AttributeError):
        xp.__path__  # noqa: B018 - else submodules of NumPy would be found below cupy
    with pytest.raises(TypeError):
        hash(xp.ones(3))


def test_empty_is_not_zero(xp) -> None:
    assert np.isnan(to_numpy(xp.empty(3, np.float16))).all()


# -- graphs ----------------------------------------------------------------------------------------

FORBIDDEN: dict[str, Callable[[Any], Any]] = {
    "addition": lambda x: x + x,
    "in-place addition": lambda x: x.__iadd__(1),
    "a function": lambda x: cupy().exp(x),
    "a sum": lambda x: x.sum(),
    "a comparison": lambda x: x == x,
    "item": lambda x: x[0].item(),
    "float": lambda x: float(x[0]),
    "truth": lambda x: bool(x[0]),
    "tolist": lambda x: x.tolist(),
    "get": lambda x: x.get(),
    "set": lambda x: x.set(np.zeros(4, np.float32)),
    "asnumpy": to_numpy,
    "asarray": lambda x: cupy().asarray(np.ones(3)),
    "array": lambda x: cupy().array([1.0]),
    "assignment": lambda x: x.__setitem__(0, 1),
    "fill": lambda x: x.fill(0),
    "copyto": lambda x: cupy().copyto(x, x),
    "astype": lambda x: x.astype(np.float16),
    "fancy index": lambda x: x[[0, 1]],
    "mask": lambda x: x[np.newaxis][:, ::2].T.reshape(-1)[[True, False]],
    "reshape that copies": lambda x: x.reshape(2, 2).T.reshape(-1),
    "ravel that copies": lambda x: x[::2].ravel(),
    "contiguous copy": lambda x: cupy().ascontiguousarray(x[::2]),
    "synchronize": lambda x: cupy().cuda.Device().synchronize(),
    "stream's synchronize": lambda x: cupy().cuda.get_current_stream().synchronize(),
    "another capture": lambda x: cupy().cuda.get_current_stream().begin_capture(),
}


@pytest.mark.parametrize("name", FORBIDDEN)
def test_what_no_graph_can_hold(xp, name: str) -> None:
    x = xp.zeros(4, np.float32)
    with xp.cuda.Stream(non_blocking=True) as stream:
        stream.begin_capture()
        with pytest.raises(CaptureError, match="while a graph is recorded"):
            FORBIDDEN[name](x)
        stream.end_capture()
    assert to_numpy(x).tolist() == [0] * 4
    if name != "another capture":
        FORBIDDEN[name](x)  # at any other time it works


def test_a_graph_holds_kernels_products_zeros_and_copies(xp) -> None:
    """Nothing happens while they are recorded; each replay does it all, with what is there then."""
    double = kernel("twice")
    x = xp.asarray(np.float32([1, 2, 3, 4]))
    gemm, handle = product()
    with xp.cuda.Stream(non_blocking=True) as stream:
        stream.begin_capture()
        double((1,), (32,), (x, np.int32(4)))
        before = x.copy()
        double((1,), (32,), (x, np.int32(4)))
        zeros, unknown = xp.zeros(4, np.float32), xp.empty(4, np.float32)
        outer = xp.zeros((4, 4), np.float32)
        gemm(handle, x.reshape(4, 1), x[None], outer)
        double((1,), (32,), (zeros, np.int32(4)))
        graph = stream.end_capture()
        assert x.tolist() == [1, 2, 3, 4]
        zeros.fill(5)
        unknown.fill(5)
        for start in ([1, 2, 3, 4], [5, 6, 7, 8]):
            x.set(np.float32(start))
            graph.launch(stream)
            stream.synchronize()
            x0 = np.float32(start)
            np.testing.assert_array_equal(to_numpy(before), 2 * x0)
            np.testing.assert_array_equal(to_numpy(x), 4 * x0)
            np.testing.assert_array_equal(to_numpy(outer), 16 * np.outer(x0, x0))
            assert zeros.tolist() == [0] * 4
            assert np.isnan(to_numpy(unknown)).all()
        graph.launch()
        assert x.tolist() == [80, 96, 112, 128]


def test_a_graph_keeps_its_arrays(xp) -> None:
    double = kernel("twice")
    with xp.cuda.Stream() as stream:
        stream.begin_capture()
        scratch = xp.zeros(4, np.float32)
        double((1,), (4,), (scratch, np.int32(4)))
        del scratch
        graph = stream.end_capture()
    for _ in range(100):
        xp.zeros(4, np.float32)
        graph.launch()


def test_captures_begin_and_end_in_order(xp) -> None:
    null, stream = xp.cuda.get_current_stream(), xp.cuda.Stream()
    assert null.ptr == 0 != stream.ptr
    with pytest.raises(RuntimeError, match="null stream"):
        null.begin_capture()
    with pytest.raises(RuntimeError, match="with stream"):
        stream.begin_capture()
    with pytest.raises(CaptureError, match="no graph"):
        stream.end_capture()
    with stream:
        assert xp.cuda.get_current_stream() is stream
    assert xp.cuda.get_current_stream() is null


def test_a_capture_that_broke_off_is_forgotten() -> None:
    with emulated_gpu(), cupy().cuda.Stream() as stream:
        stream.begin_capture()
    with emulated_gpu():
        assert (cupy().ones(3) + 1).tolist() == [2, 2, 2]


# -- the stand-in for cuBLAS -----------------------------------------------------------------------

TYPES = {"float32": 0, "float16": 2}


def product() -> tuple[Callable[..., int], ctypes.c_void_p]:
    """A function that asks cuBLAS for out = a b of matrices that lie row by row, and a handle."""
    library = cuda_library("cublas")
    handle = ctypes.c_void_p()
    assert library.cublasCreate_v2(ctypes.byref(handle)) == 0
    one, zero = ctypes.c_float(1), ctypes.c_float(0)

    def gemm(handle: ctypes.c_void_p, a: Any, b: Any, out: Any, **other: Any) -> int:
        (m, n), k = out.shape, a.shape[1]
        setting = {"transb": 0, "transa": 0, "n": n, "m": m, "k": k, "alpha": one, "beta": zero}
        setting |= {"ldb": n, "lda": k, "ldc": n, "compute": 68} | other
        s = setting
        pointers = [ctypes.c_void_p(z.data.ptr) for z in (b, a, out)]
        types = [TYPES[str(z.dtype)] for z in (b, a, out)]
        return library.cublasGemmEx(
            *(handle, s["transb"], s["transa"], s["n"], s["m"], s["k"], ctypes.byref(s["alpha"])),
            *(pointers[0], types[0], s["ldb"], pointers[1], types[1], s["lda"]),
            *(ctypes.byref(s["beta"]), pointers[2], types[2], s["ldc"], s["compute"], -1),
        )

    return gemm, handle


@pytest.mark.parametrize(
    ("dtype", "out_dtype"),
    [("float32", "float32"), ("float16", "float16"), ("float16", "float32")],
)
@pytest.mark.parametrize("transposed", [(0, 0), (1, 0), (0, 1), (1, 1)])
def test_products_are_numpys(xp, rng, dtype: str, out_dtype: str, transposed) -> None:
    m, n, k = 5, 7, 11
    a, b = rng.normal(size=(m, k)).astype(dtype), rng.normal(size=(k, n)).astype(dtype)
    before = rng.normal(size=(m, n)).astype(out_dtype)
    out = xp.asarray(before)
    a_there = xp.asarray(np.ascontiguousarray(a.T) if transposed[0] else a)
    b_there = xp.asarray(np.ascontiguousarray(b.T) if transposed[1] else b)
    gemm, handle = product()
    status = gemm(
        *(handle, a_there, b_there, out),
        **{"transa": transposed[0], "transb": transposed[1], "m": m, "n": n, "k": k},
        **{"lda": m if transposed[0] else k, "ldb": k if transposed[1] else n},
        **{"alpha": ctypes.c_float(0.5), "beta": ctypes.c_float(2)},
    )
    assert status == 0
    expected = 0.5 * (a.astype(float) @ b.astype(float)) + 2 * before.astype(float)
    tolerance = 1e-3 if out_dtype == "float16" else 1e-6
    np.testing.assert_allclose(to_numpy(out), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("wrong", "status"),
    [({"lda": 2}, 7), ({"ldb": 3}, 7), ({"ldc": 1}, 7), ({"m": -1}, 7), ({"compute": 64}, 15)],
)
def test_products_that_cublas_refuses(xp, wrong: dict[str, int], status: int) -> None:
    gemm, handle = product()
    a, b, out = (xp.zeros(shape, np.float32) for shape in ((2, 3), (3, 4), (2, 4)))
    assert gemm(handle, a, b, out) == 0
    assert gemm(handle, a, b, out, **wrong) == status
    assert gemm(None, a, b, out) == 1
    assert gemm(handle, a.astype(np.float16), b, out) == 15


# -- the modules -----------------------------------------------------------------------------------


@pytest.mark.parametrize("installed", [False, True])
@pytest.mark.parametrize("error", [False, True])
def test_the_modules_come_and_go(monkeypatch, installed: bool, error: bool) -> None:
    for name in MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
        if installed:
            monkeypatch.setitem(sys.modules, name, ModuleType(f"the real {name}"))
    before = {name: sys.modules.get(name) for name in MODULES}

    class SomethingWrongError(Exception):
        pass

    try:
        with emulated_gpu():
            assert mh.cuda_available()
            assert cupy().__version__ == "emulated"
            with emulated_gpu(blocks_backwards=True):
                assert cupy().__version__ == "emulated"
            assert cupy().__version__ == "emulated"
            if error:
                raise SomethingWrongError
    except SomethingWrongError:
        assert error
    assert {name: sys.modules.get(name) for name in MODULES} == before
    if not installed:
        assert not set(MODULES) & set(sys.modules)


def test_real_cupy_is_there_again_afterwards() -> None:
    real = pytest.importorskip("cupy")
    with emulated_gpu():
        assert cupy() is not real
    assert cupy() is real
    assert import_module("cuda.pathfinder").__file__


@pytest.mark.skipif(mh.cuda_available(), reason="there is a GPU")
def test_without_the_emulator_there_is_no_gpu() -> None:
    with emulated_gpu():
        assert mh.cuda_available()
        to_device(np.ones(3), "cuda")
    assert not mh.cuda_available()
    with pytest.raises(DeviceError, match="no GPU is available"):
        to_device(np.ones(3), "cuda")


def test_without_a_compiler_there_is_no_emulator(monkeypatch) -> None:
    module = import_module("minihyperflows.emulator.compilation")
    monkeypatch.setattr(module, "compiler", lambda: None)
    with pytest.raises(CompilerMissingError, match=r"g\+\+ 12"), emulated_gpu():
        pass


def test_no_other_system_has_a_compiler_for_it(monkeypatch) -> None:
    from minihyperflows.emulator import compiler

    monkeypatch.setattr(sys, "platform", "darwin")
    assert compiler() is None


# -- does CuPy have what the package asks it for? --------------------------------------------------


def asks_for_cupy(node: ast.expr) -> bool:
    """Whether the expression is an array module: ``xp``, ``xp_of(...)`` or ``cupy()``."""
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id in ("xp_of", "cupy")
    return isinstance(node, ast.Name) and node.id == "xp"


def dotted(node: ast.expr) -> str | None:
    """ "cuda.Stream" for ``xp.cuda.Stream``; None for other expressions."""
    if not isinstance(node, ast.Attribute):
        return None
    if asks_for_cupy(node.value):
        return node.attr
    inner = dotted(node.value)
    return inner and f"{inner}.{node.attr}"


def names_of_cupy() -> set[str]:
    files = [f for f in PACKAGE.rglob("*.py") if "emulator" not in f.parts]
    nodes = (node for f in files for node in ast.walk(ast.parse(f.read_text(encoding="utf-8"))))
    return {name for node in nodes if isinstance(node, ast.Attribute) and (name := dotted(node))}


def lookup(module: Any, name: str) -> Any:
    for part in name.split("."):
        if isinstance(module, type) or not hasattr(module, part):
            return getattr(module, part, None)
        module = getattr(module, part)
    return module


@pytest.mark.slow
def test_the_emulator_has_what_the_package_asks_for(xp) -> None:
    names = names_of_cupy()
    assert {"empty", "cuda.Stream", "RawModule", "lib.stride_tricks.sliding_window_view"} <= names
    assert not [name for name in names if lookup(xp, name) is None and name != "newaxis"]


def test_cupy_has_what_the_package_asks_for() -> None:
    real = pytest.importorskip("cupy")
    missing = [name for name in names_of_cupy() if lookup(real, name) is None]
    assert missing in ([], ["newaxis"])  # which is None


def test_cupy_has_what_the_emulator_has() -> None:
    real = pytest.importorskip("cupy")
    names = [name for name in vars(ndarray) if not name.startswith("_")]
    assert {"reshape", "shape", "sum", "T"} <= set(names)
    assert not [name for name in names if not hasattr(real.ndarray, name)]
    with emulated_gpu():
        cuda = vars(cupy().cuda)
    for name, value in cuda.items():
        assert hasattr(real.cuda, name), name
        if isinstance(value, type):
            public = [n for n in vars(value) if not n.startswith("_")]
            assert not [n for n in public if not hasattr(getattr(real.cuda, name), n)], name
    assert real.ndarray.__module__ == ndarray.__module__ == "cupy"
