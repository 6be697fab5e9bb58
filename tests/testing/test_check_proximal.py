"""The check of proximal operators: it passes right ones and objects to broken ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from minihyperflows.related.dhp import shrink_norm, soft_threshold
from minihyperflows.testing import check_proximal


def absolute(x: np.ndarray) -> float:
    return float(abs(x).sum())


def norm(x: np.ndarray) -> float:
    return float(np.sqrt((x * x).sum()))


def count(x: np.ndarray) -> float:
    return float((x != 0).sum())


def hard_threshold(z: np.ndarray, tau: float) -> np.ndarray:
    return np.where(abs(z) > np.sqrt(2 * tau), z, np.zeros_like(z)) if tau else z.copy()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("proximal", "penalty"),
    [
        (soft_threshold, absolute),
        (shrink_norm, norm),
        (hard_threshold, count),
        (lambda z, tau: z / (1 + tau), lambda x: float((x * x).sum() / 2)),
        (lambda z, tau: z.copy(), lambda x: 0.0),
    ],
    ids=["l1", "norm", "l0", "squares", "nothing"],
)
def test_right_operators_pass(proximal: Any, penalty: Any) -> None:
    check_proximal(proximal, penalty)


def in_place(z: np.ndarray, tau: float) -> np.ndarray:
    z *= 1 - tau
    return z


@pytest.mark.parametrize(
    ("broken", "penalty", "message"),
    [
        (lambda z, tau: z - tau * np.sign(z), absolute, "at .* it is"),  # steps over zero
        (lambda z, tau: soft_threshold(z, tau / 10), absolute, "at .* it is"),
        (lambda z, tau: np.where(abs(z) > 2 * tau, z, 0.0 * z), count, "at .* it is"),
        (lambda z, tau: soft_threshold(z, (2 * tau) ** 0.5), count, "at .* it is"),
        (shrink_norm, absolute, "at .* it is"),
        (soft_threshold, norm, "at .* it is"),
        (in_place, absolute, "writes into z"),
        (lambda z, tau: soft_threshold(z, tau).astype(np.float64), absolute, "must be alike"),
        (lambda z, tau: float(abs(z).sum()), absolute, "comes float"),
        (lambda z, tau: soft_threshold(z, tau + 1e-3), absolute, "without a penalty"),
        (lambda z, tau: z + (np.nan if tau else 0.0) * z, absolute, "it is"),
    ],
)
def test_wrong_operators_are_found(broken: Any, penalty: Any, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_proximal(broken, penalty)
