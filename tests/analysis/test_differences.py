"""Differences, paired by seed (``analysis.differences``)."""

from __future__ import annotations

import math

import numpy as np
import pytest

from minihyperflows.analysis import paired_differences
from minihyperflows.flows.law import mean_half_width


def rows_of(table: dict[str, list[float]], sparsity: float = 0.9) -> list[dict]:
    return [
        {"method": name, "target_sparsity": sparsity, "seed": seed, "test_accuracy": value}
        for name, values in table.items()
        for seed, value in enumerate(values)
    ]


def test_differences_are_paired_by_seed() -> None:
    """Seeds that differ by far more than the methods do not blur the difference."""
    rows = rows_of({"hyperflows": [0.50, 0.71, 0.92], "gradual": [0.49, 0.69, 0.89]})
    (difference,) = paired_differences(rows[::-1])
    assert difference.method == "gradual"
    assert difference.seeds == 3
    assert difference.mean == pytest.approx(0.02)
    # s = 0.01, t = 4.302653 for two degrees of freedom
    assert difference.high - difference.mean == pytest.approx(4.302653 * 0.01 / math.sqrt(3))
    assert difference.low == pytest.approx(0.02 - 0.024841, abs=1e-6)


def test_only_seeds_that_both_have_are_compared() -> None:
    rows = rows_of({"hyperflows": [0.9, 0.8], "rigl": [0.8, 0.6, 0.1], "dense": [0.99, 0.99]})
    rows += rows_of({"rigl": [0.5]}, sparsity=0.95)
    (difference,) = paired_differences(rows)
    assert (difference.seeds, difference.sparsity) == (2, 0.9)
    assert difference.mean == pytest.approx(0.15)
    (one,) = paired_differences(rows_of({"hyperflows": [0.9], "random": [0.3]}))
    assert one.mean == pytest.approx(0.6)
    assert math.isnan(one.low)


def test_the_interval_covers_the_mean_as_often_as_it_says(rng: np.random.Generator) -> None:
    samples = rng.standard_normal((2000, 5))
    covered = np.mean([abs(s.mean()) <= mean_half_width(list(s)) for s in samples])
    assert covered == pytest.approx(0.95, abs=0.02)
