"""Is a proximal operator the minimiser that it claims to be?"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

Array = np.ndarray
GRID = np.linspace(-6, 6, 481)  # candidates for a vector of one entry; 0 is one of them
TAUS = (1e-3, 0.1, 0.5, 2.0)
SLACK = 1e-9  # by which another point may be better: rounding


def check_proximal(
    proximal: Callable[[Array, float], Array],
    penalty: Callable[[Array], float],
    rng: np.random.Generator | int = 0,
) -> None:
    """Check a proximal operator, the minimiser of a penalty near a point:

        proximal(z, tau) = argmin over x of  1/2 |x - z|^2 + tau penalty(x)

    For vectors of one entry every x on a fine grid is tried against what the operator returns, so
    a minimum that is only a local one is found out. For longer vectors many other points are:
    z with some of its entries set to 0 or scaled, and small steps away from the answer. Shape and
    dtype must be those of z, z must not be written into, and tau = 0 must change nothing. Example::

        check_proximal(dhp.soft_threshold, lambda x: abs(x).sum())

    Args:
        proximal: takes an array z and tau >= 0; returns an array like z.
        penalty: of an array of any length; need not be convex.
        rng: seed or generator for the z and the steps.

    Raises:
        AssertionError: names z, tau, what was returned, and a point that is better.
    """
    rng = np.random.default_rng(rng)
    for dtype in (np.float32, np.float64):
        for z in _points(rng):
            _check_form(proximal, z.astype(dtype))
    for z in _points(rng):
        for tau in TAUS:
            found = proximal(z.copy(), tau)
            _check_minimum(z, tau, found, penalty, _others(z, found, rng))


def _points(rng: np.random.Generator) -> Iterator[Array]:
    """The z: numbers large and small, of both signs, zeros; vectors of several."""
    for value in (0.0, 0.03, -0.2, 0.7, -1.1, 1.9, *rng.normal(0, 1.5, 8)):
        yield np.array([value])
    yield np.zeros(3)
    yield from (scale * rng.standard_normal(n) for n in (2, 5) for scale in (0.1, 1.0))
    yield np.array([1.3, 0.0, -0.4, 0.02])


def _check_form(proximal: Callable[[Array, float], Array], z: Array) -> None:
    before = z.copy()
    for tau in (0.0, 0.3):
        found = proximal(z, tau)
        if not np.array_equal(z, before):
            raise AssertionError("the operator writes into z: return a new array")
        if not isinstance(found, np.ndarray) or (found.shape, found.dtype) != (z.shape, z.dtype):
            kind = f"{getattr(found, 'dtype', type(found).__name__)} {np.shape(found)}"
            raise AssertionError(f"from z of {z.dtype} {z.shape} comes {kind}: it must be alike")
        if tau == 0 and not np.array_equal(found, z):
            raise AssertionError(f"at z = {z} tau = 0 gives {found}: without a penalty, x is z")


def _others(z: Array, found: Array, rng: np.random.Generator) -> Iterator[Array]:
    """Points to compare with the answer."""
    if z.size == 1:
        yield from GRID[:, None]
    yield z
    yield np.zeros_like(z)
    for _ in range(30):
        yield z * (rng.uniform(size=z.shape) < 0.5)  # some entries gone
        yield z * rng.uniform(0, 1)  # all a little smaller
        step = 10.0 ** rng.uniform(-4, -1) * rng.standard_normal(z.shape)
        yield found + step
        yield found + step * (found != 0)  # zeros stay
        yield found + step * (np.arange(z.size) == rng.integers(z.size))  # one entry


def _check_minimum(
    z: Array, tau: float, found: Array, penalty: Callable[[Array], float], others: Iterator[Array]
) -> None:
    def objective(x: Array) -> float:
        return float(((x - z) ** 2).sum() / 2 + tau * penalty(x))

    best = min(others, key=objective)
    if not objective(found) <= objective(best) + SLACK:
        raise AssertionError(
            f"at z = {z}, tau = {tau} the operator returns {found}, where "
            f"1/2 |x - z|^2 + tau penalty(x) is {objective(found):.6g}; at {best} it is "
            f"{objective(best):.6g}"
        )
