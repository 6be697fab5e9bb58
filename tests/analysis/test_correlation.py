"""Rank correlation and dominance (``analysis.correlation``)."""

from __future__ import annotations

import numpy as np
import pytest

from minihyperflows import analysis


def test_ranks_share_ties() -> None:
    assert analysis.ranks(np.array([3.0, 1.0, 3.0, 2.0])).tolist() == [3.5, 1, 3.5, 2]


def test_spearman_is_one_for_any_rising_function_and_nan_for_a_constant() -> None:
    x = np.random.default_rng(0).standard_normal(30)
    assert analysis.spearman(x, np.exp(x)) == pytest.approx(1)
    assert analysis.spearman(x, -(x**3)) == pytest.approx(-1)
    assert np.isnan(analysis.spearman(x, np.ones(30)))


def test_spearman_of_untied_ranks_has_the_textbook_form() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.permutation(12), rng.permutation(12)
    textbook = 1 - 6 * ((a - b) ** 2).sum() / (12 * (12**2 - 1))
    assert analysis.spearman(a, b) == pytest.approx(textbook)


def test_interval_covers_about_95_in_100() -> None:
    rng, covered = np.random.default_rng(0), 0
    true = 6 / np.pi * np.arcsin(0.6 / 2)  # of a normal pair with correlation 0.6
    for _ in range(300):
        x, noise = rng.standard_normal((2, 100))
        rho = analysis.spearman(x, 0.6 * x + 0.8 * noise)
        low, high = analysis.interval(rho, 100)
        covered += low < true < high
    assert 0.9 < covered / 300 < 0.99
    assert analysis.interval(1.0, 30)[1] <= 1


def test_dominance() -> None:
    rng = np.random.default_rng(0)
    assert analysis.dominance(np.array([2.0, 3.0]), np.array([0.0, 1.0]), rng)[0] == 1
    value, low, high = analysis.dominance(rng.normal(1, 1, 80), rng.normal(0, 1, 90), rng)
    assert low < value < high
    assert low > 0  # the true value is 0.52
