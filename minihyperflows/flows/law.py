"""The power law, the density that a constant pressure leads to, and how to doubt it (chapter 10).

:func:`fit_power_law` fits a line to ln density against ln gamma. A line fits almost anything that
falls, so there are other forms to set against it (:data:`FORMS`), with intervals for their
parameters and a criterion that charges for each (:func:`compare_forms`), the slope between
neighbouring pressures (:func:`local_slopes`), and a comparison of what a form leaves unexplained
with the scatter between seeds (:func:`lack_of_fit`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

CONFIDENCE = 0.95  # of all intervals
REACH = math.log(1e4)  # how far below the smallest gamma gamma0 is searched for
LOGARITHMIC = ("c", "gamma0")  # parameters that are exponentials of what is fitted


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

    The interval of alpha takes the points for independent. Runs at one gamma are not where they
    share something that another gamma does not have, such as a bend of the true curve there: each
    run then counts as new evidence although it repeats the same deviation, and the interval is too
    narrow. Fit the means over the runs at each gamma where that is to be feared.

    Args:
        gamma: pressures, all positive, not all equal.
        density: the densities they lead to, all positive (in any unit; c has the same).

    Raises:
        ValueError: fewer than two points, shapes that differ, or values without a logarithm.
    """
    x, y = _logarithms(gamma, density)
    spread = float(((x - x.mean()) ** 2).sum())
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


def _logarithms(gamma: Any, density: Any) -> tuple[np.ndarray, np.ndarray]:
    """x = ln gamma and y = ln density, or a ValueError that says why there are none to fit."""
    gamma, density = np.asarray(gamma, dtype=float), np.asarray(density, dtype=float)
    if gamma.shape != density.shape or gamma.ndim != 1 or gamma.size < 2:
        raise ValueError(
            f"a fit needs two or more pairs; got gamma of shape {gamma.shape} and density of shape "
            f"{density.shape}"
        )
    if not (np.all(gamma > 0) and np.all(density > 0) and np.isfinite(gamma * density).all()):
        raise ValueError("gamma and density must be positive and finite: leave other points out")
    if np.ptp(gamma) == 0:
        raise ValueError("all values of gamma are equal: no slope can be fitted")
    return np.log(gamma), np.log(density)


def _slope_half_width(residual: float, spread: float, n: int) -> float:
    """t_{0.975, n-2} times the standard error of a fitted slope."""
    if n < 3:
        return math.nan
    quantile = student_t_quantile((1 + CONFIDENCE) / 2, n - 2)
    return quantile * math.sqrt(residual / (n - 2) / spread)


# -- other forms ---------------------------------------------------------------------------------


def power_law(x: np.ndarray, theta: float) -> list[np.ndarray]:
    """s = c gamma^-alpha,  ln s = ln c - alpha x  with x = ln gamma."""
    return [np.ones_like(x), -x]


def log_quadratic(x: np.ndarray, theta: float) -> list[np.ndarray]:
    """s = c exp(-(a0 x + a1 x^2)),  x = ln gamma: the authors' form. Its slope is -(a0 + 2 a1 x).

    a1 = 0 is the power law. It is also what the tail of a log-normal distribution looks like.
    """
    return [np.ones_like(x), -x, -(x**2)]


def cutoff(x: np.ndarray, theta: float) -> list[np.ndarray]:
    """s = c gamma^-alpha exp(-rate gamma): a power law that ends near gamma = 1 / rate."""
    return [np.ones_like(x), -x, -np.exp(x)]


def offset(x: np.ndarray, theta: float) -> list[np.ndarray]:
    """s = c (gamma + gamma0)^-alpha: a power law that is flat below gamma0 = exp(theta)."""
    return [np.ones_like(x), -np.log(np.exp(x) + math.exp(theta))]


def bounded(x: np.ndarray, theta: float) -> list[np.ndarray]:
    """s = (1 + gamma / gamma0)^-alpha: the same, and 1 without pressure, as a density is.

    If the flux that the weights can summon has a Lomax distribution, this is the fraction with more
    than the pressure's.
    """
    return [-np.log1p(np.exp(x - theta))]


def broken_line(x: np.ndarray, theta: float) -> list[np.ndarray]:
    """s = c gamma^-alpha up to gamma0 = exp(theta), and from there with the exponent alpha + bend.

    ln s = ln c - alpha x - bend max(x - theta, 0).
    """
    return [np.ones_like(x), -x, -np.maximum(x - theta, 0)]


@dataclass(frozen=True)
class Form:
    """A form that the law might have: ln s is a sum of columns times coefficients.

    Attributes:
        columns: of the regression, from x = ln gamma and theta = ln gamma0, in the order of
            ``coefficients``.
        coefficients: what the columns are multiplied by; for "c" it is ln c.
        search: where theta can lie, from the sorted distinct x; None if there is no gamma0.
    """

    columns: Callable[[np.ndarray, float], list[np.ndarray]]
    coefficients: tuple[str, ...]
    search: Callable[[np.ndarray], tuple[float, float]] | None = None

    @property
    def parameters(self) -> tuple[str, ...]:
        """The names of all parameters."""
        return self.coefficients + (("gamma0",) if self.search else ())


