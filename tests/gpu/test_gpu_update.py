"""One kernel that steps all parameters, against the optimisers, gates and pressure of the CPU."""

from __future__ import annotations

import re

import numpy as np
import pytest

from minihyperflows import Tensor, flows, nn, optim
from minihyperflows.engine.backend import cupy, to_numpy
from minihyperflows.flows.gates import KAPPA, gated_layers
from minihyperflows.flows.gpu import update
from minihyperflows.flows.gpu.flat import FIRST_SCALE, GROWTH_INTERVAL, FlatTraining
from minihyperflows.flows.gpu.update import Counter

STEPS = 5
OPTIMIZERS = {
    "sgd": lambda params: optim.SGD(params, 0.05, momentum=0.9, weight_decay=0.01),
    "nesterov": lambda params: optim.SGD(params, 0.05, momentum=0.9, nesterov=True),
    "adam": lambda params: optim.Adam(params, 0.01, weight_decay=0.02),
}


def network(gates: bool = True) -> nn.Module:
    """Layers whose weights end inside a tile, at its end, and beyond it; t on both sides of 0."""
    rng = np.random.default_rng(0)
    net = nn.Sequential(
        nn.Conv2d(3, 5, 3, rng=rng),
        nn.BatchNorm2d(5),
        nn.Linear(32, 64, rng=rng),  # 2048 weights
        nn.Linear(7, 300, bias=False, rng=rng),
    )
    if gates:
        flows.attach(net, init=(-0.02, 0.02), rng=rng)
    return net


def gradients(net: nn.Module, seed: int) -> dict[str, np.ndarray]:
    """dL/d(parameter), for weights with respect to the weight in use."""
    rng = np.random.default_rng(seed)
    return {
        k: rng.normal(0, 1, p.shape).astype(np.float32) for k, p in net.named_parameters().items()
    }


def step_on_the_cpu(net, optimizers, given, gamma, floor) -> dict[str, np.ndarray]:
    """The definition: gates, fluxes and pressure by hand, then the optimisers. Returns |flux|."""
    total = sum(t.size for t in flows.presences(net).values())
    fluxes = {}
    for name, p in net.named_parameters().items():
        p.grad = given[name].copy()
    for name, layer in gated_layers(net).items():
        t, w = layer.presence, layer.weight
        flux = KAPPA * w.data * w.grad
        pushed = 1 if floor is None else t.data > floor
        t.grad = (flux + gamma / total * pushed).astype(np.float32)
        w.grad = w.grad * (t.data >= 0)
        fluxes[name] = abs(flux), t.data >= 0
    for optimizer in optimizers:
        optimizer.step()
    return fluxes


def optimizers_of(net, weights: str, presences: str | None):
    both = [OPTIMIZERS[weights](net.parameters())]
    if presences:
        both.append(OPTIMIZERS[presences](flows.presences(net).values()))
    return both


def give(net, flat: FlatTraining, given: dict[str, np.ndarray], scale: float = 1.0) -> None:
    """Write gradients to where backward would."""
    for name, p in net.named_parameters().items():
        layer = dict(net.named_modules())[name.rpartition(".")[0]]
        in_use = getattr(layer, "weight_in_use", None) if name.endswith("weight") else None
        buffer = p.gradient_buffer if in_use is None else in_use.gradient_buffer
        buffer[...] = cupy().asarray(given[name] * np.float32(scale))


def one_step(flat: FlatTraining, loss: float = 1.0, batch: int = 4) -> None:
    flat.step(Tensor(cupy().asarray(np.float32(loss))), batch)


