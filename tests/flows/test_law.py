"""The power-law fit."""

import numpy as np
import pytest
from support.lanes import large

from minihyperflows.flows import fit_power_law
from minihyperflows.flows.law import (
    FORMS,
    akaike_weights,
    compare_forms,
    fit_form,
    lack_of_fit,
    local_slopes,
    student_t_cdf,
    student_t_quantile,
)

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


# -- other forms ---------------------------------------------------------------------------------

OCTAVES = 2.0 ** np.arange(-8, 8)

# One law of each form, with its formula written out once more.
PLANTED = {
    "power law": ({"c": 0.008, "alpha": 0.7}, lambda g: 0.008 * g**-0.7),
    "bounded": ({"alpha": 0.7, "gamma0": 0.01}, lambda g: (1 + g / 0.01) ** -0.7),
    "log-quadratic": (
        {"c": 0.008, "a0": 0.7, "a1": 0.05},
        lambda g: 0.008 * np.exp(-(0.7 * np.log(g) + 0.05 * np.log(g) ** 2)),
    ),
    "cutoff": (
        {"c": 0.008, "alpha": 0.7, "rate": 0.02},
        lambda g: 0.008 * g**-0.7 * np.exp(-0.02 * g),
    ),
    "offset": (
        {"c": 0.008, "alpha": 0.7, "gamma0": 0.05},
        lambda g: 0.008 * (g + 0.05) ** -0.7,
    ),
    "broken line": (
        {"c": 0.008, "alpha": 0.5, "bend": 0.5, "gamma0": 0.3},
        lambda g: 0.008 * g**-0.5 * np.maximum(g / 0.3, 1) ** -0.5,
    ),
}


def test_every_form_is_planted_here():
    assert set(PLANTED) == set(FORMS)


@pytest.mark.parametrize("name", FORMS)
def test_a_form_recovers_what_was_planted(name):
    parameters, law = PLANTED[name]
    fit = fit_form(name, OCTAVES, law(OCTAVES))
    assert fit.parameters == pytest.approx(parameters, rel=1e-4)
    assert abs(fit.residuals).max() < 1e-4
    assert fit(np.array([0.1, 3.0])) == pytest.approx(law(np.array([0.1, 3.0])), rel=1e-4)
    for parameter, (low, high) in fit.intervals.items():
        assert low <= fit.parameters[parameter] <= high


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMS)
def test_the_criterion_picks_what_was_planted(name):
    rng = np.random.default_rng(1)
    law, wins, draws = PLANTED[name][1], 0, 10
    gamma = np.tile(OCTAVES, 3)
    for _ in range(draws):
        best = compare_forms(gamma, law(gamma) * np.exp(0.05 * rng.standard_normal(gamma.size)))[0]
        wins += best.form == name
    assert wins >= 7


def test_the_criterion_of_a_line_by_hand():
    gamma, density = [1, np.e, np.e**2, np.e**3, np.e**4], np.exp([1, -1, 0, -1, 1])
    fit = fit_form("power law", gamma, density)  # the slope is 0, the mean is 0: RSS = 4
    assert fit.parameters == pytest.approx({"c": 1, "alpha": 0})
    assert fit.residuals == pytest.approx([1, -1, 0, -1, 1])
    assert fit.aicc == pytest.approx(5 * np.log(4 / 5) + 6 + 24)  # n = 5, k = 3


def test_the_power_law_is_the_same_fit():
    rng = np.random.default_rng(2)
    density = OCTAVES**-0.7 * np.exp(0.2 * rng.standard_normal(OCTAVES.size))
    law, fit = fit_power_law(OCTAVES, density), fit_form("power law", OCTAVES, density)
    assert fit.parameters == pytest.approx({"c": law.c, "alpha": law.alpha})
    assert fit.intervals["alpha"] == pytest.approx(law.alpha_interval)


@pytest.mark.parametrize(
    ("name", "parameter"),
    [
        ("log-quadratic", "a1"),
        ("cutoff", "rate"),
        *large(("offset", "gamma0"), ("broken line", "bend")),
    ],
)
def test_the_intervals_of_the_forms_cover_the_truth(name, parameter):
    parameters, law = PLANTED[name]
    rng, draws, hits = np.random.default_rng(3), 200, 0
    for _ in range(draws):
        noise = np.exp(0.05 * rng.standard_normal(OCTAVES.size))
        low, high = fit_form(name, OCTAVES, law(OCTAVES) * noise).intervals[parameter]
        hits += low <= parameters[parameter] <= high
    assert 0.89 <= hits / draws <= 0.99  # 0.95 expected, standard deviation 0.015


