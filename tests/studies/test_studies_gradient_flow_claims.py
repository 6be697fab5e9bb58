"""The claims of the gradient flow: how runs go, what their rows say, and what comes out early."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from support.spies import calls_of

from minihyperflows import lab
from minihyperflows.data.datasets import make_shapes32
from minihyperflows.engine import NonFiniteLossError
from minihyperflows.errors import UserError
from minihyperflows.lab.records import read_records, write_records
from minihyperflows.lab.training import evaluate
from minihyperflows.nn.counting import flops
from minihyperflows.related import channel_groups
from minihyperflows.related.filters import widths
from minihyperflows.related.rounds import prune_weights
from minihyperflows.studies import frame, gradient_flow_runs
from minihyperflows.studies import gradient_flow_claims as claims
from minihyperflows.studies import gradient_flow_filters as filters
from minihyperflows.studies import gradient_flow_weights as weights
from minihyperflows.studies.gradient_flow_runs import Course, Plan, State, Task, train_dense

TINY = Plan(
    **{"images": 320, "test_images": 100, "epochs": 5, "batch_size": 32, "lr": 0.1},
    **{"window": 1, "tail": 2, "scored": 128, "probed": 200},
)
SMALL = dataclasses.replace(TINY, images=64, test_images=32, epochs=3, lr=0.05, tail=1, scored=32)
LAYERS = {"fc1": 64 * 300, "fc2": 300 * 100, "fc3": 100 * 10}


@pytest.fixture
def digits() -> Task:
    return Task(lab.load("digits"), TINY, weights.build)


# -- the plan and the training -------------------------------------------------------------------


def test_rounds_are_at_even_distances() -> None:
    plan = Plan(images=100, test_images=10, epochs=16, batch_size=10)
    assert plan.moments(start=1, rounds=1, steps=10) == [10]
    assert plan.moments(start=2, rounds=4, steps=10) == [20, 30, 40, 50]
    many = plan.moments(start=10, rounds=25, steps=79)
    assert (many[0], many[-1]) == (790, 790 + 3 * 79)
    assert {b - a for a, b in pairwise(many)} == {9, 10}


@pytest.mark.parametrize(("start", "rounds"), [(14, 1), (11, 5), (-1, 1), (0, 0)])
def test_the_survivors_have_their_epochs(start: int, rounds: int) -> None:
    plan = Plan(images=100, test_images=10, epochs=16, batch_size=10)
    plan.check(10, 25)
    plan.check(13, 1)
    with pytest.raises(UserError, match=r"choose an earlier time|no such pruning"):
        plan.check(start, rounds)


@pytest.mark.slow
def test_runs_share_their_beginning_and_their_batches(digits: Task) -> None:
    net = digits.dense(0, 1)
    before = net.state_dict()["fc1.weight"].copy()
    course = Course(digits, 0, digits.steps)
    course.advance(net, 2 * digits.steps)
    assert (net.state_dict()["fc1.weight"] != before).any()
    again = digits.dense(0, 1)  # a copy of what the first one was
    np.testing.assert_array_equal(again.state_dict()["fc1.weight"], before)
    other = Course(digits, 0, digits.steps)
    other.advance(again, digits.steps + 3)
    other.advance(again, 2 * digits.steps)  # a new optimiser, the same batches
    assert other.losses[10:14] == course.losses[10:14]
    assert other.losses[14:] != course.losses[14:]
    assert (digits.dense(1, 1).state_dict()["fc1.weight"] != before).any()


def test_an_epoch_reads_every_image_once(digits: Task) -> None:
    course, seen = Course(digits, 3), []
    for _ in range(digits.steps):
        seen.append(course._batch())
        course.step += 1
    np.testing.assert_array_equal(np.sort(np.concatenate(seen)), np.arange(320))
    assert (course._batch() != seen[0]).any()  # the next epoch has another order


@pytest.mark.slow
def test_the_overlap_is_the_loss_along_the_weights(digits: Task) -> None:
    """theta.g = dL(a theta)/da at a = 1."""
    landscape = digits.landscape(digits.dense(0, 1))
    state, theta = State.of(landscape), landscape.weights.astype(float)
    slope = (landscape.loss(theta * (1 + 1e-5)) - landscape.loss(theta * (1 - 1e-5))) / 2e-5
    assert state.overlap == pytest.approx(slope, rel=1e-3)
    assert state.loss == pytest.approx(landscape.loss(theta), rel=1e-5)
    assert state.gradient_norm > 0


# -- weights ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_nothing_is_lost_where_nothing_is_removed(digits: Task) -> None:
    row = weights.run(digits, "magnitude", start=1, rounds=1, kept=1.0, seed=0)
    assert row["remaining"] == row["total"] == sum(LAYERS.values())
    assert row["loss_after"] == row["loss_before"]
    assert row["gradient_ratio"] == 1
    assert row["overlap_error"] == 0
    assert min(row["test_accuracy"], train_dense(digits, 0)["test_accuracy"]) > 0.75


@pytest.mark.slow
@pytest.mark.parametrize(("rounds", "last"), [(1, 2), (3, 3)])
def test_what_a_row_says(digits: Task, rounds: int, last: float) -> None:
    row = weights.run(digits, "loss", start=2, rounds=rounds, kept=0.1, seed=0)
    assert row["remaining"] == 5020
    kept = sum(row[f"density_{name}"] * size for name, size in LAYERS.items())
    assert kept == pytest.approx(5020)
    assert row["last_pruning"] == last
    assert row["loss_before"] < row["loss_after"]
    assert row["gradient_ratio"] == row["gradient_norm_after"] / row["gradient_norm_before"]
    assert row["train_loss"] < row["loss_area"] / TINY.tail < 2.3
    assert row["loss_one_epoch"] < 2.3
    assert row["test_accuracy"] > 0.75


@pytest.mark.slow
def test_a_row_by_hand(digits: Task) -> None:
    """Two rounds: what is measured when, and that the first round is the one that is measured."""
    row = weights.run(digits, "loss", start=1, rounds=2, kept=0.1, seed=0)
    net, epoch = digits.dense(0, 1), digits.steps
    landscape, course = digits.landscape(net), Course(digits, 0, epoch)
    moments, states = iter([epoch, 2 * epoch]), [State.of(landscape)]
    scores = digits.scores(weights.RANKINGS["loss"], "weight", 0)
    for _ in prune_weights(net, 0.9, 2, lambda net: course.advance(net, next(moments)), scores):
        states.append(State.of(landscape))
    before, after, last = states
    assert (row["loss_before"], row["loss_after"]) == (before.loss, after.loss) != last.loss
    norms = before.gradient_norm, after.gradient_norm
    assert (row["gradient_norm_before"], row["gradient_norm_after"]) == norms
    assert row["gradient_ratio"] == norms[1] / norms[0]
    assert (row["overlap_before"], row["overlap_after"]) == (before.overlap, after.overlap)
    lost = abs((after.overlap - before.overlap) / before.overlap)
    assert row["overlap_error"] == pytest.approx(lost)
    course.advance(net, 3 * epoch)
    assert row["loss_one_epoch"] == landscape.loss()
    course.advance(net, 4 * epoch)
    losses = course.losses[2 * epoch : 4 * epoch]
    assert row["loss_area"] == pytest.approx(np.mean(losses) * TINY.tail)
    course.advance(net, 5 * epoch)
    assert (row["last_pruning"], row["train_loss"]) == (2, landscape.loss())
    assert row["test_accuracy"] == evaluate(net, digits.data)


@pytest.mark.slow
def test_every_round_scores_other_images(
    digits: Task, shapes: lab.Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the score of the ranking, at its temperature, in evaluation mode."""
    calls = calls_of(monkeypatch, gradient_flow_runs, "importance")
    weights.run(digits, "grasp-200", start=0, rounds=3, kept=0.5, seed=0)
    small = Task(shapes, SMALL, filters.resnet20)
    list(filters.run(small, "loss", start=0, rounds=3, kept=0.5, seed=0, controls=()))
    names = ("score", "level", "temperature", "mode")
    assert [tuple(call[name] for name in names) for call in calls] == [
        *[("grasp", "weight", 200, "eval")] * 3,
        *[("loss_preservation", "filter", 5, "eval")] * 3,
    ]
    assert len({call["x"].tobytes() for call in calls}) == 6


