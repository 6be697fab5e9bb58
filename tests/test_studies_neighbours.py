"""Hyperflows and its neighbours side by side: equal steps, equal size in the end, one table."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minihyperflows import flows
from minihyperflows.lab.records import read_records, write_records
from minihyperflows.lab.studies import neighbours
from minihyperflows.lab.studies.dhp_runs import NETWORK, Course, from_scratch, stream, train
from minihyperflows.lab.studies.dhp_tables import widths_of
from minihyperflows.lab.studies.dhp_tasks import EXPERIMENTS
from minihyperflows.lab.studies.neighbours import METHODS, Contest, Run, do, experiment_of
from minihyperflows.nn import Module
from minihyperflows.related.ranking import kept_fraction

STEPS = 22  # of an epoch of the digits
CONV = "conv-digits"


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few epochs of the digits."""
    brief = dataclasses.replace(EXPERIMENTS[CONV], budget=6, search=3)
    monkeypatch.setitem(EXPERIMENTS, CONV, brief)


def study(out: Path, *words: str) -> list[dict[str, Any]]:
    neighbours.main(["--out", str(out), "--quiet", *words])
    return read_records(out)


def contest(level: str, method: str, counted: str = "macs", target: float = 0.3) -> Contest:
    experiment = experiment_of(CONV)
    return Contest(experiment, experiment.load(), Run(CONV, level, method, counted, target, 0))


def test_all_methods_end_at_the_same_size_after_the_same_steps(tmp_path: Path) -> None:
    """At most the target, and no further below it than a channel costs."""
    rows = study(tmp_path / "a.csv", "--targets", "0.3", "--seeds", "1")
    assert len(rows) == 1 + 2 * (7 + 9)
    for row in rows:
        assert row["steps"] == 6 * STEPS
        assert 0.05 < row["score"] <= 1
        assert row["cpu_seconds"] > 0
        assert {"commit", "date", "device", "dtype", "numpy"} <= row.keys()
        assert f"--methods {row['method']} " in row["command"]
        assert "--data-dir" not in row["command"]
        if row["method"] == "dense":
            assert row["macs_ratio"] == row["weights_ratio"] == 1
            continue
        ratio = row[f"{row['counted']}_ratio"]
        lowest = {"weight": 0.299, "filter": 0.24 if "dhp" in row["method"] else 0.26}
        assert lowest[row["level"]] < ratio <= 0.3
        assert bool(row["densities"]) != bool(row["widths"])
        if "dhp" in row["method"]:
            assert 0 < row["search_steps"] <= 3 * STEPS
            assert row["reached"] == (row["search_ratio"] <= 0.32)
    pressed = [row["steering_error"] for row in rows if row["method"] == "hyperflows"]
    assert len(pressed) == 2
    assert max(map(abs, pressed)) < 0.3
    # what is learned is a matter of learning: the network is the same for all, weights are not
    assert len({row["score"] for row in rows}) > 5


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
    other = rows[3]["command"].split()[3:-2]  # after python -m MODULE, before --out FILE
    (again,) = study(tmp_path / "b.csv", *other)
    same = ("score", "densities", "macs_ratio", "weights_ratio", "steps", "command")
    assert [again[name] for name in same] == [rows[3][name] for name in same]
    write_records(tmp_path / "c.csv", rows[:2])
    joined = study(tmp_path / "c.csv", "--join", str(tmp_path / "a.csv"), str(tmp_path / "b.csv"))
    assert len(joined) == 6


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
    neighbours.land_within(
        nets[1], 0.2 * total, lambda keep: sum(int(mask.sum()) for mask in keep.values())
    )
    for a, b in zip(*(flows.presences(net).values() for net in nets[:2]), strict=True):
        np.testing.assert_array_equal(a.data >= 0, b.data >= 0)
    price = neighbours.prices(nets[2], (8, 8, 1), "macs")
    assert price == {"0": 16, "3": 16, "6": 4, "9": 4, "14": 1}
    neighbours.by_layer(nets[2])["9"].data += 0.1  # more of the cheap ones come first
    whole = sum(price[n] * t.size for n, t in neighbours.by_layer(nets[2]).items())
    neighbours.land_within(nets[2], 0.2 * whole, lambda keep: neighbours.price_of(keep, price))
    left = {n: t.data >= 0 for n, t in neighbours.by_layer(nets[2]).items()}
    assert 0.2 * whole - 16 < neighbours.price_of(left, price) <= 0.2 * whole
    assert flows.density(nets[2]) > 0.25


def test_rounds_fall_between_a_tenth_and_a_half_of_the_steps() -> None:
    found = list(contest("weight", "magnitude", target=0.1).rounds(1000))
    assert [step for step, _ in found] == [13, 26, 40, 53, 66]
    assert [left for _, left in found] == [1000 * kept_fraction(k, 5, 0.9) for k in range(1, 6)]
    assert found[-1][1] == pytest.approx(100)


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


def test_uniform_widths_are_a_network_of_its_own() -> None:
    """Trained with all steps, from initial weights."""
    run = contest("filter", "uniform")
    net = neighbours.METHOD_OF["filter", "uniform"](run)
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
    neighbours.main(["--out", str(tmp_path / "a.csv"), "--table"])
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "| level | method | conv-digits, 10% of macs | time |",
        "|---|---|---|---|",
        "|  | dense | 95.00 ± 0.00 | 1.0 |",
        "| weight | hyperflows | 91.00 ± 12.71 | 1.5 |",
        "| weight | magnitude | 80.00 ± 0.00 | 1.5 |",
    ]
    assert math.isnan(neighbours.cells(rows[:1])[CONV, "", "dense", "", ""].half_width)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--targets", "1"], "a target is a fraction, between 0 and 1"),
        (["--networks", "conv-mnist"], "mnist"),
        (["--table"], "there is no file"),
        (["--join", "nowhere.csv"], "there is no file nowhere.csv"),
    ],
)
def test_mistakes_are_told_in_a_line(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        study(tmp_path / "a.csv", *words, "--seeds", "0")
    assert stop.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert message in lines[-1]
    assert not (tmp_path / "a.csv").exists()


def test_every_method_is_there() -> None:
    named = {(level, method) for level, methods in METHODS.items() for method in methods}
    assert named == neighbours.METHOD_OF.keys()
