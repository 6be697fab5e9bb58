"""Matrix products: NumPy's, cut into blocks by size alone."""

import numpy as np
import pytest

from minihyperflows import Tensor
from minihyperflows import functional as F
from minihyperflows.engine import products, threads
from minihyperflows.engine.blas import blas_threads, set_blas_threads
from minihyperflows.engine.products import matmul
from minihyperflows.engine.threads import set_threads


@pytest.fixture(autouse=True)
def _as_before():
    before = blas_threads()
    yield
    set_threads(None)
    set_blas_threads(before)


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(products, "BLOCK", 30)
    monkeypatch.setattr(products, "LEAST_SIDE", 2)
    monkeypatch.setattr(products, "LEAST_STACK", 3)


def whole(rng, shape, dtype):
    """Small whole numbers, whose sums are exact in any order, in some memory order."""
    a = rng.integers(-4, 5, shape).astype(dtype)
    if np.dtype(dtype).kind == "c":
        a = a + 1j * rng.integers(-4, 5, shape).astype(dtype)
    order = rng.permutation(a.ndim)
    return np.ascontiguousarray(a.transpose(order)).transpose(np.argsort(order))


DTYPES = ["float32", "float64", "complex64", "complex128", "float16", "longdouble", "int64", "bool"]


@pytest.mark.slow
def test_any_shapes_and_dtypes(small_blocks, rng):
    cut = 0
    for case in range(600):
        set_threads(1 + case % 3)
        n, k, m = rng.integers(0 if case % 10 == 0 else 1, 12, 3)
        stack = tuple(rng.integers(1, 6, rng.integers(0, 3)))
        stacks = [
            tuple(1 if rng.random() < 0.2 else s for s in stack)[rng.integers(0, len(stack) + 1) :]
            for _ in range(2)
        ]
        dtypes = DTYPES[case % len(DTYPES)], rng.choice(DTYPES)
        a = whole(rng, (*stacks[0], n, k), dtypes[0])
        b = whole(rng, (*stacks[1], k, m), dtypes[case % 3 == 0])
        y, right = matmul(a, b), np.matmul(a, b)
        assert (y.shape, y.dtype) == (right.shape, right.dtype)
        np.testing.assert_array_equal(y, right, err_msg=f"case {case}")
        cut += products._is_large(a, b)
    assert cut > 200


@pytest.mark.parametrize("shape", [(5,), (0,), (400, 5), (2, 3, 5)])
def test_one_row(rng, shape, small_blocks):
    x, w = rng.standard_normal(shape), rng.standard_normal((shape[-1], 4))
    np.testing.assert_allclose(matmul(x, w), x @ w, rtol=1e-12)


@pytest.fixture
def helped(monkeypatch):
    """For each operation that the pool shared: how many blocks it had."""
    asked = []
    share = threads._share

    def counted(work, slices, others):
        asked.append(len(slices))
        return share(work, slices, others)

    monkeypatch.setattr(threads, "_share", counted)
    return asked


@pytest.mark.parametrize(
    ("a", "b", "shared"),
    [
        ((64, 784), (784, 300), False),  # LeNet-300 on a small batch
        ((512, 784), (784, 300), True),
        ((300, 512), (512, 784), True),
        ((64, 10, 64), (64, 64, 10), False),  # attention over few tokens
        ((64, 197, 64), (64, 64, 197), True),
        ((2, 3, 400, 400), (400, 400), True),  # too few matrices to share: cut through each
    ],
)
def test_the_pool_gets_the_large_ones(helped, a, b, shared):
    set_threads(2)
    matmul(np.ones(a, np.float32), np.ones(b, np.float32))
    assert bool(helped) == shared
    assert all(blocks > 1 for blocks in helped)


def test_with_one_thread_the_pool_gets_nothing(helped):
    set_threads(1)
    matmul(np.ones((512, 784), np.float32), np.ones((784, 300), np.float32))
    assert not helped


@pytest.mark.parametrize("dtype", ["float32", "float64", "complex64"])
def test_linear_layers_and_products_do_not_depend_on_the_threads(dtype, rng, monkeypatch):
    """Bit for bit: forward and gradients, in products of odd sizes above the limit."""
    shapes = {"x": (7, 91, 203), "weight": (305, 203), "bias": (305,), "b": (7, 305, 399)}
    arrays = {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}
    monkeypatch.setattr(products, "BLOCK", 1 << 23)  # smaller, for products of a test's size
    assert 4 * products.BLOCK < 7 * 91 * 203 * 305
    results = []
    for number in (1, 2, 3):
        set_threads(number)
        x, weight, bias, b = (Tensor(a, requires_grad=True) for a in arrays.values())
        y = F.linear(x, weight, bias) @ b
        (y * y).sum().backward()
        results.append([y.data, x.grad, weight.grad, bias.grad, b.grad])
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            np.testing.assert_array_equal(one, two)
