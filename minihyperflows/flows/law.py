"""The power law: the density that a constant pressure leads to (chapter 10)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class PowerLaw:
    """density = c * gamma ** -alpha.

    Attributes:
        c: the density at gamma = 1.
        alpha: the exponent; the density falls by 2^-alpha with every octave of gamma.
        r2: the fraction of the variance of ln density that the line explains.
        alpha_interval: 95 % confidence interval of alpha (Student's t with n - 2 degrees of
            freedom; assumes independent, equally scattered ln density). NaN for two points.
    """

    c: float
    alpha: float
    r2: float
    alpha_interval: tuple[float, float]

    def __call__(self, gamma: Any) -> Any:
        """The density at pressure ``gamma`` (a number or an array)."""
        return self.c * np.asarray(gamma, dtype=float) ** -self.alpha


def fit_power_law(gamma: Any, density: Any) -> PowerLaw:
    """Least squares of ln density against ln gamma.

    Args:
        gamma: pressures, all positive, not all equal.
        density: the densities they lead to, all positive (in any unit; c has the same).

    Raises:
        ValueError: fewer than two points, shapes that differ, or values without a logarithm.
    """
    gamma, density = np.asarray(gamma, dtype=float), np.asarray(density, dtype=float)
    if gamma.shape != density.shape or gamma.ndim != 1 or gamma.size < 2:
        raise ValueError(
            f"a fit needs two or more pairs; got gamma of shape {gamma.shape} and density of shape "
            f"{density.shape}"
        )
    if not (np.all(gamma > 0) and np.all(density > 0) and np.isfinite(gamma * density).all()):
        raise ValueError("gamma and density must be positive and finite: leave other points out")
    x, y = np.log(gamma), np.log(density)
    spread = float(((x - x.mean()) ** 2).sum())
    if spread == 0:
        raise ValueError("all values of gamma are equal: no slope can be fitted")

    slope = float(((x - x.mean()) * (y - y.mean())).sum()) / spread
    intercept = float(y.mean() - slope * x.mean())
    residual = float(((y - intercept - slope * x) ** 2).sum())
    total = float(((y - y.mean()) ** 2).sum())
    half_width = _slope_half_width(residual, spread, x.size)
    return PowerLaw(
        c=math.exp(intercept),
        alpha=-slope,
        r2=1 - residual / total if total else 1.0,
        alpha_interval=(-slope - half_width, -slope + half_width),
    )


def _slope_half_width(residual: float, spread: float, n: int) -> float:
    """t_{0.975, n-2} times the standard error of a fitted slope."""
    if n < 3:
        return math.nan
    return student_t_quantile(0.975, n - 2) * math.sqrt(residual / (n - 2) / spread)


def student_t_quantile(probability: float, freedom: int) -> float:
    """The t that Student's distribution with ``freedom`` degrees of freedom stays below.

    By bisection of :func:`student_t_cdf`, for probabilities in [0.5, 1).
    """
    low, high = 0.0, 1.0
    while student_t_cdf(high, freedom) < probability:
        high *= 2
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        if student_t_cdf(middle, freedom) < probability:
            low = middle
        else:
            high = middle
    return high


def student_t_cdf(t: float, freedom: int) -> float:
    """P(T <= t) for t >= 0 and a whole number of degrees of freedom.

    With theta = arctan(t / sqrt(freedom)) the integral of the density is a finite sum of powers of
    cos(theta). Source: Abramowitz & Stegun, 26.7.3 and 26.7.4.
    """
    theta = math.atan(t / math.sqrt(freedom))
    cos2 = math.cos(theta) ** 2
    odd = freedom % 2
    term = math.cos(theta) if odd else 1.0
    series = 0.0
    for k in range(freedom // 2):
        series += term
        term *= cos2 * (2 * k + 1 + odd) / (2 * k + 2 + odd)
    central = math.sin(theta) * series  # P(-t <= T <= t)
    if odd:
        central = 2 / math.pi * (theta + central)
    return 0.5 + central / 2
