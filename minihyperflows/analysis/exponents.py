"""The exponent of the pruning law, fitted for every seed (chapter 10)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from minihyperflows import flows
from minihyperflows.flows.law import mean_half_width


@dataclasses.dataclass(frozen=True)
class Exponent:
    """density = c saliency ** -alpha, fitted for every seed.

    Attributes:
        alpha: the mean over the seeds.
        interval: of 95 %, from the scatter between seeds (Student's t); NaN for a single one. The
            scatter around a line says less: the steps of a run depend on each other.
        c, r2: their geometric and arithmetic means.
        points: in each fit, on average.
        seeds: alpha of each.
    """

    alpha: float
    interval: tuple[float, float]
    c: float
    r2: float
    points: float
    seeds: tuple[float, ...]


def exponent(
    rows: Sequence[Mapping[str, Any]], low: float, high: float, saliency: str = "saliency"
) -> Exponent:
    """The exponent of one method's rows with low < density <= high.

    Args:
        rows: of one method, any number of seeds.
        low, high: the authors' window is 0.005, 0.5.
        saliency: which column.

    Raises:
        ValueError: a seed has fewer than two such rows.
    """
    chosen = [r for r in rows if low < r["density"] <= high]
    laws, sizes = [], []
    for seed in sorted({r["seed"] for r in rows}):
        points = [(r[saliency], r["density"]) for r in chosen if r["seed"] == seed]
        laws.append(flows.fit_power_law(*zip(*points, strict=True)))
        sizes.append(len(points))
    alphas = np.array([law.alpha for law in laws])
    half, mean = mean_half_width(alphas), float(alphas.mean())
    return Exponent(
        alpha=mean,
        interval=(mean - half, mean + half),
        c=math.exp(float(np.mean([math.log(law.c) for law in laws]))),
        r2=float(np.mean([law.r2 for law in laws])),
        points=float(np.mean(sizes)),
        seeds=tuple(float(a) for a in alphas),
    )