@pytest.mark.slow
def test_the_claims_in_small(digits: Task) -> None:
    """One seed, 90 % of the weights at once: only what is far apart."""

    def rows(start: int, *scores: str) -> list[dict]:
        return [weights.run(digits, score, start, 1, 0.1, 0) for score in scores]

    magnitude, loss = rows(0, "magnitude", "loss")
    assert magnitude["density_fc2"] < 0.001  # initial weights are small where the fan-in is large
    assert magnitude["test_accuracy"] < 0.3  # a layer is gone
    assert loss["test_accuracy"] > 0.7
    magnitude, preserve, grasp = rows(2, "magnitude", "preserve-1", "grasp-1")
    assert magnitude["loss_before"] == preserve["loss_before"] == grasp["loss_before"]
    assert grasp["loss_after"] > 3 * preserve["loss_after"] > 3 * grasp["loss_before"]
    assert grasp["gradient_ratio"] > 3 * preserve["gradient_ratio"]
    assert grasp["loss_area"] > 2 * magnitude["loss_area"]
    assert grasp["test_accuracy"] < magnitude["test_accuracy"] - 0.2


def test_a_training_that_fails_is_a_row(digits: Task) -> None:
    """Whenever it fails: with the network that the last round has left, if there was one."""
    digits.plan = dataclasses.replace(TINY, lr=1e6)
    row = weights.run(digits, "random", start=0, rounds=1, kept=0.5, seed=0)
    assert row["diverged"] == 1
    assert row["remaining"] == 25_100
    assert "test_accuracy" not in row
    assert weights.run(digits, "random", start=1, rounds=1, kept=0.5, seed=0) == {"diverged": 1}
    assert train_dense(digits, 0) == {"diverged": 1}
    net = digits.network(0)
    net.fc1.weight.data[0, 0] = np.nan
    with pytest.raises(NonFiniteLossError, match="a score is NaN"):
        digits.scores(weights.RANKINGS["magnitude"], "weight", 0)(net)