def _from_far_below(x: np.ndarray) -> tuple[float, float]:
    return float(x[0] - REACH), float(x[-1])


def _two_points_on_either_side(x: np.ndarray) -> tuple[float, float]:
    return float(x[1]), float(x[-2])


FORMS = {
    "power law": Form(power_law, ("c", "alpha")),
    "bounded": Form(bounded, ("alpha",), _from_far_below),
    "log-quadratic": Form(log_quadratic, ("c", "a0", "a1")),
    "cutoff": Form(cutoff, ("c", "alpha", "rate")),
    "offset": Form(offset, ("c", "alpha"), _from_far_below),
    "broken line": Form(broken_line, ("c", "alpha", "bend"), _two_points_on_either_side),
}


@dataclass(frozen=True)
class Fit:
    """A form of :data:`FORMS` fitted to gammas and densities.

    Attributes:
        form: its name.
        parameters: by name.
        intervals: 95 % confidence intervals of the parameters, by name (Student's t, from the
            linearised least squares). NaN where gamma0 came out at the end of its range, since the
            data do not say then what it is.
        residuals: ln density minus that of the form, for each point.
        aicc: the corrected Akaike criterion; smaller is better, see :func:`fit_form`.
    """

    form: str
    parameters: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    residuals: np.ndarray
    aicc: float

    def __call__(self, gamma: Any) -> Any:
        """The density at pressure ``gamma`` (a number or an array)."""
        form, x = FORMS[self.form], np.log(np.asarray(gamma, dtype=float))
        columns = form.columns(x, math.log(self.parameters.get("gamma0", 1.0)))
        pairs = zip(form.coefficients, columns, strict=True)
        return np.exp(sum(_as_coefficient(n, self.parameters[n]) * column for n, column in pairs))


def _as_coefficient(name: str, value: float) -> float:
    return math.log(value) if name in LOGARITHMIC else value


def _as_parameter(name: str, coefficient: float) -> float:
    return math.exp(min(coefficient, 700.0)) if name in LOGARITHMIC else float(coefficient)


def fit_form(name: str, gamma: Any, density: Any) -> Fit:
    """Least squares of ln density with the form ``name`` of :data:`FORMS`.

    With k parameters, the variance of the residuals among them, and n points,

        AICc = n ln(RSS / n) + 2 k + 2 k (k + 1) / (n - k - 1),

    which estimates how badly the form would do on new points: a parameter has to earn its place.

    Args:
        gamma: pressures, all positive; several runs may have the same.
        density: the densities they lead to, all positive.

    Raises:
        ValueError: no such form, values without a logarithm, or too few points for this form.
    """
    if name not in FORMS:
        raise ValueError(f"there is no form {name!r}: choose one of {', '.join(FORMS)}")
    form, (x, y) = FORMS[name], _logarithms(gamma, density)
    _require_points(name, x)
    theta, inside = _best_theta(form, x, y)
    coefficients, residuals = _regression(form, x, y, theta)
    squares, freedom = float(residuals @ residuals), x.size - len(form.parameters)
    errors = _standard_errors(form, x, theta, coefficients, squares / freedom)
    half_widths = student_t_quantile((1 + CONFIDENCE) / 2, freedom) * errors
    values = np.append(coefficients, theta) if form.search else coefficients
    found, intervals = {}, {}
    for parameter, value, half in zip(form.parameters, values, half_widths, strict=True):
        found[parameter] = _as_parameter(parameter, value)
        low, high = (value - half, value + half) if inside else (math.nan, math.nan)
        intervals[parameter] = _as_parameter(parameter, low), _as_parameter(parameter, high)
    criterion = akaike(squares, x.size, len(form.parameters) + 1)
    return Fit(name, found, intervals, residuals, criterion)


def _require_points(name: str, x: np.ndarray) -> None:
    k, pressures = len(FORMS[name].parameters), np.unique(x).size
    if x.size < k + 3 or pressures < k + 1:
        raise ValueError(
            f"{name} has {k} parameters: it needs {k + 3} points at {k + 1} pressures or more, "
            f"got {x.size} at {pressures}"
        )


def _best_theta(form: Form, x: np.ndarray, y: np.ndarray) -> tuple[float, bool]:
    """theta with the least squares, and whether that is inside of its range."""
    if form.search is None:
        return 0.0, True

    def squares(theta: float) -> float:
        residuals = _regression(form, x, y, theta)[1]
        return float(residuals @ residuals)

    low, high = form.search(np.unique(x))
    theta = _search(squares, low, high)
    return theta, low < theta < high


def _regression(
    form: Form, x: np.ndarray, y: np.ndarray, theta: float
) -> tuple[np.ndarray, np.ndarray]:
    """The coefficients that fit best with this theta, and the residuals."""
    matrix = np.column_stack(form.columns(x, theta))
    coefficients = np.linalg.lstsq(matrix, y, rcond=None)[0]
    return coefficients, y - matrix @ coefficients


