"""Groups of channels: what residual sums, depthwise convolutions and flattening tie together."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from minihyperflows import flows, models, nn, no_grad
from minihyperflows import functional as F
from minihyperflows.engine.tensor import Tensor
from minihyperflows.related import dhp
from minihyperflows.related.channels import (
    ChannelGroup,
    channel_groups,
    group_of_inputs,
    group_of_outputs,
)
from minihyperflows.related.cutting import cut

IMAGE = (32, 32, 3)


def network(name: str, rng: np.random.Generator) -> tuple[nn.Module, tuple[int, ...]]:
    if name == "lenet300":
        return models.lenet300(rng=rng), (28, 28, 1)
    if name.startswith("resnet") and name != "resnet50":
        return models.resnet(int(name[6:]), rng=rng), IMAGE
    return getattr(models, name)(width=0.25, rng=rng), IMAGE


NETWORKS = [
    "lenet300",
    "vgg13",
    "vgg19",
    "resnet20",
    "resnet50",
    "resnet164",
    "mobilenet_v1",
    "mobilenet_v2",
]


@pytest.mark.parametrize("name", NETWORKS)
def test_every_layer_has_its_places(name: str, rng: np.random.Generator) -> None:
    """One group makes what it makes, one is what it reads, and the sizes fit its weight."""
    net, image = network(name, rng)
    groups = channel_groups(net, image)
    made, read = group_of_outputs(groups), group_of_inputs(groups)
    layers = {n: m for n, m in net.named_modules() if isinstance(m, nn.Weighted)}
    assert set(made) == set(read) == set(layers)
    for layer, module in layers.items():
        assert module.weight.shape[0] == groups[made[layer]].size
        if layer in groups[made[layer]].depthwise:
            assert made[layer] == read[layer]
        else:
            inputs = groups[read[layer]]
            assert module.weight.shape[-1] == inputs.size * inputs.inputs[layer]
    norms = {n: m for n, m in net.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert sorted(n for g in groups.values() for n in g.norms) == sorted(norms)
    for group in groups.values():
        assert all(norms[n].weight.shape == (group.size,) for n in group.norms)
    fixed = [n for n, group in groups.items() if not group.removable]
    assert len(fixed) == 2
    assert fixed[0] == "input"
    assert made[list(layers)[-1]] == fixed[1]  # the classifier's outputs


@pytest.mark.parametrize("name", ["resnet20", "mobilenet_v1"])
def test_finding_changes_nothing(name: str, rng: np.random.Generator) -> None:
    net, image = network(name, rng)
    next(iter(net.children()))[1].eval()
    state, modes = net.state_dict(), [m.training for _, m in net.named_modules()]
    channel_groups(net, image)
    assert modes == [m.training for _, m in net.named_modules()]
    for key, value in net.state_dict().items():
        np.testing.assert_array_equal(value, state[key])


def test_a_residual_stream_is_one_group(rng: np.random.Generator) -> None:
    groups = channel_groups(models.resnet(20, rng=rng), IMAGE)
    assert len(groups) == 14  # images, 3 streams, 9 blocks' middles, classes
    blocks = [f"layer2.{i}" for i in range(3)]
    assert groups["layer2.0.conv2"] == ChannelGroup(
        name="layer2.0.conv2",
        size=32,
        outputs=("layer2.0.conv2", "layer2.0.downsample.0", "layer2.1.conv2", "layer2.2.conv2"),
        norms=("layer2.0.bn2", "layer2.0.downsample.1", "layer2.1.bn2", "layer2.2.bn2"),
        inputs={
            **{f"{block}.conv1": 1 for block in blocks[1:]},
            **{"layer3.0.conv1": 1, "layer3.0.downsample.0": 1},
        },
    )
    assert all(groups[f"{block}.conv1"].outputs == (f"{block}.conv1",) for block in blocks)


def test_a_depthwise_filter_goes_with_the_channel_that_it_reads(rng: np.random.Generator) -> None:
    groups = channel_groups(models.mobilenet_v1(width=0.25, rng=rng), IMAGE)
    assert len(groups) == 16  # images, the first convolution, 13 pointwise ones, classes
    assert groups["features.1.1.0"] == ChannelGroup(
        name="features.1.1.0",
        size=16,
        outputs=("features.1.1.0", "features.2.0.0"),
        depthwise=("features.2.0.0",),
        norms=("features.1.1.1", "features.2.0.1"),
        inputs={"features.2.1.0": 1},
    )


def test_a_flattened_map_repeats_its_channels(rng: np.random.Generator) -> None:
    net = nn.Sequential(
        nn.Conv2d(2, 5, 3, rng=rng), nn.ReLU(), nn.Flatten(), nn.Linear(80, 7, rng=rng)
    )
    groups = channel_groups(net, (6, 6, 2))
    assert groups["0"].size == 5
    assert groups["0"].inputs == {"3": 16}  # a map of 4 x 4 pixels


def test_gates_are_looked_through(rng: np.random.Generator) -> None:
    net = models.resnet(20, rng=rng)
    before = channel_groups(net, IMAGE)
    flows.attach(net, rng=rng)
    assert channel_groups(net, IMAGE) == before


@pytest.mark.parametrize("layers", [("fc1",), ("fc1", "fc2", "fc3")])
def test_frozen_layers_have_their_groups(layers: tuple[str, ...], rng: np.random.Generator) -> None:
    net, image = network("lenet300", rng)
    before = channel_groups(net, image)
    frozen = [p for n, p in net.named_parameters().items() if n.startswith(layers)]
    for parameter in frozen:
        parameter.requires_grad = False
    assert channel_groups(net, image) == before
    assert [p for p in net.parameters() if not p.requires_grad] == frozen


def test_without_operations_there_is_nothing_to_find(rng: np.random.Generator) -> None:
    net, image = network("lenet300", rng)
    with no_grad(), pytest.raises(ValueError, match="leave no_grad"):
        channel_groups(net, image)
    with pytest.raises(ValueError, match="no parameters"):
        channel_groups(nn.Sequential(nn.ReLU()), image)


class Strange(nn.Module):
    """A convolution and something after it that mixes channels."""

    def __init__(self, kind: str, rng: np.random.Generator) -> None:
        self.kind = kind
        self.first = nn.Conv2d(4, 4, 1, rng=rng)
        self.last = nn.Conv2d(4, 4, 1, groups=2 if kind == "groups" else 1, rng=rng)
        if kind == "parameter":
            self.scale = nn.Parameter(np.ones(4, np.float32))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.kind == "shuffled":
            x = x[..., ::-1]
        if self.kind == "parameter":
            x = x * self.scale
        if self.kind == "mean":
            x = x.mean(axis=-1, keepdims=True)
            return x
        return self.last(x)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("groups", "2 groups"),
        ("shuffled", "GetItem"),
        ("parameter", "scale"),
        ("mean", "Mean"),
    ],
)
def test_what_is_not_understood_is_refused(
    kind: str, message: str, rng: np.random.Generator
) -> None:
    with pytest.raises(ValueError, match=message):
        channel_groups(Strange(kind, rng), (3, 3, 4))


class Averaged(nn.Module):
    """A convolution, and the mean of its outputs over ``axis``."""

    def __init__(self, axis: int | tuple[int, ...], rng: np.random.Generator) -> None:
        self.axis, self.conv = axis, nn.Conv2d(4, 4, 1, rng=rng)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).mean(axis=self.axis)


@pytest.mark.parametrize("axis", [-1, 3, (1, 3)])
def test_the_axis_of_channels_is_known_by_its_place(axis: Any, rng: np.random.Generator) -> None:
    """Not by its length: here rows, columns and channels are four each."""
    assert set(channel_groups(Averaged((1, 2), rng), (4, 4, 4))) == {"input", "conv"}
    with pytest.raises(ValueError, match="Mean: it reduces the axis of channels"):
        channel_groups(Averaged(axis, rng), (4, 4, 4))


class Between(nn.Module):
    """Two convolutions, and something between them; ``first`` has another name if it is given."""

    def __init__(self, between: Any, rng: np.random.Generator, first: str = "first") -> None:
        self.between, self.name = between, first
        setattr(self, first, nn.Conv2d(2, 4, 1, rng=rng))
        self.single = nn.Conv2d(2, 1, 1, rng=rng)
        self.norm = nn.BatchNorm2d(4)
        self.last = nn.Conv2d(4, 3, 1, rng=rng)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.between(self, getattr(self, self.name)(x), x))


@pytest.mark.parametrize(
    "between",
    [
        lambda net, y, x: y * np.arange(4, dtype=np.float32),
        lambda net, y, x: y + Tensor(np.ones((3, 3, 4), np.float32)),
        lambda net, y, x: np.ones((1, 4), np.float32) - y,
        lambda net, y, x: F.softmax(y),
        lambda net, y, x: F.log_softmax(y, axis=3),
        lambda net, y, x: F.batch_norm(y, running_mean=np.zeros(4), running_var=np.ones(4)),
        lambda net, y, x: net.norm(y) * (net.norm.weight * np.arange(4, dtype=np.float32)),
    ],
)
def test_channels_with_an_entry_of_something_else_stay(
    between: Any, rng: np.random.Generator
) -> None:
    net = Between(between, rng)
    groups = channel_groups(net, (3, 3, 2))
    assert not groups["first"].removable
    with pytest.raises(ValueError, match="first: its channels cannot be removed"):
        cut(net, groups, {"first": np.array([True, True, False, True])})


@pytest.mark.parametrize(
    "between",
    [
        lambda net, y, x: y * np.float32(3) + np.ones((3, 3, 1), np.float32),
        lambda net, y, x: np.ones(1, np.float32) - y,
        lambda net, y, x: F.softmax(y, axis=1),
        lambda net, y, x: net.norm(y) * (0.5 * net.norm.weight),
    ],
)
def test_what_treats_all_channels_alike_leaves_them_removable(
    between: Any, rng: np.random.Generator
) -> None:
    group = channel_groups(Between(between, rng), (3, 3, 2))["first"]
    assert group.removable
    assert not group.stretched


def test_a_map_of_one_channel_is_stretched(rng: np.random.Generator) -> None:
    for between in (lambda net, y, x: y * net.single(x), lambda net, y, x: net.single(x) + y):
        groups = channel_groups(Between(between, rng), (3, 3, 2))
        assert [n for n, group in groups.items() if group.stretched] == ["first"]


def test_a_network_may_end_in_log_softmax(rng: np.random.Generator) -> None:
    net = nn.Sequential(nn.Linear(5, 4, rng=rng), nn.ReLU(), nn.Linear(4, 3, rng=rng))
    plain = channel_groups(net, (5,))
    for end in (F.log_softmax, F.softmax):
        assert channel_groups(Ending(net, end), (5,)) == {
            n.replace("0", "net.0").replace("2", "net.2"): renamed(g) for n, g in plain.items()
        }


class Ending(nn.Module):
    def __init__(self, net: nn.Module, end: Any) -> None:
        self.net, self.end = net, end

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.net(x))


def renamed(group: ChannelGroup) -> ChannelGroup:
    """With the names of the network inside another."""
    return ChannelGroup(
        name=group.name if group.name == "input" else f"net.{group.name}",
        size=group.size,
        outputs=tuple(f"net.{n}" for n in group.outputs),
        inputs={f"net.{n}": k for n, k in group.inputs.items()},
        removable=group.removable,
    )


def test_the_images_keep_their_name_apart(rng: np.random.Generator) -> None:
    """From a layer called "input", and from further constants that layers read."""
    groups = channel_groups(Between(lambda net, y, x: y, rng, first="input"), (3, 3, 2))
    assert {n: g.size for n, g in groups.items()} == {"input 2": 2, "input": 4, "last": 3}
    assert groups["input"].removable
    seen = Between(lambda net, y, x: y * net.single(x * 2.0), rng)
    groups = channel_groups(seen, (3, 3, 2))
    assert {n: g.size for n, g in groups.items() if not g.outputs} == {"input": 2, "input 2": 2}
    assert groups["input"].inputs == {"first": 1}
    costs = dhp.layer_costs(seen, (3, 3, 2), groups)
    assert {c.layer: c.inputs for c in costs}["single"] == "input 2"


class Computed(nn.Module):
    """Two linear layers, the first with a weight that is computed from its own by ``compute``."""

    def __init__(self, compute: Any, rng: np.random.Generator) -> None:
        self.compute, self.fc = compute, nn.Linear(6, 6, rng=rng)
        self.after = nn.Linear(6, 6, rng=rng)
        self.last = nn.Linear(6, 3, rng=rng)
        self.t = nn.Parameter(rng.standard_normal((6, 6)).astype(np.float32), role="presence")

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.linear(self.after(x), self.compute(self, self.fc.weight), self.fc.bias)
        return self.last(F.relu(hidden))


COMPUTED = {
    "half": lambda net, w: 0.5 * w,
    "gated": lambda net, w: flows.gate(net.t) * w,
    "masked": lambda net, w: w * np.tril(np.ones((6, 6), np.float32)),
    "normed": lambda net, w: w / (w * w).sum(axis=1, keepdims=True) ** 0.5,
    "transposed": lambda net, w: w.T,
}


@pytest.mark.parametrize("name", COMPUTED)
def test_rows_and_columns_of_computed_weights_go_if_they_can(
    name: str, rng: np.random.Generator
) -> None:
    """Of half a weight half of a row; of one with a partner, or mixed, nothing."""
    net = Computed(COMPUTED[name], rng)
    groups = channel_groups(net, (6,))
    free = name == "half"
    assert {n for n, g in groups.items() if g.removable} == ({"fc", "after"} if free else set())
    assert set(group_of_outputs(groups)) == set(group_of_inputs(groups)) == {"fc", "after", "last"}
    if free:
        cut(net, groups, {n: np.arange(6) < 4 for n in ("fc", "after")})
        assert net(rng.standard_normal((2, 6)).astype(np.float32)).shape == (2, 3)


def test_layers_that_share_a_weight_are_of_one_group(rng: np.random.Generator) -> None:
    net = nn.Sequential(*(nn.Linear(6, n, rng=rng) for n in (6, 6, 3)))
    net[1].weight = net[0].weight  # type: ignore[attr-defined]
    group = channel_groups(net, (6,))["0"]
    assert (group.outputs, group.tied) == (("0", "1"), ("1",))
    assert set(group.inputs) == {"0", "1", "2"}
    assert not group.removable  # it reads the images


@pytest.mark.parametrize("gates", ["flows", "hypernetworks"])
def test_weights_of_gates_are_the_layers(gates: str, rng: np.random.Generator) -> None:
    net = models.resnet(20, rng=rng)
    before = channel_groups(net, IMAGE)
    if gates == "flows":
        flows.attach(net, rng=rng)
    else:
        dhp.HyperNetwork(net, IMAGE, rng=rng)
    assert channel_groups(net, IMAGE) == before