# -- filters ---------------------------------------------------------------------------------------


@pytest.fixture
def shapes() -> lab.Dataset:
    return make_shapes32(64, 32)


@pytest.mark.slow
@pytest.mark.parametrize("network", filters.NETWORKS)
def test_filters_and_their_controls(network: str, shapes: lab.Dataset) -> None:
    task = Task(shapes, SMALL, filters.NETWORKS[network])
    score, same, uniform = filters.run(task, "magnitude", start=0, rounds=2, kept=0.5, seed=0)
    assert [row["control"] for row in (score, same, uniform)] == ["", "widths", "uniform"]
    assert score["remaining"] == round(score["total"] / 2)
    sizes = {row["control"]: [int(n) for n in row["widths"].split()] for row in (same, uniform)}
    full = [int(n) for n in score["full_widths"].split()]
    assert same["widths"] == score["widths"]
    assert sum(sizes["widths"]) == score["remaining"]
    for key in ("macs", "parameters"):
        assert same[key] == score[key]
    assert 0.8 * score["macs"] < uniform["macs"] <= score["macs"]
    share = uniform["remaining"] / sum(full)
    for number, whole in zip(sizes["uniform"], full, strict=True):
        assert abs(number - share * whole) < 0.06 * whole + 1
    for row in (score, same, uniform):
        assert row["last_pruning"] == 1
        assert row["loss_before"] == score["loss_before"]
        assert 0 <= row["test_accuracy"] <= 1
        assert np.isfinite([row["loss_after"], row["loss_area"], row["gradient_ratio"]]).all()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(("start", "rounds", "left"), [(1, 1, False), (0, 2, True)])
