"""Sweeps: many runs on workers that may die, on this machine and on a Dask cluster."""

import csv
import dataclasses
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from functools import partial

import pytest
from support import moments, program
from support.moments import Die, Hold, Moments
from threadpoolctl import threadpool_limits

from minihyperflows import lab
from minihyperflows.cli import main
from minihyperflows.lab import cluster, runs, sweep, workers
from minihyperflows.lab.records import read_records
from minihyperflows.lab.sweep import parse_gammas, run_sweep
from minihyperflows.lab.workers import Attempt, Event, Kind, carry_out, supervise

RECIPE = lab.RECIPES["lenet300-digits-gamma"].scaled(0.025)  # 2 epochs
# A checkpoint is sure to be there after the dense stage; so what dies in epoch 3 has one.
LONG = lab.RECIPES["lenet300-digits"].with_fields({"dense.epochs": 1, "pruning.epochs": 3})

posix = pytest.mark.skipif(os.name == "nt", reason="Windows has other process groups")
needs_dask = pytest.mark.skipif(
    importlib.util.find_spec("distributed") is None, reason="dask.distributed is not installed"
)


class Here:
    """A pool that does everything at once, in this process."""

    def __init__(self, workers=1):
        self.events, self.started = [], []

    def has_room(self):
        return not self.events

    def start(self, attempt):
        self.started.append(attempt)
        told = []
        result = carry_out(attempt, told.append)
        self.events = [Event(attempt, Kind.EPOCH, epoch=n) for n in told]
        self.events.append(Event(attempt, *result))

    def wait(self):
        events, self.events = self.events, []
        return events

    def close(self):
        pass


@pytest.fixture
def here(monkeypatch):
    """Sweeps run in this process; the list of the folders they have worked in."""
    started = []

    class Recording(Here):
        def start(self, attempt):
            started.append(attempt.folder.name)
            super().start(attempt)

    monkeypatch.setattr(sweep, "Processes", Recording)
    monkeypatch.setattr(runs, "_draw", lambda *_: None)  # the plots take longer than the epochs
    with threadpool_limits(1):
        yield started


def rows(folder):
    """metrics.csv without the wall times."""
    with open(folder / "metrics.csv", encoding="utf-8", newline="") as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


# -- gammas --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "gammas"),
    [
        ("1", (1,)),
        ("0.5,1,2", (0.5, 1, 2)),
        ("2,0.5,2", (0.5, 2)),
        ("2^-6:2^6", tuple(2.0**k for k in range(-6, 7))),
        ("2^-6:2^6:2", tuple(2.0**k for k in range(-6, 7, 2))),
        ("2**-2 : 2**0, 8", (0.25, 0.5, 1, 8)),
        ("1:2:0.5", (1, 2**0.5, 2)),
        ("3:12", (3, 6, 12)),
        ("0,2^0", (0, 1)),
        ("1e-3", (0.001,)),
    ],
)
def test_gammas(text, gammas):
    assert parse_gammas(text) == pytest.approx(gammas, rel=1e-15, abs=0)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        *(
            (text, "is not a gamma")
            for text in ("", "a", "1,,2", "-1", "2^", "2^2^2", "nan", "inf")
        ),
        *((text, "is not a gamma") for text in ("-2^0.5", "0^-1", "10^999", "1:b")),
        ("1e-40", "too small a gamma"),
        ("1:1e308:1e-9", "more than 100,000 gammas"),
        ("2:1", "must go up"),
        ("0:1", "must go up"),
        ("1:4:0", "must go up"),
        ("1:10", "does not end on a step of 1 octaves from 1"),
        ("1:8:2", "does not end on a step"),
        ("1:2:3:4", "is not a range"),
    ],
)
def test_bad_gammas(text, words):
    with pytest.raises(lab.UserError, match=words):
        parse_gammas(text)


