"""Gates: which weights count, what the removed ones feel, and how gates come and go."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest

import minihyperflows as mh
from minihyperflows import flows, models, nn, testing
from minihyperflows import functional as F
from minihyperflows.flows.gates import GatedWeight, is_present


def conv_net(rng: np.random.Generator, dtype: Any = np.float64) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1, rng=rng, dtype=dtype),
        nn.BatchNorm2d(3, dtype=dtype),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(48, 4, rng=rng, dtype=dtype),
    )


def images(dtype: Any = np.float64) -> np.ndarray:
    return np.random.default_rng(5).standard_normal((3, 4, 4, 2)).astype(dtype)


# -- the gate itself -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_the_boundary_belongs_to_the_present(dtype: Any) -> None:
    tiny = np.finfo(dtype).smallest_subnormal
    t = np.array([0.0, -0.0, tiny, -tiny, 1, -1, np.inf, -np.inf], dtype)
    np.testing.assert_array_equal(is_present(t), [1, 1, 1, 0, 1, 0, 1, 0])
    np.testing.assert_array_equal(flows.gate(mh.Tensor(t)).data, [1, 1, 1, 0, 1, 0, 1, 0])


def test_the_gate_declares_a_quarter_exactly() -> None:
    assert flows.KAPPA == 0.25
    testing.check_surrogate(flows.gate, kappa=0.25)


def test_the_gate_of_complex_numbers_looks_at_the_real_part() -> None:
    t = mh.Tensor(np.array([1 - 5j, -1 + 5j, 0 - 1j]), requires_grad=True)
    mask = flows.gate(t)
    np.testing.assert_array_equal(mask.data, [1, 0, 1])
    assert mask.dtype == np.complex128
    mask.backward(np.array([4j, 8, 4]))
    np.testing.assert_array_equal(t.grad, [1j, 2, 1])


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.complex128])
def test_gated_weight_is_weight_times_gate(dtype: Any, rng: np.random.Generator) -> None:
    arrays = [rng.standard_normal((5, 3, 3, 2)).astype(dtype) for _ in range(3)]
    arrays[1][0] = 0  # on the boundary
    results = []
    for f in (
        lambda w, t: mh.apply(GatedWeight(), w, t),
        lambda w, t: w * flows.gate(t),
    ):
        w, t = (mh.Tensor(a, requires_grad=True) for a in arrays[:2])
        y = f(w, t)
        y.backward(arrays[2])
        results.append((y.data, w.grad, t.grad))
    for fast, simple in zip(*results, strict=True):
        np.testing.assert_array_equal(fast, simple)  # bit for bit


def test_the_flux_of_a_removed_weight(rng: np.random.Generator) -> None:
    """dL/dt = kappa w dL/dw', w' the weight in use, whether the weight is present or not."""
    layer = nn.Linear(6, 4, rng=rng, dtype=np.float64)
    flows.attach(layer, init=(-1, 1), rng=rng)
    x, c = rng.standard_normal((5, 6)), rng.standard_normal((5, 4))
    layer(x).backward(c)
    in_use = c.T @ x  # dL/dw'
    present = layer.presence.data >= 0
    assert 0 < present.sum() < present.size
    np.testing.assert_allclose(layer.presence.grad, 0.25 * layer.weight.data * in_use, rtol=1e-12)
    np.testing.assert_allclose(layer.weight.grad, in_use * present, rtol=1e-12)


def test_the_flux_is_a_quarter_of_the_change_that_reinsertion_brings(
    rng: np.random.Generator,
) -> None:
    """To first order, putting w back changes the loss by w dL/dw' = flux / kappa."""
    layer = nn.Linear(6, 3, rng=rng, dtype=np.float64)
    flows.attach(layer, init=(-1, -0.5), rng=rng)  # everything removed
    layer.weight.data *= 1e-4  # small weights: first order is all there is
    x, labels = rng.standard_normal((8, 6)), rng.integers(0, 3, 8)

    def loss() -> mh.Tensor:
        return F.cross_entropy(layer(x), labels)

    base = loss()
    base.backward()
    for index in np.ndindex(3, 6):
        layer.presence.data[index] *= -1
        change = loss().item() - base.item()
        layer.presence.data[index] *= -1
        flux = layer.presence.grad[index]
        np.testing.assert_allclose(change, flux / 0.25, rtol=1e-2, atol=1e-12)


