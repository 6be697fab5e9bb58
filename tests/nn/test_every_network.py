"""What holds for every network: found whole, gated, landed, made dense, saved; at random.

``HYPOTHESIS_PROFILE=large`` tries many more.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.nested_networks import CHANNELS, CLASSES, SIDE, NestedNetwork, images

from minihyperflows import flows, nn, optim
from minihyperflows import functional as F
from minihyperflows.flows.gates import counts
from minihyperflows.nn.counting import flops, kept_weights, sparse_flops
from minihyperflows.related.pruners import Magnitude, Random

FEWER = settings(max_examples=settings().max_examples // 5)
far = pytest.mark.filterwarnings("ignore:landing:minihyperflows.DoubtfulResultWarning")
DTYPES = st.sampled_from(
    [(np.float32,), (np.float64,), (np.float32, np.float64), (np.float16, np.float32, np.float64)]
)
SEEDS = st.integers(0, 2**32)


def build(seed: int, dtypes: tuple[Any, ...]) -> NestedNetwork:
    return NestedNetwork(np.random.default_rng(seed), dtypes)


def gated(seed: int, dtypes: tuple[Any, ...], draws: int = 1) -> NestedNetwork:
    net = build(seed, dtypes)
    flows.attach(net, init=(-0.5, 0.5), rng=np.random.default_rng([seed, draws]))
    return net


def evaluate(net: nn.Module, seed: int) -> np.ndarray:
    return net.eval()(images(np.random.default_rng(seed))).data


def distinct_weights(net: nn.Module) -> list[nn.Parameter]:
    """By definition: the weights of all convolutions and linear layers, each once."""
    layers = [m for _, m in net.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    return list({id(layer.weight): layer.weight for layer in layers}.values())


@FEWER
@given(SEEDS, DTYPES)
def test_every_parameter_is_found_once(seed: int, dtypes: Any) -> None:
    net = build(seed, dtypes)
    found = [id(p) for p in net.parameters()]
    assert set(found) == {
        id(p) for layer in net.made() for p in (layer.weight, layer.bias) if p is not None
    }
    assert len(found) == len(set(found))
    optim.SGD(net.parameters(), lr=0.1)
    for name, tensor in net.named_tensors().items():  # the name says where it is
        at: Any = net
        for part in name.split("."):
            if isinstance(at, dict):
                at = at[part]
            else:
                at = at[int(part)] if isinstance(at, list | tuple) else getattr(at, part)
        assert at is tensor


@FEWER
@given(SEEDS, DTYPES)
def test_to_dense_is_the_same_function(seed: int, dtypes: Any) -> None:
    net = gated(seed, dtypes)
    weights, total = distinct_weights(net), sum(w.size for w in distinct_weights(net))
    assert len(flows.presences(net)) == len(weights)
    before, density, by_hand = evaluate(net, seed), flows.density(net), copy.deepcopy(net)
    masks = [t.data >= 0 for t in flows.presences(by_hand).values()]
    assert density == sum(int(m.sum()) for m in masks) / total
    flows.detach(by_hand)
    for weight, mask in zip(distinct_weights(by_hand), masks, strict=True):
        weight.data = np.where(mask, weight.data, weight.data * 0)
    np.testing.assert_array_equal(evaluate(by_hand, seed), before)
    flows.to_dense(net)
    np.testing.assert_array_equal(evaluate(net, seed), before)
    assert [id(w) for w in distinct_weights(net)] == [id(w) for w in weights]
    assert not flows.presences(net)


@pytest.mark.slow
@far
@FEWER
@given(SEEDS, DTYPES, st.floats(0, 1))
def test_landing_and_counting_agree(seed: int, dtypes: Any, target: float) -> None:
    net = gated(seed, dtypes)
    total = sum(w.size for w in distinct_weights(net))
    flows.land(net, target)
    assert flows.density(net) == kept_weights(target, total) / total
    names = [k.removesuffix(".weight") for k, p in net.named_parameters().items()
             if any(p is w for w in distinct_weights(net))]  # fmt: skip
    layers = flows.layer_density(net)
    assert list(layers) == names == [k.removesuffix(".presence") for k in flows.presences(net)]
    present = sum(layers[n] * w.size for n, w in zip(names, distinct_weights(net), strict=True))
    np.testing.assert_allclose(present / total, flows.density(net), rtol=1e-12)
    dense = flops(net, (SIDE, SIDE, CHANNELS))
    assert set(dense) == set(layers)
    exact = {n: present * dense[n] // size for n, (present, size) in counts(net).items()}
    assert sparse_flops(dense, layers) == exact


@pytest.mark.slow
@FEWER
@given(SEEDS, DTYPES, st.booleans())
def test_states_go_round(seed: int, dtypes: Any, with_gates: bool) -> None:
    make = gated if with_gates else build
    net, other = make(seed, dtypes), make(seed, dtypes)
    for tensor in {id(t): t for t in other.named_tensors().values()}.values():
        tensor.data = tensor.data + 1
    net(images(np.random.default_rng(seed)))  # moves running statistics
    state = net.state_dict()
    other.load_state_dict(state)
    for name, value in other.state_dict().items():
        np.testing.assert_array_equal(value, state[name], err_msg=name)
    np.testing.assert_array_equal(evaluate(other, seed), evaluate(net, seed))
    assert len(distinct_weights(other)) == len(distinct_weights(net))
    twin = copy.deepcopy(net)
    assert len(twin.parameters()) == len(net.parameters())
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in net.parameters()}


@pytest.mark.slow
@FEWER
@given(SEEDS, DTYPES)
def test_the_recorder_counts_by_definition(seed: int, dtypes: Any) -> None:
    net, rng = gated(seed, dtypes), np.random.default_rng(seed)
    recorder, parameters = flows.FlowRecorder(net), flows.presences(net)
    masks = {k: t.data >= 0 for k, t in parameters.items()}
    flips, regrowths, flux = (dict.fromkeys(masks, 0) for _ in range(3))
    for _ in range(4):
        net.zero_grad()
        loss = F.cross_entropy(net(images(rng)), rng.integers(0, CLASSES, 4))
        (loss + 0.5 * flows.pressure(net)).backward()
        recorder.observe_flux(gamma=0.5)
        for name, t in parameters.items():
            total = sum(p.size for p in parameters.values())
            values = abs(t.grad - 0.5 / total)[masks[name]]
            flux[name] = [*(flux[name] or []), float(values.mean()) if values.size else None]
            t.data = t.data * rng.choice([1, 1, -1], t.shape).astype(t.dtype)
            now = t.data >= 0
            flips[name] += int((now != masks[name]).sum())
            regrowths[name] += int((now & ~masks[name]).sum())
            masks[name] = now
        recorder.observe_step()
        assert recorder.density == flows.density(net)
    for name, layer in recorder.take().items():
        key = f"{name}.presence"
        assert (layer.flips, layer.regrowths) == (flips[key], regrowths[key])
        assert layer.density == float(masks[key].mean())
        seen = [value for value in flux[key] if value is not None]
        expected = np.mean(seen) if seen else np.nan
        np.testing.assert_allclose(layer.flux_present, expected, rtol=1e-6)


@FEWER
@given(SEEDS, DTYPES, st.sampled_from([Random, Magnitude]), st.sampled_from([0.0, 0.5, 0.9]))
def test_masks_come_off_without_a_trace(
    seed: int, dtypes: Any, method: Any, sparsity: float
) -> None:
    net, pruner = build(seed, dtypes), method(sparsity)
    total = sum(w.size for w in distinct_weights(net))
    pruner.start(net, optim.SGD(net.parameters(), lr=0.1), 1, np.random.default_rng(seed))
    assert pruner.total == total
    assert pruner.density == pruner.kept / total
    before = evaluate(net, seed)
    pruner.finish()
    np.testing.assert_array_equal(evaluate(net, seed), before)
    assert sum(np.count_nonzero(w.data) for w in distinct_weights(net)) <= pruner.kept
