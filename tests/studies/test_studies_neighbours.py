"""Hyperflows and its neighbours side by side: equal steps, equal size in the end, one table."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.spies import calls_of

from minihyperflows import flows
from minihyperflows.errors import UserError
from minihyperflows.lab.records import read_records, write_records
from minihyperflows.nn import Module
from minihyperflows.related.ranking import kept_fraction
from minihyperflows.studies import frame, gradient_flow_runs, neighbours
from minihyperflows.studies import neighbour_methods as methods
from minihyperflows.studies.dhp_runs import NETWORK, Course, from_scratch, stream, train
from minihyperflows.studies.dhp_tables import widths_of
from minihyperflows.studies.dhp_tasks import EXPERIMENTS
from minihyperflows.studies.neighbour_methods import METHODS, Contest, Run
from minihyperflows.studies.neighbours import do, experiment_of

STEPS, EPOCHS = 8, 8  # of an epoch; of a run
CONV = "conv-digits"


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few epochs of some of the digits."""
    brief = dataclasses.replace(EXPERIMENTS[CONV], budget=EPOCHS, search=5, images=512)
    monkeypatch.setitem(EXPERIMENTS, CONV, brief)
    monkeypatch.setattr(methods, "SCORED", 64)


def study(out: Path, *words: str) -> list[dict[str, Any]]:
    frame.main(neighbours.STUDY, ["--out", str(out), "--quiet", *words], listed=True)
    return read_records(out)


def contest(level: str, method: str, counted: str = "macs", target: float = 0.3) -> Contest:
    experiment = experiment_of(CONV)
    return Contest(experiment, experiment.load(), Run(CONV, level, method, counted, target, 0))


@pytest.mark.slow
def test_all_methods_end_at_the_same_size_after_the_same_steps(tmp_path: Path) -> None:
    """At most the target, and no further below it than a channel costs."""
    words = ["--targets", "0.3", "--seeds", "1", "--counted"]
    study(tmp_path / "a.csv", *words, "macs")
    some = ("hyperflows", "magnitude", "dhp", "uniform")
    rows = study(tmp_path / "a.csv", *words, "weights", "--methods", *some)
    assert len(rows) == 1 + (7 + 9) + (2 + 3)
    for row in rows:
        assert row["steps"] == EPOCHS * STEPS
        assert 0.05 < row["score"] <= 1
        assert row["cpu_seconds"] > 0
        assert {"commit", "date", "device", "dtype", "numpy"} <= row.keys()
        assert f"--method {row['method']} " in row["command"]
        assert "--data-dir" not in row["command"]
        if row["method"] == "dense":
            assert row["macs_ratio"] == row["weights_ratio"] == 1
            continue
        ratio = row[f"{row['counted']}_ratio"]
        lowest = {"weight": 0.299, "filter": 0.24 if "dhp" in row["method"] else 0.26}
        assert lowest[row["level"]] < ratio <= 0.3
        assert bool(row["densities"]) != bool(row["widths"])
        if "dhp" in row["method"]:
            assert 0 < row["search_steps"] <= 5 * STEPS
            assert row["reached"] == (row["search_ratio"] <= 0.32)
    # what is learned is a matter of learning: the network is the same for all, weights are not
    assert len({row["score"] for row in rows}) > 5


@pytest.mark.slow
def test_a_run_depends_on_its_own_seed_only(tmp_path: Path) -> None:
    """The command of a row repeats it; what is there is not done again; files are joined."""
    words = ["--counted", "macs", "--targets", "0.3", "--methods", "magnitude", "uniform"]
    rows = study(tmp_path / "a.csv", *words, "--seeds", "0", "1")
    assert [(r["level"], r["method"], r["seed"]) for r in rows] == [
        (level, method, seed)
        for seed in (0, 1)
        for level, method in (
            ("weight", "magnitude"),
            ("filter", "magnitude"),
            ("filter", "uniform"),
        )
    ]
    before = (tmp_path / "a.csv").read_bytes()
    study(tmp_path / "a.csv", *words, "--seeds", "1")
    assert (tmp_path / "a.csv").read_bytes() == before
    other = rows[3]["command"].split()[3:-2]  # after minihyperflows study neighbours
    (again,) = study(tmp_path / "b.csv", *other)
    same = ("score", "densities", "macs_ratio", "weights_ratio", "steps", "command")
    assert [again[name] for name in same] == [rows[3][name] for name in same]
    write_records(tmp_path / "c.csv", rows[:2])
    joined = study(tmp_path / "c.csv", "--join", str(tmp_path / "a.csv"), str(tmp_path / "b.csv"))
    assert len(joined) == 6


@pytest.mark.slow
def test_a_run_is_recognised_by_its_row(tmp_path: Path) -> None:
    """Whatever digits its target has, and however often it is asked for."""
    words = ["--methods", "uniform", "uniform", "--counted", "macs", "--seeds", "0", "0"]
    words += ["--targets", "0.3333333333333333", "0.33333333"]
    (row,) = study(tmp_path / "a.csv", *words)
    before = (tmp_path / "a.csv").read_bytes()
    assert row["target"] == 0.333333
    study(tmp_path / "a.csv", *words)
    assert (tmp_path / "a.csv").read_bytes() == before