def test_a_power_law_is_seldom_said_to_be_curved():
    rng, curved = np.random.default_rng(4), 0
    for _ in range(400):
        density = OCTAVES**-0.7 * np.exp(0.1 * rng.standard_normal(OCTAVES.size))
        low, high = fit_form("log-quadratic", OCTAVES, density).intervals["a1"]
        curved += low > 0 or high < 0
    assert 8 <= curved <= 34  # 20 expected, standard deviation 4.4


def test_the_authors_quadratic_fit():
    fit = fit_form("log-quadratic", 2.0 ** np.arange(-6, 8), ADAM)
    expected = {"c": 0.8255, "a0": 0.6789, "a1": 0.0104}
    assert fit.parameters == pytest.approx(expected, abs=6e-5)


def test_what_the_data_cannot_say_has_no_interval():
    fit = fit_form("offset", OCTAVES, OCTAVES**-0.7)  # no gamma0 at all
    assert fit.parameters["gamma0"] < OCTAVES[0] / 1000
    assert np.isnan(fit.intervals["gamma0"]).all()


def test_weights_of_evidence():
    fits = compare_forms(OCTAVES, PLANTED["broken line"][1](OCTAVES))
    weights = akaike_weights(fits)
    assert weights.sum() == pytest.approx(1)
    assert (np.diff(weights) <= 0).all()
    assert weights[0] > 0.99
    assert fits[0].form == "broken line"


def test_local_slopes_average_over_seeds_first():
    gamma = np.array([1.0, 4, 16, 1, 4, 16])
    density = np.array([2.0, 1, 0.25, 8, 1, 0.25])  # geometric means 4, 1, 1/4
    middle, slopes = local_slopes(gamma, density)
    assert middle == pytest.approx([2, 8])
    assert slopes == pytest.approx([1, 1])


def test_lack_of_fit_is_one_for_the_right_form_and_large_for_a_wrong_one():
    rng, gamma, ratios = np.random.default_rng(5), np.tile(OCTAVES, 3), []
    for _ in range(300):
        density = gamma**-0.7 * np.exp(0.1 * rng.standard_normal(gamma.size))
        found = lack_of_fit(fit_form("power law", gamma, density), gamma, density)
        ratios.append(found.ratio)
    assert (found.misses, found.scatter) == (14, 32)
    assert np.mean(ratios) == pytest.approx(32 / 30, abs=0.1)  # the mean of F
    assert np.mean(np.array(ratios) > 2.02) == pytest.approx(0.05, abs=0.03)  # its 95 % quantile
    density = PLANTED["broken line"][1](gamma) * np.exp(0.1 * rng.standard_normal(gamma.size))
    assert lack_of_fit(fit_form("power law", gamma, density), gamma, density).ratio > 5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fit_form("parabola", OCTAVES, OCTAVES), "there is no form 'parabola'"),
        (lambda: fit_form("broken line", OCTAVES[:6], OCTAVES[:6]), "it needs 7 points at 5"),
        (lambda: fit_form("cutoff", np.tile([1.0, 2, 3], 3), np.ones(9)), "got 9 at 3"),
        (lambda: fit_form("offset", OCTAVES, -OCTAVES), "positive"),
        (lambda: local_slopes([1, 2], [1, 0]), "positive"),
        (
            lambda: lack_of_fit(fit_form("power law", OCTAVES, OCTAVES), OCTAVES, OCTAVES),
            "every pressure has one run only",
        ),
        (
            lambda: lack_of_fit(
                fit_form("power law", np.tile(OCTAVES, 3), np.tile(1 / OCTAVES, 3)),
                *(np.tile(OCTAVES, 3), np.tile(1 / OCTAVES, 3)),
            ),
            "runs at the same pressure are equal",
        ),
        (
            lambda: lack_of_fit(fit_form("power law", OCTAVES, OCTAVES), OCTAVES[:8], OCTAVES[:8]),
            "the fit has 16 points, but 8 were given",
        ),
    ],
)
def test_what_cannot_be_fitted_says_so_in_one_sentence(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
