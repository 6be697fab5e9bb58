"""The table of epochs: which are kept, what is summed over those that are not."""

from __future__ import annotations

import csv
import itertools
import shutil
from pathlib import Path

import pytest

from minihyperflows import lab
from minihyperflows.errors import UserError
from minihyperflows.lab.records import read_records
from minihyperflows.lab.runs import RunFolder
from minihyperflows.studies import convergence


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen epochs on the digits under pressure, with gates that open and close soon."""
    recipe = lab.RECIPES["lenet300-digits-gamma"].with_fields(
        {"pruning.epochs": 16, "presence.lr": 0.02, "batch_size": 128}
    )
    folder = tmp_path_factory.mktemp("runs") / "gamma-4-seed0"
    lab.run(recipe.with_gamma(4.0), folder, progress=False)
    return folder


def test_few_epochs_are_kept_of_many() -> None:
    assert convergence.kept_epochs(3) == [1, 2, 3]
    assert convergence.kept_epochs(10) == list(range(1, 11))
    kept = convergence.kept_epochs(300)
    assert kept[:12] == [*range(1, 11), 12, 13]
    assert kept[-1] == 300
    assert len(kept) == 34
    assert all(1.05 < b / a < 1.25 for a, b in itertools.pairwise(kept[9:-1]))


@pytest.mark.slow
def test_the_rows_are_those_of_the_run(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "epochs.csv"
    convergence.main([str(run), "--out", str(out)])
    rows = read_records(out)
    with open(RunFolder(run).metrics, encoding="utf-8", newline="") as file:
        metrics = {int(row["epoch"]): row for row in csv.DictReader(file)}
    assert [row["epoch"] for row in rows] == [*range(1, 11), 12, 13, 15, 16]
    for row in rows:
        whole = metrics[row["epoch"]]
        assert row["density"] == pytest.approx(float(whole["density"]), rel=1e-5)
        assert row["test_accuracy"] == pytest.approx(float(whole["test_accuracy"]), rel=1e-5)
    assert sum(row["flips"] for row in rows) == sum(int(m["flips"]) for m in metrics.values())
    assert rows[10]["flips"] == sum(int(metrics[epoch]["flips"]) for epoch in (11, 12))
    lost = 50_200 * (1 - rows[-1]["density"])  # what left and did not come back
    assert sum(r["flips"] - 2 * r["regrowths"] for r in rows) == pytest.approx(lost, abs=0.2)
    assert (rows[0]["gamma"], rows[0]["floor"], rows[0]["epochs"]) == (4.0, "", 16)


def test_the_flux_is_the_mean_over_present_weights(run: Path, tmp_path: Path) -> None:
    rows = list(convergence.course(run))
    with open(RunFolder(run).layers, encoding="utf-8", newline="") as file:
        layers = [row for row in csv.DictReader(file) if int(row["epoch"]) == 1]
    sizes = {"fc1": 64 * 300, "fc2": 300 * 100, "fc3": 1000}
    present = [sizes[row["layer"]] * float(row["density"]) for row in layers]
    fluxes = [float(row["flux_present"]) for row in layers]
    mean = sum(f * n for f, n in zip(fluxes, present, strict=True)) / sum(present)
    assert rows[0]["flux"] == pytest.approx(mean)


def test_an_unfinished_run_is_taken_as_far_as_it_came(run: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    shutil.copy(RunFolder(run).checkpoint, RunFolder(tmp_path / "run").checkpoint)
    with pytest.raises(UserError, match="no finished run"):
        list(convergence.course(tmp_path / "run"))
    assert list(convergence.course(tmp_path / "run", unfinished=True)) == list(
        convergence.course(run)
    )


def test_an_unfinished_run_is_a_users_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        convergence.main([str(tmp_path), "--out", str(tmp_path / "epochs.csv")])
    assert "holds no finished run" in capsys.readouterr().err
    assert not (tmp_path / "epochs.csv").exists()