@pytest.mark.slow
def test_weights_come_back_between_the_end_of_the_pressure_and_the_landing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = contest("weight", "hyperflows", "weights")
    run = Contest(dataclasses.replace(plain.experiment, budget=16), plain.task, plain.run)
    present: dict[int, dict[str, np.ndarray]] = {}  # by step

    def noted(function: Callable[..., None]) -> Callable[..., None]:
        def call(net: Module, *args: Any, **kwargs: Any) -> None:
            masks = {name: t.data >= 0 for name, t in methods.by_layer(net).items()}
            present.setdefault(run.course.step, masks)
            function(net, *args, **kwargs)

        return call

    monkeypatch.setattr(run.course, "advance", noted(run.course.advance))
    monkeypatch.setattr(methods, "land_within", noted(methods.land_within))
    methods.hyperflows(run)
    at_end, at_landing = (present[run.at(part)] for part in (0.5, 0.6))
    left = sum(mask.sum() for mask in at_end.values()) / sum(m.size for m in at_end.values())
    assert 0.01 < left < 0.29
    assert run.report["steering_error"] == pytest.approx(left - 0.9 * 0.3)
    back = {name: at_landing[name] & ~mask for name, mask in at_end.items()}
    assert sum(mask.sum() for mask in back.values()) > 10


@pytest.mark.slow
@pytest.mark.parametrize(
    ("level", "method", "kind"),
    [
        ("weight", "loss", ("loss_preservation", "weight", 1, "eval")),
        ("filter", "grasp-200", ("grasp", "filter", 200, "eval")),
    ],
)
def test_every_round_scores_other_images(
    level: str, method: str, kind: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the method's score, at its temperature, in evaluation mode."""
    calls = calls_of(monkeypatch, gradient_flow_runs, "importance")
    methods.METHOD_OF[level, method](contest(level, method))
    names = ("score", "level", "temperature", "mode")
    assert [tuple(call[name] for name in names) for call in calls] == [kind] * 5
    images = {call["x"].tobytes() for call in calls}
    assert len(images) == 5
    assert {len(call["x"]) for call in calls} == {64}


def test_hyperflows_lands_on_any_cost() -> None:
    """Where all weights cost the same it is the landing of the package."""
    nets: list[Module] = []
    for _ in range(3):
        net = contest("weight", "hyperflows").network()
        flows.attach(net, rng=np.random.default_rng(1))
        for t in flows.presences(net).values():
            t.data -= 0.3
        nets.append(net)
    flows.land(nets[0], 0.2)
    total = sum(t.size for t in flows.presences(net).values())
    methods.land_within(
        nets[1], 0.2 * total, lambda keep: sum(int(mask.sum()) for mask in keep.values())
    )
    for a, b in zip(*(flows.presences(net).values() for net in nets[:2]), strict=True):
        np.testing.assert_array_equal(a.data >= 0, b.data >= 0)
    price = methods.prices(nets[2], (8, 8, 1), "macs")
    assert price == {"0": 16, "3": 16, "6": 4, "9": 4, "14": 1}
    methods.by_layer(nets[2])["9"].data += 0.1  # more of the cheap ones come first
    whole = sum(price[n] * t.size for n, t in methods.by_layer(nets[2]).items())
    methods.land_within(nets[2], 0.2 * whole, lambda keep: methods.price_of(keep, price))
    left = {n: t.data >= 0 for n, t in methods.by_layer(nets[2]).items()}
    assert 0.2 * whole - 16 < methods.price_of(left, price) <= 0.2 * whole
    assert flows.density(nets[2]) > 0.25


def test_rounds_fall_between_a_tenth_and_a_half_of_the_steps() -> None:
    found = list(contest("weight", "magnitude", target=0.1).rounds(1000))
    assert [step for step, _ in found] == [6, 13, 19, 26, 32]
    assert [left for _, left in found] == [1000 * kept_fraction(k, 5, 0.9) for k in range(1, 6)]
    assert found[-1][1] == pytest.approx(100)


@pytest.mark.slow
def test_a_course_is_the_training_in_one_piece() -> None:
    """Whatever it is interrupted by; another network goes on with the batches."""
    experiment = experiment_of(CONV)
    task = experiment.load()
    nets = [experiment.build(stream(0, NETWORK)) for _ in range(2)]
    train(nets[0], experiment, task, 30, seed=0)
    course, losses = Course(experiment, task, 30, seed=0), []
    for until in (7, 7, 20, 30):
        course.advance(nets[1], until, lambda loss: losses.append(loss.item()) or loss)
        assert course.step == until
    assert len(losses) == 30
    for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        np.testing.assert_array_equal(a.data, b.data)


@pytest.mark.slow
def test_uniform_widths_are_a_network_of_its_own() -> None:
    """Trained with all steps, from initial weights."""
    run = contest("filter", "uniform")
    net = methods.METHOD_OF["filter", "uniform"](run)
    row = do(run.run, run.experiment, run.task)
    widths = {n: w for n, w in widths_of(row["widths"]).items() if n not in ("input", "14")}
    again = from_scratch(widths, run.experiment, run.task, run.steps, 0)
    for a, b in zip(net.parameters(), again.parameters(), strict=True):
        np.testing.assert_array_equal(a.data, b.data)
    shares = [w / full for w, full in zip(widths.values(), (16, 32, 32, 64), strict=True)]
    assert max(shares) - min(shares) < 0.06


def test_the_table_says_what_the_record_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    head = {"network": CONV, "cpu_seconds": 2.0}
    rows = [head | {"level": "", "method": "dense", "counted": "", "target": ""} for _ in range(2)]
    for method, scores in (("hyperflows", (0.9, 0.92)), ("magnitude", (0.8, 0.8))):
        kind = {"level": "weight", "method": method, "counted": "macs", "target": 0.1}
        rows += [head | kind | {"score": s, "cpu_seconds": 3.0} for s in scores]
    for k, row in enumerate(rows):
        row |= {"seed": k % 2, "score": row.get("score", 0.95)}
    write_records(tmp_path / "a.csv", rows)
    key = CONV, "weight", "hyperflows", "macs", 0.1
    cell = neighbours.cells(read_records(tmp_path / "a.csv"))[key]
    assert (cell.mean, cell.seeds, cell.cost) == (pytest.approx(0.91), 2, 1.5)
    assert cell.half_width == pytest.approx(12.706 * 0.01, rel=1e-3)  # Student, one degree
    frame.main(neighbours.STUDY, ["--out", str(tmp_path / "a.csv"), "--table"])
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "| level | method | conv-digits, 10% of macs | time |",
        "|---|---|---|---|",
        "|  | dense | 95.00 ± 0.00 | 1.0 |",
        "| weight | hyperflows | 91.00 ± 12.71 | 1.5 |",
        "| weight | magnitude | 80.00 ± 0.00 | 1.5 |",
    ]
    assert math.isnan(neighbours.cells(rows[:1])[CONV, "", "dense", "", ""].half_width)


