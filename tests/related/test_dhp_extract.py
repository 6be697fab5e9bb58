"""What a search leaves: masks, networks cut to them, PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from support.hyper import IMAGE, build, gates, hyper_network, scatter_latents

from minihyperflows import nn
from minihyperflows.engine.tensor import Tensor
from minihyperflows.related.dhp import (
    extract,
    generated,
    reestimate_norms,
    survivors,
)

# -- masks and extraction --------------------------------------------------------------------------


def test_survivors_are_the_large_ones_and_at_least_the_floor() -> None:
    z = np.array([0.3, -0.2, 0.1, 0.0, -0.4])
    np.testing.assert_array_equal(survivors(z, 0.15, 1), [1, 1, 0, 0, 1])
    np.testing.assert_array_equal(survivors(z, 0.2, 1), [1, 1, 0, 0, 1])  # the border survives
    np.testing.assert_array_equal(survivors(z, 0.35, 4), [1, 1, 1, 0, 1])
    np.testing.assert_array_equal(survivors(z, 9.0, 5), [1, 1, 1, 1, 1])
    np.testing.assert_array_equal(survivors(z * (z > 0.2), 0.35, 3), [1, 1, 1, 0, 0])  # zeros tie


def test_below_the_threshold_is_not_zero() -> None:
    network = hyper_network("resnet20")
    latent = network.latents["conv1"]
    latent.data[:] = 1
    latent.data[:6] = [0, 0, -0.0, 0.004, -0.004, 0.006]
    count = network.latent_counts()["conv1"]
    assert (count.size, count.below, count.zero) == (16, 5, 3)
    assert network.widths()["conv1"] == 11
    assert network.kept()["conv1"].sum() == 11
    assert network.kept()["input"].all()
    network.threshold = 0.01
    assert network.widths()["conv1"] == 10


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet20", "mobilenet_v1", "mobilenet_v2"])
def test_the_generated_network_computes_the_same(name: str) -> None:
    network = hyper_network(name, dtype=np.float64)
    x = np.random.default_rng(1).standard_normal((2, *IMAGE))
    plain = generated(network)
    np.testing.assert_array_equal(plain(x).data, network(x).data)
    np.testing.assert_array_equal(plain.eval()(x).data, network.eval()(x).data)
    assert network.net is not plain
    assert set(plain.named_parameters()) == set(
        build(name, np.random.default_rng(0)).named_parameters()
    )


def test_extraction_cuts_what_was_generated() -> None:
    """U7 for a hypernetwork: rows and columns of the generated weights, batch norms cut alike; and
    the search can go on as if nothing had happened."""
    network = hyper_network("resnet20", dtype=np.float64)
    scatter_latents(network)
    state = network.state_dict()
    net, whole, kept = extract(network), generated(network), network.kept()
    rows, columns = kept["layer2.1.conv1"], kept["layer2.0.conv2"]
    found, expected = net.state_dict(), whole.state_dict()
    np.testing.assert_array_equal(
        found["layer2.1.conv1.weight"], expected["layer2.1.conv1.weight"][rows][:, columns]
    )
    np.testing.assert_array_equal(
        found["layer2.1.bn1.weight"], expected["layer2.1.bn1.weight"][rows]
    )
    np.testing.assert_array_equal(found["fc.weight"], expected["fc.weight"])
    for key, value in network.state_dict().items():
        np.testing.assert_array_equal(value, state[key])
    assert len(gates(network)) == 21
    other = {"conv1": np.arange(16) < 5}
    assert extract(network, other).state_dict()["conv1.weight"].shape == (5, 3, 3, 3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet20", "vgg13", "mobilenet_v1", "mobilenet_v2"])
def test_without_biases_channels_with_latent_zero_can_go(name: str) -> None:
    """Nothing reads a channel whose latent is zero, so the cut changes nothing. With biases, which
    are not zero after training, it does."""
    x = np.random.default_rng(1).standard_normal((2, *IMAGE))
    for bias in (False, True):
        network = hyper_network(name, np.float64, hyper_bias=bias)
        rng = np.random.default_rng(5)
        for parameter in network.parameters():
            parameter.data = parameter.data + 0.1 * rng.standard_normal(parameter.shape)
        for group, latent in network.latents.items():
            if network.floors[group] < latent.size:
                latent.data[: latent.size // 3] = 0
        full, net = network.train()(x).data, extract(network)
        assert network.flops_ratio() < 0.75
        difference = abs(net.train()(x).data - full).max() / abs(full).max()
        assert (difference < 1e-9) is not bias


@pytest.mark.slow
def test_reestimated_statistics_are_the_means_over_the_batches() -> None:
    net = generated(hyper_network("resnet20", dtype=np.float64))
    rng = np.random.default_rng(1)
    batches = [Tensor(rng.standard_normal((4, *IMAGE))) for _ in range(3)]
    norm = dict(net.named_modules())["layer1.0.bn1"]
    assert isinstance(norm, nn.BatchNorm2d)
    alone = []
    for x in batches:
        reestimate_norms(net, [x])
        alone.append((norm.running_mean.data.copy(), norm.running_var.data.copy()))
    net.eval()
    weights = net.named_parameters()["conv1.weight"].data.copy()
    reestimate_norms(net, batches)
    mean, variance = np.mean(alone, axis=0)
    np.testing.assert_allclose(norm.running_mean.data, mean, rtol=1e-12)
    np.testing.assert_allclose(norm.running_var.data, variance, rtol=1e-12)
    assert norm.momentum == 0.1
    assert not norm.training
    np.testing.assert_array_equal(net.named_parameters()["conv1.weight"].data, weights)


def test_reestimation_puts_modes_and_momenta_back(rng: np.random.Generator) -> None:
    """Those of every module by itself, and after an error amid the batches too."""
    net = build("resnet20", rng)
    modules = dict(net.named_modules())
    norm = modules["layer1.0.bn1"]
    assert isinstance(norm, nn.BatchNorm2d)
    norm.training, norm.momentum = False, 0.3

    def settings() -> list[Any]:
        return [(m.training, getattr(m, "momentum", None)) for m in modules.values()]

    def broken() -> Iterator[Tensor]:
        yield from [Tensor(np.ones((2, *IMAGE), np.float32))] * 2
        raise OSError("no more images")

    before, mean = settings(), norm.running_mean.data.copy()
    reestimate_norms(net, [Tensor(np.ones((2, *IMAGE), np.float32))])
    assert settings() == before
    assert (norm.running_mean.data != mean).any()
    with pytest.raises(OSError, match="no more images"):
        reestimate_norms(net, broken())
    assert settings() == before


def test_a_norm_that_is_used_twice_has_the_mean_over_both_uses(rng: np.random.Generator) -> None:
    net = Twice(rng)
    x = [rng.standard_normal((4, 3, 3, 2)) for _ in range(2)]
    reestimate_norms(net, [Tensor(a) for a in x])
    parts = [a * scale for a in x for scale in (1, 10)]
    means = np.mean([part.mean(axis=(0, 1, 2)) for part in parts], axis=0)
    variances = np.mean([part.var(axis=(0, 1, 2), ddof=1) for part in parts], axis=0)
    np.testing.assert_allclose(net.norm.running_mean.data, means, rtol=1e-12)
    np.testing.assert_allclose(net.norm.running_var.data, variances, rtol=1e-12)
    assert net.norm.num_batches_tracked.item() == 4


class Twice(nn.Module):
    """One norm for x and for 10 x."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.norm = nn.BatchNorm2d(2, dtype=np.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x) + self.norm(x * 10)


