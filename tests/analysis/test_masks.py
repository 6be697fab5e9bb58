"""Masks, paths through them, and what chance expects (``analysis.masks``)."""

from __future__ import annotations

import numpy as np
import pytest

from minihyperflows import analysis
from minihyperflows.analysis.masks import LAYERS, Masks, expected_overlap, paths

KINDS = ("uniform", "layers", "pixels", "margins")


def random_masks(rng: np.random.Generator) -> Masks:
    """Small masks with layers, rows and columns of very different densities."""
    masks = {}
    for name, shape, density in (("fc1", (12, 20), 0.2), ("fc2", (8, 12), 0.4), ("fc3", (5, 8), 1)):
        chance = np.outer(rng.uniform(0.3, 1, shape[0]), rng.uniform(0, 1, shape[1]) ** 2)
        masks[name] = rng.random(shape) < density * chance
    return masks


def test_expected_overlap_is_that_of_masks_placed_at_random() -> None:
    rng = np.random.default_rng(0)
    a, b = random_masks(rng), random_masks(rng)
    expected = expected_overlap(a, b)
    found: dict[str, list[int]] = {kind: [] for kind in KINDS[:3]}
    chance = {name: analysis.margins(a[name]) for name in LAYERS}
    drawn = []
    for _ in range(3000):
        shuffled = rng.permutation(analysis.joined(a))
        found["uniform"].append(int((shuffled & analysis.joined(b)).sum()))
        layers = {name: rng.permutation(mask.reshape(-1)) for name, mask in a.items()}
        hits = {name: int((layers[name] & b[name].reshape(-1)).sum()) for name in layers}
        found["layers"].append(sum(hits.values()))
        columns = rng.permuted(a["fc1"], axis=0)  # the rows of each column in a new order
        found["pixels"].append(int((columns & b["fc1"]).sum()) + hits["fc2"] + hits["fc3"])
        draw = {name: rng.random(p.shape) < p for name, p in chance.items()}
        drawn.append(np.concatenate([draw["fc1"].sum(axis=0), draw["fc1"].sum(axis=1)]))
    for kind, values in found.items():
        error = np.std(values) / len(values) ** 0.5
        assert abs(np.mean(values) - expected["all"][kind]) < 5 * error
    wanted = np.concatenate([a["fc1"].sum(axis=0), a["fc1"].sum(axis=1)])
    np.testing.assert_allclose(np.mean(drawn, axis=0), wanted, atol=0.2)


def test_expected_overlap_of_weights_of_like_size() -> None:
    rng = np.random.default_rng(4)
    weight = rng.standard_normal((40, 50))
    largest = abs(weight) >= np.sort(abs(weight), axis=None)[-200]
    assert analysis.expected_by_size(largest, largest, weight) == pytest.approx(200)
    a, b = (rng.random(weight.shape) < np.where(largest, 0.5, 0.05) for _ in range(2))
    found = analysis.expected_by_size(a, b, weight)
    ties = (a & largest).sum() * (b & largest).sum() / 200
    ties += (a & ~largest).sum() * (b & ~largest).sum() / 1800
    assert abs(found - ties) < 0.25 * ties
    assert analysis.expected_by_size(a, b, rng.permuted(weight)) < 0.6 * ties


def test_margins_keep_the_sums_of_rows_and_columns() -> None:
    rng = np.random.default_rng(1)
    mask = rng.random((30, 40)) < np.outer(rng.random(30) ** 2, rng.random(40))
    mask[3], mask[:, 5] = False, False
    mask[7, :5], mask[7, 6:] = True, True  # full but for the empty column
    chance = analysis.margins(mask)
    np.testing.assert_allclose(chance.sum(axis=0), mask.sum(axis=0), atol=1e-6)
    np.testing.assert_allclose(chance.sum(axis=1), mask.sum(axis=1), atol=1e-6)
    assert ((chance >= 0) & (chance <= 1)).all()
    assert (chance[3] == 0).all()
    assert (chance[7] == mask[7]).all()
    for plain in (np.ones((4, 6), bool), np.zeros((4, 6), bool), np.eye(6, dtype=bool)[:4] > 2):
        assert (analysis.margins(plain) == plain).all()


def test_two_equal_masks_overlap_completely_and_nested_chance_grows() -> None:
    a = random_masks(np.random.default_rng(2))
    rows = {row["part"]: row for row in analysis.overlap(a, a)}
    for row in rows.values():
        assert row["intersection"] == row["a_present"] == row["b_present"]
        assert all(row[kind] <= row["intersection"] for kind in KINDS[1:])
    one = rows["all"]
    assert one["uniform"] < one["layers"] < one["pixels"] < one["margins"]


def test_paths() -> None:
    masks = {
        "fc1": np.zeros((300, 64), bool),
        "fc2": np.zeros((100, 300), bool),
        "fc3": np.zeros((10, 100), bool),
    }
    masks["fc1"][[0, 1, 2], 5] = True
    masks["fc2"][[0, 1, 2], [0, 1, 7]] = True  # unit 2 leads nowhere, unit 7 is fed by nothing
    masks["fc3"][3, [0, 2]] = True  # unit 1 of the second layer leads nowhere
    # The path 5 -> 0 -> 0 -> 3 is the only one: three weights of eight.
    assert paths(masks) == {"units1": 1, "units2": 1, "idle": 5}
