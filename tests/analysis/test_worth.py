"""The exact worth of single weights (``analysis.worth``)."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest

from minihyperflows import Tensor, analysis, flows, lab, nn, testing
from minihyperflows import functional as F
from minihyperflows.analysis.worth import LAYERS

SMOOTHING = 0.1


@pytest.fixture(scope="module")
def problem() -> tuple[nn.Module, np.ndarray, np.ndarray]:
    """A LeNet-300 for the digits with random gates, and some images."""
    data, rng = lab.load("digits"), np.random.default_rng(0)
    recipe = dataclasses.replace(lab.RECIPES["lenet300-digits"], dtype="float64")
    net = lab.build_network(recipe, data, rng)
    flows.attach(net, init=(-1.0, 1.0), rng=rng)
    return net, lab.normalise(data.train_x[:60], data, np.float64), data.train_y[:60]


@pytest.fixture(scope="module")
def probe(problem: tuple[nn.Module, np.ndarray, np.ndarray]) -> analysis.Probe:
    return analysis.Probe(*problem, smoothing=SMOOTHING)


def loss_and_gradient(net: nn.Module, x: np.ndarray, labels: np.ndarray) -> float:
    net.zero_grad()
    loss = F.cross_entropy(net(Tensor(x)), labels, SMOOTHING)
    loss.backward()
    return loss.item()


@pytest.mark.parametrize("name", LAYERS)
def test_worth_is_the_definition(problem, probe: analysis.Probe, name: str) -> None:
    net, x, labels = problem
    trial = copy.deepcopy(net)
    layer = getattr(trial, name)
    places = np.sort(np.random.default_rng(1).choice(layer.weight.size, 12, replace=False))
    exact = analysis.worths(probe, name, places)
    assert 0 < probe.present[name].flat[places].sum() < 12  # of both kinds
    for k, place in enumerate(places):
        before, losses, gradients = layer.presence.data.flat[place], {}, {}
        for presence in (1.0, -1.0):
            layer.presence.data.flat[place] = presence
            losses[presence] = loss_and_gradient(trial, x, labels)
            flux = layer.presence.grad.flat[place]
            gradients[presence] = flux / (flows.KAPPA * layer.weight.data.flat[place])
        layer.presence.data.flat[place] = before
        testing.assert_close(exact["worth"][k], losses[-1.0] - losses[1.0], rtol=1e-6, atol=1e-13)
        other = gradients[-1.0 if before >= 0 else 1.0]
        testing.assert_close(exact["other"][k], other, rtol=1e-6, atol=1e-13)
    halves = (exact["even"] + exact["odd"]) / 2
    testing.assert_close(halves, exact["worth"], rtol=1e-9, atol=1e-15)


def test_loss_and_gradient_are_the_package_s(problem, probe: analysis.Probe) -> None:
    net, x, labels = problem
    testing.assert_close(probe.loss, loss_and_gradient(net, x, labels))
    for name in LAYERS:
        layer = getattr(net, name)
        flux = flows.KAPPA * layer.weight.data * probe.gradient(name)
        testing.assert_close(flux, layer.presence.grad, rtol=1e-9)
        examples = probe.gradient(name, examples=True)
        testing.assert_close(examples.T @ probe.inputs[name] / len(x), probe.gradient(name))


@pytest.mark.parametrize("name", LAYERS)
def test_curvature_is_the_derivative_of_the_gradient(problem, probe, name: str) -> None:
    net, x, labels = problem
    i, j = np.argwhere(probe.present[name] & (probe.curvature(name) > 0))[5]
    trial = copy.deepcopy(net)
    weight = getattr(trial, name).weight
    weight.data = weight.data.astype(complex)
    weight.data[i, j] += 1e-20j  # the complex step
    trial.zero_grad()
    F.cross_entropy(trial(Tensor(x)), labels, SMOOTHING).backward()
    testing.assert_close(weight.grad[i, j].imag / 1e-20, probe.curvature(name)[i, j], rtol=1e-8)


def test_second_order_is_exact_for_small_weights(problem) -> None:
    """The error of the second order goes with the third power of the weight."""
    net, x, labels = problem
    trial, errors = copy.deepcopy(net), []
    for size in (1e-2, 1e-3):
        trial.fc3.weight.data[4, 7] = size
        probe = analysis.Probe(trial, x, labels, SMOOTHING)
        exact = analysis.worths(probe, "fc3", np.array([407]))["worth"][0]
        errors.append(abs(probe.second_order("fc3")[4, 7] - exact))
    assert errors[1] < 3e-3 * errors[0] + 1e-15
