"""Pooling by kernels, against the CPU's in float64."""

from __future__ import annotations

import numpy as np
import pytest
from support.gpu import gpu as gpu

from minihyperflows import Tensor
from minihyperflows import functional as F
from minihyperflows.engine.backend import to_device, to_numpy
from minihyperflows.engine.gpu import pooling
from minihyperflows.engine.gpu.capture import Replay

POOLS = {"max": F.max_pool2d, "avg": F.avg_pool2d}
# Images, size and stride of the windows: pixels left over, windows that overlap, gaps between them,
# one pixel, one window, packs of all widths, rows of more than one block.
CASES = [
    ((2, 4, 4, 8), 2, None),
    ((1, 7, 5, 3), 2, None),
    ((3, 9, 8, 5), 3, 2),
    ((2, 7, 7, 24), (3, 2), 1),
    ((1, 11, 6, 1), 2, (4, 3)),
    ((2, 1, 1, 16), 1, None),
    ((5, 4, 4, 12), 4, None),
    ((1, 3, 40, 34), (2, 3), (1, 2)),
    ((1, 2, 150, 8), 2, None),
    ((1, 17, 19, 2), (16, 16), 1),
]
every_case = pytest.mark.parametrize(("shape", "size", "stride"), CASES)
every_dtype = pytest.mark.parametrize("dtype", ["float32", "float16"])
every_pool = pytest.mark.parametrize("pool", POOLS)
# Relative to the largest number: one rounding (5e-4 in float16), or sums in float32.
TOLERANCE = {"float32": 1e-6, "float16": 6e-4}


def draw(shape: tuple[int, ...], dtype: str, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def forward_and_backward(pool, x, c, size, stride):
    leaf = Tensor(x, requires_grad=True)
    y = POOLS[pool](leaf, size, stride)
    on_gpu = isinstance(y.creator, pooling.Pool2d)
    y.backward(c)
    return y.data, leaf.grad, on_gpu


def assert_near(found, expected: np.ndarray, dtype: str) -> None:
    assert found.dtype == dtype
    bound = TOLERANCE[dtype] * np.abs(expected).max()
    np.testing.assert_allclose(to_numpy(found).astype(np.float64), expected, rtol=0, atol=bound)


@every_case
@every_dtype
@every_pool
def test_pooling_is_that_of_the_cpu(gpu, pool, shape, size, stride, dtype):
    x = np.round(draw(shape, dtype), 1)  # with equals in a window
    y_shape = POOLS[pool](Tensor(x), size, stride).shape
    c = draw(y_shape, dtype, 1)
    wide = (a.astype(np.float64) for a in (x, c))
    y, dx, _ = forward_and_backward(pool, *wide, size, stride)
    arrays = (to_device(a, "cuda") for a in (x, c))
    y_gpu, dx_gpu, on_gpu = forward_and_backward(pool, *arrays, size, stride)
    assert on_gpu
    assert_near(y_gpu, y, dtype)
    assert_near(dx_gpu, dx, dtype)
    if pool == "max":
        np.testing.assert_array_equal(to_numpy(y_gpu), y)


@every_dtype
def test_the_places_are_those_of_the_cpu(gpu, dtype):
    """The first of equals; a NaN wherever there is one, the last of several."""
    x = np.round(draw((2, 6, 6, 3), dtype))
    x[0, 1, 1], x[1, 3, 2, 0], x[1, 3, 3, 0] = np.nan, np.nan, np.nan
    results = []
    for device in ("cpu", "cuda"):
        y = F.max_pool2d(Tensor(to_device(x, device), requires_grad=True), 3, 1)
        results.append((y.numpy(), to_numpy(y.creator.place)))
    for found, expected in zip(results[1], results[0], strict=True):
        np.testing.assert_array_equal(found, expected)
    assert results[1][1].dtype == "uint8"


@every_pool
def test_large_windows_and_other_types(gpu, pool):
    """A byte counts 256 places; what does not fit goes the general way."""
    x = draw((1, 20, 17, 2), "float32")
    for dtype, size, expected in (
        ("float32", (16, 16), True),
        ("float32", (17, 17), pool == "avg"),
        ("float64", (2, 2), False),
    ):
        wide = x.astype(np.float64)
        y = POOLS[pool](Tensor(wide), size)
        c = draw(y.shape, dtype, 1)
        y, dx, _ = forward_and_backward(pool, wide, c.astype(np.float64), size, None)
        arrays = (to_device(a, "cuda") for a in (x.astype(dtype), c))
        y_gpu, dx_gpu, on_gpu = forward_and_backward(pool, *arrays, size, None)
        assert on_gpu == expected
        np.testing.assert_allclose(to_numpy(y_gpu), y, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(to_numpy(dx_gpu), dx, rtol=1e-5, atol=1e-6)


@every_dtype
@every_pool
def test_a_cotangent_of_another_kind(gpu, pool, dtype):
    """Of another dtype, or not contiguous."""
    x, c = draw((2, 6, 6, 4), dtype), draw((2, 4, 3, 3), "float64", 1)
    _, dx, _ = forward_and_backward(pool, x.astype(np.float64), c.transpose(0, 2, 3, 1), 2, None)
    c = to_device(c, "cuda").transpose(0, 2, 3, 1)
    _, dx_gpu, on_gpu = forward_and_backward(pool, to_device(x, "cuda"), c, 2, None)
    assert on_gpu
    np.testing.assert_allclose(to_numpy(dx_gpu), dx, atol=4e-3)


@every_pool
def test_a_complex_cotangent_is_refused(gpu, pool):
    x, c = draw((1, 2, 2, 3), "float32"), draw((1, 1, 1, 3), "float32") + 1j
    with pytest.raises(TypeError, match="complex"):
        forward_and_backward(pool, to_device(x, "cuda"), to_device(c, "cuda"), 2, None)


@every_dtype
@every_pool
def test_a_replay_is_the_step_itself(gpu, pool, dtype):
    x = Tensor(to_device(draw((2, 7, 5, 8), dtype), "cuda"), requires_grad=True)
    c = to_device(draw((2, 3, 2, 8), dtype, 1), "cuda")
    results = {}

    def step():
        x.grad = None
        y = POOLS[pool](x, 3, 2)
        y.backward(c)
        results.update(y=y.data, dx=x.grad)

    step()
    replay = Replay(step)
    recorded = dict(results)
    for seed in (2, 3):
        x.data.set(draw(x.shape, dtype, seed))
        c.set(draw(c.shape, dtype, seed + 2))
        replay()
        step()
        for name, array in recorded.items():
            np.testing.assert_array_equal(to_numpy(array), to_numpy(results[name]))
            assert np.isfinite(to_numpy(array)).all()


def test_windows_that_do_not_overlap_are_read_by_packs(gpu, monkeypatch):
    launched = []
    monkeypatch.setattr(pooling.SOURCE, "launch", lambda kernel, *a: launched.append(kernel))
    for channels in (1, 2, 4, 8, 12):
        pooling.max_pool(to_device(draw((1, 2, 2, channels), "float16"), "cuda"), (2, 2), (2, 2))
    assert launched == [f"max_pool<__half, {v}>" for v in (1, 2, 4, 8, 4)]