# -- sweeps --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_sweep_and_its_table(here, tmp_path, capsys):
    found = run_sweep(RECIPE, (0.25, 64), tmp_path / "s", seeds=2)
    assert here == ["gamma-0.25-seed0", "gamma-0.25-seed1", "gamma-64-seed0", "gamma-64-seed1"]
    assert [(r["gamma"], r["seed"]) for r in found] == [(0.25, 0), (0.25, 1), (64, 0), (64, 1)]
    assert found == read_records(tmp_path / "s" / "sweep.csv")
    for row in found:
        assert row["density"] == row["remaining"] / row["weights"]
        assert row["recipe"] == "lenet300-digits-gamma"
        assert (row["presence_optimizer"], row["presence_lr"], row["floor"]) == ("adam", 0.003, "")
        assert row["epochs"] == 2
        assert f"--gamma {float(row['gamma'])} --set pruning.epochs=2" in row["command"]
    assert found[0]["density"] > found[2]["density"]
    shown = capsys.readouterr()
    lines = [line for line in shown.out.splitlines() if line.startswith("gamma ")]
    assert len(lines) == 4
    assert f"{found[3]['density']:.4%}" in lines[3]
    assert f"{found[3]['test_accuracy']:.2%}" in lines[3]
    assert "8/8" in shown.err
    assert not list(tmp_path.rglob("attempt")), "a mark was left"
    # each run is what `lab.run` makes of it
    lab.run(RECIPE.with_gamma(64), tmp_path / "alone", seed=1, progress=False)
    assert rows(tmp_path / "alone") == rows(tmp_path / "s" / "gamma-64-seed1")


@pytest.mark.slow
def test_finished_runs_are_not_repeated_and_others_can_be_added(here, tmp_path, capsys):
    run_sweep(RECIPE, (1,), tmp_path, record=tmp_path / "other.csv")
    assert not (tmp_path / "sweep.csv").exists()
    found = run_sweep(RECIPE, (1, 4), tmp_path, seeds=2, progress=False)
    assert here == [f"gamma-{g}-seed{s}" for g, s in ((1, 0), (1, 1), (4, 0), (4, 1))]
    assert len(found) == 4
    # the table has everything that is finished in the folder
    assert len(run_sweep(RECIPE, (1,), tmp_path)) == 4
    assert len(here) == 4
    assert "1 runs of 2 epochs, 1 of them finished already" in capsys.readouterr().out
    run_sweep(RECIPE, (1,), tmp_path, resume=False, progress=False)
    assert here[4:] == ["gamma-1-seed0"]
    assert len(read_records(tmp_path / "sweep.csv")) == 1


@pytest.mark.slow
def test_a_dense_stage_is_run_once_for_each_seed(here, tmp_path):
    recipe = lab.RECIPES["lenet300-digits"].scaled(0.02)  # 1 + 2 + 1 epochs, the last left out
    run_sweep(recipe, (1, 2), tmp_path, seeds=2, progress=False)
    summaries = {
        folder.name: json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        for folder in sweep.SweepFolder(tmp_path).finished()
    }
    assert [s["dense_from"] and os.path.basename(s["dense_from"]) for s in summaries.values()] == [
        *(None, None, "gamma-1-seed0", "gamma-1-seed1")
    ]
    assert all(s["target_sparsity"] is None for s in summaries.values())
    assert {r["stage"] for r in rows(tmp_path / "gamma-2-seed1")} == {"dense", "pruning"}


@pytest.mark.slow
def test_a_run_that_fails_leaves_the_others_alone(here, tmp_path, monkeypatch, capsys):
    real = workers.run

    def wild(recipe, *arguments, **options):
        if recipe.pressure.gamma == 1:
            raise lab.UserError("the disk is full")
        if recipe.pressure.gamma == 2:
            raise ZeroDivisionError("a bug")
        return real(recipe, *arguments, **options)

    monkeypatch.setattr(workers, "run", wild)
    with pytest.raises(lab.UserError, match=r"2 of 3 runs failed .*full.*again") as error:
        run_sweep(RECIPE, (1, 2, 4), tmp_path)
    assert "\n" not in str(error.value)
    assert [r["gamma"] for r in read_records(tmp_path / "sweep.csv")] == [4]
    assert "failed: ZeroDivisionError: a bug (test_sweep.py, line" in capsys.readouterr().out
    monkeypatch.setattr(workers, "run", real)
    assert len(run_sweep(RECIPE, (1, 2, 4), tmp_path, progress=False)) == 3
    assert len(here) == 5


@pytest.mark.slow
def test_another_sweep_in_the_folder_is_refused(here, tmp_path):
    run_sweep(RECIPE, (1,), tmp_path / "s", progress=False)
    other = dataclasses.replace(RECIPE, batch_size=64)
    with pytest.raises(lab.UserError, match=r"another sweep .*size 32 there, .*size 64"):
        run_sweep(other, (1,), tmp_path / "s", progress=False)
    with pytest.raises(lab.UserError, match="holds a run, not a sweep"):
        run_sweep(RECIPE, (1,), tmp_path / "s" / "gamma-1-seed0", progress=False)
    run_sweep(other, (1,), tmp_path / "s", progress=False, resume=False)


