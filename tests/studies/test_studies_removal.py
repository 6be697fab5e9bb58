"""The study of single weights: is the worth exact, and does the command do its work?"""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import numpy as np
import pytest

from minihyperflows import Tensor, flows, lab, nn, testing
from minihyperflows import functional as F
from minihyperflows.lab.records import read_records
from minihyperflows.studies import removal

SMOOTHING = 0.1


@pytest.fixture(scope="module")
def problem() -> tuple[nn.Module, np.ndarray, np.ndarray]:
    """A LeNet-300 for the digits with random gates, and some images."""
    data, rng = lab.load("digits"), np.random.default_rng(0)
    recipe = dataclasses.replace(lab.RECIPES["lenet300-digits"], dtype="float64")
    net = lab.build_network(recipe, data, rng)
    flows.attach(net, init=(-1.0, 1.0), rng=rng)
    return net, lab.normalise(data.train_x[:60], data, np.float64), data.train_y[:60]


@pytest.fixture(scope="module")
def probe(problem: tuple[nn.Module, np.ndarray, np.ndarray]) -> removal.Probe:
    return removal.Probe(*problem, smoothing=SMOOTHING)


def loss_and_gradient(net: nn.Module, x: np.ndarray, labels: np.ndarray) -> float:
    net.zero_grad()
    loss = F.cross_entropy(net(Tensor(x)), labels, SMOOTHING)
    loss.backward()
    return loss.item()


@pytest.mark.parametrize("name", removal.LAYERS)
def test_worth_is_the_definition(problem, probe: removal.Probe, name: str) -> None:
    net, x, labels = problem
    trial = copy.deepcopy(net)
    layer = getattr(trial, name)
    places = np.sort(np.random.default_rng(1).choice(layer.weight.size, 12, replace=False))
    exact = removal.worths(probe, name, places)
    assert 0 < probe.present[name].flat[places].sum() < 12  # of both kinds
    for k, place in enumerate(places):
        before, losses, gradients = layer.presence.data.flat[place], {}, {}
        for presence in (1.0, -1.0):
            layer.presence.data.flat[place] = presence
            losses[presence] = loss_and_gradient(trial, x, labels)
            flux = layer.presence.grad.flat[place]
            gradients[presence] = flux / (flows.KAPPA * layer.weight.data.flat[place])
        layer.presence.data.flat[place] = before
        testing.assert_close(exact["worth"][k], losses[-1.0] - losses[1.0], rtol=1e-6, atol=1e-13)
        other = gradients[-1.0 if before >= 0 else 1.0]
        testing.assert_close(exact["other"][k], other, rtol=1e-6, atol=1e-13)
    halves = (exact["even"] + exact["odd"]) / 2
    testing.assert_close(halves, exact["worth"], rtol=1e-9, atol=1e-15)


def test_loss_and_gradient_are_the_package_s(problem, probe: removal.Probe) -> None:
    net, x, labels = problem
    testing.assert_close(probe.loss, loss_and_gradient(net, x, labels))
    for name in removal.LAYERS:
        layer = getattr(net, name)
        flux = flows.KAPPA * layer.weight.data * probe.gradient(name)
        testing.assert_close(flux, layer.presence.grad, rtol=1e-9)
        examples = probe.gradient(name, examples=True)
        testing.assert_close(examples.T @ probe.inputs[name] / len(x), probe.gradient(name))


@pytest.mark.parametrize("name", removal.LAYERS)
def test_curvature_is_the_derivative_of_the_gradient(problem, probe, name: str) -> None:
    net, x, labels = problem
    i, j = np.argwhere(probe.present[name] & (probe.curvature(name) > 0))[5]
    trial = copy.deepcopy(net)
    weight = getattr(trial, name).weight
    weight.data = weight.data.astype(complex)
    weight.data[i, j] += 1e-20j  # the complex step
    trial.zero_grad()
    F.cross_entropy(trial(Tensor(x)), labels, SMOOTHING).backward()
    testing.assert_close(weight.grad[i, j].imag / 1e-20, probe.curvature(name)[i, j], rtol=1e-8)


