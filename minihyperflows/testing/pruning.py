"""Do a gate and a pressure scheduler keep their contracts?"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np

from minihyperflows.engine.tensor import Tensor
from minihyperflows.testing.problem import as_function


def check_surrogate(gate: Any, kappa: float = 0.25, rng: np.random.Generator | int = 0) -> None:
    """Check a gate: the step forward, the declared derivative backward, both exactly.

    forward: 1 where t >= 0 (zero included, -0.0 too), else 0;   backward: kappa c, everywhere.

    The step has no useful derivative of its own, so finite differences do not apply: what is
    declared is compared bit by bit, in float32 and float64, at zeros, at the smallest numbers of
    both signs, at large ones and at random ones. Example::

        check_surrogate(flows.gate)

    Args:
        gate: takes a tensor t and returns a tensor; or a Function, as in :func:`check_grad`.
        kappa: the declared derivative.
        rng: seed or generator for the random t and c.

    Raises:
        AssertionError: names the t, what was expected there and what was found.
    """
    function, rng = as_function(gate), np.random.default_rng(rng)
    for dtype in (np.float32, np.float64):
        t = Tensor(_telling_values(dtype, rng), requires_grad=True)
        mask = function(t)
        _require_equal("the gate at", t.data, mask.data, (t.data >= 0).astype(dtype))
        if mask.creator is None:
            raise AssertionError("the gate cuts the graph: no gradient can reach t")
        c: np.ndarray = rng.standard_normal(t.shape).astype(dtype)
        mask.backward(c)
        if t.grad is None:
            raise AssertionError("the gate's backward gives t no gradient")
        _require_equal(f"the gradient (kappa = {kappa}) at", t.data, t.grad, c * kappa)


def _telling_values(dtype: Any, rng: np.random.Generator) -> np.ndarray:
    """Zeros of both signs, the smallest and largest numbers, and random ones."""
    info = np.finfo(dtype)
    special = [0.0, info.smallest_subnormal, info.tiny, 1e-8, 0.3, 1.0, 39.0, info.max]
    random = rng.standard_normal(20).astype(dtype)
    positive = np.array(special, dtype)
    return np.concatenate([positive, -positive, random])


def _require_equal(what: str, t: np.ndarray, found: np.ndarray, expected: np.ndarray) -> None:
    if found.shape != t.shape or found.dtype != t.dtype:
        raise AssertionError(
            f"{what} t of {t.dtype} and shape {t.shape} is of {found.dtype} and shape {found.shape}"
        )
    wrong = np.flatnonzero(found != expected)
    if wrong.size:
        i = wrong[0]
        raise AssertionError(
            f"{what} t = {t[i]} is {found[i]} where {expected[i]} is declared "
            f"({t.dtype}; {wrong.size} of {t.size} values are off)"
        )


def check_scheduler(
    scheduler: Any,
    target_sparsity: float | None = None,
    epochs: int | None = None,
    rng: np.random.Generator | int = 0,
) -> None:
    """Check a pressure scheduler: anything with ``expected(epoch)`` and ``update(epoch, density)``.

    ``expected``: the densities for the epochs 1 ... ``epochs`` never rise, begin below 1 and end
    at 1 - target_sparsity. ``update`` returns the pressure gamma for the next epoch: it goes up
    while the network is denser than expected, down while it is sparser, never below 0 and never
    to infinity or NaN, whatever densities it is shown. If there are ``state_dict`` and
    ``load_state_dict``, a copy that loads the state must continue identically. The check works on
    copies of ``scheduler``. Example::

        check_scheduler(flows.PressureScheduler(target_sparsity=0.98, epochs=40))

    Args:
        scheduler: a new one.
        target_sparsity, epochs: its aim; left out, its attributes of these names.
        rng: seed or generator for random densities.

    Raises:
        AssertionError: says what went wrong, and at which epoch.
    """
    target = scheduler.target_sparsity if target_sparsity is None else target_sparsity
    last = scheduler.epochs if epochs is None else epochs
    rng = np.random.default_rng(rng)
    _check_trajectory(scheduler, 1 - target, last)
    _check_steering(scheduler, last)
    _check_robustness(scheduler, last, rng)
    if hasattr(scheduler, "state_dict") and hasattr(scheduler, "load_state_dict"):
        _check_continuing(scheduler, last, rng)


def _check_trajectory(scheduler: Any, target_density: float, epochs: int) -> None:
    previous = 1.0
    for epoch in range(1, epochs + 1):
        density = scheduler.expected(epoch)
        if not 0 <= density <= previous:
            raise AssertionError(
                f"expected({epoch}) is {density}, but a trajectory of densities must not rise "
                f"(expected({epoch - 1}) is {previous}) nor leave [0, 1]"
            )
        previous = density
    if epochs > 1 and target_density < 1 and scheduler.expected(1) >= 1:
        raise AssertionError("expected(1) is 1: nothing would be removed in the first epoch")
    if abs(previous - target_density) > 1e-6:
        raise AssertionError(
            f"expected({epochs}) is {previous:.8f}, but 1 - target_sparsity is {target_density:.8f}"
        )


def _check_steering(scheduler: Any, epochs: int) -> None:
    scheduler, half = copy.deepcopy(scheduler), epochs // 2
    gammas = [0.0]
    for epoch in range(1, half + 1):
        gammas.append(_update(scheduler, epoch, 1.0))
        if gammas[-1] < gammas[-2]:
            raise AssertionError(
                f"after epoch {epoch} the network is denser than expected, but gamma falls from "
                f"{gammas[-2]} to {gammas[-1]}"
            )
    if half and scheduler.expected(half) < 1 and not gammas[-1] > 0:
        raise AssertionError(f"after {half} epochs without any pruning gamma is still 0")
    for epoch in range(half + 1, epochs):
        gammas.append(_update(scheduler, epoch, 0.0))
        if gammas[-1] > gammas[-2]:
            raise AssertionError(
                f"after epoch {epoch} the network is sparser than expected, but gamma rises from "
                f"{gammas[-2]} to {gammas[-1]}"
            )
    if epochs - half > 1 and gammas[half] > 0 and not gammas[-1] < gammas[half]:
        raise AssertionError(f"gamma stays at {gammas[-1]} though nothing is left of the network")


def _check_robustness(scheduler: Any, epochs: int, rng: np.random.Generator) -> None:
    for _ in range(5):
        trial = copy.deepcopy(scheduler)
        for epoch in range(1, 2 * epochs + 1):
            _update(trial, epoch, float(rng.choice([0, 1, rng.uniform(), trial.expected(epoch)])))


def _update(scheduler: Any, epoch: int, density: float) -> float:
    gamma = scheduler.update(epoch, density)
    if not 0 <= gamma < np.inf:
        raise AssertionError(f"update({epoch}, {density}) returns gamma = {gamma}")
    return gamma


def _check_continuing(scheduler: Any, epochs: int, rng: np.random.Generator) -> None:
    first, second = copy.deepcopy(scheduler), copy.deepcopy(scheduler)
    densities = rng.uniform(size=epochs + 1)
    half = epochs // 2
    for epoch in range(1, half + 1):
        first.update(epoch, densities[epoch])
    second.load_state_dict(first.state_dict())
    for epoch in range(half + 1, epochs + 1):
        found, expected = (s.update(epoch, densities[epoch]) for s in (second, first))
        if found != expected:
            raise AssertionError(
                f"after loading the state of epoch {half}, update({epoch}) returns {found} where "
                f"the original returns {expected}: state_dict leaves something out"
            )
