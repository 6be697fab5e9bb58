"""The study of the pruning law: saliencies, thresholds, the staircase, and going on."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from support import RESULTS

from minihyperflows import Tensor, flows, lab, testing
from minihyperflows import functional as F
from minihyperflows.analysis import exponent
from minihyperflows.flows.gates import gated_layers, is_present
from minihyperflows.lab.records import Row, read_records
from minihyperflows.studies import frame
from minihyperflows.studies import pruning_law as law

main = partial(frame.main, law.STUDY, listed=True)

WEIGHTS = 50_200
SHORT = dataclasses.replace(
    law.SETTINGS["lenet300-digits"],
    recipe=lab.RECIPES["lenet300-digits"].with_fields({"dense.epochs": 2, "presence.lr": 0.02}),
    steps=5,
    batches=7,
    gammas=(0.25, 4.0, 64.0),
    epochs_per_level=2,
)


@pytest.fixture(scope="module")
def data() -> lab.Dataset:
    return lab.load("digits")


@pytest.fixture(scope="module")
def rows(data: lab.Dataset) -> dict[str, list[Row]]:
    return {method: law.run(SHORT, method, data, seed=1) for method in law.METHODS}


def network(data: lab.Dataset, seed: int = 0):
    """A LeNet-300 in float64 with all gates open, and its weights by layer."""
    rng = np.random.default_rng(seed)
    recipe = dataclasses.replace(SHORT.recipe, dtype="float64")
    net = lab.build_network(recipe, data, rng)
    flows.attach(net, rng=rng)
    return net, {name: layer.weight.data for name, layer in gated_layers(net).items()}


# -- saliencies and thresholds ---------------------------------------------------------------------


def test_the_lowest_of_the_whole_network_go(data: lab.Dataset) -> None:
    net, weights = network(data)
    magnitudes = {name: abs(w) for name, w in weights.items()}
    before = np.concatenate([m.reshape(-1) for m in magnitudes.values()])
    for keep in (40_000, 12_345, 1):
        removed, kept = law.prune_lowest(net, magnitudes, keep)
        masks = [is_present(t.data).reshape(-1) for t in flows.presences(net).values()]
        mask = np.concatenate(masks)
        assert mask.sum() == keep
        assert before[~mask].max() == removed <= kept == before[mask].min()
        assert removed == np.sort(before)[-keep - 1]


def test_a_weight_that_is_gone_stays_away(data: lab.Dataset) -> None:
    net, weights = network(data)
    saliency = {name: abs(w) for name, w in weights.items()}
    law.prune_lowest(net, saliency, 1000)
    first = {name: is_present(t.data).copy() for name, t in flows.presences(net).items()}
    law.prune_lowest(net, {name: 1 / s for name, s in saliency.items()}, 900)  # the other way round
    for name, t in flows.presences(net).items():
        assert not (is_present(t.data) & ~first[name]).any()


@pytest.mark.slow
def test_taylor_saliency_is_the_weight_times_the_gradient(data: lab.Dataset) -> None:
    net, weights = network(data)
    law.prune_lowest(net, {name: abs(w) for name, w in weights.items()}, 20_000)

    def batches() -> Iterator[tuple[Tensor, np.ndarray]]:
        for start in (0, 50):
            chosen = slice(start, start + 50)
            images = lab.normalise(data.train_x[chosen], data, np.float64)
            yield Tensor(images), data.train_y[chosen]

    whole = law.taylor_saliency(net, batches(), 0.1, each=False)
    each = law.taylor_saliency(net, batches(), 0.1, each=True)
    gradients = []
    for x, y in batches():
        net.zero_grad()
        F.cross_entropy(net(x), y, 0.1).backward()
        gradients.append(net.fc2.weight.grad.copy())
    w, mask = weights["fc2"], is_present(net.fc2.presence.data)
    expected = abs(w * (gradients[0] + gradients[1]) / 2)[mask]
    testing.assert_close(whole["fc2"][mask], expected, rtol=1e-12)
    expected = (abs(w * gradients[0]) + abs(w * gradients[1]))[mask] / 2
    testing.assert_close(each["fc2"][mask], expected, rtol=1e-12)
    assert (each["fc2"] >= whole["fc2"] * (1 - 1e-12)).all()


# -- runs ------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("method", law.ITERATIVE)
def test_a_tenth_goes_in_each_step(rows: dict[str, list[Row]], method: str) -> None:
    for n, row in enumerate(rows[method], start=1):
        assert row["step"] == n
        assert row["remaining"] == int(0.9**n * WEIGHTS)
        assert row["density"] == row["remaining"] / WEIGHTS
        assert 0 <= row["saliency"] <= row["smallest_surviving"]
        assert row["sparsest_density"] <= row["density"]
    assert len(rows[method]) == SHORT.steps


@pytest.mark.slow
def test_the_threshold_rises_and_a_prune_of_little_costs_little(rows) -> None:
    magnitude = rows["magnitude"]
    thresholds = [row["saliency"] for row in magnitude]
    assert thresholds == sorted(thresholds)
    for before, now in pairwise(magnitude):
        assert now["accuracy_before_prune"] == before["test_accuracy"]
        assert abs(now["accuracy_after_prune"] - now["accuracy_before_prune"]) < 0.1
    assert rows["taylor"][0]["accuracy_before_prune"] == magnitude[0]["accuracy_before_prune"]
    assert rows["pressure"][0]["accuracy_before_prune"] == ""


@pytest.mark.slow
def test_without_training_the_thresholds_are_quantiles(data, rows) -> None:
    trainer = law.new_trainer(SHORT, "magnitude", data, seed=1)
    while trainer.epoch < SHORT.recipe.dense.epochs:
        trainer.run_epoch()
    layers = [trainer.net.fc1, trainer.net.fc2, trainer.net.fc3]
    magnitudes = np.sort(abs(np.concatenate([m.weight.data.reshape(-1) for m in layers])))
    for row in rows[law.UNTRAINED]:
        assert row["saliency"] == magnitudes[WEIGHTS - row["remaining"] - 1]
        assert row["smallest_surviving"] == magnitudes[WEIGHTS - row["remaining"]]
        assert row["accuracy_after_prune"] == row["test_accuracy"]
    assert rows[law.UNTRAINED][0]["saliency"] == rows["magnitude"][0]["saliency"]


@pytest.mark.slow
def test_the_mean_of_sizes_is_more_than_the_size_of_the_mean(rows) -> None:
    assert rows["taylor-batches"][0]["saliency"] > rows["taylor"][0]["saliency"]


@pytest.mark.slow
def test_the_mask_holds_while_training_goes_on(data: lab.Dataset) -> None:
    trainer = law.new_trainer(SHORT, "magnitude", data, seed=1)
    masks = []
    while not trainer.finished:
        trainer.run_epoch()
        if (t := flows.presences(trainer.net)) and "fc1.presence" in t:
            masks.append(t["fc1.presence"].data.copy())
            assert set(np.unique(masks[-1])) <= {-1.0, 1.0}
    for before, now in pairwise(masks):
        assert (now <= before).all()
        assert (now < before).any()


@pytest.mark.slow
def test_the_density_comes_down_the_stairs(rows: dict[str, list[Row]]) -> None:
    stairs = rows["pressure"]
    assert [row["gamma"] for row in stairs] == list(SHORT.gammas)
    densities = [1.0]
    for row in stairs:
        assert row["push"] == row["gamma"] / WEIGHTS
        assert row["saliency"] == pytest.approx(4 * row["push"])
        densities += [row["density_halfway"], row["density"]]
    assert densities[-1] < 0.1
    assert all(b <= a for a, b in pairwise(densities))
    assert sum(row["flips"] for row in stairs) >= (1 - densities[-1]) * WEIGHTS


# -- the file --------------------------------------------------------------------------------------


def command(out: Path, *words: str) -> list[str]:
    options = {"dense-epochs": 1, "steps": 3, "batches": 5, "epochs-per-level": 2, "gammas": "1,8"}
    pairs = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    return [*pairs, "--out", str(out), *words]


@pytest.mark.slow
def test_the_command_leaves_a_table_and_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "law.csv"
    main(command(out, "--methods", "magnitude"))
    first = read_records(out)
    assert [row["step"] for row in first] == [1, 2, 3]
    assert {"commit", "date", "device", "dtype", "numpy"} <= first[0].keys()
    assert str(tmp_path) not in first[0]["command"]
    main(command(out, "--methods", "magnitude", "pressure"))
    second = read_records(out)
    assert second[:3] == first
    assert [row["gamma"] for row in second[3:]] == [1, 8]
    other, joined = tmp_path / "other.csv", tmp_path / "joined.csv"
    main(command(other, "--methods", "taylor"))
    main(["--join", str(out), str(other), str(out), "--out", str(joined)])
    methods = [row["method"] for row in read_records(joined)]
    assert methods == ["magnitude"] * 3 + ["taylor"] * 3 + ["pressure"] * 2
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "joined.csv",
        "law.csv",
        "other.csv",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["taylor", "pressure"])
@pytest.mark.parametrize("at", [1, 4])
def test_an_interrupted_run_goes_on(tmp_path, monkeypatch, data, rows, method: str, at) -> None:
    monkeypatch.setattr(law, "SAVE_EVERY", 0.0)
    checkpoint = tmp_path / "run.safetensors"

    class StopError(Exception):
        pass

    def stop(epoch: int) -> None:
        if epoch == at + 1:
            raise StopError

    with pytest.raises(StopError):
        law.run(SHORT, method, data, 1, checkpoint, stop)
    resumed = law.run(SHORT, method, data, 1, checkpoint)
    without = [{k: v for k, v in row.items() if k != "seconds"} for row in resumed]
    assert without == [{k: v for k, v in r.items() if k != "seconds"} for r in rows[method]]
    with pytest.raises(lab.UserError, match="other settings"):
        law.run(SHORT, method, data, 2, checkpoint)


def test_a_user_s_mistake_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--epochs-per-level", "3"], ["--gammas", "2^x"], ["--dense-epochs", "0"]):
        with pytest.raises(SystemExit) as stopped:
            main([*words, "--out", str(tmp_path / "law.csv")])
        assert stopped.value.code == 2
        assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path / "nowhere" / "law.csv")])
    assert "there is no folder" in capsys.readouterr().err


# -- the fits --------------------------------------------------------------------------------------


def points(alphas: dict[int, float]) -> list[Row]:
    saliencies = 2.0 ** np.arange(-8, 5)
    return [
        {"seed": seed, "saliency": s, "density": 0.1 * s**-alpha}
        for seed, alpha in alphas.items()
        for s in saliencies
    ]


def test_the_exponent_is_that_of_the_points() -> None:
    made = points({0: 0.5, 1: 0.6, 2: 0.7})
    found = exponent(made, 0.0, 0.5)
    assert found.alpha == pytest.approx(0.6)
    assert found.seeds == pytest.approx((0.5, 0.6, 0.7))
    assert found.c == pytest.approx(0.1)
    half = 4.302653 * 0.1 / np.sqrt(3)  # Student's t with two degrees of freedom
    assert found.interval == pytest.approx((0.6 - half, 0.6 + half))
    assert np.isnan(exponent(points({0: 0.5}), 0.0, 0.5).interval[0])
    inside = [row for row in made if 0.01 < row["density"] <= 0.5]
    assert exponent(made, 0.01, 0.5).points == pytest.approx(len(inside) / 3)


@pytest.mark.slow
def test_runs_of_the_committed_record_are_not_repeated(tmp_path: Path) -> None:
    """They were made when the module had another name."""
    out = tmp_path / "law.csv"
    shutil.copy(RESULTS / "pruning-law.csv", out)
    before = read_records(out)
    words = ["--recipe", "lenet300-mnist", "--method", "magnitude", "--seeds", "3"]
    rows = frame.carry_out(law.STUDY, *frame.parse(law.STUDY, [*words, "--out", str(out)]))
    assert rows == before
    main(["--join", str(RESULTS / "pruning-law.csv"), "--out", str(out)])
    assert len(read_records(out)) == len(before)
