"""Is the gradient right? Finite differences, and the complex step (chapter 02)."""

from __future__ import annotations

from typing import Any

import numpy as np

from minihyperflows.testing.compare import as_array, relative_error
from minihyperflows.testing.problem import Problem, copy_of, is_float, keep_away

Array = np.ndarray
EPSILON = float(np.finfo(np.float64).eps)

# The step h of a central difference. Its error is about h^2 (the third derivative) plus
# EPSILON / h (rounding): together smallest near the cube root of EPSILON, 6e-6.
STEP = EPSILON ** (1 / 3)
COMPLEX_STEP = 1e-20  # nothing is subtracted there, so it can be as small as one likes
ROUND_OFF = 100 * EPSILON  # relative rounding error that a computation may have gathered


def numerical_gradient(
    f: Any, *arrays: Any, wrt: int = 0, cotangent: Any = None, step: float = STEP
) -> Array:
    """dL/dx of L = <cotangent, f(x, ...)>, one element after another, by central differences.

    dL/dx_i = (L(x + h e_i) - L(x - h e_i)) / 2h + O(h^2)

    Two evaluations for each element: the definition, for small inputs. Example::

        numerical_gradient(lambda x: (x * x).sum(), np.array([1.0, 2.0]))    # [2, 4]

    Args:
        f: a function of tensors (or a Function, see :func:`check_grad`).
        arrays: its inputs.
        wrt: the number of the input x to differentiate with respect to.
        cotangent: of the output's shape; left out, ones, so that L is the sum of the outputs.
        step: h.

    Returns:
        An array of x's shape.

    Raises:
        TypeError: x holds integers.
    """
    problem = Problem.of_tensors(f, [copy_of(a) for a in arrays])
    if not is_float(problem.inputs[wrt]):
        raise TypeError(f"{problem.names[wrt]} holds integers, which cannot move by a small step")
    y = problem.evaluate(problem.inputs)
    c = np.ones_like(y) if cotangent is None else as_array(cotangent)
    return _element_by_element(problem, wrt, c, step)


def check_grad(
    f: Any,
    *arrays: Any,
    rng: np.random.Generator | int = 0,
    directions: int = 3,
    per_element: bool = False,
    away_from: float | None = None,
    rtol: float = 1e-6,
    step: float = STEP,
) -> None:
    """Check the gradient of ``f`` with respect to each of its inputs, in float64.

    Backward computes g = J^T c from a cotangent c, where J is the Jacobian of f. For random c and
    a random direction v both sides of

        <c, J v> = <J^T c, v>

    are one number; the left one is a central difference, <c, f(x + h v) - f(x - h v)> / 2h. The
    random cotangent matters: the sum of a softmax is always 1, so with a cotangent of ones even a
    backward that returns zeros passes.

    Example::

        check_grad(lambda x, w: (x @ w).exp(), x, w)
        check_grad(ops.Softmax(axis=0), x)     # also a Function subclass, or an instance of one
        check_grad(F.relu, x, away_from=0.0)

    Args:
        f: takes one tensor for each array and returns a tensor. Or a Function: the class, a new
            instance, or a function without arguments that makes one.
        arrays: the inputs. Those of integers (labels, say) are constants.
        rng: seed or generator for c and v.
        directions: how many directions to try for each input.
        per_element: compare every element too (:func:`numerical_gradient`), for small inputs.
        away_from: where f has a kink; inputs closer than 0.01 are moved away.
        rtol: the relative error allowed.
        step: h; scaled up with inputs larger than 1.

    Raises:
        AssertionError: names the input, what was expected and found, and the likely mistake.
    """
    inputs = [copy_of(a) if away_from is None else keep_away(copy_of(a), away_from) for a in arrays]
    problem = Problem.of_tensors(f, inputs)
    check_problem(problem, np.random.default_rng(rng), directions, per_element, rtol, step)