def test_second_order_is_exact_for_small_weights(problem) -> None:
    """The error of the second order goes with the third power of the weight."""
    net, x, labels = problem
    trial, errors = copy.deepcopy(net), []
    for size in (1e-2, 1e-3):
        trial.fc3.weight.data[4, 7] = size
        probe = removal.Probe(trial, x, labels, SMOOTHING)
        exact = removal.worths(probe, "fc3", np.array([407]))["worth"][0]
        errors.append(abs(probe.second_order("fc3")[4, 7] - exact))
    assert errors[1] < 3e-3 * errors[0] + 1e-15


# -- rank correlation ------------------------------------------------------------------------------


def test_ranks_share_ties() -> None:
    assert removal.ranks(np.array([3.0, 1.0, 3.0, 2.0])).tolist() == [3.5, 1, 3.5, 2]


def test_spearman_is_one_for_any_rising_function_and_nan_for_a_constant() -> None:
    x = np.random.default_rng(0).standard_normal(30)
    assert removal.spearman(x, np.exp(x)) == pytest.approx(1)
    assert removal.spearman(x, -(x**3)) == pytest.approx(-1)
    assert np.isnan(removal.spearman(x, np.ones(30)))


def test_spearman_of_untied_ranks_has_the_textbook_form() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.permutation(12), rng.permutation(12)
    textbook = 1 - 6 * ((a - b) ** 2).sum() / (12 * (12**2 - 1))
    assert removal.spearman(a, b) == pytest.approx(textbook)


def test_interval_covers_about_95_in_100() -> None:
    rng, covered = np.random.default_rng(0), 0
    true = 6 / np.pi * np.arcsin(0.6 / 2)  # of a normal pair with correlation 0.6
    for _ in range(300):
        x, noise = rng.standard_normal((2, 100))
        rho = removal.spearman(x, 0.6 * x + 0.8 * noise)
        low, high = removal.interval(rho, 100)
        covered += low < true < high
    assert 0.9 < covered / 300 < 0.99
    assert removal.interval(1.0, 30)[1] <= 1


def test_dominance() -> None:
    rng = np.random.default_rng(0)
    assert removal.dominance(np.array([2.0, 3.0]), np.array([0.0, 1.0]), rng)[0] == 1
    value, low, high = removal.dominance(rng.normal(1, 1, 80), rng.normal(0, 1, 90), rng)
    assert low < value < high
    assert low > 0  # the true value is 0.52


# -- the study -------------------------------------------------------------------------------------


def arguments(out: Path, seeds: int) -> list[str]:
    settings = {"recipe": "lenet300-digits", "epochs-scale": 0.1, "images": 150, "sample": 30}
    words = [str(word) for k, v in settings.items() for word in (f"--{k}", v)]
    return [*words, "--seeds", str(seeds), "--out", str(out)]


@pytest.mark.slow
def test_the_command_leaves_a_table_and_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "removal.csv"
    removal.main(arguments(out, 1))
    first = read_records(out)
    assert {row["moment"] for row in first} >= {"dense", "end"}
    assert {row["state"] for row in first} == {"present", "removed", "both"}
    for row in first:
        assert -1 <= row["low"] <= row["rho"] <= row["high"] <= 1
        assert row["command"].endswith("--data-dir DIR --out FILE")
        assert str(tmp_path) not in row["command"]
    both = [r for r in first if r["estimate"] == "both" and r["state"] == "present"]
    assert min(row["rho"] for row in both) > 0.8
    removal.main(arguments(out, 2))
    second = read_records(out)
    assert [str(row) for row in second[: len(first)]] == [str(row) for row in first]
    assert {row["seed"] for row in second} == {0, 1}


@pytest.mark.slow
def test_watching_does_not_change_the_run() -> None:
    data, recipe = lab.load("digits"), lab.RECIPES["lenet300-digits"].scaled(0.04)
    densities = []
    for kind in (lab.Trainer, removal.WatchingTrainer):
        rng = np.random.default_rng(3)
        trainer = kind(lab.build_network(recipe, data, rng), data, recipe, rng)
        if isinstance(trainer, removal.WatchingTrainer):
            trainer.watch(lab.normalise(data.train_x[:50], data, np.float64), data.train_y[:50])
        while not trainer.finished:
            trainer.run_epoch()
        densities.append(trainer.net.fc1.presence.data.copy())
    assert (densities[0] == densities[1]).all()
    assert len(trainer.history) == recipe.timeline.pruning + recipe.timeline.regrowth
