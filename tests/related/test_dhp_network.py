"""Networks of hypernetworks: shared latents, what is trained, what any widths cost."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
from support.hyper import IMAGE, build, gates, hyper_network, latent_of_outputs, scatter_latents

from minihyperflows import flows, models, nn
from minihyperflows import functional as F
from minihyperflows.engine.tensor import Tensor
from minihyperflows.nn import weighted_layers
from minihyperflows.nn.counting import flops
from minihyperflows.nn.models.resnets import Bottleneck, ResNet
from minihyperflows.related.channels import channel_groups
from minihyperflows.related.cutting import set_widths
from minihyperflows.related.dhp import (
    HyperNetwork,
    extract,
    generated,
    layer_costs,
    layer_weights,
    macs,
    output_pixels,
    widths_at,
)

# -- which latents there are, and who shares them --------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("depth", [20, 56, 110])
def test_residual_networks_share_a_latent_in_each_stage(depth: int) -> None:
    """Images, three stages, one hidden latent in each block; the stem is in the first stage."""
    network = hyper_network(f"resnet{depth}", embedding=1)
    blocks = (depth - 2) // 6
    assert len(network.latents) == 1 + 3 + 3 * blocks
    made = latent_of_outputs(network)
    for stage in (1, 2, 3):
        names = [f"layer{stage}.{i}.conv2" for i in range(blocks)]
        names += ["conv1"] if stage == 1 else [f"layer{stage}.0.downsample.0"]
        assert len({id(made[name]) for name in names}) == 1
        hidden = {id(made[f"layer{stage}.{i}.conv1"]) for i in range(blocks)}
        assert len(hidden) == blocks
    fixed = {n for n, z in network.latents.items() if network.floors[n] == z.size}
    assert fixed == {"input", "layer3.0.conv2"}
    assert set(network.floors.values()) == {3, 4, 64}
    assert set(made) == set(network.layers)
    assert "fc" not in made


def test_bottlenecks_have_two_hidden_latents_and_the_stem_its_own() -> None:
    network = hyper_network("resnet164", embedding=1)
    assert len(network.latents) == 1 + 3 + 1 + 2 * 54
    made = latent_of_outputs(network)
    assert made["layer1.0.conv3"] is made["layer1.0.downsample.0"] is made["layer1.17.conv3"]
    assert made["conv1"] is not made["layer1.0.conv3"]
    assert gates(network)["layer1.0.conv1"].z_in is made["conv1"]


def test_a_depthwise_layer_goes_with_the_layer_before_it() -> None:
    """28 latents; those of one entry and the last, which the classifier reads, stay whole."""
    network = hyper_network("mobilenet_v1")
    assert len(network.latents) == 28
    for i in range(1, 14):
        depthwise = gates(network)[f"features.{i}.0.0"]
        before = "features.0.0" if i == 1 else f"features.{i - 1}.1.0"
        assert depthwise.z_out is latent_of_outputs(network)[before]
        assert depthwise.z_in is network.latents[f"features.{i}.0.0.input"]
        assert depthwise.z_in.shape == (1,)
    fixed = [n for n, z in network.latents.items() if network.floors[n] == z.size]
    assert len(fixed) == 16
    some = hyper_network("mobilenet_v1", classifier_keeps=0.4)
    assert some.floors["features.13.1.0"] == 52  # of 128, rounded up
    some.latents["features.13.1.0"].data[:100] = 0
    assert extract(some).state_dict()["classifier.weight"].shape == (10, 52)


def test_inverted_residuals_share_a_latent_in_each_stage() -> None:
    """Images, seven stages, the stem; for each block what it expands to (but the first, which does
    not) and the one entry of its depthwise layer; the last layer."""
    network = hyper_network("mobilenet_v2", embedding=1)
    made = latent_of_outputs(network)
    assert len(network.latents) == 1 + 7 + 1 + (16 + 17) + 1
    assert made["features.4.conv.2"] is made["features.5.conv.2"] is made["features.6.conv.2"]
    assert made["features.6.conv.2"] is not made["features.7.conv.2"]
    assert made["features.5.conv.0.0"] is made["features.5.conv.1.0"]
    assert made["features.1.conv.0.0"] is made["features.0.0"]


def test_chains_have_a_latent_for_each_layer() -> None:
    network = hyper_network("vgg13", minimum=2)
    assert len(network.latents) == 11
    assert len({id(z) for z in latent_of_outputs(network).values()}) == 10
    assert list(network.floors.values()) == [3, *[2] * 9, 64]
    linear = hyper_network("lenet300")
    assert {n: z.size for n, z in linear.latents.items()} == {"input": 3072, "fc1": 300, "fc2": 100}


class Denoiser(nn.Module):
    """x + what three convolutions make of x: the images' channels are the outputs' too."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.head = nn.Conv2d(3, 8, 3, padding=1, rng=rng, dtype=np.float64)
        self.body = nn.Conv2d(8, 8, 3, padding=1, bias=False, rng=rng, dtype=np.float64)
        self.norm = nn.BatchNorm2d(8, dtype=np.float64)
        self.tail = nn.Conv2d(8, 3, 3, padding=1, rng=rng, dtype=np.float64)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.tail(self.norm.then_relu(self.body(F.relu(self.head(x)))))


