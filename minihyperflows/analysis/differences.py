"""How much better one method is than others, seed by seed (chapters 11 and 16)."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from minihyperflows.flows.law import mean_half_width


@dataclasses.dataclass(frozen=True)
class Difference:
    """How much better the reference is than ``method``, in accuracy: the mean over the seeds that
    both have, and its 95 % interval (Student's t; NaN for one seed)."""

    method: str
    sparsity: float
    seeds: int
    mean: float
    low: float
    high: float


def paired_differences(
    rows: Sequence[Mapping[str, Any]], reference: str = "hyperflows"
) -> list[Difference]:
    """The accuracy of ``reference`` minus that of every other method, seed by seed.

    Runs of the same seed share their dense network, so its luck drops out of the difference. The
    interval holds for one comparison; of twenty that are read, one misses on average.
    """
    accuracy = {(r["method"], r["target_sparsity"], r["seed"]): r["test_accuracy"] for r in rows}
    result = []
    for method in dict.fromkeys(r["method"] for r in rows):
        if method in (reference, "dense"):
            continue
        for sparsity in sorted({r["target_sparsity"] for r in rows if r["method"] == method}):
            differences = [
                accuracy[reference, sparsity, seed] - value
                for (name, s, seed), value in accuracy.items()
                if name == method and s == sparsity and (reference, s, seed) in accuracy
            ]
            if differences:
                spread = mean_half_width(differences)
                mean = statistics.mean(differences)
                size = len(differences)
                result.append(
                    Difference(method, sparsity, size, mean, mean - spread, mean + spread)
                )
    return result