def check_complex_step(
    f: Any, *arrays: Any, rng: np.random.Generator | int = 0, rtol: float = 1e-9
) -> None:
    """Check that ``f`` is computed, forward and backward, as its analytic continuation.

    For an analytic f and a tiny h (1e-20), nothing is subtracted and nothing lost in

        Im f(x + i h v) / h = J v,          Im g(x + i h v) / h = H v,

    where g = J^T c is what backward computes and H = d<c, f>/dx dx the matrix of second
    derivatives. So the forward pass must agree with backward, and H v must be symmetric
    (<u, H v> = <v, H u>), to rounding; and H v must agree with a central difference of g.
    That needs operations that keep complex numbers complex, compare by the real part and never
    conjugate. Example::

        check_complex_step(lambda x: x.exp() / (1 + x * x), np.linspace(-1, 1, 5))

    Args:
        f, arrays, rng: as for :func:`check_grad`; stay away from kinks.
        rtol: the relative error allowed, except for the central difference (1e-5).

    Raises:
        AssertionError: says which of the three equations fails.
    """
    rng = np.random.default_rng(rng)
    problem = Problem.of_tensors(f, [copy_of(a) for a in arrays])
    c = rng.standard_normal(problem.evaluate(problem.inputs).shape)
    u, v = problem.direction(rng), problem.direction(rng)
    gradient = problem.gradients(problem.inputs, c)

    y = problem.evaluate(problem.moved(v, 1j * COMPLEX_STEP))
    if y.dtype.kind != "c":
        raise AssertionError(f"complex inputs give {y.dtype}: the imaginary part is lost")
    forward = (c * y.imag).sum() / COMPLEX_STEP
    noise = ROUND_OFF * _norm(c * y.real)
    _compare(_inner(gradient, v), forward, rtol, noise, _norm(*_products(gradient, v)), FORWARD)

    h_v, h_u = (_second_derivative(problem, c, d, gradient, rtol) for d in (v, u))
    scale = _norm(*_products(h_v, u), *_products(h_u, v))
    noise = ROUND_OFF * _norm(*gradient)
    _compare(_inner(h_v, u), _inner(h_u, v), rtol, noise, scale, SYMMETRY)

    ahead, behind = (problem.gradients(problem.moved(v, s), c) for s in (STEP, -STEP))
    difference = (_inner(ahead, u) - _inner(behind, u)) / (2 * STEP)
    _compare(_inner(h_v, u), difference, 1e-5, noise / STEP, scale, SECOND)


FORWARD = "the imaginary part of the forward pass, <c, Im f(x + ihv)> / h, is not <J^T c, v>"
SYMMETRY = "the imaginary part of the backward pass, H v, is not symmetric: <u, H v> != <v, H u>"
SECOND = "the imaginary part of the backward pass, H v, is not the change of the gradient along v"


# -- the comparison ------------------------------------------------------------------------------


def check_problem(
    problem: Problem,
    rng: np.random.Generator,
    directions: int = 3,
    per_element: bool = False,
    rtol: float = 1e-6,
    step: float = STEP,
) -> None:
    """:func:`check_grad` for any function of arrays with any claimed gradient."""
    y = problem.evaluate(problem.inputs)
    if not np.isfinite(y).all():
        raise AssertionError("the output is not finite: choose other inputs to check at")
    c = rng.standard_normal(y.shape)
    gradients = problem.gradients(problem.inputs, c)
    for i, (x, gradient) in enumerate(zip(problem.inputs, gradients, strict=True)):
        if not is_float(x):
            continue
        if gradient is None:
            raise AssertionError(f"{problem.names[i]} gets no gradient: the graph is cut before it")
        if gradient.shape != x.shape:
            raise AssertionError(f"{problem.names[i]} gets a gradient of shape {gradient.shape}")
        comparison = Comparison(problem, i, gradient, c, rtol, step)
        for _ in range(directions):
            comparison.add(rng.standard_normal(x.shape))
        comparison.judge()
        if per_element:
            comparison.judge_elements()


