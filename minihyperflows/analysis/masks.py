"""What is left of LeNet-300: its masks, paths through them, and what chance expects of two
(chapter 11)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, TypeAlias

import numpy as np

from minihyperflows.data.datasets import Dataset
from minihyperflows.flows.gates import gated_layers, is_present
from minihyperflows.nn import Module

LAYERS = ("fc1", "fc2", "fc3")
RARE = 0.01  # of the images
GROUPS = 100  # of weights by size
Row: TypeAlias = dict[str, Any]
Masks: TypeAlias = dict[str, np.ndarray]


def masks_of(net: Module) -> Masks:
    """By layer, which weights are present."""
    return {name: is_present(layer.presence.data) for name, layer in gated_layers(net).items()}


def joined(masks: Masks) -> np.ndarray:
    """The masks of all layers as one vector."""
    return np.concatenate([masks[name].reshape(-1) for name in LAYERS])


def parted(mask: np.ndarray, shapes: dict[str, tuple[int, ...]]) -> Masks:
    """The inverse of :func:`joined`."""
    ends = np.cumsum([math.prod(shapes[name]) for name in LAYERS])
    parts = np.split(mask[: ends[-1]], ends[:-1])
    return {name: part.reshape(shapes[name]) for name, part in zip(LAYERS, parts, strict=True)}


def paths(masks: Masks) -> Row:
    """Hidden units with a path from an input and one to an output, and the present weights that
    are on no path from an input to an output."""
    first, second, third = (masks[name] for name in LAYERS)
    reached1 = first.any(axis=1)
    reached2 = (second & reached1).any(axis=1)
    leads2 = np.asarray(third.any(axis=0))
    leads1 = (second & leads2[:, None]).any(axis=0)
    live1, live2 = reached1 & leads1, reached2 & leads2
    used = first[live1].sum() + second[np.ix_(live2, live1)].sum() + third[:, live2].sum()
    idle = int(joined(masks).sum() - used)
    return {"units1": int(live1.sum()), "units2": int(live2.sum()), "idle": idle}


def pixel_groups(data: Dataset) -> dict[str, np.ndarray]:
    """Boolean masks over the pixels: constant over the training set, rare, other."""
    x = data.train_x.reshape(len(data.train_x), -1)
    lowest = x.min(axis=0)
    constant = lowest == x.max(axis=0)
    rare = ((x > lowest).mean(axis=0) < RARE) & ~constant
    return {"constant": constant, "rare": rare, "other": ~constant & ~rare}


def margins(mask: np.ndarray, rounds: int = 100) -> np.ndarray:
    """P (out, in): the chance of each weight if only the numbers per row and per column count.

    P_ij = x_i y_j / (1 + x_i y_j) is of all independent choices with the mask's row and column
    sums the one of largest entropy; x and y are found in turns. Rows and columns that are full or
    empty leave no choice.
    """
    chance = mask.astype(float)
    rows, columns = np.arange(mask.shape[0]), np.arange(mask.shape[1])
    while True:
        rest = mask[np.ix_(rows, columns)]
        free = [rest.any(axis=k) & ~rest.all(axis=k) for k in (1, 0)]
        if not rest.size or all(f.all() for f in free):
            break
        rows, columns = rows[free[0]], columns[free[1]]
    if not rest.size:
        return chance
    r, c = rest.sum(axis=1, dtype=float), rest.sum(axis=0, dtype=float)
    x, y = r / math.sqrt(r.sum()), c / math.sqrt(c.sum())
    for _ in range(rounds):
        x = r / (y / (1 + np.outer(x, y))).sum(axis=1)
        y = c / (x[:, None] / (1 + np.outer(x, y))).sum(axis=0)
    chance[np.ix_(rows, columns)] = np.outer(x, y) / (1 + np.outer(x, y))
    return chance


def expected_overlap(
    a: Masks, b: Masks, weights: Masks | None = None, fit: bool = True
) -> dict[str, dict[str, float]]:
    """By layer and for "all", the intersection that chance expects of masks like ``a`` and ``b``,
    by what they have in common: ``uniform``, ``layers``, ``pixels``, ``margins``, ``sizes``.

    Args:
        a, b: masks by layer.
        weights: by layer, of the network that both begin with, for ``sizes``.
        fit: whether to find ``margins``, which takes a second.
    """
    number = {name: (int(a[name].sum()), int(b[name].sum())) for name in LAYERS}
    size = {name: a[name].size for name in LAYERS}
    totals = [sum(pair[k] for pair in number.values()) for k in (0, 1)]
    everywhere = totals[0] * totals[1] / sum(size.values()) ** 2
    result = {}
    for name in LAYERS:
        columns = a[name].sum(axis=0) @ b[name].sum(axis=0) / a[name].shape[0]
        inside = number[name][0] * number[name][1] / size[name]
        result[name] = {
            "uniform": everywhere * size[name],
            "layers": inside,
            "pixels": float(columns) if name == "fc1" else inside,
        }
        if fit:
            expected = (margins(a[name]) * margins(b[name])).sum()
            result[name]["margins"] = float(expected)
        if weights is not None:
            result[name]["sizes"] = expected_by_size(a[name], b[name], weights[name])
    kinds = result["fc1"]
    result["all"] = {kind: sum(result[name][kind] for name in LAYERS) for kind in kinds}
    return result


def expected_by_size(a: np.ndarray, b: np.ndarray, weight: np.ndarray) -> float:
    """The intersection that chance expects within groups of weights of about the same size: 100
    equally many, or as many as leave twenty weights for each."""
    groups = min(GROUPS, weight.size // 20)
    group = np.empty(weight.size, int)
    group[np.argsort(abs(weight), axis=None)] = np.arange(weight.size) * groups // weight.size
    one, other = (np.bincount(group, m.reshape(-1), groups) for m in (a, b))
    return float((one * other / np.bincount(group, minlength=groups)).sum())


def overlap(a: Masks, b: Masks, weights: Masks | None = None, fit: bool = True) -> Iterator[Row]:
    """A row for all weights and for each layer: the two numbers, the intersection, and chance
    (see :func:`expected_overlap`)."""
    expected = expected_overlap(a, b, weights, fit)
    for part in ("all", *LAYERS):
        one, other = (joined(m) if part == "all" else m[part].reshape(-1) for m in (a, b))
        numbers = {"part": part, "weights": one.size, "a_present": int(one.sum())}
        numbers |= {"b_present": int(other.sum()), "intersection": int((one & other).sum())}
        yield numbers | expected[part]
