"""Tied weights: layers that share a weight have one weight, for everything that is done to it."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from minihyperflows import Tensor, flows, lab, nn, optim
from minihyperflows import functional as F
from minihyperflows.cli import pruned_weights
from minihyperflows.flows.gates import WeightGate, counts
from minihyperflows.flows.gpu.flat import FlatTraining
from minihyperflows.nn import weight_groups
from minihyperflows.nn.counting import flops, kept_weights, sparse_flops
from minihyperflows.related import pruners, rounds


def tied(dtype: Any = np.float64, size: int = 6) -> nn.Sequential:
    """Two layers with one weight and biases of their own, and a third with both of its own."""
    rng = np.random.default_rng(0)
    layers = [nn.Linear(size, size, rng=rng, dtype=dtype) for _ in range(3)]
    layers[1].weight = layers[0].weight
    return nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])


def untied(net: nn.Sequential) -> nn.Sequential:
    """A copy in which the second layer has a weight, and a t, of its own, equal to the first's."""
    other = copy.deepcopy(net)
    other[2].weight = nn.Parameter(net[0].weight.data.copy())
    if flows.presences(net):
        t = nn.Parameter(net[0].presence.data.copy(), role="presence")
        other[2].presence, other[2].weight_gate = t, WeightGate(t)
    return other


def inputs(dtype: Any = np.float64, size: int = 6) -> Tensor:
    return Tensor(np.random.default_rng(3).standard_normal((4, size)).astype(dtype))


LABELS = np.array([0, 2, 1, 5])


def test_groups_have_the_name_of_their_first_layer() -> None:
    net = tied()
    groups = weight_groups(net)
    assert {name: len(layers) for name, layers in groups.items()} == {"0": 2, "4": 1}
    assert groups["0"] == [net[0], net[2]]
    assert [f"{name}.weight" for name in groups] == [
        k for k in net.named_parameters() if k.endswith("weight")
    ]


def test_one_presence_serves_all_layers_of_a_weight() -> None:
    net = tied()
    flows.attach(net, init=(-1, 1), rng=np.random.default_rng(2))
    assert list(flows.presences(net)) == ["0.presence", "4.presence"]
    assert net[0].presence is net[2].presence
    weight = net[0].weight.data * (net[0].presence.data >= 0)
    for layer in (net[0], net[2]):
        np.testing.assert_array_equal(layer.effective_weight().data, weight)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_to_dense_is_the_same_function(dtype: Any) -> None:
    net = tied(dtype)
    flows.attach(net, init=(-1, 1), rng=np.random.default_rng(2))
    before = net(inputs(dtype)).data.copy()
    flows.to_dense(net)
    np.testing.assert_array_equal(net(inputs(dtype)).data, before)
    assert net[0].weight is net[2].weight
    assert not any("presence" in name for name in net.state_dict())


def test_detach_frees_every_layer() -> None:
    net = tied()
    before = net(inputs()).data
    flows.attach(net, init=(-1, 1), rng=np.random.default_rng(2))
    flows.detach(net)
    np.testing.assert_array_equal(net(inputs()).data, before)
    assert all(layer.weight_gate is None for layer in nn.weighted_layers(net).values())
    flows.attach(net, rng=np.random.default_rng(2))


def test_a_weight_counts_once() -> None:
    net = tied()
    flows.attach(net, rng=np.random.default_rng(2))
    net[0].presence.data[:3] = -1
    assert counts(net) == {"0": (18, 36), "4": (36, 36)}
    assert flows.layer_density(net) == {"0": 0.5, "4": 1.0}
    assert flows.density(net) == 0.75
    np.testing.assert_allclose(
        flows.pressure(net).data, (net[0].presence.data.sum() + net[4].presence.data.sum()) / 72
    )
    dense = flops(net, (6,))
    assert dense == {"0": 2 * 66, "4": 66}  # both layers that use it work
    assert sparse_flops(dense, flows.layer_density(net)) == {"0": 66, "4": 66}


@pytest.mark.filterwarnings("ignore:landing:minihyperflows.DoubtfulResultWarning")
@pytest.mark.parametrize("target", [0.0, 0.1, 0.5, 1.0])
def test_landing_counts_it_once(target: float) -> None:
    net = tied()
    flows.attach(net, init=(-1, 1), rng=np.random.default_rng(2))
    flows.land(net, target)
    assert flows.density(net) == int(target * 72) / 72


def test_the_gradients_of_a_tied_weight_are_the_sums_of_its_layers() -> None:
    net = tied()
    flows.attach(net, init=(-1, 1), rng=np.random.default_rng(2))
    other = untied(net)
    for n in (net, other):
        F.cross_entropy(n(inputs()), LABELS).backward()
    for name in ("weight", "presence"):
        separate = getattr(other[0], name).grad + getattr(other[2], name).grad
        np.testing.assert_allclose(getattr(net[0], name).grad, separate, rtol=1e-12, atol=1e-15)