def test_controls_of_a_training_that_fails(
    start: int, rounds: int, left: bool, shapes: lab.Dataset
) -> None:
    """Before the first round, or between two: there is nothing that they could follow."""
    task = Task(shapes, dataclasses.replace(SMALL, lr=1e30, batch_size=8), filters.resnet20)
    score, *controls = filters.run(task, "random", start, rounds, kept=0.5, seed=0)
    assert score["diverged"] == 1
    assert ("widths" in score) is left
    assert controls == [{"control": name, "diverged": 1} for name in ("widths", "uniform")]


def test_the_networks_are_what_they_are_called(shapes: lab.Dataset) -> None:
    found = {}
    for name, build in filters.NETWORKS.items():
        net = build(shapes, np.random.default_rng(0))
        found[name] = list(widths(channel_groups(net, (32, 32, 3))).values())
        assert sum(flops(net, (32, 32, 3)).values()) < 25e6
    assert found["vgg13"] == [16, 16, 32, 32, 64, 64, *[128] * 4]
    assert found["resnet20"] == [16] * 4 + [32] * 4 + [64] * 4
    assert found["mobilenet"] == [8, 16, 32, 32, 64, 64, *[128] * 6, 256, 256]


def test_uniform_widths_of_the_whole_are_the_whole(shapes: lab.Dataset) -> None:
    net, image = filters.resnet20(shapes, np.random.default_rng(0)), (32, 32, 3)
    full = widths(channel_groups(net, image))
    half = {name: size // 2 for name, size in full.items()}
    assert filters.uniform(net, image, [full, half]) == [full, half]


# -- the command -----------------------------------------------------------------------------------


def study(out: Path, *words: str) -> list[dict]:
    frame.main(claims.STUDY, ["--out", str(out), *words], listed=True)
    return read_records(out)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, shapes: lab.Dataset) -> None:
    monkeypatch.setitem(weights.PLANS, "digits", TINY)
    monkeypatch.setitem(filters.PLANS, "shapes32", SMALL)
    load = frame.load
    monkeypatch.setattr(frame, "load", lambda n, d: shapes if n == "shapes32" else load(n, d))


@pytest.mark.slow
def test_it_goes_on_where_it_stopped(tmp_path: Path, tiny: None) -> None:
    words = ["--starts", "1", "--kept", "0.1", "--seeds", "4"]
    once = study(tmp_path / "a.csv", *words, "--rounds", "1", "--scores", "random")
    more = study(tmp_path / "a.csv", *words, "--rounds", "1", "2", "--scores", "random", "dense")
    assert more[0] == once[0]
    assert [(r["score"], r["rounds"], r["kept"]) for r in more] == [
        ("random", 1, 0.1),
        ("random", 2, 0.1),
        ("dense", 0, 1),
    ]
    assert more[2]["density_fc1"] == ""
    for row in more:
        assert f"--score {row['score']} " in row["command"]
        assert {"commit", "date", "device", "dtype", "numpy", "cpu_seconds"} <= row.keys()
    alone = study(tmp_path / "b.csv", *words, "--rounds", "2", "--scores", "random")
    same = ("test_accuracy", "loss_after", "density_fc1", "loss_area")
    assert [alone[0][name] for name in same] == [more[1][name] for name in same]


@pytest.mark.slow
def test_controls_that_are_missing_are_added(tmp_path: Path, tiny: None) -> None:
    out = tmp_path / "f.csv"
    words = ["--part", "filters", "--dataset", "shapes32", "--networks", "vgg13"]
    words += ["--scores", "magnitude", "--starts", "1", "--rounds", "1"]
    words += ["--seeds", "0", "--kept", "0.5"]
    rows = study(out, *words)
    assert [row["control"] for row in rows] == ["", "widths", "uniform"]
    assert "--controls widths uniform --seed 0 --out" in rows[0]["command"]
    write_records(out, [rows[0], rows[2]])
    again = study(out, *words)
    assert [row["control"] for row in again] == ["", "uniform", "widths"]
    assert again[2]["widths"] == rows[1]["widths"] == rows[0]["widths"]


