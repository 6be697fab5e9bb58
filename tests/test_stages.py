"""The timeline, and landing on the target."""

import numpy as np
import pytest

from minihyperflows import flows, models
from minihyperflows.flows.stages import Timeline, _smallest, kept_weights, land


def gated(rng, low=-1.0, high=1.0, dtype=np.float32):
    net = models.lenet300(in_features=8, num_classes=3, rng=rng, dtype=dtype)
    flows.attach(net, init=(low, high), rng=rng)
    return net


def all_t(net):
    return np.concatenate([p.data.reshape(-1) for p in flows.presences(net).values()])


def test_timeline():
    timeline = Timeline(dense=2, pruning=3, regrowth=1)
    stages = [timeline.locate(e) for e in range(1, 7)]
    assert stages == [
        ("dense", 1), ("dense", 2), ("pruning", 1), ("pruning", 2), ("pruning", 3), ("regrowth", 1),
    ]  # fmt: skip
    for epoch in (0, 7):
        with pytest.raises(ValueError, match="not in 1"):
            timeline.locate(epoch)
    with pytest.raises(ValueError, match="at least one pruning epoch"):
        Timeline(1, 0, 1)


@pytest.mark.parametrize("total", [50_200, 266_200, 7])
@pytest.mark.parametrize("sparsity", [0.6, 0.9, 0.95, 0.98, 0.99, 0.995])
def test_kept_weights_do_not_exceed_the_density(total, sparsity):
    keep = kept_weights(1 - sparsity, total)
    assert keep == int(round((1 - sparsity) * total, 6))
    assert -1e-6 <= (1 - sparsity) * total - keep < 1


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("target", [0.01, 0.3, 0.5, 0.9])
def test_landing_keeps_exactly_the_largest_t(target, dtype):
    net = gated(np.random.default_rng(1), dtype=dtype)
    before = all_t(net).copy()
    present = (before >= 0).sum()
    change = land(net, target)
    after, keep = all_t(net), kept_weights(target, before.size)
    assert (after >= 0).sum() == keep == present + change
    assert set(np.flatnonzero(after >= 0)) == set(np.argsort(before)[-keep:])
    moved = (after >= 0) != (before >= 0)
    assert moved.sum() == abs(change)
    np.testing.assert_array_equal(after[~moved], before[~moved])


@pytest.mark.parametrize("count", [1, 2, 7, 499, 500])
@pytest.mark.parametrize("different", [3, 40, 10**9])
def test_the_smallest_are_the_beginning_of_a_stable_sort(count, different):
    values = np.random.default_rng(count).integers(0, different, 500).astype(np.float32)
    expected = np.argsort(values, kind="stable")[:count]
    assert sorted(_smallest(values, count)) == sorted(expected)


def test_landing_where_it_is_already_changes_nothing():
    net = gated(np.random.default_rng(1))
    before = all_t(net).copy()
    present = float((before >= 0).mean())
    assert land(net, present) == 0
    np.testing.assert_array_equal(all_t(net), before)


def test_landing_with_ties_and_signed_zeros():
    """-0.0 is present; among equal t the earlier weight moves."""
    net = gated(np.random.default_rng(0))
    for p in flows.presences(net).values():
        p.data[...] = -0.0
    assert flows.density(net) == 1
    assert land(net, 0.25) == -(all_t(net).size - kept_weights(0.25, all_t(net).size))
    assert flows.density(net) == pytest.approx(0.25, abs=1e-4)
    assert all_t(net)[-1] >= 0 > all_t(net)[0]
