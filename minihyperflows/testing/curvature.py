"""Is a product of the Hessian with a vector right?"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np

from minihyperflows import functional as F
from minihyperflows.engine.errors import NonFiniteLossError
from minihyperflows.engine.tensor import Tensor
from minihyperflows.nn import Linear, Module
from minihyperflows.related.derivatives import Landscape

Vector: TypeAlias = np.ndarray
Gradient: TypeAlias = Callable[[Vector], Vector]
Product: TypeAlias = Callable[[Gradient, Vector, Vector], Vector]

LENGTHS = (1.0, 1e-6, 1e6)  # of v


class _Network(Module):
    """A smooth network with 68 parameters."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.first = Linear(4, 6, rng=rng, dtype=np.float64)
        self.middle = Linear(6, 4, rng=rng, dtype=np.float64)
        self.last = Linear(4, 2, rng=rng, dtype=np.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.tanh(self.middle(F.tanh(self.first(x)))))


def check_hessian_product(
    product: Product, rtol: float = 1e-9, rng: np.random.Generator | int = 0
) -> None:
    """Check a function that gives H v, the Hessian of a loss times a vector, from its gradient.

    ``product(gradient, theta, v)`` may call ``gradient``, which takes a vector of parameters, real
    or complex, and returns dL/dtheta there. Its result is compared with the complex step for random
    vectors v, very short and very long ones too, and for v = 0; theta and v must stay as they are.
    Example::

        check_hessian_product(lambda gradient, theta, v: gradient(theta + 1e-30j * v).imag / 1e-30)

    Args:
        product: the function to judge.
        rtol: the error allowed, relative to the largest entry of H v. Central differences in
            float64 reach 1e-10; one-sided ones stay above 1e-9, whatever their step.
        rng: seed or generator for the network, its images, and v.

    Raises:
        AssertionError: says for which v, what was expected and what was found.
    """
    rng = np.random.default_rng(rng)
    x, labels = rng.standard_normal((10, 4)), rng.integers(0, 2, 10)
    landscape = Landscape(_Network(rng), x, labels)
    theta = landscape.weights
    for length in LENGTHS:
        v = length * rng.standard_normal(theta.shape)
        _check_product(product, landscape, theta, v, rtol, f"for v of length {length:g} x random")
    _check_product(product, landscape, theta, np.zeros_like(theta), rtol, "for v = 0")


def _check_product(
    product: Product, landscape: Landscape, theta: Vector, v: Vector, rtol: float, what: str
) -> None:
    given, copies = (theta, v), (theta.copy(), v.copy())
    try:
        found = np.asarray(product(landscape.gradient, theta, v))
    except NonFiniteLossError as reason:
        raise AssertionError(f"{what} the gradient is asked for at NaN: {reason}") from reason
    for array, copy, name in zip(given, copies, ("theta", "v"), strict=True):
        if not np.array_equal(array, copy):
            raise AssertionError(f"{what} the product changes {name}: work on a copy")
    if found.shape != v.shape or np.iscomplexobj(found):
        raise AssertionError(f"{what} H v is {found.dtype} of shape {found.shape}, v {v.shape}")
    expected = landscape.hessian_product(copies[1], copies[0])
    size = abs(expected).max()
    error = abs(found - expected).max()
    if not error <= rtol * size:
        i = int(np.nan_to_num(abs(found - expected), nan=np.inf).argmax())
        raise AssertionError(
            f"{what} entry {i} of H v is {found[i]:.8g} where {expected[i]:.8g} is expected; "
            f"relative to the largest entry the error is {error / size if size else error:.1e}, "
            f"allowed {rtol:.0e}. Choose the step so that step times v suits theta, whatever the "
            "length of v"
        )