def test_images_that_are_added_to_the_outputs(rng: np.random.Generator) -> None:
    """A convolution that makes the outputs is generated like the others; images have one latent,
    which stays whole."""
    network = HyperNetwork(Denoiser(rng), IMAGE, rng=rng)
    scatter_latents(network)
    assert list(network.layers) == ["head", "body", "tail"]
    assert gates(network)["tail"].z_out is gates(network)["head"].z_in
    assert sorted(network.floors.values()) == [3, 4, 4]
    net = extract(network)
    assert net(np.ones((1, 4, 4, 3))).shape == (1, 4, 4, 3)
    assert network.flops_ratio() < 1


def test_a_flattened_map_repeats_its_latent(rng: np.random.Generator) -> None:
    """The inputs k C + c of a linear layer are those of channel c."""
    layers = [nn.Conv2d(1, 3, 3, rng=rng), nn.ReLU(), nn.Flatten()]
    layers += [nn.Linear(12, 5, rng=rng), nn.ReLU(), nn.Linear(5, 2, rng=rng)]
    network = HyperNetwork(nn.Sequential(*layers), (4, 4, 1), hyper_bias=False, minimum=1, rng=rng)
    network.latents["0"].data[1] = 0
    x = rng.standard_normal((2, 4, 4, 1)).astype(np.float32)
    net = extract(network)
    assert net.state_dict()["3.weight"].shape == (5, 8)
    np.testing.assert_allclose(net(x).data, network(x).data, rtol=1e-5, atol=1e-6)