def test_the_recorder_reads_it_once() -> None:
    net = tied()
    flows.attach(net, init=(-1, 1), rng=np.random.default_rng(2))
    recorder = flows.FlowRecorder(net)
    F.cross_entropy(net(inputs()), LABELS).backward()
    recorder.observe_flux()
    present = net[0].presence.data >= 0
    flux = abs(net[0].presence.grad)
    net[0].presence.data[...] = -net[0].presence.data
    recorder.observe_step()
    assert recorder.density == flows.density(net)
    report = recorder.take()
    assert list(report) == ["0", "4"]
    assert (report["0"].flips, report["0"].regrowths) == (36, int((~present).sum()))
    np.testing.assert_allclose(report["0"].flux_present, flux[present].mean(), rtol=1e-12)


def test_ties_made_after_attach_are_refused() -> None:
    net = tied()
    net[2].weight = nn.Parameter(net[0].weight.data.copy())
    flows.attach(net, rng=np.random.default_rng(2))
    net[2].weight = net[0].weight
    for use in (flows.density, flows.to_dense, flows.FlowRecorder):
        with pytest.raises(ValueError, match=r"share 0\.weight do not share its gate"):
            use(net)
    flows.detach(net)
    flows.attach(net, rng=np.random.default_rng(2))
    assert flows.density(net) == 1


# -- saving ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("gated", [False, True])
def test_a_state_goes_round_and_the_tie_stays(gated: bool) -> None:
    net, other = tied(), tied()
    if gated:
        flows.attach(net, init=(-1, 1), rng=np.random.default_rng(2))
        flows.attach(other, rng=np.random.default_rng(5))
    for p in other.parameters():
        p.data = p.data + 1
    state = net.state_dict()
    assert {"0.weight", "2.weight"} <= set(state)  # as in PyTorch
    other.load_state_dict(state)
    assert other[0].weight is other[2].weight
    np.testing.assert_array_equal(other(inputs()).data, net(inputs()).data)
    other[0].weight.data += 1
    np.testing.assert_array_equal(other[2].weight.data, net[0].weight.data + 1)


def test_a_state_with_two_values_for_one_weight_is_refused_and_changes_nothing() -> None:
    net = tied()
    before, state = net.state_dict(), net.state_dict()
    state["2.weight"] = state["2.weight"] + 1
    with pytest.raises(ValueError, match=r"0\.weight and 2\.weight are one tensor here"):
        net.load_state_dict(state)
    for name, value in net.state_dict().items():
        np.testing.assert_array_equal(value, before[name])
    state = {name: np.full_like(value, np.nan) for name, value in state.items()}
    net.load_state_dict(state)  # NaN in both places is one value


def test_pytorch_ties_have_the_same_names() -> None:
    torch = pytest.importorskip("torch")
    linear = [torch.nn.Linear(6, 6, dtype=torch.float64) for _ in range(3)]
    linear[1].weight = linear[0].weight
    theirs = torch.nn.Sequential(linear[0], torch.nn.ReLU(), linear[1], torch.nn.ReLU(), linear[2])
    net = tied()
    net.load_state_dict({name: value.numpy() for name, value in theirs.state_dict().items()})
    expected = theirs(torch.tensor(inputs().data)).detach().numpy()
    np.testing.assert_allclose(net(inputs()).data, expected, rtol=1e-12)


@pytest.mark.filterwarnings("ignore::minihyperflows.DoubtfulResultWarning")
def test_a_training_goes_on_where_it_was_saved() -> None:
    """Gates, optimisers and recorder of a tied network, after any epoch, bit for bit."""
    digits = lab.load("digits")
    data = dataclasses.replace(digits, train_x=digits.train_x[::8], train_y=digits.train_y[::8])
    fields = {"dense.epochs": 1, "pruning.epochs": 2, "regrowth.epochs": 2, "target_sparsity": 0.5}
    recipe = lab.RECIPES["lenet300-digits"].with_fields(fields | {"presence.lr": 0.02})

    def trainer() -> lab.Trainer:
        return lab.Trainer(DigitNet(), data, recipe, np.random.default_rng(1))

    whole, states = trainer(), []
    while not whole.finished:
        whole.run_epoch()
        states.append(whole.state_dict())
    for arrays, values in states[:-1]:
        later = trainer()
        later.load_state_dict(arrays, values)
        while not later.finished:
            later.run_epoch()
        assert later.net.middle[0].weight is later.net.middle[1].weight
        for name, value in later.state_dict()[0].items():
            np.testing.assert_array_equal(value, states[-1][0][name], err_msg=name)
    weights = 64 * 16 + 16 * 16 + 16 * 10
    assert flows.density(whole.net) == kept_weights(0.5, weights) / weights


