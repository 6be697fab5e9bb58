"""The check of Hessian products: it passes right ones and objects to careless ones."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from minihyperflows.testing.curvature import check_hessian_product

Vector = np.ndarray
Gradient = Callable[[Vector], Vector]


def complex_step(gradient: Gradient, theta: Vector, v: Vector) -> Vector:
    return gradient(theta + 1e-30j * v).imag / 1e-30


def length(v: Vector) -> float:
    """|v|, never quite 0."""
    return max(float(np.linalg.norm(v)), 1e-300)


def central(gradient: Gradient, theta: Vector, v: Vector) -> Vector:
    step = 1e-5 * max(1.0, length(theta)) / length(v)
    return (gradient(theta + step * v) - gradient(theta - step * v)) / (2 * step)


def test_right_products_pass() -> None:
    check_hessian_product(complex_step, rtol=1e-12)
    for seed in range(3):
        check_hessian_product(central, rng=seed)


def one_sided(gradient: Gradient, theta: Vector, v: Vector) -> Vector:
    step = 1e-8 * max(1.0, length(theta)) / length(v)
    return (gradient(theta + step * v) - gradient(theta)) / step


def fixed_step(gradient: Gradient, theta: Vector, v: Vector) -> Vector:
    return (gradient(theta + 1e-5 * v) - gradient(theta - 1e-5 * v)) / 2e-5


def divides_by_zero(gradient: Gradient, theta: Vector, v: Vector) -> Vector:
    step = 1e-5 / np.linalg.norm(v)
    return (gradient(theta + step * v) - gradient(theta - step * v)) / (2 * step)


def in_place(gradient: Gradient, theta: Vector, v: Vector) -> Vector:
    found = complex_step(gradient, theta, v)
    v /= 2
    return found


def forgets_the_imaginary_part(gradient: Gradient, theta: Vector, v: Vector) -> Vector:
    return gradient(theta + 1e-30j * v) / 1e-30


def the_gradient(gradient: Gradient, theta: Vector, v: Vector) -> Vector:
    return gradient(theta) * v


@pytest.mark.filterwarnings("ignore:divide by zero", "ignore:invalid value")
@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (one_sided, "allowed 1e-09"),
        (fixed_step, "for v of length 1e-06 x random entry"),
        (divides_by_zero, "for v = 0"),
        (in_place, "changes v"),
        (forgets_the_imaginary_part, "complex128"),
        (the_gradient, "is expected"),
    ],
)
def test_careless_products_are_found(broken: Callable[..., Vector], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_hessian_product(broken)
