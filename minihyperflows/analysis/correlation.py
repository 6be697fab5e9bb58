"""Rank correlation and dominance, with their intervals."""

from __future__ import annotations

import math

import numpy as np


def ranks(x: np.ndarray) -> np.ndarray:
    """1 for the smallest number, 2 for the next; equal numbers share the mean of their ranks."""
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """The correlation of the ranks of x and y (n,), (6.13); NaN if one of them is constant."""
    a, b = (r - r.mean() for r in (ranks(x), ranks(y)))
    norm = math.sqrt((a @ a) * (b @ b))
    return float(a @ b / norm) if norm else math.nan


def interval(rho: float, n: int) -> tuple[float, float]:
    """A 95 % interval for a rank correlation of n pairs: artanh rho has variance 1.06 / (n - 3)
    (Fieller, Hartley, Pearson 1957)."""
    center = math.atanh(min(max(rho, -1 + 1e-12), 1 - 1e-12))
    half = 1.96 * math.sqrt(1.06 / (n - 3))
    return math.tanh(center - half), math.tanh(center + half)


def dominance(
    a: np.ndarray, b: np.ndarray, rng: np.random.Generator, resamples: int = 400
) -> tuple[float, float, float]:
    """P(a > b) - P(a < b) for a number of each, and a 95 % interval from resampling both."""
    signs = np.sign(a[:, None] - b)  # (n_a, n_b)
    counts = [rng.multinomial(len(x), np.full(len(x), 1 / len(x)), resamples) for x in (a, b)]
    drawn = ((counts[0] @ signs) * counts[1]).sum(axis=1) / signs.size
    low, high = np.quantile(drawn, (0.025, 0.975))
    return float(signs.mean()), float(low), float(high)