@pytest.mark.slow
def test_a_run_is_recognised_by_its_row(tmp_path: Path, tiny: None) -> None:
    """Whatever digits its fraction has, and however often it is asked for."""
    words = ["--part", "filters", "--dataset", "shapes32", "--networks", "vgg13", "vgg13"]
    words += ["--scores", "random", "random", "--starts", "0", "0", "--rounds", "1", "1"]
    words += ["--seeds", "0", "0", "--controls", "widths", "widths"]
    words += ["--kept", "0.3333333333333333", "0.33333333"]
    rows = study(tmp_path / "a.csv", *words)
    assert [(row["control"], row["kept"]) for row in rows] == [("", 0.333333), ("widths", 0.333333)]
    before = (tmp_path / "a.csv").read_bytes()
    study(tmp_path / "a.csv", *words)
    assert (tmp_path / "a.csv").read_bytes() == before


@pytest.mark.slow
def test_what_cannot_be_kept_is_told_before_any_training(
    tmp_path: Path, tiny: None, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = calls_of(monkeypatch, Task, "dense")
    words = ["--part", "filters", "--dataset", "shapes32", "--networks", "vgg13", "--seeds", "0"]
    words += ["--starts", "1", "--rounds", "1", "--scores", "dense", "random", "--kept"]
    with pytest.raises(SystemExit) as end:
        study(tmp_path / "a.csv", *words, "0.5", "0.05")
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error.endswith("0.05 is too little for vgg13: 42 of 736 channels stay in any case\n")
    assert not trained
    fewest = filters.run(
        Task(make_shapes32(64, 32), SMALL, filters.vgg13), "random", 0, 1, 42 / 736, 0, ()
    )
    assert next(iter(fewest))["remaining"] == 42


@pytest.mark.slow
def test_files_are_joined(tmp_path: Path, tiny: None) -> None:
    files = [tmp_path / name for name in ("one.csv", "other.csv", "both.csv")]
    words = ["--scores", "random", "--rounds", "1", "--starts", "0", "--kept", "0.5"]
    study(files[0], *words, "--seeds", "1", "0")
    study(files[1], *words, "--seeds", "2", "1")
    rows = study(files[2], "--join", str(files[1]), str(files[0]))
    assert [row["seed"] for row in rows] == [0, 1, 2]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--scores", "best"], "no 'best'"),
        (["--networks", "vgg13"], "no 'vgg13'"),
        (["--controls", "uniform"], "none in this part"),
        (["--dataset", "cifar10"], "choose from digits, mnist"),
        (["--kept", "0"], "is not a fraction"),
        (["--epochs", "0"], "'0' is not a count"),
        (["--epochs", "12"], "earlier time"),
        (["--rounds", "0"], "no such pruning"),
        (["--seeds", "-1"], "'-1' is not a seed"),
        (["--join", "nowhere.csv"], "no file nowhere.csv"),
        (["--dataset", "mnist", "--data-dir", "nowhere"], "nowhere"),
    ],
)
def test_errors_are_one_line(words: list[str], message: str, tmp_path: Path, capsys) -> None:
    with pytest.raises(SystemExit) as end:
        study(tmp_path / "a.csv", *words)
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert len([line for line in error.splitlines() if not line.startswith("this is now")]) == 1


def test_the_default_grids() -> None:
    sizes = {}
    for part in claims.PARTS:
        sizes[part] = len(frame.parse(claims.STUDY, ["--part", part, "--out", "x"])[1])
    assert sizes["weights"] == 4 * (8 * 3 * 3 * 2 + 1)
    assert sizes["filters"] == 3 * 2 * (6 * 3 + 1)
