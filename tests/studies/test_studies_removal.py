"""The study of single weights: is the worth exact, and does the command do its work?"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from minihyperflows import lab
from minihyperflows.lab.records import read_records
from minihyperflows.studies import frame, removal

# -- the study -------------------------------------------------------------------------------------


def arguments(out: Path, seeds: int) -> list[str]:
    settings = {"recipe": "lenet300-digits", "epochs-scale": 0.1, "images": 150, "sample": 30}
    words = [str(word) for k, v in settings.items() for word in (f"--{k}", v)]
    return [*words, "--seeds", str(seeds), "--out", str(out)]


@pytest.mark.slow
def test_the_command_leaves_a_table_and_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "removal.csv"
    frame.command(removal.STUDY, arguments(out, 1))
    first = read_records(out)
    assert {row["moment"] for row in first} >= {"dense", "end"}
    assert {row["state"] for row in first} == {"present", "removed", "both"}
    for row in first:
        assert -1 <= row["low"] <= row["rho"] <= row["high"] <= 1
        assert row["command"].endswith("--sample 30 --seed 0 --out FILE")
        assert str(tmp_path) not in row["command"]
    both = [r for r in first if r["estimate"] == "both" and r["state"] == "present"]
    assert min(row["rho"] for row in both) > 0.8
    frame.command(removal.STUDY, arguments(out, 2))
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