# -- networks --------------------------------------------------------------------------------------


def test_attach_gates_every_weight_once(rng: np.random.Generator) -> None:
    net = conv_net(rng)
    before = copy.deepcopy(net)
    flows.attach(net, rng=rng)
    presences = flows.presences(net)
    assert list(presences) == ["0.presence", "4.presence"]
    for name, t in presences.items():
        weight = net.named_parameters()[name.replace("presence", "weight")]
        assert (t.shape, t.dtype, t.role) == (weight.shape, weight.dtype, "presence")
        assert 0.2 <= t.data.min() < t.data.max() <= 0.5
    assert list(net.named_parameters()) == list(before.named_parameters())
    assert flows.density(net) == 1
    np.testing.assert_array_equal(net(images()).data, before(images()).data)


def test_initial_presences_come_from_the_generator() -> None:
    nets = []
    for dtype in (np.float32, np.float64, np.float64):
        net = conv_net(np.random.default_rng(0), dtype)
        flows.attach(net, init=(-0.1, 0.3), rng=np.random.default_rng(9))
        nets.append(flows.presences(net))
    for single, double, again in zip(*(n.values() for n in nets), strict=True):
        np.testing.assert_array_equal(double.data, again.data)
        np.testing.assert_array_equal(single.data, double.data.astype(np.float32))


def test_presences_of_zero_are_present(rng: np.random.Generator) -> None:
    net = conv_net(rng)
    flows.attach(net, init=(0, 0), rng=rng)
    assert flows.density(net) == 1


def test_detach_gives_the_dense_net_back(rng: np.random.Generator) -> None:
    net = conv_net(rng)
    dense = net(images()).data
    names = list(net.state_dict())
    flows.attach(net, init=(-1, 1), rng=rng)
    assert not np.array_equal(net(images()).data, dense)
    flows.detach(net)
    np.testing.assert_array_equal(net(images()).data, dense)
    assert list(net.state_dict()) == names
    assert flows.presences(net) == {}
    flows.attach(net, rng=rng)  # and again


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_to_dense_is_the_same_function(
    training: bool, dtype: Any, rng: np.random.Generator
) -> None:
    net = conv_net(rng, dtype).train(training)
    flows.attach(net, init=(-1, 1), rng=rng)
    gated, density = copy.deepcopy(net), flows.density(net)
    parameters = net.parameters()
    flows.to_dense(net)
    x = images(dtype)
    np.testing.assert_array_equal(net(x).data, gated(x).data)  # bit for bit
    assert net.parameters() == parameters  # the same objects, for the optimiser that has them
    weights = np.concatenate([net[i].weight.data.ravel() for i in (0, 4)])
    assert (weights != 0).mean() == density
    with pytest.raises(ValueError, match="no gates"):
        flows.density(net)


def test_to_dense_and_gated_nets_have_the_same_weight_gradients_where_present(
    rng: np.random.Generator,
) -> None:
    net = conv_net(rng)
    flows.attach(net, init=(-1, 1), rng=rng)
    masks = {name: t.data >= 0 for name, t in flows.presences(net).items()}
    dense = copy.deepcopy(net)
    flows.to_dense(dense)
    for n in (net, dense):
        F.cross_entropy(n(images()), [0, 1, 2]).backward()
    for i in (0, 4):
        mask = masks[f"{i}.presence"]
        np.testing.assert_allclose(net[i].weight.grad, dense[i].weight.grad * mask, rtol=1e-12)
        assert dense[i].weight.grad[~mask].any()


