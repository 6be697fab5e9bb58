"""The search: its step, its stop, and a whole one on the digits."""

from __future__ import annotations

import copy
import json
import textwrap
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest

from minihyperflows import functional as F
from minihyperflows import lab, models, nn, optim
from minihyperflows.nn.models.resnets import BasicBlock, ResNet
from minihyperflows.nn.optim import sgd_rule
from minihyperflows.related import dhp
from minihyperflows.related.channels import channel_groups
from minihyperflows.related.dhp import (
    HyperLayer,
    HyperNetwork,
    Search,
    extract,
    generated,
    soft_threshold,
)

IMAGE = (8, 8, 3)


def small_resnet(rng: np.random.Generator, dtype: Any = np.float64) -> ResNet:
    """Two stages of one residual block, 8 and 16 channels."""
    return ResNet(BasicBlock, ((1, 8), (1, 16)), 10, 1.0, rng, dtype)


def small_search(target: float = 0.5, l1: float = 0.1, **options: Any) -> Search:
    rng = np.random.default_rng(0)
    return Search(HyperNetwork(small_resnet(rng), IMAGE, rng=rng), target, l1, **options)


def backward(network: HyperNetwork, seed: int = 0) -> None:
    rng = np.random.default_rng(seed)
    network.zero_grad()
    x = rng.standard_normal((4, *IMAGE)).astype(network.latents["input"].dtype)
    F.cross_entropy(network(x), rng.integers(0, 10, 4)).backward()


# -- one step --------------------------------------------------------------------------------------


def test_a_step_is_sgd_and_then_the_proximal_step() -> None:
    """Three steps by the formulas: the proximal step leaves no trace in the velocity, and latents
    that are not pruned feel weight decay only."""
    search = small_search(lr=0.05, momentum=0.9, weight_decay=1e-2, l1=0.2)
    network = search.network
    weight = network.layers["conv1"].W2
    tensors = {**network.latents, "W2": weight}
    values = {name: t.data.copy() for name, t in tensors.items()}
    velocities: dict[str, Any] = dict.fromkeys(tensors)
    for step in range(3):
        backward(network, step)
        for name, t in tensors.items():
            assert t.grad is not None
            values[name], velocities[name] = sgd_rule(
                values[name], t.grad, velocities[name], 0.05, 0.9, 1e-2
            )
            if network.floors.get(name, t.size) < t.size:
                values[name] = soft_threshold(values[name], 0.05 * 0.2)
        search.step()
        for name, t in tensors.items():
            np.testing.assert_allclose(t.data, values[name], rtol=1e-12, atol=1e-15, err_msg=name)
    assert search.steps == 3


def test_weight_decay_of_the_latents_can_be_set_apart() -> None:
    """With neither penalty nor decay a latent without gradient stays as it is."""
    search = small_search(l1=0.0, latent_decay=0.0)
    latent = search.network.latents["conv1"]
    before, weight = latent.data.copy(), search.network.layers["conv1"].W2
    norm = (weight.data**2).sum()
    backward(search.network)
    for tensor in [latent, weight]:
        tensor.grad = np.zeros_like(tensor.data)
    search.step()
    np.testing.assert_array_equal(latent.data, before)
    assert (weight.data**2).sum() < norm


def test_the_learning_rate_of_now_counts() -> None:
    search = small_search(l1=1.0, weight_decay=0.0)
    latent = search.network.latents["conv1"]
    before = latent.data.copy()
    backward(search.network)
    latent.grad = np.zeros_like(latent.data)
    search.lr = 0.001
    search.step()
    np.testing.assert_array_equal(latent.data, soft_threshold(before, 0.001))


def test_any_optimiser_can_take_the_place_of_sgd() -> None:
    search = small_search(lr=1e-3)
    network = search.network
    search.weight_optimizer = optim.Adam(network.parameters(), 1.0)
    search.latent_optimizer = optim.Adam(network.latents.values(), 1.0)
    before = network.layers["conv1"].W2.data.copy()
    backward(network)
    search.step()
    step = abs(network.layers["conv1"].W2.data - before)
    assert step.max() == pytest.approx(1e-3, rel=1e-3)  # Adam's first step, at the search's rate


def test_hypernetworks_are_replaced_before_a_search(rng: np.random.Generator) -> None:
    """Later the optimiser would go on moving the old one."""
    search = small_search()
    network, old = search.network, search.network.layers["conv1"]
    network.replace("conv1", HyperLayer(old.shape, rng=rng, dtype=np.float64))
    backward(network)
    latent = network.latents["conv1"].data.copy()
    with pytest.raises(ValueError, match="replace hypernetworks first"):
        search.step()
    np.testing.assert_array_equal(network.latents["conv1"].data, latent)
    assert search.steps == 0
    Search(network, 0.5, 0.1).step()


def test_the_stop_is_looked_at_every_so_many_steps() -> None:
    search = small_search(target=0.9, check_every=2, stop_limit=0.05)
    assert search.history == [(0, 1.0)]
    assert not search.reached
    search.network.latents["conv1"].data[:4] = 1e-3
    backward(search.network)
    search.step()
    assert search.ratio == 1.0  # has not looked
    search.step()
    assert search.ratio < 0.7
    assert search.reached
    assert search.history == [(0, 1.0), (2, search.network.flops_ratio())]
    search.target = search.ratio - 0.06
    assert not search.reached
    search.stop_limit = 0.07
    assert search.reached


