"""Removing channels: the narrower network computes what the wide one does without them."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest

from minihyperflows import flows, models, nn
from minihyperflows import functional as F
from minihyperflows.nn.counting import flops
from minihyperflows.related.channels import ChannelGroup, channel_groups
from minihyperflows.related.cutting import cut, set_widths

IMAGE = (32, 32, 3)
NETWORKS = ["lenet300", "vgg13", "resnet20", "resnet50", "mobilenet_v1", "mobilenet_v2"]


def network(name: str, rng: np.random.Generator, dtype: Any = np.float64) -> nn.Module:
    """One of the models, narrow, with running statistics that are not those of the beginning."""
    if name == "lenet300":
        return models.lenet300(3 * 32 * 32, rng=rng, dtype=dtype)
    if name == "resnet20":
        net: nn.Module = models.resnet(20, width=0.5, rng=rng, dtype=dtype)
    else:
        net = getattr(models, name)(width=0.125, rng=rng, dtype=dtype)
    for key, tensor in net.named_tensors().items():
        if isinstance(tensor.data, np.ndarray) and tensor.data.ndim == 1:
            tensor.data = rng.uniform(0.5, 1.5, tensor.shape).astype(tensor.dtype)
        assert np.isfinite(tensor.data).all(), key
    return net


def random_masks(groups: dict[str, ChannelGroup], rng: np.random.Generator) -> dict[str, Any]:
    """For every group that can lose channels, about half of them, and at least one."""
    masks = {}
    for name, group in groups.items():
        if group.removable:
            masks[name] = rng.random(group.size) < 0.5
            masks[name][rng.integers(group.size)] = True
    return masks


def silence(net: nn.Module, groups: dict[str, ChannelGroup], masks: dict[str, Any]) -> None:
    """Make the channels outside the masks zero everywhere, without removing them."""
    modules = dict(net.named_modules())
    for name, mask in masks.items():
        group = groups[name]
        for layer in group.outputs:
            modules[layer].weight.data[~mask] = 0
            if modules[layer].bias is not None:
                modules[layer].bias.data[~mask] = 0
        for norm in group.norms:
            modules[norm].weight.data[~mask] = modules[norm].bias.data[~mask] = 0


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_left_computes_what_the_silenced_network_does(name: str, training: bool) -> None:
    """U7: no row, no column and no statistic of a removed channel is missed or mistaken."""
    silenced, narrow = (network(name, np.random.default_rng(3)) for _ in range(2))
    rng = np.random.default_rng(4)
    groups = channel_groups(narrow, IMAGE)
    masks = random_masks(groups, rng)
    cut(narrow, groups, masks)
    silence(silenced, groups, masks)
    x = rng.standard_normal((3, *IMAGE))
    found, expected = (net.train(training)(x).data for net in (narrow, silenced))
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9 * abs(expected).max())


@pytest.mark.parametrize("name", NETWORKS)
def test_a_cut_network_is_an_ordinary_one(name: str, rng: np.random.Generator) -> None:
    """It trains, its groups have the new sizes, and a cut one takes another's state."""
    net, other = network(name, rng), network(name, rng)
    groups = channel_groups(net, IMAGE)
    masks = random_masks(groups, rng)
    for each in (net, other):
        cut(each, groups, masks)
    F.cross_entropy(net(rng.standard_normal((2, *IMAGE))), [0, 1]).backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in net.parameters())
    sizes = {n: int(masks[n].sum()) if n in masks else g.size for n, g in groups.items()}
    assert {n: g.size for n, g in channel_groups(net, IMAGE).items()} == sizes
    other.load_state_dict(net.state_dict())
    x = rng.standard_normal((2, *IMAGE))
    np.testing.assert_array_equal(net.eval()(x).data, other.eval()(x).data)


def test_flattened_maps_lose_all_inputs_of_a_channel(rng: np.random.Generator) -> None:
    """After flattening an (H, W, C) map, channel c is the inputs c, C + c, 2 C + c, ..."""
    net = nn.Sequential(
        nn.Conv2d(1, 3, 3, rng=rng), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2, rng=rng)
    )
    linear = net[3]
    assert isinstance(linear, nn.Linear)
    before = linear.weight.data.copy()
    cut(net, channel_groups(net, (4, 4, 1)), {"0": np.array([True, False, True])})
    np.testing.assert_array_equal(linear.weight.data, before[:, [0, 2, 3, 5, 6, 8, 9, 11]])


