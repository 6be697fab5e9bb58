"""The study of the scheduler's targets: its runs, its table, and going on where it stopped."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from minihyperflows import analysis, flows, lab, testing
from minihyperflows.lab.records import read_records
from minihyperflows.studies import frame, targets

SHORT = {"dense.epochs": 1, "pruning.epochs": 3, "regrowth.epochs": 1}
SEED = ["--seeds", "1"]


@pytest.fixture(autouse=True)
def short_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three epochs of pruning; t starts close to the gate's threshold."""
    for name in ("perceptron", "perceptron-proportional"):
        setting = targets.SETTINGS[name]
        recipe = setting.recipe.with_fields(SHORT | {"presence.lr": 0.05})
        monkeypatch.setitem(targets.SETTINGS, name, dataclasses.replace(setting, recipe=recipe))


def test_a_row_has_the_scheduler_s_error_and_the_landing(tmp_path: Path) -> None:
    out, twice = tmp_path / "targets.csv", ["perceptron", "perceptron"]
    words = ["--out", str(out), "--settings", *twice, "--targets", "0.9", "0.9", *SEED]
    frame.command(targets.STUDY, words)
    (row,) = read_records(out)
    assert row["aim"] == pytest.approx(0.91)
    assert row["error"] == pytest.approx(row["sparsity_before_regrowth"] - 0.91)
    assert row["late_error"] >= 0
    assert abs(row["sparsity"] - 0.9) < 1 / 4_440
    assert 0.5 < row["test_accuracy"] <= 1
    assert "--setting perceptron --target-sparsity 0.9 --seed 0 --out FILE" in row["command"]
    assert {"commit", "date", "device", "dtype", "numpy"} <= row.keys()


@pytest.mark.slow
def test_finished_runs_are_not_repeated(tmp_path: Path) -> None:
    out = tmp_path / "targets.csv"
    words = ["--out", str(out), "--setting", "perceptron", *SEED, "--target-sparsity", "0.9"]
    first = frame.carry_out(targets.STUDY, *frame.parse(targets.STUDY, words))
    both = frame.carry_out(targets.STUDY, *frame.parse(targets.STUDY, [*words, "0.95"]))
    assert len(both) == 2
    assert both[0]["date"] == first[0]["date"]
    assert both[0]["seconds"] == pytest.approx(first[0]["seconds"])


@pytest.mark.slow
def test_runs_that_share_their_dense_network_are_those_that_do_not() -> None:
    setting, data = targets.SETTINGS["perceptron"], lab.load("digits")
    dense = targets.train_dense(setting, data, seed=3)
    one, other = (targets.prune(setting, data, dense, 0.95, seed=3) for _ in range(2))
    trainer = targets.new_trainer(setting, data, 0.95, seed=3)
    alone = [trainer.run_epoch() for _ in range(5)][1:]
    for a, b, c in zip(one, other, alone, strict=True):
        assert a.density == b.density == c.density
        assert a.train_loss == b.train_loss == c.train_loss


@pytest.mark.parametrize(
    ("build", "weights"), [(analysis.perceptron, 4_440), (analysis.small_convnet, 11_208)]
)
def test_the_networks_have_the_weights_they_say(build, weights, rng) -> None:
    net = build(targets.SETTINGS["convnet"].recipe, lab.load("digits"), rng)
    flows.attach(net, rng=rng)
    assert sum(t.size for t in flows.presences(net).values()) == weights
    assert net(np.zeros((2, 8, 8, 1), np.float32)).shape == (2, 10)


def test_every_setting_is_a_valid_recipe() -> None:
    assert len(targets.SETTINGS) == 6
    for setting in targets.SETTINGS.values():
        for target in targets.TARGETS:
            assert setting.recipe.with_target(target).regrowth.land


def test_the_proportional_scheduler_is_a_scheduler() -> None:
    testing.check_scheduler(targets.ProportionalScheduler(0.98, 40, step=1.0))


def test_it_moves_in_proportion() -> None:
    scheduler = targets.ProportionalScheduler(0.9, 100, step=2.0)
    scheduler.update(1, 1.0)
    assert scheduler.base == pytest.approx(-2 * np.log(scheduler.expected(1)))
    assert scheduler.gamma == pytest.approx(scheduler.base**1.5)
    before = scheduler.base
    scheduler.update(2, scheduler.expected(2) * np.exp(-0.01))
    assert scheduler.base == pytest.approx(before - 0.02)
    assert scheduler.update(100, 1.0) == scheduler.gamma == pytest.approx((before - 0.02) ** 1.5)


def test_a_setting_is_steered_by_its_scheduler() -> None:
    data = lab.load("digits")
    for name, setting in targets.SETTINGS.items():
        trainer = targets.new_trainer(setting, data, 0.9, seed=0)
        kind = targets.ProportionalScheduler if "proportional" in name else flows.PressureScheduler
        assert type(trainer.scheduler) is kind
        assert trainer.scheduler.target_sparsity == pytest.approx(0.91)
        assert trainer.scheduler.aggressivity == 10