class Again(nn.Module):
    """Four linear layers: the second is used twice, the last never."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.first = nn.Linear(5, 8, rng=rng)
        self.twice = nn.Linear(8, 8, rng=rng)
        self.last = nn.Linear(8, 3, rng=rng)
        self.never = nn.Linear(8, 8, rng=rng)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.twice(F.relu(self.twice(self.first(x))))))


def test_what_the_network_does_not_use_keeps_its_weight(rng: np.random.Generator) -> None:
    net = Again(rng)
    own = net.never.weight.data.copy()
    network = HyperNetwork(net, (5,), minimum=1, rng=rng)
    assert list(network.layers) == ["first", "twice"]
    scatter_latents(network)
    small = extract(network)
    np.testing.assert_array_equal(small.named_parameters()["never.weight"].data, own)
    assert small(np.ones((2, 5), np.float32)).shape == (2, 3)


def test_a_layer_that_is_used_twice_costs_twice(rng: np.random.Generator) -> None:
    """5 8 + 2 8 8 + 8 3 multiplications, 5 8 + 8 8 + 8 3 weights."""
    net = Again(rng)
    groups = channel_groups(net, (5,))
    widths = {name: group.size for name, group in groups.items()}
    assert macs(layer_costs(net, (5,), groups), widths) == 192
    assert macs(layer_weights(net, groups), widths) == 128
    half = widths | {"first": 4}
    assert macs(layer_costs(net, (5,), groups), half) == 5 * 4 + 2 * 4 * 4 + 4 * 3


def test_options_out_of_range(rng: np.random.Generator) -> None:
    for option in ({"minimum": 0}, {"embedding": 0}, {"classifier_keeps": 1.5}):
        with pytest.raises(ValueError, match=next(iter(option))):
            HyperNetwork(build("vgg13", rng), IMAGE, rng=rng, **option)


def test_what_is_trained() -> None:
    """Hypernetworks, batch norms and the classifier; latents apart; the replaced weights not."""
    network = hyper_network("resnet20")
    names = network.named_parameters()
    assert "net.fc.weight" in names
    assert "net.conv1.weight" not in names
    assert {n.rpartition(".")[2] for n in names} == {"w1", "W2", "B0", "b1", "b2", "weight", "bias"}
    assert list(network.named_parameters("latent")) == [f"latents.{n}" for n in network.latents]
    loss = F.cross_entropy(network(np.ones((2, *IMAGE), np.float32)), [0, 1])
    loss.backward()
    trained = [*network.parameters(), *network.latents.values()]
    assert all(p.grad is not None for p in trained)
    replaced = network.named_parameters("replaced").values()
    assert [p.grad for p in replaced] == [None] * 21
    assert sum(p.size for p in trained) > 10 * sum(p.size for p in replaced)


def test_another_hypernetwork_can_make_a_weight(rng: np.random.Generator) -> None:
    """It is called with the layer's latents, trained, and saved; the old one is none of these."""
    network = hyper_network("vgg19")
    name = next(iter(network.layers))
    old, gate = network.layers[name], gates(network)[name]

    class Outer(nn.Module):
        def __init__(self, shape: tuple[int, ...]) -> None:
            self.v = nn.Parameter(rng.standard_normal(shape))

        def generate(self, z_in: Tensor, z_out: Tensor) -> Tensor:
            assert z_in is gate.z_in
            assert z_out is gate.z_out
            return self.v * 1.0

    new = Outer(old.shape)
    network.replace(name, new)  # type: ignore[arg-type] - it has the method, that is enough
    network(Tensor(rng.standard_normal((2, *IMAGE)))).sum().backward()
    assert abs(new.v.grad).max() > 0
    assert any(p is new.v for p in network.parameters())
    assert not {id(p) for p in old.parameters()} & {id(p) for p in network.parameters()}
    assert f"layers.{name}.v" in network.state_dict()
    with pytest.raises(ValueError, match="no hypernetwork makes the weight of 'fc'"):
        network.replace("fc", old)


def test_a_network_is_taken_once(rng: np.random.Generator) -> None:
    net = build("resnet20", rng)
    HyperNetwork(net, IMAGE, rng=rng)
    with pytest.raises(ValueError, match="gates already"):
        HyperNetwork(net, IMAGE, rng=rng)
    gated = build("resnet20", rng)
    flows.attach(gated, rng=rng)
    with pytest.raises(ValueError, match="gates already"):
        HyperNetwork(gated, IMAGE, rng=rng)


def test_states_and_copies() -> None:
    """A copy has latents of its own, shared as before, and a saved state brings everything back."""
    network, x = hyper_network("resnet20"), np.ones((1, *IMAGE), np.float32)
    twin = copy.deepcopy(network)
    before = network.eval()(x).data
    twin.latents["conv1"].data *= 2
    np.testing.assert_array_equal(network(x).data, before)
    assert not np.allclose(twin.eval()(x).data, before, rtol=1e-3)
    twin.load_state_dict(network.state_dict())
    np.testing.assert_array_equal(twin(x).data, before)


# -- counting --------------------------------------------------------------------------------------


