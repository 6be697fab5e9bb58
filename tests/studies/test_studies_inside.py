"""The study behind chapter 11: where surviving weights are, their overlap, the bottleneck."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tqdm import tqdm

from minihyperflows import flows, lab
from minihyperflows.flows.gates import gated_layers
from minihyperflows.lab import runs
from minihyperflows.lab.training import build_network
from minihyperflows.studies import inside

RECIPE = lab.RECIPES["lenet300-digits"].with_fields(
    inside.SHORT | {"dense.epochs": 1, "pruning.epochs": 3, "regrowth.epochs": 1}
)
FIRST, SECOND = "dense0-order0-presence0-98", "dense0-order1-presence1-98"
SQUEEZED = "bottleneck-fc3-seed1-40"


# -- runs ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_order_and_first_presences_have_seeds_of_their_own() -> None:
    data = lab.load("digits")

    def first_epoch(order: int, presence: int) -> tuple[np.ndarray, np.ndarray]:
        net = build_network(RECIPE, data, np.random.default_rng(0))
        trainer = inside.SeededTrainer(net, data, RECIPE, order, presence)
        trainer.recipe = RECIPE.with_fields({"presence.lr": 0.0})  # t stays as it is drawn
        trainer.run_epoch()
        return net.fc1.presence.data.copy(), net.fc1.weight.data.copy()

    (t, w), (same_t, same_w) = first_epoch(0, 0), first_epoch(0, 0)
    other_order, other_t = first_epoch(1, 0), first_epoch(0, 1)
    assert (t == same_t).all()
    assert (w == same_w).all()
    assert (other_order[0] == t).all()
    assert (other_order[1] != w).any()
    assert (other_t[0] != t).any()
    assert (other_t[1] == w).all()


@pytest.mark.slow
def test_bottleneck_presses_on_one_layer_only() -> None:
    data = lab.load("digits")
    recipe = RECIPE.with_fields({"dense.epochs": 0, "pruning.epochs": 10}).with_gamma(0.0)

    def trained(layer: str) -> tuple[inside.BottleneckTrainer, dict[str, Any]]:
        rng = np.random.default_rng(0)
        trainer = inside.BottleneckTrainer(build_network(recipe, data, rng), data, recipe, rng)
        trainer.press_on(layer)
        assert trainer.pressure() == 0
        trainer.run_epoch()
        assert trainer.pressure() == 5
        trainer.pressure = lambda: 1e6  # type: ignore[method-assign]
        trainer.run_epoch()
        return trainer, {k: v.presence for k, v in gated_layers(trainer.net).items()}

    one, presences = trained("fc3")
    push = np.float32(1e6 / 50_200)
    assert abs(presences["fc3"].grad - push).max() < 1
    assert abs(presences["fc2"].grad).max() < 1
    assert flows.layer_density(one.net)["fc2"] > 0.9
    _, pressed = trained("all")
    assert all(abs(p.grad - push).max() < 1 for p in pressed.values())
    one.epoch = 9
    assert inside.BottleneckTrainer.pressure(one) == 5.0**9


@pytest.mark.slow
def test_a_bottleneck_ends_once_it_is_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    data = lab.load("digits")
    monkeypatch.setattr(inside.BottleneckTrainer, "pressure", lambda t: 1e7 * (t.epoch // 3 + 1))
    rows = inside.squeeze(inside.Bottleneck(0, 20), RECIPE, data, tqdm(disable=True))
    empty = [row["epoch"] for row in rows if row["fc3"] == 0]
    assert len(rows) < 20
    assert len(rows) % 3 == 0
    assert len(empty) in (3, 4, 5)
    assert np.isnan(rows[-1]["weight_rms"])
    assert rows[-1]["fc1"] > 0.5


@pytest.mark.slow
def test_a_pruning_begins_with_the_trained_or_with_the_random_weights(tmp_path: Path) -> None:
    data = lab.load("digits")
    study = inside.Study(tmp_path, RECIPE, data)
    runs = [inside.RUNS[f"{begin}0-order1-presence1-98"] for begin in ("dense", "start")]
    (trained, good), (random, poor) = (study.dense(run) for run in runs)
    assert good > 0.8 > poor
    first = build_network(RECIPE, data, np.random.default_rng(0)).state_dict()
    assert all((random[name] == first[name]).all() for name in first)
    assert (trained["fc1.weight"] != random["fc1.weight"]).any()


# -- the folder, the tables ----------------------------------------------------------------------


def read(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two prunings and a bottleneck on the digits, and their tables."""
    folder = tmp_path_factory.mktemp("inside")
    study = inside.Study(folder, RECIPE, lab.load("digits"))
    study.do(inside.RUNS[FIRST], "command")
    study.do(inside.RUNS[SECOND], "command")
    study.do(inside.RUNS[SQUEEZED], "command")
    inside.write_tables(study)
    return folder


