"""The timeline, and landing on the target."""

import itertools
import re
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minihyperflows import DoubtfulResultWarning, flows, models, nn
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


far = pytest.mark.filterwarnings("ignore:landing:minihyperflows.DoubtfulResultWarning")

# -- landing, against exhaustion -------------------------------------------------------------------

VALUES = (0.0, -0.0, 0.25, -0.25, 0.1, -0.1, 1e-3, -1e-3, np.inf, -np.inf, "tiny", "-tiny")


class Presences(nn.Module):
    """Layers of 1 x n weights whose t are given, in dtypes of their own."""

    def __init__(self, arrays):
        rng = np.random.default_rng(0)
        self.layers = [nn.Linear(len(a), 1, rng=rng, dtype=a.dtype) for a in arrays]
        flows.attach(self, rng=rng)
        for layer, array in zip(self.layers, arrays, strict=True):
            layer.presence.data[0] = array


@st.composite
def presences_of_layers(draw):
    """One to three layers of one to four t: ties, both zeros, infinities, the smallest numbers."""
    arrays = []
    for _ in range(draw(st.integers(1, 3))):
        dtype = np.dtype(draw(st.sampled_from(["float16", "float32", "float64"])))
        tiny = float(np.finfo(dtype).tiny)
        values = draw(st.lists(st.sampled_from(VALUES) | st.floats(-1, 1), min_size=1, max_size=4))
        named = {"tiny": tiny, "-tiny": -tiny}
        arrays.append(np.array([named.get(v, v) for v in values], dtype))
    return arrays


def best_moves(t, change):
    """The weights that land moves, by trying all sets of that many: of those that can move (from
    one side to the other) the nearest to 0, of equally near ones the earliest."""
    candidates = [i for i, value in enumerate(t) if (value >= 0) == (change < 0)]
    sets = itertools.combinations(candidates, abs(change))
    return min(sets, key=lambda chosen: (sorted(abs(t[i]) for i in chosen), chosen))


@pytest.mark.slow
@far
@given(presences_of_layers(), st.floats(0, 1) | st.sampled_from([0, 1, 0.5, np.float32(0.25)]))
def test_landing_moves_the_fewest_and_nearest_across(arrays, target):
    net = Presences(arrays)
    before = np.concatenate(arrays, dtype=np.float64)
    keep = kept_weights(float(target), before.size)
    change = keep - int((before >= 0).sum())
    moved = best_moves(list(before), change)
    assert land(net, target) == change
    assert flows.density(net) == keep / before.size
    after = [layer.presence.data[0] for layer in net.layers]
    assert [a.dtype for a in after] == [a.dtype for a in arrays]
    start = 0
    for old, new in zip(arrays, after, strict=True):
        for i, (a, b) in enumerate(zip(old, new, strict=True), start):
            if i in moved:
                assert b == (0 if change > 0 else -np.finfo(new.dtype).tiny)
            else:
                assert a.tobytes() == b.tobytes()  # -0.0 too
        start += old.size


@far
def test_landing_with_two_dtypes():
    """-tiny of float64 would be -0.0 in float32, which is present."""
    net = Presences([np.full(4, 0.5, np.float32), np.full(4, 0.5, np.float64)])
    assert land(net, 0.25) == -6
    assert flows.density(net) == 0.25
    assert land(net, 1.0) == 6
    assert flows.density(net) == 1


@far
def test_landing_where_the_arrays_lie_in_odd_memory():
    net = gated(np.random.default_rng(1))
    t = net.fc2.presence
    t.data = np.asfortranarray(t.data)
    land(net, 0.3)
    assert flows.density(net) == kept_weights(0.3, all_t(net).size) / all_t(net).size


@pytest.mark.parametrize("target", [1.5, -0.2, float("nan"), float("inf"), "0.5", None])
def test_a_density_that_is_not_a_fraction_is_refused(target):
    net = gated(np.random.default_rng(1))
    before = all_t(net).copy()
    with pytest.raises(ValueError, match=re.escape(f"a fraction in [0, 1], not {target}")):
        land(net, target)
    np.testing.assert_array_equal(all_t(net), before)


def test_landing_needs_gates_and_numbers():
    net = gated(np.random.default_rng(1))
    net.fc2.presence.data[0, 0] = np.nan
    with pytest.raises(ValueError, match=r"fc2\.presence holds NaN, which has no rank"):
        land(net, 0.5)
    flows.detach(net)
    with pytest.raises(ValueError, match="no gates: attach them first"):
        land(net, 0.5)


@pytest.mark.parametrize("target", [0.39, 0.4, 0.6, 0.61])
def test_a_landing_that_moves_more_than_a_tenth_is_doubtful(target):
    net = nn.Sequential(nn.Linear(100, 10, rng=np.random.default_rng(0)))
    flows.attach(net, rng=np.random.default_rng(1))
    (t,) = flows.presences(net).values()
    t.data[...] = np.linspace(-1, 1, 1000, dtype=np.float32).reshape(t.shape)  # a half is present
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        moved = land(net, target)
    how = "brought back 110" if moved > 0 else "removed 110"
    assert [how in str(w.message) for w in told] == [True] * (abs(moved) > 100)
    assert all(w.category is DoubtfulResultWarning and w.filename == __file__ for w in told)