class DigitNet(nn.Module):
    """A classifier of digits whose two middle layers share a weight."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.first = nn.Linear(64, 16, rng=rng)
        self.middle = [nn.Linear(16, 16, rng=rng), nn.Linear(16, 16, rng=rng)]
        self.middle[1].weight = self.middle[0].weight
        self.last = nn.Linear(16, 10, rng=rng)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(F.flatten(x)))
        for layer in self.middle:
            x = F.relu(layer(x))
        return self.last(x)


def test_what_is_exported_computes_the_same() -> None:
    net = tied()
    flows.attach(net, init=(-1, 1), rng=np.random.default_rng(2))
    before = net(inputs()).data
    exported = pruned_weights({f"net.{k}": v for k, v in net.state_dict().items()})
    dense = tied()
    dense.load_state_dict(exported)
    np.testing.assert_array_equal(dense(inputs()).data, before)


def test_a_single_layer_is_exported_with_its_zeros() -> None:
    layer = nn.Linear(5, 4, rng=np.random.default_rng(0))
    flows.attach(layer, init=(-1, 1), rng=np.random.default_rng(2))
    exported = pruned_weights({f"net.{k}": v for k, v in layer.state_dict().items()})
    flows.to_dense(layer)
    assert set(exported) == {"weight", "bias"}
    np.testing.assert_array_equal(exported["weight"], layer.weight.data)


# -- other methods ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        pruners.Random,
        pruners.Magnitude,
        lambda sparsity: pruners.Gradual(sparsity, every=2),
        lambda sparsity: pruners.Movement(sparsity, every=2),
        lambda sparsity: pruners.RigL(sparsity, every=2),
    ],
)
def test_pruners_mask_it_once(make: Callable[[float], pruners.Pruner]) -> None:
    net, pruner = tied(), make(0.6)
    optimizer = optim.SGD(net.parameters(), 0.1, momentum=0.9)
    pruner.start(net, optimizer, 10, np.random.default_rng(1))
    for step in range(1, 11):
        net.zero_grad()
        F.cross_entropy(net(inputs()), LABELS).backward()
        optimizer.step()
        pruner.after_step(step)
    assert list(pruner.masks) == ["0", "4"]
    assert pruner.total == 72
    assert pruner.density == pruner.kept / 72 == 28 / 72
    before = net(inputs()).data
    pruner.finish()
    np.testing.assert_array_equal(net(inputs()).data, before)
    assert sum(int((p.data != 0).sum()) for p in net.parameters() if p.ndim > 1) <= 28


def test_rounds_of_scores_prune_it_once() -> None:
    net = tied()

    def magnitudes(net: nn.Module) -> dict[str, np.ndarray]:
        return {name: abs(p.data) for name, p in net.named_parameters().items()}

    for done in rounds.prune_weights(net, 0.5, 2, lambda net: None, magnitudes, least=1):
        assert done.total == 72
    before = net(inputs()).data
    rounds.finish(net)
    np.testing.assert_array_equal(net(inputs()).data, before)
    assert sum(int((p.data != 0).sum()) for p in net.parameters() if p.ndim > 1) == 36


# -- flat arrays on a GPU --------------------------------------------------------------------------


@pytest.mark.parametrize("gated", [False, True])
def test_flat_training_steps_it_once(gated: bool, gpu: Any) -> None:
    """The same steps as on the CPU, with the gradients of both layers."""
    nets = [tied(np.float32), tied(np.float32)]
    optimizers = []
    for net, device in zip(nets, ("cpu", "cuda"), strict=True):
        if gated:
            flows.attach(net, init=(-0.01, 0.02), rng=np.random.default_rng(2))
        net.to(device)
        weights = optim.SGD(net.parameters(), 0.1, momentum=0.9)
        presences = optim.Adam(flows.presences(net).values(), 1e-2) if gated else None
        optimizers.append((weights, presences))
    flat = FlatTraining(nets[1], *optimizers[1], np.float32)
    flat.set_rates(gamma=0.5)
    for _ in range(5):
        nets[0].zero_grad()
        loss = F.cross_entropy(nets[0](inputs(np.float32)), LABELS)
        if gated:
            loss = loss + 0.5 * flows.pressure(nets[0])
        loss.backward()
        for optimizer in filter(None, optimizers[0]):
            optimizer.step()
        flat.zero_grad()
        images = inputs(np.float32).to("cuda")
        loss = F.cross_entropy(nets[1](images), Tensor(LABELS).to("cuda").data)
        loss.backward(flat.scale)
        flat.step(loss, len(LABELS))
    if gated:
        assert flat.density == flows.density(nets[1]) == flows.density(nets[0]) < 1
    flat.release()
    assert nets[1][0].weight is nets[1][2].weight
    state = nets[1].state_dict()
    for name, value in nets[0].state_dict().items():
        np.testing.assert_allclose(state[name], value, rtol=1e-4, atol=1e-6, err_msg=name)