# -- PyTorch ---------------------------------------------------------------------------------------


def test_the_extracted_network_loads_in_pytorch() -> None:
    """Into a ResNet-20 whose layers are built with the extracted widths: the same outputs."""
    torch = pytest.importorskip("torch")
    peers = pytest.importorskip("minihyperflows.bench.torch_peers")
    network = hyper_network("resnet20", dtype=np.float64)
    scatter_latents(network)
    net = extract(network)
    state = {k: torch.from_numpy(v) for k, v in net.state_dict().items()}
    twin = peers.resnet20()
    for name, module in list(twin.named_modules()):
        if f"{name}.weight" in state:
            parent, _, last = name.rpartition(".")
            narrow = narrow_layer(torch.nn, module, state[f"{name}.weight"].shape)
            setattr(twin.get_submodule(parent), last, narrow)
    twin.to(torch.float64)
    twin.load_state_dict(state)  # strict: the same names and shapes
    x = np.random.default_rng(1).standard_normal((4, *IMAGE))
    with torch.no_grad():
        expected = twin.eval()(torch.from_numpy(x.transpose(0, 3, 1, 2).copy())).numpy()
    np.testing.assert_allclose(net.eval()(x).data, expected, rtol=1e-9, atol=1e-12)


def narrow_layer(tnn: Any, like: Any, shape: tuple[int, ...]) -> Any:
    """A new PyTorch layer of the same kind with a weight of ``shape``."""
    if isinstance(like, tnn.Conv2d):
        options = (like.kernel_size, like.stride, like.padding)
        return tnn.Conv2d(shape[1], shape[0], *options, bias=False)
    if isinstance(like, tnn.Linear):
        return tnn.Linear(shape[1], shape[0])
    return tnn.BatchNorm2d(shape[0])