@pytest.mark.parametrize("steps", [1, 3])
def test_a_search_continues_where_it_stopped(steps: int) -> None:
    """Bit for bit, through arrays and JSON."""
    undisturbed, stopped, resumed = (small_search(check_every=2) for _ in range(3))
    for seed in range(5):
        if seed == steps:
            arrays, values = stopped.state_dict()
            resumed.load_state_dict(arrays, json.loads(json.dumps(values)))
        for search in (undisturbed, stopped if seed < steps else resumed):
            backward(search.network, seed)
            search.step()
    assert resumed.history == undisturbed.history
    assert resumed.steps == 5
    expected = undisturbed.state_dict()[0]
    for name, array in resumed.state_dict()[0].items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)


# -- whole searches on the digits ------------------------------------------------------------------


@cache
def digits(dtype: Any) -> tuple[Any, ...]:
    """The images in [0, 1] with their one channel three times, as the residual networks want."""
    data = lab.load("digits")
    images = [np.repeat(x / 255, 3, axis=-1).astype(dtype) for x in (data.train_x, data.test_x)]
    return images[0], data.train_y, images[1], data.test_y


def batch(rng: np.random.Generator, dtype: Any) -> tuple[Any, Any]:
    x, y, _, _ = digits(dtype)
    chosen = rng.integers(0, len(x), 64)
    return x[chosen], y[chosen]


def accuracy(net: nn.Module, dtype: Any) -> float:
    _, _, x, y = digits(dtype)
    return float((net.eval()(x).data.argmax(axis=1) == y).mean())


@dataclass
class Found:
    """What a search has found."""

    search: Search
    full: nn.Module
    compact: nn.Module


@cache
def searched(dtype: Any, hyper_bias: bool, target: float, l1: float, seed: int = 0) -> Found:
    rng = np.random.default_rng(seed)
    net = small_resnet(rng, dtype)
    network = HyperNetwork(net, IMAGE, hyper_bias=hyper_bias, rng=rng)
    search = Search(network, target, l1, check_every=10)
    while not search.reached and search.steps < 200:
        x, y = batch(rng, dtype)
        network.zero_grad()
        F.cross_entropy(network(x), y).backward()
        search.step()
    return Found(search, generated(network), extract(network))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_search_reaches_its_target(dtype: Any) -> None:
    """Half of the multiplications, in under 200 steps, and an ordinary network that learns."""
    found = searched(dtype, hyper_bias=True, target=0.5, l1=0.1)
    search, compact = found.search, copy.deepcopy(found.compact)
    assert search.reached
    assert 0.3 < search.ratio <= 0.52
    ratios = [ratio for _, ratio in search.history]
    assert ratios[0] == 1
    assert ratios[-1] == min(ratios)
    sizes = {name: group.size for name, group in channel_groups(compact, IMAGE).items()}
    assert sizes == search.network.widths()
    assert all(t.dtype == dtype for t in compact.parameters())
    assert not any(m.weight_gate for _, m in compact.named_modules() if isinstance(m, nn.Weighted))
    optimizer, rng = optim.SGD(compact.parameters(), 0.05, momentum=0.9), np.random.default_rng(1)
    compact.train()
    for _ in range(60):
        x, y = batch(rng, dtype)
        compact.zero_grad()
        F.cross_entropy(compact(x), y).backward()
        optimizer.step()
    assert accuracy(compact, dtype) > 0.85


@pytest.mark.slow
def test_the_function_gap_is_large_as_published() -> None:
    """U9: with biases the cut takes away what the network computed with."""
    found = searched(np.float64, hyper_bias=True, target=0.5, l1=0.1)
    full, cut = (accuracy(net, np.float64) for net in (found.full, found.compact))
    assert full > 0.6
    assert cut < full - 0.25


@pytest.mark.slow
def test_without_biases_there_is_no_gap() -> None:
    """U9: latents carry the function, so what is cut was not used any more."""
    found = searched(np.float64, hyper_bias=False, target=0.8, l1=0.1)
    assert 0.4 < found.search.ratio <= 0.82
    counts = found.search.network.latent_counts().values()
    assert all(count.below == count.zero for count in counts)
    full, cut = (net.eval()(digits(np.float64)[2]).data for net in (found.full, found.compact))
    assert np.std(full, axis=0).max() > 0.1 * abs(full).max()  # images are told apart
    np.testing.assert_allclose(cut, full, rtol=1e-9, atol=1e-12 * abs(full).max())


def test_the_example_of_the_docstring_runs() -> None:
    assert dhp.__doc__
    example = dhp.__doc__.split("::\n", 1)[1].split("Source:")[0]
    rng = np.random.default_rng(0)
    batches = [(rng.standard_normal((2, 32, 32, 3)).astype(np.float32), np.array([0, 1]))] * 2
    names: dict[str, Any] = {"rng": rng, "models": models, "dhp": dhp, "F": F, "batches": batches}
    exec(textwrap.dedent(example), names)
    assert names["search"].steps == 2
    assert names["compact"](batches[0][0]).shape == (2, 10)
    assert set(dhp.__all__) <= set(dir(dhp))