def test_mistakes_are_named_before_anything_changes(rng: np.random.Generator) -> None:
    net = network("resnet20", rng)
    groups, state = channel_groups(net, IMAGE), net.state_dict()
    good = {"conv1": np.arange(8) < 4}
    for bad, error, message in [
        ({"layer2.0.conv2": np.ones(3, bool)}, ValueError, "has 16 channels"),
        ({"layer2.0.conv2": np.zeros(16, bool)}, ValueError, "no channels left"),
        ({"fc": np.arange(10) < 9}, ValueError, "cannot be removed"),
        ({"input": np.arange(3) < 2}, ValueError, "cannot be removed"),
        ({"nothing": np.ones(3, bool)}, KeyError, "nothing"),
    ]:
        with pytest.raises(error, match=message):
            cut(net, groups, good | bad)
    flows.attach(net, rng=rng)
    with pytest.raises(ValueError, match="gates"):
        cut(net, groups, good)
    flows.detach(net)
    for key, value in net.state_dict().items():
        np.testing.assert_array_equal(value, state[key])


def test_widths_from_scratch_are_initialised_for_their_fan_in() -> None:
    """As a network built that narrow: same shapes, same bounds of the uniform initial weights."""
    halves = {"conv1": 8, "layer2.0.conv2": 16, "layer3.0.conv2": 32}
    for stage, width in enumerate([8, 16, 32], start=1):
        halves |= {f"layer{stage}.{block}.conv1": width for block in range(3)}
    net = models.resnet(20, rng=np.random.default_rng(0))
    set_widths(net, IMAGE, halves)
    built = models.resnet(20, width=0.5, rng=np.random.default_rng(1))
    assert flops(net, IMAGE) == flops(built, IMAGE)
    for (name, found), expected in zip(
        net.named_parameters().items(), built.parameters(), strict=True
    ):
        assert found.shape == expected.shape, name
        assert found.dtype == expected.dtype
        if found.size > 100:  # a few hundred uniform draws come near to their bound
            assert abs(found.data).max() == pytest.approx(abs(expected.data).max(), rel=0.02), name


def test_initial_biases_are_scaled_with_the_weights() -> None:
    """PyTorch's initial biases have the weights' bound, 1 / sqrt(fan-in), of the inputs left."""
    net = models.lenet300(rng=np.random.default_rng(0))
    set_widths(net, (28, 28, 1), {"fc1": 75})
    for parameter in (net.fc2.weight, net.fc2.bias):
        assert parameter is not None
        assert abs(parameter.data).max() == pytest.approx(75**-0.5, rel=0.05)


def test_what_layers_share_is_cut_once(rng: np.random.Generator) -> None:
    """A weight, its scale for the new fan-in, and a bias."""
    options: dict[str, Any] = {"rng": rng, "dtype": np.float64}
    layers = [nn.Linear(n, m, **options) for n, m in ((5, 6), (6, 6), (6, 6), (6, 3))]
    net = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), *layers[2:])
    layers[2].weight, layers[2].bias = layers[1].weight, layers[1].bias
    before = layers[1].weight.data.copy()
    keep = np.array([True, False, True, True, False, True])
    silenced = copy.deepcopy(net)
    groups = channel_groups(net, (5,))
    assert groups["0"].outputs == ("0", "2", "4")
    cut(net, groups, {"0": keep})
    assert layers[2].weight is layers[1].weight
    np.testing.assert_array_equal(layers[1].weight.data, before[keep][:, keep])
    silence(silenced, groups, {"0": keep})
    x = rng.standard_normal((3, 5))
    np.testing.assert_allclose(net(x).data, silenced(x).data, rtol=1e-12)
    before = layers[1].weight.data.copy()
    set_widths(net, (5,), {"0": 1})
    np.testing.assert_allclose(layers[1].weight.data, before[:1, :1] * 2, rtol=1e-12)
