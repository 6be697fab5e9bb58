"""Comparing two results, with a message that says how they differ."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from minihyperflows.engine.tensor import Tensor


def assert_close(
    mine: Any, package: Any, rtol: float = 1e-7, atol: float = 1e-12, what: str = "the result"
) -> None:
    """Check that |mine - package| <= atol + rtol |package|, number by number.

    Example::

        assert_close(my_softmax(x), F.softmax(x), what="softmax")

    Args:
        mine: the answer: a tensor, an array, a number, or a dictionary of them.
        package: what it should be.
        rtol, atol: the relative and the absolute error allowed. The defaults suit float64; for
            float32 an ``rtol`` of 1e-5 is usual.
        what: its name in the message.

    Raises:
        AssertionError: the shapes (or names) differ, or a number is too far off. A NaN is close
            only to a NaN.
    """
    if isinstance(package, Mapping):
        _assert_same_names(mine, package, what)
        for name, expected in package.items():
            assert_close(mine[name], expected, rtol, atol, f"{what}, {name}")
        return
    found, expected = as_array(mine), as_array(package)
    if found.shape != expected.shape:
        raise AssertionError(f"{what} has shape {found.shape} where {expected.shape} is expected")
    wrong = ~np.isclose(found, expected, rtol, atol, equal_nan=True)
    if wrong.any():
        raise AssertionError(f"{what} is wrong: {_differences(found, expected, wrong, rtol)}")


def as_array(value: Any) -> np.ndarray:
    """The values of a tensor, an array or a number as a NumPy array."""
    return value.numpy() if isinstance(value, Tensor) else np.asarray(value)


def _assert_same_names(mine: Any, package: Mapping[str, Any], what: str) -> None:
    found = sorted(mine) if isinstance(mine, Mapping) else type(mine).__name__
    if found != sorted(package):
        raise AssertionError(f"{what} has {found} where {sorted(package)} is expected")


def _differences(found: np.ndarray, expected: np.ndarray, wrong: np.ndarray, rtol: float) -> str:
    """Where the two differ most, how much, and in how many places."""
    with np.errstate(invalid="ignore"):
        error = np.where(wrong, np.nan_to_num(abs(found - expected), nan=np.inf), -1.0)
    at = np.unravel_index(error.argmax(), error.shape)
    place = f"at index {tuple(map(int, at))} " if at else ""
    count = f" ({int(wrong.sum())} of {wrong.size} numbers are off)" if wrong.size > 1 else ""
    return (
        f"{place}expected {expected[at]:.8g}, found {found[at]:.8g}, "
        f"relative error {relative_error(found[at], expected[at]):.1e}, allowed {rtol:.0e}{count}"
    )


def relative_error(found: Any, expected: Any) -> float:
    """|found - expected| / max(|found|, |expected|); 0 if both are 0, NaN if one is not finite."""
    larger = max(abs(found), abs(expected))
    if not np.isfinite(larger):
        return float("nan")
    return float(abs(found - expected) / larger) if larger else 0.0
