"""The supports of a network's weights (``analysis.support``)."""

from __future__ import annotations

import numpy as np
import pytest

from minihyperflows import flows, lab, nn
from minihyperflows import functional as F
from minihyperflows.analysis import Supports, supports
from minihyperflows.engine import Tensor

RECIPE = "lenet300-digits-gamma"


def test_fractions_of_a_distribution() -> None:
    # Two removed weights, and four present ones of which two were sampled.
    found = Supports(np.array([-1.0, 2.0, 4.0, 8.0]), np.array([1.0, 1.0, 2.0, 2.0]))
    assert found.above(3.0) == pytest.approx(4 / 6)
    assert found.presence(3.0) == pytest.approx((2 * (1 - 3 / 4) + 2 * (1 - 3 / 8)) / 6)
    assert found.presence(9.0) == 0.0
    assert found.balance(4 / 6) == 4.0  # just the two that stand for four are above what is below 4
    assert found.balance(0.01) == 8.0
    assert found.balance(1.0) == -1.0


@pytest.mark.slow
def test_support_is_minus_the_flux_of_the_removed_weight() -> None:
    data, rng = lab.load("digits"), np.random.default_rng(0)
    recipe = lab.RECIPES[RECIPE].with_fields({"dtype": "float64"})
    net = lab.build_network(recipe, data, rng)
    flows.attach(net, init=(-0.01, 0.01), rng=rng)  # half of the weights are removed
    before = net.state_dict()
    found = supports(net, data, 0.1, rng, sample=3, images=len(data.train_y))
    assert {k: v.tolist() for k, v in net.state_dict().items()} == {
        k: v.tolist() for k, v in before.items()
    }

    total = sum(t.size for t in flows.presences(net).values())
    removed = total - round(total * flows.density(net))
    assert found.values.size == removed + 3
    assert found.counts.sum() == pytest.approx(total)

    x = Tensor(lab.normalise(data.train_x, data, np.float64))
    net.zero_grad()
    F.cross_entropy(net(x), data.train_y, 0.1).backward()
    off = [-t.grad[t.data < 0] for t in flows.presences(net).values() if t.grad is not None]
    np.testing.assert_allclose(found.values[:removed], np.concatenate(off), rtol=1e-9, atol=1e-15)


@pytest.mark.slow
def test_a_present_weight_is_removed_to_be_measured() -> None:
    data, rng = lab.load("digits"), np.random.default_rng(0)
    layer = nn.Linear(64, 10, rng=rng, dtype=np.float64)
    net = nn.Sequential(nn.Flatten(), layer)
    flows.attach(net, init=(-1.0, -0.5), rng=rng)
    kept = [(3, 20), (4, 36), (9, 43)]
    for place in kept:
        layer.presence.data[place] = 0.5
    found = supports(net, data, 0.1, rng, sample=50)
    assert found.values.size == 640
    x, expected = Tensor(lab.normalise(data.train_x, data, np.float64)), []
    for place in kept:
        layer.presence.data[place] = -0.5
        net.zero_grad()
        F.cross_entropy(net(x), data.train_y, 0.1).backward()
        expected.append(-layer.presence.grad[place])
        layer.presence.data[place] = 0.5
    np.testing.assert_allclose(sorted(found.values[-3:]), sorted(expected), rtol=1e-9)
