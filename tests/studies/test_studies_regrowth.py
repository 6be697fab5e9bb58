"""The study behind chapter 09: what happens to removed weights, and who comes back."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minihyperflows import flows, lab, nn, optim
from minihyperflows.analysis import decayed, travel
from minihyperflows.lab.records import read_records
from minihyperflows.studies import frame, regrowth
from minihyperflows.studies.regrowth import Pruned

main = partial(frame.main, regrowth.STUDY, listed=True)
SHORT = {"dense.epochs": 1, "pruning.epochs": 4, "regrowth.epochs": 2}
HASTE = {"pressure.step": 1.0, "presence.lr": 0.02}


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four epochs of pruning, two of regrowth, two learning rates of t; t moves fast."""
    for name, value in SHORT.items():
        monkeypatch.setitem(regrowth._COMMON, name, value)
    monkeypatch.setitem(regrowth._DATASETS, "digits", HASTE)
    monkeypatch.setattr(regrowth, "SCALES", (1.0, 5.0))


def prune(variant: str = "high to low", **changes: Any) -> tuple[Pruned, Any]:
    data = lab.load("digits")
    dense, _ = regrowth.train_dense("digits", data, seed=2)
    return Pruned(variant, "digits", data, dense, seed=2), data


# -- closed forms --------------------------------------------------------------------------------


def test_a_removed_weight_goes_where_the_closed_form_says() -> None:
    rng, rates = np.random.default_rng(0), [0.1] * 40 + [0.02] * 60
    w = nn.Parameter(rng.standard_normal(50))
    opt = optim.SGD([w], 0.1, momentum=0.9, weight_decay=0.01)
    removed_after = rng.integers(1, 101, 50)  # until then it has a gradient, afterwards none
    weight, velocity = np.zeros(50), np.zeros(50)
    for step, lr in enumerate(rates, start=1):
        opt.lr = lr
        w.grad = np.where(step <= removed_after, rng.standard_normal(50), 0.0)
        opt.step()
        now = removed_after == step
        weight[now], velocity[now] = w.data[now], opt.state[0]["velocity"][now]
    found = decayed(weight, velocity, removed_after, rates, 0.01, 0.9)
    np.testing.assert_allclose(found, w.data, rtol=1e-12)


def test_travel_is_the_sum_of_the_learning_rates() -> None:
    rates = [0.001 * 10 * 0.75**k for k in range(8) for _ in range(469)]
    assert travel(0.001, 469, 10, 0.75, 8) == pytest.approx(sum(rates))
    settings = regrowth.recipe("high to low")
    by_recipe = [settings.regrowth.presence_lr_factor(k) for k in range(1, 9)]
    assert sum(by_recipe) * 0.469 == pytest.approx(travel(0.001, 469, 10, 0.75, 8))


def test_the_variants_are_recipes_with_one_dense_network() -> None:
    dense = [regrowth.recipe(name).dense_settings() for name in regrowth.VARIANTS]
    assert all(settings == dense[0] for settings in dense)
    assert regrowth.recipe("high").regrowth.lr_at(8) == regrowth.recipe("high").pruning.lr_at(9)
    assert not any(regrowth.recipe(name).regrowth.land for name in regrowth.VARIANTS)
    assert regrowth.recipe("high to low, no decay").pruning.weight_decay == 0


# -- a pruned network ----------------------------------------------------------------------------


@pytest.mark.slow
def test_removals_are_remembered(short: None) -> None:
    data, settings = lab.load("digits"), regrowth.recipe("high to low", dataset="digits")
    trainer = regrowth.new_trainer(settings, data, seed=1)
    masks, weights = [], []
    observe = trainer._observe

    def spy(removed_after: np.ndarray) -> None:
        observe(removed_after)
        masks.append(trainer.presence() >= 0)
        weights.append(trainer.weights())

    trainer._observe = spy  # type: ignore[method-assign]
    while not trainer.finished:
        trainer.run_epoch()
    was = np.array([np.ones_like(masks[0]), *masks])
    left, back = was[:-1] & ~was[1:], ~was[:-1] & was[1:]
    last = len(masks) - np.argmax(left[::-1], axis=0)
    gone = left.any(axis=0)
    assert 0.5 < gone.mean() < 1
    np.testing.assert_array_equal(trainer.removed_after, np.where(gone, last, regrowth.NEVER))
    there = np.array(weights)[last[gone] - 1, np.flatnonzero(gone)]
    np.testing.assert_array_equal(trainer.weight[gone], there)
    np.testing.assert_array_equal(trainer.returned, back.any(axis=0))
    assert back.any()