def table(*rows: tuple[Any, ...]) -> list[str]:
    """The lines below the heading's line, and it, for (level, method, target, seed)."""
    names = ("level", "method", "target", "seed")
    same = {"network": CONV, "score": 0.9, "cpu_seconds": 2.0}
    found = [same | dict(zip(names, row, strict=True)) for row in rows]
    lines = neighbours.markdown([r | {"counted": "macs" if r["level"] else ""} for r in found])
    return [line for line in lines.splitlines() if not line.startswith("|---")]


def test_the_table_says_what_there_is() -> None:
    """Without a dense network no cost, from one seed no interval, of a dense network itself."""
    assert table(("weight", "loss", 0.125, 0), ("weight", "loss", 0.115, 0)) == [
        "| level | method | conv-digits, 12.5% of macs | conv-digits, 11.5% of macs | time |",
        "| weight | loss | 90.00 | 90.00 |  |",
    ]
    assert table(("", "dense", "", 0), ("", "dense", "", 1)) == [
        "| level | method | conv-digits | time |",
        "|  | dense | 90.00 ± 0.00 | 1.0 |",
    ]
    some = [("filter", "dhp", 0.3, seed) for seed in (0, 1)]
    assert table(("", "dense", "", 1), *some)[-1] == "| filter | dhp | 90.00 ± 0.00 | 1.0 |"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--targets", "1"], "'1' is not a fraction: write a number above 0 and below 1"),
        (["--targets", "much"], "'much' is not a fraction"),
        (["--seeds", "-1"], "'-1' is not a seed: write a whole number from 0 on"),
        (["--targets", "0.001", "--methods", "dense", "magnitude"], "magnitude of conv-digits, m"),
        (["--targets", "0.001", "--methods", "dense", "uniform"], "choose a larger target"),
        (["--targets", "0.01", "--methods", "dense", "dhp"], "dhp of conv-digits, macs: 0.0"),
        (["--levels", "weight", "--methods", "uniform"], "no run was asked for"),
        (["--networks", "conv-mnist"], "mnist"),
        (["--table"], "there is no file"),
        (["--join", "nowhere.csv"], "there is no file nowhere.csv"),
    ],
)
def test_mistakes_are_told_in_a_line(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        study(tmp_path / "a.csv", "--seeds", "0", *words)
    assert stop.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert message in lines[-1]
    assert not (tmp_path / "a.csv").exists()


def test_what_must_stay_is_a_matter_of_the_method() -> None:
    """A filter of each layer, some of all, or nothing."""
    methods.require_possible(contest("weight", "magnitude", target=1e-5))
    methods.require_possible(contest("filter", "uniform", target=0.003))
    with pytest.raises(UserError, match=r"0\.00483 stays"):
        methods.require_possible(contest("filter", "magnitude", target=0.003))


def test_every_method_is_there() -> None:
    named = {(level, method) for level, methods in METHODS.items() for method in methods}
    assert named == methods.METHOD_OF.keys()
