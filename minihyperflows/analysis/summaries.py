"""Tables of means over seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from minihyperflows.flows.law import mean_half_width


def means(rows: Sequence[Mapping[str, Any]], by: Sequence[str], shown: Sequence[str]) -> str:
    """A table in Markdown: for rows that agree in the columns ``by`` how many there are, and of
    the columns ``shown`` the mean and half the width of its 95 % interval (Student's t)."""
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in by), []).append(row)
    lines = [(*by, "rows", *shown), ("---",) * (len(by) + 1 + len(shown))]
    for key, same in groups.items():
        columns = ([row[name] for row in same if row.get(name, "") != ""] for name in shown)
        lines.append((*map(str, key), str(len(same)), *map(_text, columns)))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _text(values: Sequence[float]) -> str:
    if not values:
        return ""
    half = mean_half_width(values)
    spread = "" if math.isnan(half) else f" ± {half:.2g}"
    return f"{statistics.mean(values):.4g}{spread}"
