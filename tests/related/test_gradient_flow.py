"""The equations of gradient flow, checked along integrated flows."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from support.lanes import large

from minihyperflows import functional as F
from minihyperflows import nn
from minihyperflows.engine.tensor import Tensor
from minihyperflows.related import gradient_flow as gf
from minihyperflows.related.derivatives import Landscape
from minihyperflows.related.scores import importance

DT = 1e-5  # so short that no ReLU of the examples switches in it
Quantity = Callable[[np.ndarray], Any]


class MLP(nn.Module):
    """Linear layers with an activation between them; flattens its input."""

    def __init__(
        self, sizes: list[int], activation: Any, rng: np.random.Generator, bias: bool = True
    ) -> None:
        self.activation = activation
        self.layers = [nn.Linear(a, b, bias, rng=rng, dtype=np.float64) for a, b in pairwise(sizes)]

    def forward(self, x: Tensor) -> Tensor:
        x = F.flatten(x)
        for layer in self.layers[:-1]:
            x = self.activation(layer(x))
        return self.layers[-1](x)


class ConvNet(nn.Module):
    """conv, batch norm, ReLU; conv, ReLU, batch norm: both orders; a residual sum; linear."""

    def __init__(self, rng: np.random.Generator, eps: float = 1e-5) -> None:
        options: dict[str, Any] = {"rng": rng, "dtype": np.float64}
        self.conv1 = nn.Conv2d(2, 4, 3, padding=1, bias=False, **options)
        self.bn1 = nn.BatchNorm2d(4, eps=eps, dtype=np.float64)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1, bias=False, **options)
        self.bn2 = nn.BatchNorm2d(4, eps=eps, dtype=np.float64)
        self.fc = nn.Linear(4, 3, **options)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = y + self.bn2(F.relu(self.conv2(y)))
        return self.fc(y.mean(axis=(1, 2)))


def landscape(kind: str, rng: np.random.Generator, n: int = 12, **options: Any) -> Landscape:
    labels = rng.integers(0, 3, n)
    if kind == "conv":
        return Landscape(ConvNet(rng), rng.standard_normal((n, 5, 5, 2)), labels, **options)
    net = MLP([5, 8, 6, 3], {"tanh": F.tanh, "relu": F.relu}[kind], rng)
    return Landscape(net, rng.standard_normal((n, 5)), labels, **options)


def moved(land: Landscape, weights: np.ndarray, time: float) -> np.ndarray:
    """theta after a short time, before or after now."""
    *_, last = gf.integrate(land.gradient, weights, time, 1)
    return last.weights


def rate(land: Landscape, weights: np.ndarray, quantity: Quantity) -> Any:
    """d/dt of a quantity along the flow, by a central difference."""
    after, before = (quantity(moved(land, weights, t)) for t in (DT, -DT))
    return (after - before) / (2 * DT)


def close(found: Any, expected: Any, rtol: float = 1e-5) -> None:
    """To ``rtol`` of the largest entry."""
    np.testing.assert_allclose(found, expected, rtol=0, atol=rtol * np.abs(expected).max())


# -- the integrator ------------------------------------------------------------------------------


def test_a_quadratic_has_a_closed_form(rng: np.random.Generator) -> None:
    """L = 1/2 sum h theta^2: theta = theta_0 e^-ht, C = h theta_0^2 (1 - e^-2ht) / 2."""
    h, start = np.array([0.1, 1.0, 3.0]), rng.standard_normal(3)
    states = list(gf.integrate(lambda theta: h * theta, start, 2.0, 200))
    assert len(states) == 201
    for state in states:
        np.testing.assert_allclose(state.weights, start * np.exp(-h * state.time), atol=1e-8)
        reduction = h * start**2 * (1 - np.exp(-2 * h * state.time)) / 2
        np.testing.assert_allclose(state.loss_reduction, reduction, atol=1e-8)
    assert states[-1].time == pytest.approx(2.0)


@pytest.mark.slow
def test_the_integrator_is_of_order_four(rng: np.random.Generator) -> None:
    land = landscape("tanh", rng)
    ends = {}
    for steps in (4, 8, 64):
        *_, ends[steps] = gf.integrate(land.gradient, land.weights, 4.0, steps)
    errors = [abs(ends[n].weights - ends[64].weights).max() for n in (4, 8)]
    assert errors[0] / errors[1] == pytest.approx(16, rel=0.4)


# -- rates, at points along a flow -----------------------------------------------------------------


@pytest.fixture(scope="module", params=["tanh", "relu", *large("conv"), "tanh with weight decay"])
def flow(request: pytest.FixtureRequest) -> tuple[Landscape, list[np.ndarray]]:
    """A landscape and some points along the flow through it."""
    kind, _, decay = request.param.partition(" ")
    land = landscape(kind, np.random.default_rng(4), weight_decay=0.05 if decay else 0.0)
    states = list(gf.integrate(land.gradient, land.weights, 2.0, 20))
    return land, [states[i].weights for i in (0, 7, 20)]


Flow = tuple[Landscape, list[np.ndarray]]


def test_the_loss_falls_by_the_squared_gradient(flow: Flow) -> None:
    """(15.2), and its second derivative."""
    land, points = flow
    for theta in points:
        g = land.gradient(theta)
        close(gf.loss_rate(g).sum(), rate(land, theta, land.loss))
        second = gf.loss_acceleration(g, land.hessian_product(g, theta))
        close(second, rate(land, theta, lambda w: gf.loss_rate(land.gradient(w))))


def test_the_norm_changes_by_the_first_order_scores(flow: Flow) -> None:
    """(15.3) for each single weight, and so for every group."""
    land, points = flow
    for theta in points:
        g = land.gradient(theta)
        close(gf.norm_rate(theta, g), rate(land, theta, np.square))
        close(gf.norm_rate(theta, g), 2 * gf.loss_change(theta, g), 1e-15)


def test_norm_gradient_and_overlap(flow: Flow) -> None:
    """(15.4), (15.5), and (15.6) for each single weight."""
    land, points = flow
    for theta in points:
        g = land.gradient(theta)
        curvature = land.hessian_product(g, theta)
        close(-curvature, rate(land, theta, land.gradient))
        gradient_norm = rate(land, theta, lambda w: land.gradient(w) ** 2)
        close(gf.gradient_norm_rate(g, curvature), gradient_norm)
        overlap = rate(land, theta, lambda w: w * land.gradient(w))
        close(gf.overlap_rate(theta, g, curvature), overlap)
        second = rate(land, theta, lambda w: gf.norm_rate(w, land.gradient(w)))
        close(gf.norm_acceleration(theta, g, curvature), second)


def test_second_derivatives_along_a_smooth_flow(rng: np.random.Generator) -> None:
    """(f(t + d) - 2 f(t) + f(t - d)) / d^2 of the loss, and of the square of each weight."""
    land, step = landscape("tanh", rng), 1e-3
    theta = moved(land, land.weights, 0.5)
    after, before = (moved(land, theta, t) for t in (step, -step))
    g = land.gradient(theta)
    curvature = land.hessian_product(g, theta)
    losses = land.loss(after) - 2 * land.loss(theta) + land.loss(before)
    close(gf.loss_acceleration(g, curvature).sum(), losses / step**2)
    squares = (after**2 - 2 * theta**2 + before**2) / step**2
    close(gf.norm_acceleration(theta, g, curvature), squares)


def test_weight_decay_is_a_force_towards_zero(rng: np.random.Generator) -> None:
    """The rate of the norm from the gradient without the decay."""
    decayed = landscape("tanh", np.random.default_rng(4), weight_decay=0.05)
    plain = landscape("tanh", np.random.default_rng(4))
    theta = plain.weights
    expected = gf.norm_rate(theta, decayed.gradient())
    close(gf.norm_rate(theta, plain.gradient(), weight_decay=0.05), expected, 1e-13)


def test_a_step_of_gradient_descent_changes_the_norm_exactly(flow: Flow) -> None:
    """(15.7), for any learning rate."""
    land, (theta, *_) = flow
    g = land.gradient(theta)
    for lr in (1e-3, 0.5, 10.0):
        difference = (theta - lr * g) ** 2 - theta**2
        np.testing.assert_allclose(gf.norm_step(theta, g, lr), difference, rtol=0, atol=1e-15)


def test_what_has_moved_has_taken_off_loss(flow: Flow) -> None:
    """(15.10) for every parameter and filter. Exactly, since C and the way are sums over the same
    points, for which the inequality of Cauchy and Schwarz holds too."""
    land, (start, *_) = flow
    first, states = land.arrays(start), list(gf.integrate(land.gradient, start, 3.0, 40))
    for state in states[1:]:
        bound = gf.reduction_bound(start, state.weights, state.time)
        assert (state.loss_reduction >= bound * (1 - 1e-9)).all()
        terms = land.arrays(bound), land.arrays(state.loss_reduction)
        lower, upper = (gf.per_group(t, "filter") for t in terms)
        last = land.arrays(state.weights)
        for name in lower:
            assert (upper[name] >= lower[name] * (1 - 1e-9)).all()
            norms = [
                np.sqrt(gf.per_group({name: a[name] ** 2}, "filter")[name]) for a in (first, last)
            ]
            assert (lower[name] * (1 + 1e-9) >= (norms[1] - norms[0]) ** 2 / state.time).all()
    # at first all move straight ahead, and the bound is what is reached
    ahead = gf.reduction_bound(start, states[1].weights, states[1].time).sum()
    assert ahead > 0.95 * states[1].loss_reduction.sum()


@pytest.mark.slow
@pytest.mark.parametrize("decay", [0.0, 0.05])
def test_the_reductions_add_up(decay: float, rng: np.random.Generator) -> None:
    """The C of all parameters are L(0) - L(t), as exactly as the integrator is."""
    land = landscape("tanh", rng, weight_decay=decay)
    for state in gf.integrate(land.gradient, land.weights, 3.0, 60):
        drop = land.loss() - land.loss(state.weights)
        assert state.loss_reduction.sum() == pytest.approx(drop, rel=1e-7, abs=1e-15)


def test_a_flow_can_be_caught_on_a_kink() -> None:
    """L = |x| + y^2 / 2 arrives at x = 0 and stays, while the gradient goes on saying 1 or -1: C of
    x grows with the time, beyond the loss that there was to take."""

    def gradient(theta: np.ndarray) -> np.ndarray:
        return np.array([np.sign(theta[0]), theta[1]])

    *_, end = gf.integrate(gradient, np.array([0.5, 1.0]), 4.0, 4001)
    assert abs(end.weights[0]) < 1e-2
    assert end.loss_reduction[0] > 2
    assert end.loss_reduction[1] == pytest.approx((1 - np.exp(-8)) / 2, rel=1e-6)


@pytest.mark.slow
def test_flows_of_networks_with_relu_are_caught_too() -> None:
    """Some tenths of a per cent too much, however small the steps: not an error of integration."""
    land = landscape("relu", np.random.default_rng(4))
    for steps in (60, 240):
        *_, end = gf.integrate(land.gradient, land.weights, 3.0, steps)
        excess = end.loss_reduction.sum() / (land.loss() - land.loss(end.weights)) - 1
        assert 1e-3 < excess < 4e-3


# -- removing ------------------------------------------------------------------------------------


def members_of_a_neuron(land: Landscape) -> np.ndarray:
    """The weights into one neuron of the second layer."""
    arrays = {name: np.zeros(p.shape, bool) for name, p in land.parameters.items()}
    arrays["layers.1.weight"][2] = True
    return land.vector(arrays)


def slopes(errors: list[float]) -> np.ndarray:
    """The power with which errors shrink, for steps that shrink tenfold."""
    return -np.diff(np.log10(errors))


def test_taylor_links(rng: np.random.Generator) -> None:
    """Errors of first order fall with the square of what is removed, of second with the cube."""
    land = landscape("tanh", rng)
    theta, p = land.weights, members_of_a_neuron(land)
    g = land.gradient(theta)
    hg = land.hessian_product(g, theta)
    first, second, norm = [], [], []
    for fraction in (1.0, 0.1, 0.01, 0.001):
        smaller = gf.without(theta, p, fraction)
        change = land.loss(smaller) - land.loss(theta)
        first.append(abs(change - fraction * gf.loss_change(theta, g)[p].sum()))
        removed = np.where(p, fraction * theta, 0)
        to_second = land.hessian_product(removed, theta) @ removed / 2 - removed @ g
        second.append(abs(change - to_second))
        norms = (land.gradient(smaller) ** 2).sum() - (g**2).sum()
        norm.append(abs(norms - fraction * gf.gradient_norm_change(theta, hg)[p].sum()))
    np.testing.assert_allclose(slopes(first)[1:], 2, atol=0.1)
    np.testing.assert_allclose(slopes(second)[:2], 3, atol=0.3)
    np.testing.assert_allclose(slopes(norm)[1:], 2, atol=0.1)
    to_second = gf.loss_change_to_second_order(land, theta, p)
    change = land.loss(gf.without(theta, p)) - land.loss(theta)
    assert abs(change - to_second) == pytest.approx(second[0], abs=1e-15)
    assert not gf.without(theta, p)[p].any()


class Quadratic:
    """L = 1/2 (theta - minimum).H (theta - minimum): its second order is all that there is."""

    def __init__(self, hessian: np.ndarray, minimum: np.ndarray) -> None:
        self.hessian, self.minimum = hessian, minimum

    def loss(self, weights: np.ndarray) -> float:
        return float(self.gradient(weights) @ (weights - self.minimum) / 2)

    def gradient(self, weights: np.ndarray) -> np.ndarray:
        return self.hessian @ (weights - self.minimum)

    def hessian_product(self, v: np.ndarray, weights: np.ndarray) -> np.ndarray:
        return self.hessian @ v


def test_at_a_minimum_only_the_second_order_is_left(rng: np.random.Generator) -> None:
    """There the first says nothing, and the second all: 1/2 theta_p.H theta_p; elsewhere both."""
    root = rng.standard_normal((4, 4))
    land = Quadratic(root @ root.T, np.array([1.0, -0.5, 2.0, 0.7]))
    members = np.array([True, False, True, False])
    for theta in (land.minimum, land.minimum + rng.standard_normal(4)):
        change = land.loss(gf.without(theta, members)) - land.loss(theta)
        found = gf.loss_change_to_second_order(land, theta, members)  # type: ignore[arg-type]
        assert found == pytest.approx(change, rel=1e-12)
    at_minimum = gf.loss_change(land.minimum, land.gradient(land.minimum))
    assert not at_minimum.any()
    removed = np.where(members, land.minimum, 0)
    by_hand = removed @ land.hessian @ removed / 2
    assert by_hand > 0.1
    found = gf.loss_change_to_second_order(land, land.minimum, members)  # type: ignore[arg-type]
    assert found == pytest.approx(by_hand, rel=1e-12)


def test_where_the_hessian_is_diagonal_grasp_follows_the_loss(rng: np.random.Generator) -> None:
    """theta (Hg) = h theta g has the sign of theta g: the most negative raise the loss."""
    h = rng.random(100) + 0.1
    theta, minimum = rng.standard_normal((2, 100))
    g = h * (theta - minimum)
    grasp = -gf.gradient_norm_change(theta, h * g) / 2
    np.testing.assert_array_equal(np.sign(grasp), -np.sign(gf.loss_change(theta, g)))


# -- batch norm ----------------------------------------------------------------------------------


def filter_facts(eps: float, mode: str) -> dict[str, tuple[float, float]]:
    """How far (15.11) is from true, relative to the terms: for each convolution the largest of
    |theta_f.g_f| / sum |theta g|, and of |theta_f.(Hg)_f + |g_f|^2| / |g_f|^2."""
    rng = np.random.default_rng(2)
    x, labels = rng.standard_normal((10, 5, 5, 2)), rng.integers(0, 3, 10)
    land = Landscape(ConvNet(rng, eps), x, labels, mode=mode)
    theta, g = land.weights, land.gradient()
    hg = land.hessian_product(g)
    terms = {"flow": theta * g, "size": abs(theta * g), "curve": theta * hg, "square": g**2}
    sums = {k: gf.per_group(land.arrays(v), "filter") for k, v in terms.items()}
    found = {}
    for name in ("conv1.weight", "conv2.weight"):
        flow, size, curve, square = (sums[k][name] for k in terms)
        found[name] = (abs(flow / size).max(), abs((curve + square) / square).max())
    return found


def test_behind_batch_norm_a_filter_has_no_scale() -> None:
    """Exact with eps = 0, wrong by a multiple of eps otherwise, and not at all in evaluation mode.

    How much depends on the variances: the usual 1e-5 gives 0.1 % or less for theta.g, but up to 9 %
    for theta.Hg behind a ReLU that is seldom active.
    """
    for name, errors in filter_facts(0.0, "train").items():
        assert max(errors) < 1e-12, name
        for error, smaller in zip(
            filter_facts(1e-5, "train")[name], filter_facts(1e-6, "train")[name], strict=True
        ):
            assert error == pytest.approx(10 * smaller, rel=0.05), name
    assert max(filter_facts(1e-5, "train")["conv1.weight"]) < 3e-3
    for name, errors in filter_facts(0.0, "eval").items():
        assert min(errors) > 0.1, name


def test_behind_batch_norm_grasp_removes_the_largest_gradients(rng: np.random.Generator) -> None:
    net = ConvNet(rng, eps=0.0)
    data = rng.standard_normal((10, 5, 5, 2)), rng.integers(0, 3, 10)
    land = Landscape(net, *data)
    squares = gf.per_group(land.arrays(land.gradient() ** 2), "filter")
    grasp = importance(net, *data, "grasp", "filter")
    signed = importance(net, *data, "first_order", "filter")
    absolute = importance(net, *data, "loss_preservation", "filter")
    for name in ("conv1.weight", "conv2.weight"):
        np.testing.assert_allclose(grasp[name], -squares[name], rtol=1e-11)
        assert (signed[name] < 1e-13 * absolute[name]).all()
    assert (signed["fc.weight"] > 1e-3 * absolute["fc.weight"]).any()


def test_behind_batch_norm_norms_only_grow(rng: np.random.Generator) -> None:
    """A step adds lr^2 |g_f|^2 to the squared norm of a filter, and nothing else."""
    x, labels = rng.standard_normal((10, 5, 5, 2)), rng.integers(0, 3, 10)
    land = Landscape(ConvNet(rng, eps=0.0), x, labels)
    theta, g = land.weights, land.gradient()
    before, after, square = (
        gf.per_group(land.arrays(v), "filter") for v in (theta**2, (theta - 0.5 * g) ** 2, g**2)
    )
    for name in ("conv1.weight", "conv2.weight"):
        growth = after[name] - before[name]
        np.testing.assert_allclose(growth, 0.25 * square[name], atol=1e-14)
        assert (growth > 1e-8).all()


# -- homogeneity and temperature -----------------------------------------------------------------


def test_without_biases_all_layers_have_the_same_overlap(rng: np.random.Generator) -> None:
    """(15.12), for layers, and for the weights into and out of a hidden unit."""
    net = MLP([5, 8, 6, 3], F.relu, rng, bias=False)
    land = Landscape(net, rng.standard_normal((12, 5)), rng.integers(0, 3, 12))
    terms = land.arrays(land.weights * land.gradient())
    first, second, third = gf.per_group(terms, "layer").values()
    assert abs(first) > 1e-3
    assert first == pytest.approx(second, rel=1e-12)
    assert first == pytest.approx(third, rel=1e-12)
    into = gf.per_group(terms, "filter")["layers.0.weight"]
    out_of = terms["layers.1.weight"].sum(axis=0)
    np.testing.assert_allclose(into, out_of, rtol=0, atol=1e-16)

    biased = landscape("relu", rng)
    for parameter in biased.parameters.values():
        parameter.data = parameter.data + 0.1
    sums = gf.per_group(biased.arrays(biased.weights * biased.gradient()), "layer")
    assert abs(sums["layers.0.weight"] - sums["layers.1.weight"]) > 1e-3


@pytest.mark.parametrize("layers", [2, 3, 4])
def test_at_a_high_temperature_grasp_is_the_squared_gradient(
    layers: int, rng: np.random.Generator
) -> None:
    """theta.Hg / |g|^2 tends to D - 1, with an error of 1 / T."""
    net = MLP([5, *[8] * (layers - 1), 3], F.relu, rng, bias=False)
    data = rng.standard_normal((12, 5)), rng.integers(0, 3, 12)
    errors = []
    for temperature in (1e2, 1e3, 1e4):
        land = Landscape(net, *data, temperature)
        theta, g = land.weights, land.gradient()
        errors.append(gf.curvature_ratio(theta, g, land.hessian_product(g)) - (layers - 1))
    assert abs(errors[-1]) < 1e-2
    np.testing.assert_allclose(slopes(np.abs(errors).tolist()), 1, atol=0.1)


def test_at_a_high_temperature_the_loss_is_linear_in_the_logits(rng: np.random.Generator) -> None:
    """T (L - ln K) tends to the mean of (u - y).f, with u = 1 / K."""
    net = MLP([5, 8, 3], F.relu, rng, bias=False)
    x, labels = rng.standard_normal((12, 5)), rng.integers(0, 3, 12)
    logits = net(x).numpy()
    expected = ((1 / 3 - np.eye(3)[labels]) * logits).sum(axis=1).mean()
    found = 1e6 * (Landscape(net, x, labels, 1e6).loss() - np.log(3))
    assert found == pytest.approx(expected, rel=1e-4)


# -- groups --------------------------------------------------------------------------------------


def test_sums_over_groups_add_up(rng: np.random.Generator) -> None:
    land = landscape("conv", rng)
    terms = land.arrays(gf.loss_rate(land.gradient()))
    total = sum(a.sum() for a in terms.values())
    shapes = {name: {k: v.shape for k, v in gf.per_group(terms, name).items()} for name in LEVELS}
    for level in LEVELS:
        found = gf.per_group(terms, level)
        assert sum(a.sum() for a in found.values()) == pytest.approx(total, rel=1e-12)
    assert shapes["filter"]["conv1.weight"] == (4,)
    assert shapes["filter"]["fc.bias"] == (3,)
    assert shapes["layer"]["conv1.weight"] == ()
    with pytest.raises(ValueError, match="level"):
        gf.per_group(terms, "network")


LEVELS = ("weight", "filter", "layer")