@pytest.mark.parametrize("floor", [None, 0.005])
@pytest.mark.parametrize("presences", ["sgd", "adam"])
@pytest.mark.parametrize("weights", ["sgd", "nesterov", "adam"])
def test_steps_are_those_of_the_optimisers(gpu, weights, presences, floor):
    cpu, other = network(), network().to("cuda")
    on_cpu = optimizers_of(cpu, weights, presences)
    flat = FlatTraining(other, *optimizers_of(other, weights, presences), np.float32)
    flat.set_rates(gamma=30.0, floor=floor)
    flat.begin_epoch()
    flips, flux_sums = 0, {}
    before = {k: t.data >= 0 for k, t in flows.presences(cpu).items()}
    for k in range(STEPS):
        given = gradients(cpu, k)
        fluxes = step_on_the_cpu(cpu, on_cpu, given, 30.0, floor)
        give(other, flat, given)
        one_step(flat)
        flat.arrays.observe_flux()
        after = {k: t.data >= 0 for k, t in flows.presences(cpu).items()}
        flips += sum((after[k] != before[k]).sum() for k in after)
        before = after
        for name, (flux, present) in fluxes.items():
            flux_sums.setdefault(name, []).append((flux[present].mean(), flux[~present].mean()))
    assert_same_network(other, cpu)
    assert flips > 100
    report = flat.layer_flows()
    assert sum(layer.flips for layer in report.values()) == flips
    assert flat.density == flows.density(cpu) == flows.density(other)
    for name, pairs in flux_sums.items():
        found = report[name].flux_present, report[name].flux_removed
        np.testing.assert_allclose(found, np.mean(pairs, axis=0), rtol=1e-5)
    in_use = to_numpy(gated_layers(other)["0"].weight_in_use.data)
    layer = gated_layers(cpu)["0"]
    np.testing.assert_allclose(in_use, layer.weight.data * (layer.presence.data >= 0), rtol=1e-5)
    # and the optimisers' state is theirs
    flat.release()
    for ours, theirs in zip((flat.weights, flat.presences), on_cpu, strict=True):
        assert_same_arrays(ours.state_dict(), theirs.state_dict())


def test_a_network_without_gates(gpu):
    cpu, other = network(gates=False), network(gates=False).to("cuda")
    on_cpu = optimizers_of(cpu, "nesterov", None)
    flat = FlatTraining(other, *optimizers_of(other, "nesterov", None), None, np.float16)
    flat.set_rates(gamma=0.0)
    flat.begin_epoch()
    for k in range(STEPS):
        step_on_the_cpu(cpu, on_cpu, gradients(cpu, k), 0.0, None)
        give(other, flat, gradients(cpu, k), scale=FIRST_SCALE)
        one_step(flat)
    assert_same_network(other, cpu)
    in_use = other[0].weight_in_use.data
    assert in_use.dtype == np.float16
    assert (to_numpy(in_use) == to_numpy(other[0].weight.data).astype(np.float16)).all()


def test_an_optimiser_that_has_taken_steps_goes_on(gpu):
    cpu, other = network(), network().to("cuda")
    on_cpu, on_gpu = (optimizers_of(net, "sgd", "adam") for net in (cpu, other))
    for k in range(3):
        step_on_the_cpu(cpu, on_cpu, gradients(cpu, k), 30.0, None)
    other.load_state_dict(cpu.state_dict())
    for ours, theirs in zip(on_gpu, on_cpu, strict=True):
        ours.load_state_dict(theirs.state_dict())
    flat = FlatTraining(other, *on_gpu, np.float32)
    flat.set_rates(gamma=30.0)
    flat.begin_epoch()
    step_on_the_cpu(cpu, on_cpu, gradients(cpu, 3), 30.0, None)
    give(other, flat, gradients(cpu, 3))
    one_step(flat)
    assert_same_network(other, cpu)
    flat.read_steps()
    assert set(flat.presences.steps) == {4}


def test_an_overflow_leaves_everything_but_the_scale(gpu):
    net = network().to("cuda")
    flat = FlatTraining(net, *optimizers_of(net, "sgd", "adam"), np.float16)
    flat.set_rates(gamma=1.0)
    flat.begin_epoch()
    before = net.state_dict()
    given = gradients(net, 0)
    given["3.weight"][5, 3] = np.inf
    give(net, flat, given)
    one_step(flat)
    assert_same_arrays(net.state_dict(), before, rtol=0)
    assert flat.state_dict() == {"scale": FIRST_SCALE / 2, "good_steps": 0}
    assert flat.counter(Counter.SKIPPED) == 1
    assert flat.counter(Counter.WEIGHT_STEPS) == flat.counter(Counter.FIRST_BAD) + 1 == 0
    give(net, flat, gradients(net, 0))  # the next one counts again
    one_step(flat)
    assert flat.counter(Counter.WEIGHT_STEPS) == 1
    assert flat.state_dict()["good_steps"] == 1