def akaike(squares: float, n: int, k: int) -> float:
    """AICc of a least-squares fit with k parameters, the residuals' variance among them."""
    variance = max(squares / n, 1e-30)  # an exact fit has a criterion too
    return n * math.log(variance) + 2 * k + 2 * k * (k + 1) / (n - k - 1)


def _search(f: Callable[[float], float], low: float, high: float) -> float:
    """Where f is smallest: on a grid, then on finer ones around its best point."""
    for points in (61, 21, 21, 21, 21):
        grid = np.linspace(low, high, points)
        best = int(np.argmin([f(float(point)) for point in grid]))
        low, high = grid[max(best - 1, 0)], grid[min(best + 1, points - 1)]
    return float(grid[best])


def _standard_errors(
    form: Form, x: np.ndarray, theta: float, coefficients: np.ndarray, variance: float
) -> np.ndarray:
    """sqrt(variance diag((J^T J)^-1)), J the derivative by coefficients and theta."""
    columns = form.columns(x, theta)
    if form.search:
        step = 1e-5
        after = np.column_stack(form.columns(x, theta + step)) @ coefficients
        before = np.column_stack(form.columns(x, theta - step)) @ coefficients
        columns = [*columns, (after - before) / (2 * step)]
    matrix = np.column_stack(columns)
    if np.linalg.matrix_rank(matrix) < matrix.shape[1]:
        return np.full(matrix.shape[1], math.nan)
    inverse = np.linalg.inv(matrix.T @ matrix)
    return np.sqrt(variance * np.diag(inverse))


# -- tests of a form -----------------------------------------------------------------------------


def compare_forms(gamma: Any, density: Any, names: Sequence[str] = tuple(FORMS)) -> list[Fit]:
    """The forms ``names`` fitted to the same points, the best by AICc first."""
    return sorted((fit_form(name, gamma, density) for name in names), key=lambda fit: fit.aicc)


def akaike_weights(fits: Sequence[Fit]) -> np.ndarray:
    """exp(-Delta / 2), Delta the distance to the best AICc, scaled to the sum 1.

    How much of the evidence each form has, if one of them is right.
    """
    criteria = np.array([fit.aicc for fit in fits])
    relative = np.exp(-(criteria - criteria.min()) / 2)
    return relative / relative.sum()


def local_slopes(gamma: Any, density: Any) -> tuple[np.ndarray, np.ndarray]:
    """The exponent between each pressure and the next: -(change of ln density) / (change of x).

    Several densities at one gamma are averaged first (geometrically).

    Returns:
        The pressures half way between (geometrically), and the exponents there.
    """
    x, y = _logarithms(gamma, density)
    pressures = np.unique(x)
    mean = np.array([y[x == point].mean() for point in pressures])
    middle = np.exp((pressures[1:] + pressures[:-1]) / 2)
    return middle, -np.diff(mean) / np.diff(pressures)


@dataclass(frozen=True)
class LackOfFit:
    """Whether a form misses the mean at each pressure by more than the seeds scatter.

    Attributes:
        ratio: F, the mean square of the misses over that of the scatter; about 1 for the right
            form, and then distributed as F(``misses``, ``scatter``).
        misses: degrees of freedom, pressures minus parameters.
        scatter: degrees of freedom, points minus pressures.
    """

    ratio: float
    misses: int
    scatter: int


def lack_of_fit(fit: Fit, gamma: Any, density: Any) -> LackOfFit:
    """Compare what ``fit`` does not explain with the scatter between runs at the same gamma.

    Raises:
        ValueError: no pressure has two runs, or all runs at a pressure are equal; or they are not
            the points that were fitted.
    """
    x, y = _logarithms(gamma, density)
    if x.shape != fit.residuals.shape:
        raise ValueError(f"the fit has {fit.residuals.size} points, but {x.size} were given")
    pressures, group = np.unique(x, return_inverse=True)
    if pressures.size == x.size:
        raise ValueError("every pressure has one run only: there is no scatter to compare with")
    if all(np.ptp(y[group == g]) == 0 for g in range(pressures.size)):
        raise ValueError("runs at the same pressure are equal: there is no scatter to compare with")
    means = np.bincount(group, y) / np.bincount(group)
    scatter = float(((y - means[group]) ** 2).sum())
    misses = float(fit.residuals @ fit.residuals) - scatter
    freedom = pressures.size - len(fit.parameters), x.size - pressures.size
    return LackOfFit(misses / freedom[0] / (scatter / freedom[1]), *freedom)


# -- Student's t ---------------------------------------------------------------------------------


def mean_half_width(values: Any) -> float:
    """Of the 95 % interval of a mean: t_{0.975, n-1} s / sqrt(n). NaN for a single value."""
    n = len(values)
    if n < 2:
        return math.nan
    quantile = student_t_quantile((1 + CONFIDENCE) / 2, n - 1)
    return quantile * float(np.std(values, ddof=1)) / math.sqrt(n)


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