class Comparison:
    """Backward's gradient of one input against differences along several directions."""

    def __init__(
        self, problem: Problem, i: int, gradient: Array, c: Array, rtol: float, step: float
    ) -> None:
        self.problem, self.i, self.gradient, self.c = problem, i, gradient, c
        self.rtol, self.h = rtol, problem.step_for(i, step)
        self.y = problem.evaluate(problem.inputs)
        self.noise = ROUND_OFF * _norm(c * self.y) / self.h  # of a central difference
        self.expected: list[float] = []
        self.found: list[float] = []
        self.wrong: Array | None = None  # a direction along which the two disagree

    def difference(self, v: Array, c: Array | None = None) -> float:
        """<c, f(x + h v) - f(x - h v)> / 2h."""
        ahead, behind = self.output(v, self.h), self.output(v, -self.h)
        return float(((self.c if c is None else c) * (ahead - behind)).sum() / (2 * self.h))

    def output(self, v: Array, step: float) -> Array:
        return self.problem.evaluate(self.problem.moved(self.problem.along(self.i, v), step))

    def add(self, v: Array) -> None:
        """Compare along the direction ``v``."""
        expected, found = self.difference(v), float((self.gradient * v).sum())
        self.expected.append(expected)
        self.found.append(found)
        # a sum that happens to be near zero is judged by the size of its terms
        scale = max(abs(expected), abs(found), _norm(self.gradient * v))
        if not abs(found - expected) <= self.rtol * scale + self.noise:
            self.wrong = v

    def judge(self) -> None:
        if self.wrong is None:
            return
        pairs = list(zip(self.expected, self.found, strict=True))
        expected, found = max(pairs, key=lambda pair: abs(pair[0] - pair[1]))
        raise AssertionError(
            f"the gradient with respect to {self.problem.names[self.i]} is wrong: along a random "
            f"direction the central difference gives {expected:.8g}, backward gives {found:.8g} "
            f"(relative error {relative_error(found, expected):.1e}, allowed {self.rtol:.0e}); "
            f"{self.likely_cause(self.wrong)}"
        )

    def judge_elements(self) -> None:
        """Compare every element of the gradient."""
        expected = _element_by_element(self.problem, self.i, self.c, self.h)
        scale = np.maximum(abs(expected), abs(self.gradient).max(initial=0.0))
        wrong = ~(abs(self.gradient - expected) <= self.rtol * scale + self.noise)
        if wrong.any():
            raise AssertionError(
                f"the gradient with respect to {self.problem.names[self.i]} is wrong: "
                f"{self.worst_element(expected)}"
            )

    def likely_cause(self, v: Array) -> str:
        """A guess at the mistake, from how the numbers differ."""
        expected, found = np.array(self.expected), np.array(self.found)
        if self.has_kink(v):
            return "the function seems to have a kink or a jump here: see away_from"
        if not found.any():
            return "backward returns zero"
        if (abs(expected) <= self.noise).all():
            return "the output does not depend on this input at all"
        ratios = found / expected
        if np.ptp(ratios) <= 1e-3 * abs(ratios).max():
            factor = ratios.mean()
            sign = "the sign is wrong" if abs(factor + 1) < 1e-3 else None
            return sign or f"it is {factor:.4g} times what it should be, in every direction"
        if self.right_for_ones(v):
            return "it is right for a cotangent of ones only: does it multiply by its cotangent?"
        if self.gradient.size <= 1000:
            elements = _element_by_element(self.problem, self.i, self.c, self.h)
            return self.worst_element(elements)
        return "check the formula, and the order of the returned gradients"

    def has_kink(self, v: Array) -> bool:
        """True if the slopes ahead and behind differ, as they do not where f is smooth."""
        ahead = (self.c * (self.output(v, self.h) - self.y)).sum() / self.h
        behind = (self.c * (self.y - self.output(v, -self.h))).sum() / self.h
        return abs(ahead - behind) > 1e-2 * max(abs(ahead), abs(behind)) + 2 * self.noise

    def right_for_ones(self, v: Array) -> bool:
        ones = np.ones_like(self.c)
        gradient = self.problem.gradients(self.problem.inputs, ones)[self.i]
        error = (gradient * v).sum() - self.difference(v, ones)
        return abs(error) <= self.rtol * _norm(gradient * v) + self.noise

    def worst_element(self, expected: Array) -> str:
        at = np.unravel_index(abs(self.gradient - expected).argmax(), expected.shape)
        index = tuple(map(int, at))
        return (
            f"the worst element is {index}, where {expected[at]:.8g} is expected and "
            f"{self.gradient[at]:.8g} found"
        )


def _element_by_element(problem: Problem, i: int, c: Array, step: float) -> Array:
    """dL/dx of input ``i`` for L = <c, f>, by central differences."""
    gradient = np.zeros(problem.inputs[i].shape)
    for index in np.ndindex(gradient.shape):
        unit = np.zeros(gradient.shape)
        unit[index] = 1.0
        ahead, behind = (
            problem.evaluate(problem.moved(problem.along(i, unit), s)) for s in (step, -step)
        )
        gradient[index] = (c * (ahead - behind)).sum() / (2 * step)
    return gradient


def _second_derivative(
    problem: Problem, c: Array, v: list[Array], real: list[Array | None], rtol: float
) -> list[Array | None]:
    """H v = Im g(x + i h v) / h, having checked that the real part is the ordinary gradient."""
    gradients = problem.gradients(problem.moved(v, 1j * COMPLEX_STEP), c)
    for name, g, r in zip(problem.names, gradients, real, strict=True):
        if g is not None and r is not None:
            error = _norm(g.real - r)
            if not error <= rtol * _norm(r) + ROUND_OFF * _norm(c):
                raise AssertionError(
                    f"the gradient with respect to {name} changes by {error:.1e} when the inputs "
                    "become complex: is something conjugated, or is a real part taken?"
                )
    return [None if g is None else g.imag / COMPLEX_STEP for g in gradients]


def _compare(
    found: float, expected: float, rtol: float, noise: float, scale: float, message: str
) -> None:
    if not abs(found - expected) <= rtol * max(scale, abs(found), abs(expected)) + noise:
        error = relative_error(found, expected)
        raise AssertionError(
            f"{message}: {expected:.12g} against {found:.12g} (relative error {error:.1e}, "
            f"allowed {rtol:.0e})"
        )


def _products(gradients: list[Array | None], direction: list[Array]) -> list[Array]:
    pairs = zip(gradients, direction, strict=True)
    return [g * v for g, v in pairs if g is not None]


def _inner(gradients: list[Array | None], direction: list[Array]) -> float:
    return float(sum(product.sum() for product in _products(gradients, direction)))


def _norm(*arrays: Array | None) -> float:
    """The Euclidean norm of all the arrays together."""
    return float(sum((abs(a) ** 2).sum() for a in arrays if a is not None) ** 0.5)