# -- attempts ------------------------------------------------------------------------------------


def attempt_at(folder, **changes):
    return Attempt(recipe=RECIPE.with_gamma(1), folder=folder, seed=0, **changes)


@pytest.mark.slow
def test_an_attempt_stops_when_the_folder_is_taken_over(tmp_path, monkeypatch):
    """Before it saves anything of the epoch."""
    monkeypatch.setattr(runs, "SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    first, second = attempt_at(tmp_path), attempt_at(tmp_path)
    told = []

    def report(epoch):
        told.append(epoch)
        second.take()

    assert carry_out(first, report) == (Kind.SUPERSEDED, str(tmp_path))
    assert told == [1]
    assert len(rows(tmp_path)) == 1
    assert second.is_current()
    assert carry_out(second.next(), told.append) == (Kind.FINISHED, "")
    assert told == [1, 2]


def test_an_attempt_is_not_made_twice(tmp_path):
    """Dask starts a task again by itself; the sweep wants to count, and starts the next one."""
    attempt = attempt_at(tmp_path)
    attempt.take()
    assert carry_out(attempt, print) == (Kind.DIED, "the cluster lost it")


def test_out_of_memory_counts_as_a_death(tmp_path, monkeypatch):
    def run(*arguments, **options):
        raise MemoryError

    monkeypatch.setattr(workers, "run", run)
    assert carry_out(attempt_at(tmp_path), print) == (Kind.DIED, "out of memory")


class Scripted(Here):
    """A pool whose workers die ``deaths[gamma]`` times."""

    def __init__(self, deaths):
        super().__init__()
        self.deaths = deaths

    def start(self, attempt):
        self.started.append(attempt)
        died = attempt.deaths < self.deaths[attempt.seed]
        self.events = [Event(attempt, Kind.DIED if died else Kind.FINISHED, "signal 9" * died)]


def test_three_deaths_and_a_run_is_given_up(tmp_path):
    pool = Scripted({0: 2, 1: 7, 2: 0})
    attempts = [dataclasses.replace(attempt_at(tmp_path), seed=seed) for seed in range(3)]
    events = list(supervise(pool, attempts))
    assert [a.seed for a in pool.started] == [0, 0, 0, 1, 1, 1, 2]
    assert len({a.token for a in pool.started}) == 5 + 2  # all different
    kinds = [(e.attempt.seed, e.kind.name) for e in events]
    assert kinds == [
        *((0, "DIED"), (0, "DIED"), (0, "FINISHED")),
        *((1, "DIED"), (1, "DIED"), (1, "FAILED"), (2, "FINISHED")),
    ]
    assert events[5].reason == "3 workers died of it, the last: signal 9"


# -- real processes ------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_killed_worker_costs_its_run_an_attempt(tmp_path, monkeypatch, capsys):
    """The next one goes on from the checkpoint, and ends as if nothing had happened."""
    deadly = Die("gamma-1-seed0", epoch=3, keep=tmp_path / "kept")
    monkeypatch.setattr(workers, "_work", partial(moments.work, deadly))
    run_sweep(LONG, (1, 256), tmp_path / "s")
    printed = capsys.readouterr().out
    assert printed.count("lost its worker") == 1
    assert "gamma 1          seed 0  lost its worker (" in printed
    assert f"{cause_of_death()}), 1 of 3" in printed
    first = tmp_path / "s" / "gamma-1-seed0"
    assert_continues(first, tmp_path / "kept" / "0.csv")
    with threadpool_limits(1):
        lab.run(LONG.with_gamma(1), tmp_path / "undisturbed", progress=False)
    assert rows(first) == rows(tmp_path / "undisturbed")


def cause_of_death():
    return f"exit status {signal.SIGTERM}" if os.name == "nt" else f"signal {signal.SIGKILL}"


def assert_continues(folder, before):
    """The finished run's metrics begin with those kept in ``before``, wall times and all."""
    kept = before.read_text(encoding="utf-8")
    assert kept.count("\n") >= 2  # the names and the dense epoch, saved for certain
    assert (folder / "metrics.csv").read_text(encoding="utf-8").startswith(kept)


@pytest.mark.slow
def test_a_run_that_kills_three_workers_is_reported_and_the_rest_goes_on(tmp_path, monkeypatch):
    deadly = Die("gamma-1-seed0", epoch=1, times=3, keep=tmp_path / "kept")
    monkeypatch.setattr(workers, "_work", partial(moments.work, deadly))
    with pytest.raises(lab.UserError, match=r"1 of 2 runs failed .gamma 1 seed 0: 3 workers died"):
        run_sweep(RECIPE, (1, 2), tmp_path / "s", progress=False)
    assert len(list((tmp_path / "kept").iterdir())) == 3
    assert [r["gamma"] for r in read_records(tmp_path / "s" / "sweep.csv")] == [2]


def test_a_record_that_would_replace_the_description(tmp_path):
    out = tmp_path / "s"
    with pytest.raises(lab.UserError, match=r"sweep\.json says what the sweep is: choose another"):
        run_sweep(RECIPE, (1,), out, record=out / "sweep.json", progress=False)
    assert not out.exists()


def start_sweep(out, *program):
    """A sweep as a process, in a process group of its own with its workers."""
    fields = ["--set", "dense.epochs=1", "--set", "pruning.epochs=3"]
    command = ["sweep", "lenet300-digits", *fields, "--gammas", "1,256", "--workers", "1"]
    return subprocess.Popen(
        [sys.executable, *(program or ("-m", "minihyperflows")), *command, "--out", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def start_held_sweep(out, where, folder, epoch):
    """The same, whose run in ``folder`` stops after ``epoch``."""
    hold = {"hold": [*where.address, folder, epoch]}
    return start_sweep(out, *program("moments"), json.dumps(hold))


@pytest.mark.slow
@posix
def test_a_sweep_that_is_killed_or_interrupted_continues(tmp_path):
    out = tmp_path / "s"
    first, second = out / "gamma-1-seed0", out / "gamma-256-seed0"

    with Moments() as where:
        sweeping = start_held_sweep(out, where, first.name, 3)
        with where.next() as stopped:
            sweeping.kill()  # the supervisor alone; its worker ends by itself
            stopped.wait_for_its_end()
            sweeping.communicate()
        shutil.copy(first / "metrics.csv", tmp_path / "kept.csv")
        assert (first / "checkpoint.safetensors").exists()
        assert not (first / "summary.json").exists()

        sweeping = start_held_sweep(out, where, second.name, 3)
        with where.next() as stopped:
            os.killpg(sweeping.pid, signal.SIGINT)  # Ctrl-C reaches the workers too
            stopped.wait_for_its_end()
            printed, errors = sweeping.communicate()
    assert sweeping.returncode == 130
    assert "Traceback" not in errors
    assert printed.count("density") == 1
    assert_continues(first, tmp_path / "kept.csv")
    assert [r["gamma"] for r in read_records(out / "sweep.csv")] == [1]
    assert (second / "checkpoint.safetensors").exists()
    assert not (second / "summary.json").exists()

    sweeping = start_sweep(out)
    printed, errors = sweeping.communicate()
    assert sweeping.returncode == 0, errors
    assert "2 runs of 4 epochs, 1 of them finished already; on 1 local worker" in printed
    assert len(read_records(out / "sweep.csv")) == 2


# -- Dask ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dask_cluster():
    distributed = pytest.importorskip("distributed", reason="dask.distributed is not installed")
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, dashboard_address=None, silence_logs="CRITICAL"
    ) as local:
        yield local


@pytest.mark.slow
@needs_dask
@posix
def test_a_cluster_that_loses_a_worker(dask_cluster, tmp_path, monkeypatch, capsys):
    deadly = Die("gamma-1-seed0", epoch=3, keep=tmp_path / "kept")
    double = partial(moments.work_on_cluster, deadly)
    monkeypatch.setattr(cluster, "_carry_out_on_cluster", double)
    found = run_sweep(LONG, (1, 256), tmp_path / "s", scheduler=dask_cluster.scheduler_address)
    assert [r["gamma"] for r in found] == [1, 256]
    shown = capsys.readouterr()
    assert "gamma 1          seed 0  lost its worker (the cluster lost it), 1 of 3" in shown.out
    assert shown.out.count("lost its worker") == 1
    assert f"2 threads of 2 workers of {dask_cluster.scheduler_address}" in shown.out
    assert "8/8" in shown.err
    assert_continues(tmp_path / "s" / "gamma-1-seed0", tmp_path / "kept" / "0.csv")


@pytest.mark.slow
@needs_dask
def test_what_a_cluster_was_doing_stops_when_the_sweep_does(dask_cluster, tmp_path, monkeypatch):
    attempt = attempt_at(tmp_path / "run")
    with Moments() as where:
        held = Hold(where.address, "run", (1, "SUPERSEDED"))
        double = partial(moments.work_on_cluster, held)
        monkeypatch.setattr(cluster, "_carry_out_on_cluster", double)
        pool = cluster.Cluster(dask_cluster.scheduler_address)
        pool.start(attempt)
        with where.next() as stopped:
            assert stopped.at == 1
            pool.close()
            assert not attempt.is_current()
        with where.next() as stopped:
            assert stopped.at == "SUPERSEDED"
    assert not (tmp_path / "run" / "summary.json").exists()


@pytest.mark.slow
@needs_dask
def test_no_scheduler_at_the_address(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cluster, "SECONDS_TO_CONNECT", 1)
    out = tmp_path / "s"
    common = ["sweep", "lenet300-digits-gamma", "--gammas", "1", "--out", str(out), "--scheduler"]
    for address in ("tcp://127.0.0.1:1", "nonsense://x"):
        assert main([*common, address]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: no Dask scheduler answers at {address}")
    assert not out.exists()


def test_without_dask(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "distributed", None)
    arguments = ["sweep", "lenet300-digits-gamma", "--gammas", "1", "--out", str(tmp_path / "s")]
    assert main([*arguments, "--scheduler", "tcp://127.0.0.1:1"]) == 2
    assert 'pip install "minihyperflows[sweep]"' in capsys.readouterr().err


# -- the command line ----------------------------------------------------------------------------


def status_of(*arguments):
    """The exit status of the command line, which leaves by an exception if it cannot read them."""
    try:
        return main(list(arguments))
    except SystemExit as stop:
        return stop.code


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nonsense", "--gammas", "1"], "unknown recipe"),
        (["lenet300-digits-gamma", "--gammas", "2:1"], "must go up"),
        (["lenet300-digits-gamma", "--gammas", "1", "--seeds", "0"], "--seeds: it is a whole"),
        (["lenet300-digits-gamma", "--gammas", "1", "--workers", "0"], "--workers: it is a whole"),
        (["lenet300-mnist-gamma", "--gammas", "1", "--data-dir", "nowhere"], "nowhere"),
        (["lenet300-digits-gamma", "--gammas", "1", "--record", "no/r.csv"], "there is no folder"),
        (["lenet300-digits-gamma", "--gammas", "1", "--set", "x.y=1"], "no field 'x.y'"),
        (["lenet300-digits-gamma", "--gammas", "1", "--set", "batch_size"], "FIELD=VALUE"),
        (
            ["lenet300-digits", "--gammas", "1", "--set", "pruning.epochs=0"],
            "only weights that feel",
        ),
        (
            ["lenet300-digits-gamma", "--gammas", "1", "--workers", "2", "--scheduler", "x"],
            "leave out --workers",
        ),
    ],
)
def test_mistakes_get_one_line_and_status_2(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert status_of("sweep", *arguments, "--out", "s") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert words in line
    assert not list(tmp_path.iterdir()), "something was half-written"


def test_an_out_that_is_a_file(here, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    out = str(tmp_path / "file" / "s")
    assert main(["sweep", "lenet300-digits-gamma", "--gammas", "1", "--out", out]) == 2
    assert "error: cannot make the folder" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command(here, tmp_path, capsys):
    out = str(tmp_path / "s")
    command = ["sweep", "lenet300-digits-gamma", "--gammas", "2^-1:2^1:2", "--epochs-scale", "0.02"]
    assert main([*command, "--out", out, "--set", "presence.optimizer=sgd"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].endswith("2 pressures from 0.5 to 2, seeds 0 to 0")
    assert printed[-1] == f"records: {tmp_path / 's' / 'sweep.csv'}"
    (first, second) = read_records(tmp_path / "s" / "sweep.csv")
    assert (first["gamma"], second["gamma"]) == (0.5, 2)
    assert first["presence_optimizer"] == "sgd"
