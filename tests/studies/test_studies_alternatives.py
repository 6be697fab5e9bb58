"""The comparison at equal sparsity: the same budget for all, exact counts, paired differences."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from minihyperflows import analysis, lab
from minihyperflows.flows import PressureScheduler
from minihyperflows.lab.records import read_records
from minihyperflows.studies import alternatives, frame
from minihyperflows.studies.alternatives import (
    METHODS,
    RECIPES,
    learning_rate,
)
from minihyperflows.testing.pruners import check_pruner

SHORT = {"dense.epochs": 1, "pruning.epochs": 3, "regrowth.epochs": 1, "presence.lr": 0.02}
WEIGHTS = 50_200


@pytest.fixture(autouse=True)
def short_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    """1 + 3 + 1 epochs of the digits."""
    short = RECIPES["lenet300-digits"].with_fields(SHORT)
    monkeypatch.setitem(RECIPES, "lenet300-digits", short)


def study(out: Path, *words: str) -> list[dict]:
    words = "--recipe", "lenet300-digits", "--out", str(out), *words
    frame.main(alternatives.STUDY, words, listed=True)
    return read_records(out)


@pytest.mark.slow
def test_every_method_reaches_exactly_the_sparsity(tmp_path: Path) -> None:
    rows = study(tmp_path / "a.csv", "--sparsities", "0.9", "--seeds", "3")
    assert [row["method"] for row in rows] == list(METHODS)
    for row in rows:
        kept = WEIGHTS if row["method"] == "dense" else 5020
        assert row["kept"] == kept
        assert row["sparsity"] == pytest.approx(1 - kept / WEIGHTS)
        layers = 19_200 * row["density_fc1"] + 30_000 * row["density_fc2"]
        assert layers + 1000 * row["density_fc3"] == pytest.approx(kept)
        assert 0.05 < row["test_accuracy"] <= 1
        assert 0.3 < row["train_loss"] < 2.4
        assert row["dense_epochs"] + row["epochs"] == 5
        assert row["dense_epochs"] == (0 if row["method"] == "rigl" else 1)
        assert {"commit", "date", "device", "dtype", "numpy"} <= row.keys()
        assert f"--method {row['method']} " in row["command"]
    assert len({row["dense_accuracy"] for row in rows}) == 1  # one dense network
    by_method = {row["method"]: row for row in rows}
    assert by_method["random"]["test_accuracy"] < by_method["gradual"]["test_accuracy"]
    assert isinstance(by_method["hyperflows"]["landed_by"], int)
    assert by_method["gradual"]["landed_by"] == ""


@pytest.mark.slow
def test_going_on_and_sharing_networks(tmp_path: Path) -> None:
    folder, words = tmp_path / "folder", ["--methods", "magnitude", "gradual", "--seeds", "1"]
    once = study(tmp_path / "a.csv", *words, "--sparsities", "0.9", "--folder", str(folder))
    more = study(tmp_path / "a.csv", *words, "--sparsities", "0.9", "0.95", "--folder", str(folder))
    assert more[:2] == once
    assert len(more) == 4
    alone = study(tmp_path / "b.csv", *words, "--sparsities", "0.95")
    same = ("method", "test_accuracy", "train_loss", "density_fc1", "dense_accuracy")
    assert [[r[k] for k in same] for r in more[2:]] == [[r[k] for k in same] for r in alone]
    with np.load(folder / "lenet300-digits-gradual-0.95-1.npz") as masks:
        kept = sum(int(np.unpackbits(masks[name]).sum()) for name in ("fc1", "fc2", "fc3"))
    assert kept == more[3]["kept"] == WEIGHTS // 20


@pytest.mark.slow
def test_files_are_joined(tmp_path: Path) -> None:
    one, other, both = (tmp_path / f"{name}.csv" for name in ("one", "other", "both"))
    words = ["--methods", "random", "--seeds", "0"]
    study(one, *words, "--sparsities", "0.95", "0.9", "0.95")
    study(other, *words, "--sparsities", "0.95", "0.98")
    rows = study(both, "--join", str(one), str(other))
    assert [row["target_sparsity"] for row in rows] == [0.9, 0.95, 0.98]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sparsities", "95"], "between 0 and 1"),
        (["--join", "nowhere.csv"], "no file nowhere.csv"),
        (["--recipe", "lenet300-mnist", "--data-dir", "nowhere"], "nowhere"),
    ],
)
def test_errors_are_one_line(words, message, tmp_path: Path, capsys) -> None:
    with pytest.raises(SystemExit) as end:
        study(tmp_path / "a.csv", *words)
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


# -- the budget ------------------------------------------------------------------------------------


def test_the_learning_rate_of_the_budget() -> None:
    recipe = RECIPES["lenet300-mnist"]
    rates = [learning_rate(recipe, epoch) for epoch in range(1, 16)]
    assert rates[:6] == [1e-3] * 6
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert rates[10] == pytest.approx(1e-5 + 0.99e-3 / 2)  # 5 of 10 epochs into the cosine
    assert rates[14] > 1e-5


@pytest.mark.slow
def test_the_planned_pace_is_that_of_the_scheduler() -> None:
    scheduler = PressureScheduler(0.98, 40)
    for period in (1, 10, 25, 40):
        planned = analysis.planned_sparsity(period / 40, 0.98)
        assert planned == pytest.approx(1 - scheduler.expected(period))
    between = analysis.planned_sparsity(0.5 / 40, 0.98)
    assert between == pytest.approx((1 - scheduler.expected(1)) / 2)
    for make in (alternatives.PlannedGradual, alternatives.PlannedMovement):
        check_pruner(make, sparsity=0.9, steps=200)
        assert make(0.98).schedule(0.25) == analysis.planned_sparsity(0.25, 0.98)


@pytest.mark.slow
def test_hyperflows_learns_at_the_same_rates() -> None:
    recipe, data = RECIPES["lenet300-digits"].with_target(0.9), lab.load("digits")
    net, rng = alternatives.fresh(recipe, data, 0)
    trainer = alternatives.EqualRates(net, data, recipe.with_fields({"dense.epochs": 0}), rng)
    trainer.budget = recipe
    rates = []
    while not trainer.finished:
        record = trainer.run_epoch()
        rates.append(record.lr_weights)
        assert trainer.weight_optimizer.lr == record.lr_weights
    assert rates == [learning_rate(recipe, epoch) for epoch in range(2, 6)]


@pytest.mark.slow
def test_all_but_rigl_begin_with_the_dense_network() -> None:
    recipe, data = RECIPES["lenet300-digits"], lab.load("digits")
    dense = alternatives.train_dense(recipe, data, 0)
    outcome = alternatives.run("magnitude", recipe, data, dense, 0.5, 0)
    magnitudes = {k: abs(v) for k, v in dense.items() if k.endswith("weight")}
    threshold = np.median(np.concatenate([m.reshape(-1) for m in magnitudes.values()]))
    for name, mask in outcome.present.items():
        np.testing.assert_array_equal(mask, magnitudes[f"{name}.weight"] > threshold)
    initial, _ = alternatives.fresh(recipe, data, 0)
    assert (initial.state_dict()["fc1.weight"] != dense["fc1.weight"]).all()