@pytest.mark.slow
def test_removed_weights_decay_as_the_closed_form_says(short: None) -> None:
    pruned, _ = prune("very high to low")
    gone = pruned.absent
    assert gone.mean() > 0.5
    np.testing.assert_allclose(pruned.closed_form[gone], pruned.weight[gone], rtol=1e-4, atol=1e-6)
    assert (pruned.age[gone] >= 0).all()
    assert pruned.age[gone].max() <= 3
    assert (pruned.flux[gone] != 0).any()
    assert not pruned.flux[~gone].any()

    still, _ = prune("high to low, no decay")
    np.testing.assert_array_equal(still.without_velocity, still.weight_removed)
    assert abs(pruned.without_velocity[gone]).mean() < abs(pruned.weight_removed[gone]).mean()


@pytest.mark.slow
def test_regrowth_continues_where_pruning_ended(short: None) -> None:
    pruned, data = prune()
    slow, _ = regrowth.regrow(pruned, 0.0, data, seed=2)
    assert [r.density for r in slow] == [pruned.records[-1].density] * 2  # t stands still
    records, after = regrowth.regrow(pruned, 5.0, data, seed=2)
    row = regrowth.run_row(pruned, 0.5, records, after)
    assert row["density_before"] == pruned.records[-1].density
    assert row["density_after"] == records[-1].density == flows.density(after.net)
    absent, total = pruned.absent.sum(), pruned.absent.size
    there = row["kept"] * (total - absent) + row["present"] * absent
    assert there == pytest.approx(row["density_after"] * total)
    assert row["present"] <= row["returned"]
    ages = regrowth.age_rows(pruned, after)
    assert sum(r["count"] for r in ages) == absent
    assert sum(r["count"] * r["returned"] for r in ages) == pytest.approx(row["returned"] * absent)


# -- the files -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_tables_are_joined_and_not_repeated(
    short: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = ["--dataset", "digits", "--seeds", "0", "0"]
    one, other, both = (tmp_path / f"{name}.csv" for name in ("one", "other", "both"))
    main([*common, "--variants", "high to low", "--out", str(one)])
    main([*common, "--variants", "low", "--out", str(other)])
    monkeypatch.setattr(regrowth, "measure", lambda *_: pytest.fail("a run was repeated"))
    names = ["--variants", "low", "high to low"]
    main([*common, *names, "--join", str(other), str(one), "--out", str(both)])
    main([*common, *names, "--join", str(one), "--out", str(both)])
    rows = read_records(both)
    assert [(r["variant"], r["scale"]) for r in rows] == [
        ("high to low", 1.0),
        ("high to low", 5.0),
        ("low", 10.0),
    ]
    assert rows[:2] == read_records(one)
    assert rows[0]["density_before"] == rows[1]["density_before"]
    assert rows[0]["command"].endswith("--variant 'high to low' --seed 0 --out FILE")
    assert {"commit", "date", "numpy"} <= rows[0].keys()
    epochs = read_records(tmp_path / "both-epochs.csv")
    assert [r["epoch"] for r in epochs] == [1, 2, 3, 4, 5, 6, 5, 6, 1, 2, 3, 4, 5, 6]
    assert [r["scale"] for r in epochs[:6]] == ["", "", "", "", 1.0, 1.0]
    assert epochs[5]["density"] == rows[0]["density_after"]
    ages = read_records(tmp_path / "both-ages.csv")
    assert {(r["variant"], r["scale"]) for r in ages} == {(r["variant"], r["scale"]) for r in rows}


def test_what_a_user_gets_wrong_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--join", str(tmp_path / "none.csv"), "--out", str(tmp_path / "out.csv")])
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
