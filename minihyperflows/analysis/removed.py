"""What becomes of a removed weight, and how far its t can come back (chapter 09)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def decay_matrix(lr: float, weight_decay: float, momentum: float) -> np.ndarray:
    """One step of SGD for a weight without gradient: (w, v) <- A (w, v).

    v <- momentum v + weight_decay w;  w <- w - lr v.
    """
    row = np.array([weight_decay, momentum])
    return np.array([[1.0, 0.0] - lr * row, row])


def decayed(
    weight: np.ndarray,
    velocity: np.ndarray,
    removed_after: np.ndarray,
    rates: Sequence[float],
    weight_decay: float,
    momentum: float,
) -> np.ndarray:
    """Where weights are that were removed with a velocity and have had no gradient since.

    Args:
        weight, velocity: (n,) when they were removed.
        removed_after: (n,) in which step, counted from 1.
        rates: the learning rate of every step.
    """
    first_row = np.zeros((len(rates) + 1, 2))  # of the product of all A from a step to the last
    first_row[-1] = 1.0, 0.0
    for step in range(len(rates) - 1, -1, -1):
        first_row[step] = first_row[step + 1] @ decay_matrix(rates[step], weight_decay, momentum)
    return (first_row[removed_after] * np.stack([weight, velocity], axis=1)).sum(axis=1)


def travel(lr: float, steps: int, scale: float, decay: float, epochs: int) -> float:
    """How far t rises in a regrowth stage if it goes at Adam's speed limit, a learning rate a step:
    scale lr steps (1 - decay^epochs) / (1 - decay)."""
    return scale * lr * steps * (1 - decay**epochs) / (1 - decay)