def test_the_scale_grows_after_good_steps(gpu):
    net = network().to("cuda")
    flat = FlatTraining(net, *optimizers_of(net, "sgd", "adam"), np.float16)
    flat.set_rates(gamma=0.0)
    flat.begin_epoch()
    flat.load_state_dict({"scale": 8.0, "good_steps": GROWTH_INTERVAL - 1})
    one_step(flat)
    assert flat.state_dict() == {"scale": 16.0, "good_steps": 0}
    assert to_numpy(flat.arrays.scale)[1] == 1 / 16


def test_losses_are_added_up_and_the_first_bad_one_is_remembered(gpu):
    net = network().to("cuda")
    flat = FlatTraining(net, *optimizers_of(net, "sgd", "adam"), np.float32)
    flat.set_rates(gamma=0.0)
    flat.begin_epoch()
    for loss, batch in ((2.0, 4), (3.0, 2), (float("nan"), 4), (1.0, 4)):
        one_step(flat, loss, batch)
    assert flat.counter(Counter.FIRST_BAD) == 2
    assert flat.counter(Counter.BATCHES) == 4
    assert int(flat.arrays.position[0]) == 14
    flat.begin_epoch()
    one_step(flat, 2.0, 4)
    one_step(flat, 3.0, 2)
    assert float(flat.arrays.loss_sum[0]) == 14
    assert flat.counter(Counter.FIRST_BAD) == -1


def test_presences_freeze_at_a_density(gpu):
    net = network().to("cuda")
    flat = FlatTraining(net, *optimizers_of(net, "sgd", "adam"), np.float32)
    flat.set_rates(gamma=0.0)
    start = flat.density
    flat.begin_epoch(freeze_at_density=start + 0.2)
    density = [start]
    for _ in range(30):
        given = {name: -np.sign(p.numpy()) for name, p in net.named_parameters().items()}
        give(net, flat, given)  # the flux pulls every weight back
        one_step(flat)
        density.append(flat.density)
        if flat.counter(Counter.FROZEN):
            break
    assert density[-2] < start + 0.2 <= density[-1]
    t, taken = flat.arrays.t.copy(), flat.counter(Counter.PRESENCE_STEPS)
    give(net, flat, gradients(net, 0))
    one_step(flat)
    assert (flat.arrays.t == t).all()
    assert flat.counter(Counter.PRESENCE_STEPS) == taken
    assert flat.counter(Counter.WEIGHT_STEPS) == taken + 1


def test_the_enumerations_are_those_of_the_kernel():
    text = update.SOURCE.text()
    for enum, mark in (
        *((update.Rule, None), (update.Setting, "SETTINGS")),
        *((update.PressureSetting, None), (Counter, "COUNTERS")),
    ):
        body = re.search(rf"enum {enum.__name__} {{(.*?)}};", text, re.DOTALL)[1]
        names = re.findall(r"\b[A-Z][A-Z_]+\b", re.sub(r"//.*", "", body))
        assert names == [*(member.name for member in enum), *([mark] if mark else [])]
    assert f"constexpr int TILE = {update.TILE};" in text
    assert f"constexpr float KAPPA = {KAPPA}f;" in text


def test_what_cannot_be_laid_out_is_refused(gpu):
    net = network().to("cuda")
    weights, presences = optimizers_of(net, "sgd", "adam")
    with pytest.raises(ValueError, match="presences of every layer"):
        FlatTraining(net, weights, None, np.float32)
    some = optim.SGD(net.parameters()[1:], 0.1)
    with pytest.raises(ValueError, match="weights of every layer"):
        FlatTraining(net, some, presences, np.float32)
    weights.steps[0] += 1
    with pytest.raises(ValueError, match="different numbers of steps"):
        FlatTraining(net, weights, presences, np.float32)


def assert_same_network(ours: nn.Module, theirs: nn.Module) -> None:
    assert_same_arrays(ours.state_dict(), theirs.state_dict())


def assert_same_arrays(ours: dict, theirs: dict, rtol: float = 2e-5) -> None:
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        np.testing.assert_allclose(array, theirs[name], rtol=rtol, atol=rtol / 10, err_msg=name)
