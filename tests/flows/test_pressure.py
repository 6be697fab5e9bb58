"""The pressure: its value, its constant gradient, and what it does through real optimisers.

The closed forms are those of weights without flux: only the pressure moves their t.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import minihyperflows as mh
from minihyperflows import flows, models, nn, optim
from minihyperflows.flows.pressures import MeanPresence


def gated_lenet(rng: np.random.Generator, inputs: int = 20, dtype: Any = np.float32) -> nn.Module:
    net = models.lenet300(inputs, rng=rng, dtype=dtype)
    flows.attach(net, init=(-0.5, 0.5), rng=rng)
    return net


def all_presences(net: nn.Module) -> np.ndarray:
    return np.concatenate([t.data.ravel() for t in flows.presences(net).values()])


# -- value and gradient ----------------------------------------------------------------------------


def test_it_is_the_mean_over_the_whole_network(rng: np.random.Generator) -> None:
    net = gated_lenet(rng, dtype=np.float64)
    np.testing.assert_allclose(flows.pressure(net).item(), all_presences(net).mean(), rtol=1e-13)
    t = all_presences(net)
    floored = flows.pressure(net, floor=-0.3).item()
    np.testing.assert_allclose(floored, t[t > -0.3].sum() / t.size, rtol=1e-13)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.complex128])
def test_every_presence_feels_exactly_one_share(dtype: Any, rng: np.random.Generator) -> None:
    net = gated_lenet(rng)
    for t in flows.presences(net).values():
        t.data = t.data.astype(dtype)
        t.data.flat[:4] = [0.0, -0.0, -40.0, 40.0]
    pressure = flows.pressure(net)
    pressure.backward()
    n = 20 * 300 + 300 * 100 + 100 * 10
    for t in flows.presences(net).values():
        assert t.grad.dtype == dtype
        np.testing.assert_array_equal(t.grad, np.full(t.shape, np.ones((), dtype) / n))
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("floor", [-0.3, 0.0, -10.0, 10.0])
def test_the_floor_lets_go(floor: float, rng: np.random.Generator) -> None:
    net = gated_lenet(rng, dtype=np.float64)
    first = flows.presences(net)["fc1.presence"]
    first.data[0, :2] = [floor, np.nextafter(floor, 11)]  # at the floor, and just above it
    flows.pressure(net, floor=floor).backward()
    share = 1.0 / all_presences(net).size
    for t in flows.presences(net).values():
        np.testing.assert_array_equal(t.grad, np.where(t.data > floor, share, 0.0))
    assert (first.grad[0, :2] == [0, share]).all()


def test_gamma_scales_the_gradient(rng: np.random.Generator) -> None:
    net = gated_lenet(rng, dtype=np.float64)
    (0.5 * flows.pressure(net) * 8).backward()
    t = flows.presences(net)["fc2.presence"]
    np.testing.assert_allclose(t.grad, 4 / all_presences(net).size, rtol=1e-15)


def test_each_presence_owns_its_gradient(rng: np.random.Generator) -> None:
    net = gated_lenet(rng)
    flows.pressure(net).backward()
    gradients = [t.grad for t in flows.presences(net).values()]
    gradients[0] += 1
    assert all(g.flags.owndata and g.flags.writeable for g in gradients)
    assert gradients[1].max() < 1


def test_only_needed_shares_are_handed_out(rng: np.random.Generator) -> None:
    still, moving = mh.Tensor(rng.standard_normal(3)), mh.Tensor(rng.standard_normal(2), True)
    mh.apply(MeanPresence(), still, moving).backward()
    assert still.grad is None
    np.testing.assert_array_equal(moving.grad, [0.2, 0.2])


def test_a_net_without_gates_has_no_pressure(rng: np.random.Generator) -> None:
    with pytest.raises(ValueError, match=r"attach them first with flows\.attach"):
        flows.pressure(models.lenet300(4, rng=rng))


# -- drift without flux ----------------------------------------------------------------------------


def test_sgd_drift_without_flux() -> None:
    """rem = clip(1 - (displacement - a) / 1.5 a, 0, 1) for t uniform on [a, 2.5 a] after n steps.

    displacement = lr gamma/N (n - mu (1 - mu^n) / (1 - mu)) / (1 - mu), close to
    n lr gamma/N / (1 - mu) for many steps. The authors' ResNet-18 run at gamma = 2^-4, with a
    pressure of gamma 3.75e-6 on each weight, had 75.04 % left after 117,300 steps. Here the
    pressure is a hundred times as large and the steps are a hundredth.
    """
    net = nn.Linear(100, 30, rng=np.random.default_rng(0), dtype=np.float64)
    flows.attach(net, rng=np.random.default_rng(1))
    a, lr, mu, size = 2e-4, 1e-3, 0.9, net.weight.size
    net.presence.data = np.linspace(a, 2.5 * a, size).reshape(net.weight.shape)
    start, share = net.presence.data.copy(), 100 * 2**-4 * 3.75e-6
    optimizer = optim.SGD(flows.presences(net).values(), lr=lr, momentum=mu)
    for step in range(1, 1174):
        optimizer.zero_grad()
        (share * size * flows.pressure(net)).backward()
        optimizer.step()
        if step % 100 == 0:
            moved = lr * share * (step - mu * (1 - mu**step) / (1 - mu)) / (1 - mu)
            np.testing.assert_allclose(start - net.presence.data, moved, rtol=1e-9)
            expected = np.clip(1 - (moved - a) / (1.5 * a), 0, 1)
            assert abs(flows.density(net) - expected) <= 1 / size
    assert abs(flows.density(net) - 0.7504) < 0.01  # momentum lags by 9 steps: 0.7 points


@pytest.mark.parametrize("ratio", [1e-2, 1.0, 30.0, 1e4])
def test_adam_drift_without_flux(ratio: float) -> None:
    """displacement = n lr r with r = (gamma/N) / (gamma/N + eps): at most lr a step."""
    net = nn.Linear(10, 3, rng=np.random.default_rng(0), dtype=np.float64)
    flows.attach(net, rng=np.random.default_rng(1))
    gamma = ratio * 1e-8 * net.weight.size  # gamma / N in units of Adam's eps
    start, n, lr = net.presence.data.copy(), 300, 1e-3
    optimizer = optim.Adam(flows.presences(net).values(), lr=lr)
    for _ in range(n):
        optimizer.zero_grad()
        (gamma * flows.pressure(net)).backward()
        optimizer.step()
    np.testing.assert_allclose(start - net.presence.data, n * lr * ratio / (ratio + 1), rtol=1e-9)


def test_lenet_loses_its_first_weight_after_step_267() -> None:
    """t from 0.2 up, lr 7.5e-4, gamma 1: r = 0.9973, and 0.2 / (lr r) = 267.4."""
    rng = np.random.default_rng(0)
    net = models.lenet300(rng=rng)
    flows.attach(net, init=(0.2, 0.5), rng=rng)
    assert all_presences(net).size == 266_200
    optimizer = optim.Adam(flows.presences(net).values(), lr=7.5e-4)
    density = {}
    for step in range(1, 301):
        optimizer.zero_grad()
        flows.pressure(net).backward()
        optimizer.step()
        density[step] = flows.density(net)
    assert density[267] == 1
    assert density[268] < 1
    share = 1 / 266_200
    r = share / (share + 1e-8)
    np.testing.assert_allclose(density[300], 1 - (300 * 7.5e-4 * r - 0.2) / 0.3, atol=2e-3)


def test_pressure_without_bound_and_with_a_floor() -> None:
    """Without a floor a dead weight's t sinks for ever; with one it stays near it."""
    lowest = []
    for floor in (None, -0.3):
        net = nn.Linear(5, 4, rng=np.random.default_rng(0), dtype=np.float64)
        flows.attach(net, rng=np.random.default_rng(1))
        optimizer = optim.SGD(flows.presences(net).values(), lr=1.0)
        for _ in range(400):
            optimizer.zero_grad()
            (0.1 * flows.pressure(net, floor)).backward()  # 0.005 a step
            optimizer.step()
        lowest.append(net.presence.data.min())
        assert flows.density(net) == 0
    assert lowest[0] < -1.4
    assert -0.306 < lowest[1] <= -0.3
