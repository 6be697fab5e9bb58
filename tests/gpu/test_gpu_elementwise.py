"""Element-wise kernels against NumPy, and where the engine calls them."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from support.gpu import gpu as gpu
from support.spies import calls_of

from minihyperflows import Function, Tensor, apply
from minihyperflows import functional as F
from minihyperflows.engine import threads
from minihyperflows.engine.backend import cupy, to_device, to_numpy
from minihyperflows.engine.gpu import elementwise
from minihyperflows.engine.gpu.capture import Replay

DTYPES = ("float32", "float16")
# Below, at and beyond a pack of 4 or 8, and more than a block.
SIZES = (1, 3, 4, 7, 8, 9, 64, 1000, 4099)
every_size = pytest.mark.parametrize("size", SIZES)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


def draw(size: int | tuple[int, ...], dtype: str, seed: int = 0) -> np.ndarray:
    numbers = np.random.default_rng(seed).standard_normal(size).astype(dtype)
    numbers.reshape(-1)[: numbers.size // 5] = 0
    return numbers


def on_gpu(*arrays: np.ndarray):
    return tuple(to_device(a, "cuda") for a in arrays)


def assert_same(found, expected: np.ndarray) -> None:
    """Bit for bit: each number is rounded once."""
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(to_numpy(found), expected)


@every_size
@every_dtype
def test_relu(gpu, size, dtype):
    x, c = draw(size, dtype), draw(size, dtype, 1)
    x[-1] = np.nan
    leaf = Tensor(*on_gpu(x), requires_grad=True)
    y = F.relu(leaf)
    assert_same(y.data, np.maximum(x, 0))
    y.backward(to_device(c, "cuda"))
    assert_same(leaf.grad, np.where(x > 0, c, 0).astype(dtype))


@every_size
@pytest.mark.parametrize(("a_dtype", "b_dtype"), list(product(DTYPES, repeat=2)))
def test_add(gpu, size, a_dtype, b_dtype, monkeypatch):
    a, b = draw(size, a_dtype), draw(size, b_dtype, 1)
    expected = a + b  # NumPy adds float16 in float32 too
    x, y = on_gpu(a, b)
    sums = calls_of(monkeypatch, elementwise, "_sum")
    assert_same(threads.add(x, y), expected)
    wider = x if x.dtype == expected.dtype else y
    assert threads.add(x, y, out=wider) is wider
    assert_same(wider, expected)
    assert len(sums) == 2  # by the kernel


@every_size
@pytest.mark.parametrize(("a_dtype", "b_dtype"), list(product(DTYPES, repeat=2)))
def test_conversion(gpu, size, a_dtype, b_dtype):
    a = 1000 * draw(size, a_dtype)
    out = cupy().empty(size, b_dtype)
    elementwise.convert(*on_gpu(a), out)
    assert_same(out, a.astype(b_dtype))


def test_a_thread_may_have_many_turns(gpu, monkeypatch):
    monkeypatch.setattr(elementwise, "blocks_for", lambda items: 1)
    a, b = draw(9001, "float16"), draw(9001, "float16", 1)
    x, y = on_gpu(a, b)
    assert_same(threads.add(x, y), a + b)
    assert_same(elementwise.relu(x), np.maximum(a, 0))
    assert_same(elementwise.relu_backward(y, x), np.where(a > 0, b, 0).astype("float16"))
    out = cupy().empty(9001, "float32")
    elementwise.convert(x, out)
    assert_same(out, a.astype("float32"))


@pytest.mark.parametrize("start", range(9))
@every_dtype
def test_parts_of_arrays_begin_anywhere(gpu, start, dtype):
    """The address of a pack is a multiple of its size, or there are no packs."""
    a, b = draw(64, dtype), draw(64, dtype, 1)
    x, y = on_gpu(a, b)
    assert_same(threads.add(x[start : start + 48], y[8:56]), a[start : start + 48] + b[8:56])
    out = cupy().zeros(64, "float32")
    elementwise.convert(x[8:56], out[start : start + 48])
    expected = np.zeros(64, np.float32)
    expected[start : start + 48] = a[8:56]
    assert_same(out, expected)


def test_what_no_kernel_takes(gpu):
    """Other dtypes and layouts go the general way."""
    a, b = draw((4, 6), "float64"), draw((4, 6), "float32")
    x, y = on_gpu(a, b)
    assert_same(threads.add(x, x), a + a)
    assert_same(threads.add(y.T, y.T), (b + b).T)
    assert_same(threads.add(x, y), a + b)
    assert_same(F.relu(Tensor(y.T)).data, np.maximum(b.T, 0))


def test_nothing_is_no_trouble(gpu):
    empty = cupy().empty((0, 3), "float32")
    assert threads.add(empty, empty).shape == (0, 3)
    assert F.relu(Tensor(empty)).shape == (0, 3)


@every_dtype
def test_gradients_meet_and_reach_their_buffer_in_a_graph(gpu, dtype):
    """relu(x) is used twice, and so is x: the engine adds with kernels alone."""
    x = Tensor(*on_gpu(draw((5, 9), dtype)), requires_grad=True)
    c, d = on_gpu(draw((5, 9), dtype, 1), draw((5, 9), dtype, 2))
    x.gradient_buffer = cupy().empty((5, 9), "float32")

    def step():
        x.grad = None
        F.relu(F.relu(x)).backward(c)
        y = F.relu(x)
        F.relu(y).backward(d)

    step()
    replay = Replay(step)
    for seed in (3, 4):
        host = [draw((5, 9), dtype, seed + i) for i in range(3)]
        for array, values in zip((x.data, c, d), host, strict=True):
            array.set(values)
        replay()
        expected = np.where(host[0] > 0, host[1].astype("float32") + host[2], 0)
        assert_same(x.gradient_buffer, expected.astype("float32"))
        again = to_numpy(x.gradient_buffer).copy()
        step()
        assert_same(x.gradient_buffer, again)


class Fork(Function):
    """A copy of a, as if a and b were one;  dL/da = dL/db = c."""

    def forward(self, a, b):
        return a.copy()

    def backward(self, c):
        return c, c


@every_dtype
def test_what_reaches_an_intermediate_twice_is_added_in_a_graph(gpu, dtype):
    x = Tensor(*on_gpu(draw((3, 7), dtype)), requires_grad=True)
    c = to_device(draw((3, 7), dtype, 1), "cuda")
    x.gradient_buffer = cupy().empty((3, 7), "float32")

    def step():
        x.grad = None
        y = F.relu(x)
        apply(Fork(), y, y).backward(c)

    step()
    replay = Replay(step)
    x.gradient_buffer.fill(0)
    replay()
    x_host, c_host = to_numpy(x.data), to_numpy(c)
    expected = np.where(x_host > 0, c_host + c_host, 0)
    assert_same(x.gradient_buffer, expected.astype("float32"))