def test_saving_keeps_the_sparsity(rng: np.random.Generator) -> None:
    net = conv_net(rng)
    flows.attach(net, init=(-1, 1), rng=rng)
    other = conv_net(np.random.default_rng(1))
    flows.attach(other, rng=rng)
    other.load_state_dict(net.state_dict())
    assert flows.layer_density(other) == flows.layer_density(net)
    np.testing.assert_array_equal(other.eval()(images()).data, net.eval()(images()).data)


def test_a_gated_net_is_differentiable_in_its_weights(rng: np.random.Generator) -> None:
    net = models.lenet300(6, 3, rng=rng, dtype=np.float64)
    flows.attach(net, init=(-1, 1), rng=rng)
    testing.check_module(net, (4, 6))


def test_hessian_vector_products_through_gates(rng: np.random.Generator) -> None:
    """The complex step works in gated nets: Im g(w + i h v) / h is the change of g along v."""
    net = models.lenet300(6, 3, rng=rng, dtype=np.float64)
    flows.attach(net, init=(-1, 1), rng=rng)
    x, labels = rng.standard_normal((5, 6)), rng.integers(0, 3, 5)
    weight = net.fc2.weight
    start, v = weight.data.copy(), rng.standard_normal(weight.shape)

    def gradient(step: complex) -> np.ndarray:
        weight.data = start + step * v
        net.zero_grad()
        F.cross_entropy(net(x), labels).backward()
        return weight.grad

    exact = gradient(1e-20j).imag / 1e-20
    difference = (gradient(1e-6) - gradient(-1e-6)) / 2e-6
    np.testing.assert_allclose(exact, difference, rtol=1e-5, atol=1e-9)
    assert not exact[net.fc2.presence.data < 0].any()


# -- counting --------------------------------------------------------------------------------------


def test_density_counts_weights_not_layers(rng: np.random.Generator) -> None:
    net = models.lenet300(64, rng=rng)
    flows.attach(net, rng=rng)
    net.fc3.presence.data[:] = -1
    net.fc2.presence.data[:50] = -0.001
    total = 64 * 300 + 300 * 100 + 100 * 10
    assert flows.density(net) == (64 * 300 + 300 * 50) / total
    assert flows.layer_density(net) == {"fc1": 1.0, "fc2": 0.5, "fc3": 0.0}


def test_an_empty_network_has_density_zero(rng: np.random.Generator) -> None:
    net = conv_net(rng)
    flows.attach(net, init=(-2, -1), rng=rng)
    assert flows.density(net) == 0
    assert np.isfinite(net.eval()(images()).data).all()


# -- misuse ----------------------------------------------------------------------------------------


def test_misuse(rng: np.random.Generator) -> None:
    net = conv_net(rng)
    with pytest.raises(ValueError, match=r"init must be \(low, high\) with low <= high"):
        flows.attach(net, init=(0.5, 0.2), rng=rng)
    with pytest.raises(ValueError, match="init must be"):
        flows.attach(net, init=(0.5, float("nan")), rng=rng)
    with pytest.raises(ValueError, match="init must be"):
        flows.attach(net, init=(0, float("inf")), rng=rng)
    for wrong in (0, None, np.random.RandomState(0)):
        with pytest.raises(TypeError, match=r"rng must be a numpy\.random\.Generator"):
            flows.attach(net, rng=wrong)
        with pytest.raises(TypeError, match=r"rng must be a numpy\.random\.Generator"):
            nn.Linear(2, 2, rng=wrong)
    assert flows.presences(net) == {}
    with pytest.raises(ValueError, match=r"attach them first with flows\.attach"):
        flows.density(net)
    flows.attach(net, rng=rng)
    with pytest.raises(ValueError, match=r"attached already: flows\.detach\(net\) removes them"):
        flows.attach(net, rng=rng)
    with pytest.raises(ValueError, match="no convolution or linear layer"):
        flows.attach(nn.Sequential(nn.ReLU()), rng=rng)
    with pytest.raises(TypeError, match="rng"):
        flows.attach(conv_net(rng))
    assert flows.layer_density(nn.ReLU()) == {}
