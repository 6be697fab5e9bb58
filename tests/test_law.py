"""The power-law fit."""

import numpy as np
import pytest

from minihyperflows.flows import fit_power_law
from minihyperflows.flows.law import student_t_cdf, student_t_quantile

# The authors' LeNet-300 experiments: gamma = 2^k, per cent of the weights left (their history).
ADAM = [10.8471, 7.4880, 5.0650, 3.5984, 2.4463, 1.2701, 0.7863, 0.4823, 0.2904, 0.1649, 0.1202]
ADAM += [0.0740, 0.0541, 0.0199]  # k = -6 ... 7
SGD = [1.7205, 1.0778, 0.7261, 0.4320, 0.2615, 0.2092, 0.1089, 0.0748, 0.0496]  # k = -2 ... 6


def test_an_exact_law_is_recovered():
    gamma = 2.0 ** np.arange(-4, 5)
    law = fit_power_law(gamma, 0.03 * gamma**-0.65)
    assert law.c == pytest.approx(0.03)
    assert law.alpha == pytest.approx(0.65)
    assert law.r2 == pytest.approx(1)
    assert law.alpha_interval == pytest.approx((0.65, 0.65))
    assert law(4.0) == pytest.approx(0.03 * 4**-0.65)


def test_the_authors_fits():
    law = fit_power_law(2.0 ** np.arange(-6, 8), ADAM)
    assert (law.c, law.alpha, law.r2) == pytest.approx((0.762, 0.686, 0.9947), abs=6e-4)
    law = fit_power_law(2.0 ** np.arange(-2, 7), SGD)
    assert (law.c, law.alpha, law.r2) == pytest.approx((0.697, 0.642, 0.997), abs=6e-4)


@pytest.mark.parametrize(
    ("freedom", "quantile"),
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (5, 2.571), (12, 2.179), (30, 2.042)],
)
def test_students_t(freedom, quantile):
    assert student_t_quantile(0.975, freedom) == pytest.approx(quantile, abs=6e-4)
    assert student_t_cdf(0.0, freedom) == 0.5


def test_the_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    gamma = 2.0 ** np.arange(-4, 5)
    hits = 0
    for _ in range(1000):
        law = fit_power_law(gamma, gamma**-0.7 * np.exp(0.2 * rng.standard_normal(9)))
        low, high = law.alpha_interval
        hits += low <= 0.7 <= high
    assert 930 <= hits <= 970  # 950 expected, standard deviation 7


@pytest.mark.parametrize(
    ("gamma", "density", "message"),
    [
        ([1.0], [0.1], "two or more"),
        ([1.0, 2.0], [0.1], "two or more"),
        ([1.0, 2.0], [0.1, 0.0], "positive"),
        ([0.0, 2.0], [0.1, 0.2], "positive"),
        ([2.0, 2.0], [0.1, 0.2], "all values of gamma are equal"),
    ],
)
def test_what_has_no_fit(gamma, density, message):
    with pytest.raises(ValueError, match=message):
        fit_power_law(gamma, density)


def test_two_points_have_no_interval():
    assert np.isnan(fit_power_law([1, 2], [0.2, 0.1]).alpha_interval).all()