def bottleneck110(rng: np.random.Generator) -> nn.Module:
    """The authors' ResNet-110: bottlenecks, where ours has basic blocks."""
    return ResNet(Bottleneck, ((12, 16), (12, 32), (12, 64)), 10, 1.0, rng, np.float32)


@pytest.mark.parametrize(
    ("net", "mega_macs", "with_norms", "mega_parameters"),
    [
        ("resnet20", 40.81, 41.21, 0.272),
        ("resnet56", 125.75, 126.84, 0.856),
        (bottleneck110, 167.43, 171.90, 1.148),
        ("resnet164", 247.65, 254.18, 1.704),
        (lambda rng: models.mobilenet_v1(200, rng=rng), 46.55, 47.37, 3.412),
        (lambda rng: models.mobilenet_v1(200, 2.0, rng=rng), 181.18, 182.83, 13.10),
        (lambda rng: models.mobilenet_v2(200, rng=rng), 88.22, 91.50, 2.480),
        (lambda rng: models.mobilenet_v2(200, 2.0, rng=rng), 338.84, 345.40, 9.209),
    ],
)
def test_dense_networks_cost_what_the_authors_counter_says(
    net: Any, mega_macs: float, with_norms: float, mega_parameters: float
) -> None:
    """U6: convolutions and linear layers; with batch norm; parameters."""
    rng = np.random.default_rng(0)
    dense = build(net, rng) if isinstance(net, str) else net(rng)
    groups = channel_groups(dense, IMAGE)
    costs = layer_costs(dense, IMAGE, groups)
    widths = {name: group.size for name, group in groups.items()}
    assert macs(costs, widths) / 1e6 == pytest.approx(mega_macs, abs=0.006)
    assert macs(costs, widths, norms=True) / 1e6 == pytest.approx(with_norms, abs=0.006)
    parameters = sum(p.size for p in dense.parameters())
    assert parameters / 1e6 == pytest.approx(mega_parameters, rel=2e-3)


@pytest.mark.parametrize("name", ["resnet20", "mobilenet_v1", "mobilenet_v2", "vgg13", "lenet300"])
def test_weights_can_be_counted_in_the_place_of_multiplications(name: str) -> None:
    """Of the whole network and of what is left; a weight is used once for each output pixel."""
    network = hyper_network(name, embedding=1)
    dense = build(name, np.random.default_rng(0))
    layers = weighted_layers(dense)
    pixels, macs_by_layer = output_pixels(dense, IMAGE), {c.layer: c for c in network.costs}
    for n, layer in layers.items():
        assert pixels[n] * layer.weight.size == macs_by_layer[n].macs(network.sizes())
    network.costs = layer_weights(network.net, network.groups)
    assert macs(network.costs, network.sizes()) == sum(m.weight.size for m in layers.values())
    scatter_latents(network)
    left = weighted_layers(extract(network))
    assert macs(network.costs, network.widths()) == sum(m.weight.size for m in left.values())
    assert 0.1 < network.flops_ratio() < 0.9


@pytest.mark.parametrize("name", ["resnet20", "resnet56", "mobilenet_v1", "vgg13", "lenet300"])
def test_the_ratio_is_that_of_the_network_that_is_left(name: str) -> None:
    """U8: random latents give shapes that fit, the widths that were promised, and their cost."""
    network = hyper_network(name, embedding=1)
    scatter_latents(network)
    whole = macs_of(generated(network))
    net = extract(network)
    assert network.flops_ratio() == pytest.approx(macs_of(net) / whole, rel=1e-12)
    assert 0.1 < network.flops_ratio() < 0.9
    widths = network.widths()
    assert {n: g.size for n, g in channel_groups(net, IMAGE).items()} == widths
    assert min(width for n, width in widths.items() if n != "input") >= 4
    assert net(np.ones((2, *IMAGE), np.float32)).shape == (2, 10)