@pytest.mark.slow
def test_table_of_runs(folder: Path) -> None:
    rows = {row["name"]: row for row in read(folder / "inside.csv")}
    assert list(rows) == [FIRST, SECOND, SQUEEZED]
    assert rows[FIRST]["dense_accuracy"] == rows[SECOND]["dense_accuracy"]
    assert rows[FIRST]["present"] == "1004"
    assert int(rows[FIRST]["idle"]) < 1004
    assert 0 < int(rows[FIRST]["units1"]) <= 300
    assert rows[SQUEEZED]["layer"] == "fc3"
    assert {row["command"] for row in rows.values()} == {"command"}
    assert {row["commit"] for row in rows.values()} == {runs.commit() or ""}


@pytest.mark.slow
def test_parts_of_a_network_add_up_to_it(folder: Path) -> None:
    rows = read(folder / "inside-layers.csv")
    assert [row["epoch"] for row in rows] == ["2", "3", "4", "5"] * 2
    for row in rows:
        fc1, *others = (int(row[name]) for name in inside.LAYERS)
        assert int(row["present"]) == fc1 + sum(others)
        assert fc1 == sum(int(row[name]) for name in ("constant", "rare", "other"))
        largest = sum(int(row[f"magnitude{k}"]) for k in (1, 2, 3))
        assert largest == int(row["present"])
    pixels = {row["what"]: row["by_pixel"].split() for row in read(folder / "inside-pixels.csv")}
    assert all(len(line) == 64 for line in pixels.values())
    assert sum(map(int, pixels[FIRST])) == int(rows[3]["fc1"])
    dead = [i for i, deviation in enumerate(pixels["deviation"]) if float(deviation) == 0]
    assert sum(int(pixels[FIRST][i]) for i in dead) == int(rows[3]["constant"])
    assert sum(map(int, pixels["largest0-1004"])) == int(rows[3]["magnitude1"])


@pytest.mark.slow
def test_runs_from_one_dense_network_overlap_beyond_chance(folder: Path) -> None:
    rows = read(folder / "inside-overlap.csv")
    final = {(r["a"], r["b"], r["part"]): r for r in rows if r["epoch"] == "last"}
    both = final[FIRST, SECOND, "all"]
    assert both["a_present"] == both["b_present"] == "1004"
    assert float(both["uniform"]) == pytest.approx(1004**2 / 50200)
    assert int(both["intersection"]) > 2 * float(both["margins"]) > 2 * float(both["uniform"])
    assert (FIRST, "largest0", "fc1") in final
    epochs = [r for r in rows if r["epoch"] != "last"]
    assert [r["epoch"] for r in epochs] == ["2", "3", "4", "5"]
    assert epochs[0]["margins"] == ""


@pytest.mark.slow
def test_table_of_the_bottleneck(folder: Path) -> None:
    rows = read(folder / "inside-bottleneck.csv")
    gammas = [float(row["gamma"]) for row in rows]
    assert gammas[:9] == [0] * 4 + [5] * 4 + [25]
    assert gammas == sorted(gammas)
    density = [float(row["fc3"]) for row in rows]
    assert density[3] == 1
    assert min(density) < 0.2 < float(rows[-1]["fc1"])
    assert rows[0]["flux_removed"] == ""
    assert float(rows[-1]["flux_removed"]) > 0


@pytest.mark.slow
def test_command_does_what_is_missing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(inside, "SHORT", {})  # the recipe is not used: the runs are there
    before = (folder / f"{FIRST}.safetensors").stat().st_mtime_ns
    arguments = ["--recipe", "lenet300-digits", "--out", str(folder)]
    inside.main(["run", FIRST, SECOND, *arguments])
    assert (folder / f"{FIRST}.safetensors").stat().st_mtime_ns == before
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        inside.main(["run", "dense9", *arguments])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: there is no run 'dense9'")
    assert error.count("\n") == 1
    with pytest.raises(SystemExit, match="2"):
        inside.main(["run", "--recipe", "vgg19-cifar10", "--out", str(folder)])


def test_a_folder_of_something_else_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.csv").write_text("mine")
    with pytest.raises(SystemExit) as stop:
        inside.main(["tables", "--recipe", "lenet300-digits", "--out", str(tmp_path)])
    assert stop.value.code == 2
    assert "holds thesis.csv, which is not of this study" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.csv"]


@pytest.mark.slow
def test_a_run_of_another_recipe_is_not_taken_for_done(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nor is the dense network of another one pruned."""
    study = inside.Study(folder, lab.RECIPES["lenet300-mnist"], lab.load("digits"))
    for name in (FIRST, "dense0"):
        with pytest.raises(
            lab.UserError, match="is a run of lenet300-digits, not of lenet300-mnist"
        ):
            study.read(name)
