"""Steering the pressure: a target trajectory for the density, and the controller that follows it.

Source: arXiv 2504.05349 (the pressure scheduler) and the authors' code, where the controller is
called Policy1. Derived in chapter 08.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

# The survival factor of an epoch late in the schedule, when almost nothing is left to remove.
LATE_SURVIVAL = 0.999


def survival_factors(floor: float, epochs: int, aggressivity: float, ceiling: float) -> np.ndarray:
    """f(e) = s + (ceiling - s) sigma((A / T) (e - T / 2)) for e = 1 ... T.

    The fraction of the weights present before epoch e that should be present after it: near the
    floor s early on, near the ceiling late.
    """
    e = np.arange(1, epochs + 1)
    logistic = 1 / (1 + np.exp(-(aggressivity / epochs) * (e - epochs / 2)))
    return floor + (ceiling - floor) * logistic


def density_trajectory(target_density: float, epochs: int, aggressivity: float = 6.0) -> np.ndarray:
    """E(e) = prod_{k=1..e} f(k) for e = 0 ... T, with the floor s such that E(T) is the target.

    E(T) grows with s, so s is found by bisection. Returns T + 1 densities that fall from 1 to
    ``target_density``: fast at first, flat at the end.
    """
    # A target so dense that even the ceiling, T times, falls below it needs a higher ceiling.
    ceiling = max(LATE_SURVIVAL, target_density ** (0.5 / epochs))

    def trajectory(floor: float) -> np.ndarray:
        factors = survival_factors(floor, epochs, aggressivity, ceiling)
        return np.exp(np.concatenate(([0.0], np.cumsum(np.log(factors)))))

    steepest = trajectory(0.0)
    if steepest[-1] > target_density:  # too few epochs for this shape: remove the rest evenly
        evenly = (target_density / steepest[-1]) ** (1 / epochs)
        return steepest * evenly ** np.arange(epochs + 1)
    low, high = 0.0, ceiling
    while high - low > 1e-13:
        middle = (low + high) / 2
        if trajectory(middle)[-1] < target_density:
            low = middle
        else:
            high = middle
    return trajectory(high)


class PressureScheduler:
    """Raises the pressure while the network is denser than the trajectory, lowers it while sparser.

    The state is a base b with two inertias p and n, all 0 at the start. After epoch e < T::

        density > E(e):   b <- b + step + p;           p <- p + step / 4;   n <- 0
        otherwise:        b <- max(0, b - step - n);   n <- n + step / 4;   p <- 0
        gamma = b ** exponent

    An inertia makes the steps longer the longer they go the same way. From epoch T on gamma stays.
    All three are multiples of step / 4 and are kept as whole numbers of it, so that b returns to
    exactly 0.

    Args:
        target_sparsity: S in [0, 1); the trajectory ends at density 1 - S.
        epochs: T, the number of epochs under pressure.
        step: the paper uses 0.2 for CIFAR.
        exponent: turns the base into a pressure. Density goes like gamma^-0.65 (chapter 10), so
            with 1.5 it goes like 1 / b, and equal steps of b are about equally strong.
        aggressivity: A, how sharply the trajectory turns from fast to slow.
    """

    def __init__(
        self,
        target_sparsity: float,
        epochs: int,
        step: float = 0.2,
        exponent: float = 1.5,
        aggressivity: float = 6.0,
    ) -> None:
        if not 0 <= target_sparsity < 1:
            raise ValueError(
                f"target_sparsity is the fraction removed, in [0, 1), not {target_sparsity}"
            )
        if epochs < 1 or step <= 0:
            raise ValueError(f"epochs ({epochs}) and step ({step}) must be positive")
        self.target_sparsity, self.epochs = target_sparsity, epochs
        self.step, self.exponent, self.aggressivity = step, exponent, aggressivity
        self._trajectory = density_trajectory(1 - target_sparsity, epochs, aggressivity)
        self._base = self._up = self._down = 0  # b, p and n in units of step / 4

    @property
    def base(self) -> float:
        """b, the pressure before the exponent."""
        return self._base * self.step / 4

    @property
    def gamma(self) -> float:
        """The pressure for the next epoch, in units of the mean of t."""
        return self.base**self.exponent

    def expected(self, epoch: int) -> float:
        """E(epoch): the density that the network should have after ``epoch`` epochs of pressure."""
        if epoch < 0:
            raise ValueError(f"epochs are counted from 0, got {epoch}")
        return float(self._trajectory[min(epoch, self.epochs)])

    def update(self, epoch: int, density: float) -> float:
        """Take the density measured after ``epoch`` (from 1) and return gamma for the next one."""
        if not 0 <= density <= 1:
            raise ValueError(f"density is a fraction in [0, 1], not {density}")
        if epoch < self.epochs:
            if density > self.expected(epoch):
                self._raise()
            else:
                self._lower()
        return self.gamma

    def _raise(self) -> None:
        self._base += 4 + self._up
        self._up += 1
        self._down = 0

    def _lower(self) -> None:
        self._base = max(0, self._base - 4 - self._down)
        self._down += 1
        self._up = 0

    def state_dict(self) -> dict[str, int]:
        """What the controller remembers between epochs: b, p and n in units of step / 4."""
        return {"base": self._base, "inertia_up": self._up, "inertia_down": self._down}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue where the scheduler that wrote ``state`` stopped."""
        self._base = int(state["base"])
        self._up, self._down = int(state["inertia_up"]), int(state["inertia_down"])


def base_after_rises(rises: int, step: float) -> float:
    """b after k rises in a row from 0, in closed form: step k + step k (k - 1) / 8."""
    return step * rises + step * rises * (rises - 1) / 8


def cosine(start: float, end: float, progress: float) -> float:
    """From ``start`` to ``end`` along half a cosine as ``progress`` goes from 0 to 1."""
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2