@pytest.mark.parametrize("name", ["resnet20", "mobilenet_v1"])
def test_control_widths_cost_what_was_asked_for(name: str) -> None:
    """Uniform and random ones; a network that is built with them costs that, too."""
    network = hyper_network(name, embedding=1)
    rng, sizes, whole = np.random.default_rng(3), network.sizes(), macs_of(generated(network))
    shares, found = {group: rng.uniform(0.3, 1) for group in sizes}, []
    for options in ({}, {"floors": network.floors}, {"shares": shares, "floors": network.floors}):
        widths = widths_at(0.5, network.costs, network.groups, **options)
        net = build(name, rng)
        removable = {n for n, group in network.groups.items() if group.removable}
        set_widths(net, IMAGE, {n: widths[n] for n in removable})
        ratio = macs_of(net) / whole
        assert 0.47 < ratio <= 0.5
        assert ratio == pytest.approx(macs(network.costs, widths) / macs(network.costs, sizes))
        if "floors" in options:
            assert all(floor <= widths.get(n, floor) for n, floor in network.floors.items())
        found.append(widths)
    assert found[0] != found[1] != found[2]
    assert widths_at(1.0, network.costs, network.groups) == sizes
    with pytest.raises(ValueError, match="fewest channels"):
        widths_at(0.5, network.costs, network.groups, floors=sizes)


def test_the_ratio_of_some_widths_leads_back_to_them(rng: np.random.Generator) -> None:
    """Though a / b times b may be rounded to less than a."""
    net = models.resnet(20, rng=rng)
    groups = channel_groups(net, IMAGE)
    costs = layer_costs(net, IMAGE, groups)
    whole = {name: group.size for name, group in groups.items()}
    rounded_down = 0
    for k in range(1, 16):
        widths = {n: k * c // 16 if groups[n].removable else c for n, c in whole.items()}
        ratio = macs(costs, widths) / macs(costs, whole)
        rounded_down += ratio * macs(costs, whole) < macs(costs, widths)
        assert widths_at(ratio, costs, groups) == widths
    assert rounded_down > 0


def macs_of(net: nn.Module) -> int:
    """Multiplications by the other counter, which counts additions too: outputs (2 K - 1)."""
    layers = {n: m for n, m in net.named_modules() if isinstance(m, nn.Weighted)}
    return sum(
        layers[n].weight[0].size * count // (2 * layers[n].weight[0].size - 1)
        for n, count in flops(net, IMAGE).items()
    )


def test_a_fraction_of_the_channels_is_the_one_that_was_meant(rng: np.random.Generator) -> None:
    """0.28 of 25 are 7, though 0.28 * 25 is 7.000000000000001."""
    net = nn.Sequential(nn.Linear(4, 25, rng=rng), nn.ReLU(), nn.Linear(25, 3, rng=rng))
    network = HyperNetwork(net, (4,), minimum=1, classifier_keeps=0.28, rng=rng)
    assert network.floors["0"] == 7


def test_layers_that_share_a_weight_share_a_hypernetwork(rng: np.random.Generator) -> None:
    options: dict[str, Any] = {"rng": rng, "dtype": np.float64}
    layers = [nn.Linear(n, m, **options) for n, m in ((5, 6), (6, 6), (6, 6), (6, 3))]
    layers[2].weight = layers[1].weight
    net = nn.Sequential(*layers)
    network = HyperNetwork(net, (5,), minimum=1, classifier_keeps=0, rng=rng)
    assert list(network.layers) == ["0", "1"]
    assert layers[2].weight_gate is layers[1].weight_gate is not None
    network.latents["0"].data[:2] = 0
    x = rng.standard_normal((3, 5))
    plain, narrow = generated(network), extract(network)
    np.testing.assert_allclose(plain(x).data, network(x).data, rtol=1e-12)
    assert [p.shape for n, p in narrow.named_parameters().items() if "weight" in n] == [
        *((4, 5), (4, 4), (3, 4))
    ]
    weights = layer_weights(network.net, network.groups)
    assert macs(weights, network.sizes()) == 30 + 36 + 18
