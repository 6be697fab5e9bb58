"""Does an optimiser follow its rule?"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np

from minihyperflows.engine.threads import BLOCK
from minihyperflows.nn import Parameter
from minihyperflows.testing.compare import assert_close

Array = np.ndarray
Rule: TypeAlias = Callable[[Array, Array, Any, int], tuple[Array, Any]]

# A number, nothing, odd shapes, and lengths around the block in which the fast optimisers work.
SHAPES = [(), (0,), (1,), (7,), (3, 5), (2, 3, 4), (BLOCK - 1,), (BLOCK,), (2 * BLOCK + 3,)]
RTOL = {np.float32: 1e-5, np.float64: 1e-12}


def check_optimizer(
    optimizer: Callable[[list[Parameter]], Any],
    rule: Rule,
    steps: int = 10,
    rng: np.random.Generator | int = 0,
) -> None:
    """Check that an optimiser does, step after step, what its formula says.

    The gradients are random; the parameters are of many shapes (a number, an empty one, longer
    than the blocks in which an optimiser may work), in float32 and float64, the gradients partly
    in an unusual memory order. Parameters without a gradient must stay put, gradients must not
    change, ``zero_grad`` must forget them, and with ``state_dict`` and ``load_state_dict`` a new
    optimiser must continue identically. Example::

        def rule(theta, gradient, memory, step):
            return sgd_rule(theta, gradient, memory, lr=0.1, momentum=0.9)

        check_optimizer(lambda params: optim.SGD(params, lr=0.1, momentum=0.9), rule)

    Args:
        optimizer: makes one from a list of parameters.
        rule: the formula, (theta, gradient, memory, step) -> (new theta, new memory). ``memory``
            is None at the first step, and then whatever the rule returned; ``step`` counts from 1.
        steps: how many steps to compare.
        rng: seed or generator for the values.

    Raises:
        AssertionError: names the step, the shape and the dtype at which the two part.
    """
    rng = np.random.default_rng(rng)
    for dtype in RTOL:
        _check_steps(optimizer, rule, steps, rng, dtype)
        _check_without_gradient(optimizer, rng, dtype)
    _check_continuing(optimizer, rng)


def _parameters(rng: np.random.Generator, dtype: Any) -> list[Parameter]:
    return [Parameter(rng.standard_normal(shape).astype(dtype)) for shape in SHAPES]


def _gradient(p: Parameter, rng: np.random.Generator) -> Array:
    """A random gradient for ``p`` whose axes lie in memory in the opposite order."""
    return np.asfortranarray(rng.standard_normal(p.shape).astype(p.dtype)).reshape(p.shape)


def _check_steps(
    optimizer: Callable[[list[Parameter]], Any],
    rule: Rule,
    steps: int,
    rng: np.random.Generator,
    dtype: Any,
) -> None:
    params = _parameters(rng, dtype)
    expected: list[tuple[Array, Any]] = [(p.data.copy(), None) for p in params]
    trained = optimizer(params)
    for step in range(1, steps + 1):
        for i, p in enumerate(params):
            p.grad = _gradient(p, rng)
            theta, memory = expected[i]
            expected[i] = rule(theta, p.grad.copy(), memory, step)
        gradients = [np.array(p.grad) for p in params]
        trained.step()
        for p, (theta, _), gradient in zip(params, expected, gradients, strict=True):
            where = f"the parameter of shape {p.shape} ({p.dtype}) after step {step}"
            assert_close(p.data, theta, RTOL[dtype], RTOL[dtype], where)
            assert_close(p.grad, gradient, 0, 0, f"the gradient of {where}, which must not change,")
            if p.dtype != dtype:
                raise AssertionError(f"{where} was {np.dtype(dtype)} before")
    trained.zero_grad()
    if any(p.grad is not None and p.grad.any() for p in params):
        raise AssertionError("zero_grad leaves gradients behind")


def _check_without_gradient(
    optimizer: Callable[[list[Parameter]], Any], rng: np.random.Generator, dtype: Any
) -> None:
    still, moving = (Parameter(rng.standard_normal(5).astype(dtype)) for _ in range(2))
    before, trained = still.data.copy(), optimizer([still, moving])
    for _ in range(2):
        moving.grad = _gradient(moving, rng)
        trained.step()
    assert_close(still.data, before, 0, 0, "a parameter that has no gradient")


def _check_continuing(
    optimizer: Callable[[list[Parameter]], Any], rng: np.random.Generator
) -> None:
    params = _parameters(rng, np.float64)
    trained = optimizer(params)
    if not (hasattr(trained, "state_dict") and hasattr(trained, "load_state_dict")):
        return
    _random_step(trained, params, rng)
    others = [Parameter(p.data.copy()) for p in params]
    loaded = optimizer(others)
    loaded.load_state_dict(copy.deepcopy(trained.state_dict()))
    seed = int(rng.integers(2**32))
    for optimiser, group in ((trained, params), (loaded, others)):
        _random_step(optimiser, group, np.random.default_rng(seed))
    for p, other in zip(params, others, strict=True):
        what = f"the parameter of shape {p.shape} one step after loading the optimiser's state"
        assert_close(other.data, p.data, 0, 0, what)


def _random_step(optimizer: Any, params: list[Parameter], rng: np.random.Generator) -> None:
    for p in params:
        p.grad = _gradient(p, rng)
    optimizer.step()
