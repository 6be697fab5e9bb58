"""The study behind chapter 07: supports of weights, and runs under constant pressure."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from minihyperflows import lab
from minihyperflows.lab.records import read_records
from minihyperflows.studies import equilibrium, frame

main = partial(frame.main, equilibrium.STUDY)
RECIPE = "lenet300-digits-gamma"


@pytest.mark.slow
def test_study_writes_its_tables_and_does_not_repeat_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "record.csv"
    command = ["--recipe", RECIPE, "--epochs", "3", "--gammas", "1,64", "--sample", "5"]
    command += ["--out", str(out)]
    main(command)
    runs = read_records(out)
    assert [(r["gamma"], r["seed"], r["epochs"]) for r in runs] == [(1, 0, 3), (64, 0, 3)]
    for row in runs:
        assert 0 <= row["presence"] <= row["above"] <= 1
        assert 0 < row["density"] < 1
        assert row["command"].startswith(
            f"minihyperflows study equilibrium --recipe {RECIPE} --gamma"
        )
    epochs = read_records(tmp_path / "record-epochs.csv")
    assert [r["epoch"] for r in epochs] == [1, 2, 3] * 2
    assert epochs[2]["density"] == runs[0]["density"]
    distribution = read_records(tmp_path / "record-supports.csv")
    first = [r["above"] for r in distribution if r["gamma"] == 1]
    assert first == sorted(first, reverse=True)
    assert len(first) == len(equilibrium.OCTAVES)

    monkeypatch.setattr(equilibrium, "measure", lambda *_: pytest.fail("a run was repeated"))
    main(command)
    assert read_records(out) == runs


@pytest.mark.slow
def test_finished_runs_can_be_measured(tmp_path: Path) -> None:
    recipe = lab.RECIPES[RECIPE].with_fields({"pruning.epochs": 2}).with_gamma(4.0)
    lab.run(recipe, tmp_path / "run", seed=3, progress=False)
    out = tmp_path / "record.csv"
    main(["--runs", str(tmp_path / "run"), "--sample", "5", "--out", str(out)])
    (from_run,) = read_records(out)
    assert (from_run["seed"], from_run["gamma"], from_run["epochs"]) == (3, 4, 2)
    assert from_run["command"].startswith("minihyperflows prune")
    assert str(tmp_path) not in from_run["command"]

    data = lab.load("digits")
    same = equilibrium.train_under_pressure(recipe, data, 3)
    row, *_ = equilibrium.measure(same, data, 5)
    assert (row["density"], row["above"]) == (from_run["density"], from_run["above"])


def test_a_recipe_or_runs() -> None:
    with pytest.raises(SystemExit):
        main(["--out", "record.csv"])
