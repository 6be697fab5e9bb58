"""The pace at which Hyperflows prunes, for methods that are to prune at the same (chapter 11)."""

from __future__ import annotations

from functools import cache

import numpy as np

from minihyperflows.flows.scheduler import density_trajectory

PERIODS = 40  # in which Hyperflows is steered


def planned_sparsity(progress: float, sparsity: float) -> float:
    """What the pressure scheduler expects when the fraction ``progress`` of its time is over."""
    return 1 - float(np.interp(progress * PERIODS, range(PERIODS + 1), trajectory(1 - sparsity)))


@cache
def trajectory(density: float) -> np.ndarray:
    """The densities that the scheduler expects at the ends of its periods, from 0 on."""
    return density_trajectory(density, PERIODS)
