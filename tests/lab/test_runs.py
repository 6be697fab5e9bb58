"""Runs in folders: interrupted, continued, finished, refused."""

import csv
import dataclasses
import errno
import json
import os
import random
import subprocess
import sys
import time

import numpy as np
import pytest
from support import moments, program

from minihyperflows import DoubtfulResultWarning, lab
from minihyperflows.lab import checkpoint, runs

posix = pytest.mark.skipif(os.name == "nt", reason="there is no SIGKILL on Windows")

RECIPE = lab.RECIPES["lenet300-digits"].scaled(0.05)  # 2 + 4 + 2 epochs


def rows(folder):
    """metrics.csv without the wall times."""
    with open(folder / "metrics.csv", encoding="utf-8", newline="") as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An undisturbed run, and its summary."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return folder, lab.run(RECIPE, folder, progress=False)


@pytest.mark.slow
def test_what_a_run_leaves(finished):
    folder, summary = finished
    left = {str(p.relative_to(folder)).replace(os.sep, "/") for p in folder.rglob("*.*")}
    plots = {f"plots/{name}.png" for name in ("accuracy_density", "pressure", "flips", "layers")}
    files = {"recipe.json", "metrics.csv", "layers.csv", "summary.json"}
    files |= {"dense.safetensors", "checkpoint.safetensors"}
    assert left == files | plots
    written = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    tables = {"recipe.json", "metrics.csv", "layers.csv"}
    assert written.pop("checksums").keys() == tables | {"summary"}
    assert written == summary
    assert summary["weights"] == 50_200
    assert summary["remaining"] == 2_510
    assert summary["sparsity"] == pytest.approx(0.95)
    assert summary["flops_dense"] == 300 * 127 + 100 * 599 + 10 * 199
    assert summary["flops_sparse"] < 0.2 * summary["flops_dense"]
    assert list(rows(folder)[0])[:4] == ["epoch", "stage", "gamma", "lr_weights"]
    assert len(rows(folder)) == 8
    for plot in (folder / "plots").iterdir():
        assert plot.read_bytes().startswith(b"\x89PNG")


def test_a_finished_run_is_not_repeated(finished, monkeypatch):
    folder, summary = finished
    monkeypatch.setattr(runs, "load", None)  # would be called by a real run
    assert lab.run(RECIPE, folder, progress=False) == summary


@pytest.mark.slow
def test_killed_in_any_epoch_it_continues_bit_for_bit(finished, tmp_path, monkeypatch):
    """After every epoch the process "dies" and another one goes on from the checkpoint."""
    monkeypatch.setattr(runs, "SECONDS_BETWEEN_CHECKPOINTS", 0.0)

    class Killed(BaseException):
        pass

    real = runs.Trainer.run_epoch

    def one_epoch_only(self):
        if self.epoch > self.start:
            raise Killed
        return real(self)

    def remember(self, *arguments):
        load_state_dict(self, *arguments)
        self.start = self.epoch

    load_state_dict = runs.Trainer.load_state_dict
    monkeypatch.setattr(runs.Trainer, "start", 0, raising=False)
    monkeypatch.setattr(runs.Trainer, "run_epoch", one_epoch_only)
    monkeypatch.setattr(runs.Trainer, "load_state_dict", remember)
    deaths = 0
    while not (tmp_path / "summary.json").exists():
        try:
            lab.run(RECIPE, tmp_path, progress=False)
        except Killed:
            deaths += 1
    assert deaths == 7
    assert rows(tmp_path) == rows(finished[0])


MAIN = ("-m", "minihyperflows")


def as_process(program, out, **options):
    """A run as a process; all with as many BLAS threads, so that sums agree."""
    environment = {"OPENBLAS_NUM_THREADS": "1"} | os.environ
    command = [sys.executable, *program, "prune", "--epochs-scale", "0.05", "--out", str(out)]
    options = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL} | options
    return subprocess.Popen(command, env=environment, **options)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The metrics of such a process that nobody kills."""
    out = tmp_path_factory.mktemp("runs") / "process"
    assert as_process(MAIN, out).wait() == 0
    return rows(out)


# In the order of the deaths of one run: what is about to be written, how often since the process
# began, and what is whole then.
DEATHS = [
    ("recipe.json", 1, set()),
    ("metrics.csv", 1, {"recipe.json"}),
    ("dense.safetensors", 1, {"recipe.json", "metrics.csv", "layers.csv"}),
    ("checkpoint.safetensors", 1, {"dense.safetensors"}),
    ("metrics.csv", 2, {"checkpoint.safetensors"}),  # after the checkpoint, when its row is due
    ("layers.csv", 1, {"checkpoint.safetensors"}),  # the next process makes it good
    ("summary.json", 1, {"plots"}),
]


@pytest.mark.slow
def test_kill_minus_nine_wherever_it_hurts(undisturbed, tmp_path):
    """A real process, really killed between any two files; it ends as an undisturbed run does."""
    out = tmp_path / "run"
    for name, n, there in DEATHS:
        what = json.dumps({"die": [name, n]})
        process = as_process((*program("moments"), what), out, stderr=subprocess.PIPE, text=True)
        errors = process.communicate()[1]
        assert process.returncode == (moments.KILL if os.name == "nt" else -moments.KILL), errors
        assert there <= {file.name for file in out.iterdir()}
        assert not (out / "summary.json").exists()
    assert as_process(MAIN, out).wait() == 0
    assert rows(out) == undisturbed
    assert not list(out.glob("*.partial"))


@pytest.mark.slow
@posix
def test_kill_minus_nine_at_random_moments(undisturbed, tmp_path):
    """The same command then ends as an undisturbed run does, wherever it was."""
    random_moments = random.Random(5)
    for _ in range(4):
        process = as_process(MAIN, tmp_path)
        time.sleep(random_moments.uniform(0.7, 2.5))
        process.kill()
        process.wait()
    assert as_process(MAIN, tmp_path).wait() == 0
    assert rows(tmp_path) == undisturbed


@pytest.mark.slow
def test_a_constant_pressure_from_random_weights(tmp_path, monkeypatch):
    """No dense stage, no target, no regrowth; killed and continued it ends the same."""
    monkeypatch.setattr(runs, "SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    recipe = lab.RECIPES["lenet300-digits-gamma"].scaled(0.05)  # 4 epochs
    summary = lab.run(recipe, tmp_path / "whole", progress=False)
    assert summary["target_sparsity"] is summary["dense_accuracy"] is summary["landed_by"] is None
    assert not (tmp_path / "whole" / "dense.safetensors").exists()
    metrics = rows(tmp_path / "whole")
    assert [row["gamma"] for row in metrics] == ["1.0"] * 4
    assert {row["expected_density"] for row in metrics} == {""}

    class Killed(BaseException):
        pass

    def after_two(record):
        if record.epoch == 3:
            raise Killed

    with pytest.raises(Killed):
        lab.run(recipe, tmp_path / "run", progress=False, observe=after_two)
    assert rows(tmp_path / "run") == metrics[:2]  # `observe` comes before the saving
    lab.run(recipe, tmp_path / "run", progress=False)
    assert rows(tmp_path / "run") == metrics


@pytest.mark.slow
@pytest.mark.filterwarnings("error")
def test_a_pressure_that_nothing_survives(tmp_path):
    recipe = lab.RECIPES["lenet300-digits-gamma"].with_fields({"presence.init": [0.01, 0.02]})
    with pytest.warns(DoubtfulResultWarning, match="no weight is left: the network"):
        summary = lab.run(recipe.with_gamma(1e6).scaled(0.02), tmp_path, progress=False)
    assert summary["remaining"] == summary["flops_sparse"] == 0
    assert [text.split(":")[0] for text in summary["warnings"]] == ["no weight is left"]
    assert (tmp_path / "plots" / "layers.png").exists()


def test_another_experiment_in_the_folder_is_refused(finished):
    folder, _ = finished
    with pytest.raises(
        lab.UserError, match=r"target_sparsity 0.95 there, target_sparsity 0.9 here"
    ):
        lab.run(RECIPE.with_target(0.9), folder, progress=False)
    with pytest.raises(lab.UserError, match="seed 0 there, seed 1 here"):
        lab.run(RECIPE, folder, seed=1, progress=False)


def test_a_run_of_an_older_version_is_recognised(finished, tmp_path):
    """Its recipe lacks a field that has been added since."""
    summary = json.loads((finished[0] / "summary.json").read_text(encoding="utf-8"))
    del summary["recipe"]["pressure"]["updates_per_epoch"], summary["checksums"]
    (tmp_path / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    assert lab.run(RECIPE, tmp_path, progress=False) == summary
    longer = dataclasses.replace(RECIPE.regrowth, epochs=3)
    with pytest.raises(lab.UserError, match=r"regrowth\.epochs 2 there, regrowth\.epochs 3 here"):
        lab.run(dataclasses.replace(RECIPE, regrowth=longer), tmp_path, progress=False)


@pytest.mark.slow
def test_no_resume_starts_over(finished, tmp_path):
    lab.run(RECIPE.with_target(0.9), tmp_path, progress=False)
    summary = lab.run(RECIPE, tmp_path, resume=False, progress=False)
    assert summary["target_sparsity"] == 0.95
    assert rows(tmp_path) == rows(finished[0])


# -- the dense network of another run ------------------------------------------------------------


SPARSER = RECIPE.with_target(0.98)


def without_provenance(summary):
    own = ("seconds", "date", "dense_from", "commit")
    return {k: v for k, v in summary.items() if k not in own}


def tensors(file):
    arrays, values = checkpoint.load_checkpoint(file)
    return {k: (v.dtype, v.shape, v.tobytes()) for k, v in arrays.items()}, values["trainer"]


@pytest.mark.slow
def test_a_dense_network_of_another_run_gives_the_same_result(finished, tmp_path, monkeypatch):
    """As if the dense network had been trained again: metrics, weights, generator, to the bit."""
    own = lab.run(SPARSER, tmp_path / "own", progress=False)
    epochs = []
    real = runs.Trainer.run_epoch
    monkeypatch.setattr(runs.Trainer, "run_epoch", lambda t: (epochs.append(t.epoch), real(t))[1])
    dense_from = finished[0]
    taken = lab.run(SPARSER, tmp_path / "taken", progress=False, dense_from=dense_from)
    assert epochs == [2, 3, 4, 5, 6, 7]  # finished before; so none of the two dense epochs was run
    assert without_provenance(taken) == without_provenance(own)
    assert (taken["dense_from"], own["dense_from"]) == (str(dense_from), None)
    assert rows(tmp_path / "taken") == rows(tmp_path / "own")
    for name in ("dense.safetensors", "checkpoint.safetensors"):
        assert tensors(tmp_path / "taken" / name) == tensors(tmp_path / "own" / name)
    # it can be handed on: the third run begins with the second's copy
    again = lab.run(RECIPE, tmp_path / "again", progress=False, dense_from=tmp_path / "taken")
    assert without_provenance(again) == without_provenance(finished[1])


@pytest.mark.slow
def test_a_run_with_another_ones_dense_network_continues_without_it(
    finished, tmp_path, monkeypatch
):
    class Killed(BaseException):
        pass

    def killed(self):
        raise Killed

    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "dense.safetensors").write_bytes((finished[0] / "dense.safetensors").read_bytes())
    with monkeypatch.context() as patch:
        patch.setattr(runs.Trainer, "run_epoch", killed)
        with pytest.raises(Killed):
            lab.run(RECIPE, tmp_path / "run", progress=False, dense_from=copy)
    assert len(rows(tmp_path / "run")) == 2
    (copy / "dense.safetensors").unlink()
    summary = lab.run(RECIPE, tmp_path / "run", progress=False, dense_from=copy)
    assert rows(tmp_path / "run") == rows(finished[0])
    assert summary["dense_from"] == str(copy)


def changed(part, **values):
    return dataclasses.replace(
        RECIPE, **{part: dataclasses.replace(getattr(RECIPE, part), **values)}
    )


@pytest.mark.parametrize(
    ("recipe", "seed", "difference"),
    [
        (RECIPE, 1, r"seed 0 there, seed 1 here"),
        (changed("dense", lr=2e-3), 0, r"dense\.lr 0\.001 there, dense\.lr 0\.002 here"),
        (changed("dense", epochs=3), 0, r"dense\.epochs 2 there, dense\.epochs 3 here"),
        (dataclasses.replace(RECIPE, batch_size=64), 0, r"batch_size 32 there, batch_size 64 here"),
        (dataclasses.replace(RECIPE, dtype="float64"), 0, "dtype float32 there"),
    ],
)
def test_another_dense_network_is_refused(recipe, seed, difference, finished, tmp_path):
    with pytest.raises(lab.UserError, match=difference) as error:
        lab.run(recipe, tmp_path / "run", seed=seed, progress=False, dense_from=finished[0])
    assert str(finished[0]) in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "recipe",
    [
        RECIPE.with_target(0.9),
        changed("pruning", lr=2e-3),
        changed("regrowth", epochs=3),
        changed("presence", lr=1e-2),
        changed("pressure", step=0.3),
        dataclasses.replace(RECIPE, name="another", authors_timeline=True, deviations=()),
    ],
)
def test_what_comes_after_the_dense_stage_may_differ(recipe):
    assert recipe.dense_settings() == RECIPE.dense_settings()
    assert recipe != RECIPE


def test_where_there_is_no_dense_network(finished, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(lab.UserError, match=r"there is no .*dense\.safetensors.*--dense-from"):
        lab.run(RECIPE, out, progress=False, dense_from=tmp_path / "nowhere")
    with pytest.raises(lab.UserError, match="has no dense stage"):
        lab.run(changed("dense", epochs=0), out, progress=False, dense_from=finished[0])
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "dense.safetensors").write_bytes(b"PK\x03\x04")
    with pytest.raises(lab.UserError, match=r"cannot read .*; leave out --dense-from"):
        lab.run(RECIPE, out, progress=False, dense_from=broken)
    assert not out.exists()


@pytest.mark.slow
def test_a_refused_start_over_removes_nothing(finished, tmp_path):
    lab.run(RECIPE, tmp_path, progress=False, dense_from=finished[0])
    before = {p.name: p.read_bytes() for p in tmp_path.glob("*.*")}
    with pytest.raises(lab.UserError, match="seed 0 there"):
        lab.run(RECIPE, tmp_path, seed=1, resume=False, progress=False, dense_from=finished[0])
    assert {p.name: p.read_bytes() for p in tmp_path.glob("*.*")} == before
    # a run may even be started over from its own dense network
    lab.run(SPARSER, tmp_path, resume=False, progress=False, dense_from=tmp_path)
    assert (tmp_path / "dense.safetensors").read_bytes()


# -- what can go wrong ---------------------------------------------------------------------------


def damaged(content):
    yield b""
    yield content[:100]
    yield content[: len(content) // 2]
    yield b"\xff" * 1000
    yield b"PK\x03\x04 not a checkpoint"


def test_a_damaged_checkpoint_is_one_clear_line(finished, tmp_path):
    whole = (finished[0] / "checkpoint.safetensors").read_bytes()
    (tmp_path / "recipe.json").write_bytes((finished[0] / "recipe.json").read_bytes())
    for content in damaged(whole):
        (tmp_path / "checkpoint.safetensors").write_bytes(content)
        with pytest.raises(lab.UserError, match="cannot read the checkpoint") as error:
            lab.run(RECIPE, tmp_path, progress=False)
        assert "--no-resume" in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.slow
def test_a_full_disk_costs_nothing_but_the_epoch(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    recorded = []
    real = os.fsync

    def full_after_three(descriptor):
        recorded.append(descriptor)
        if len(recorded) > 5:  # recipe.json, three checkpoints and the dense network fit
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(checkpoint.os, "fsync", full_after_three)
    with pytest.raises(
        lab.UserError, match="No space left on device; the previous file is untouch"
    ):
        lab.run(RECIPE, tmp_path, progress=False)
    assert not list(tmp_path.glob("*.partial"))
    values = checkpoint.load_checkpoint(tmp_path / "checkpoint.safetensors")[1]
    assert values["trainer"]["epoch"] == 3
    monkeypatch.setattr(checkpoint.os, "fsync", real)
    lab.run(RECIPE, tmp_path, progress=False)
    assert rows(tmp_path) == rows(finished[0])


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    with pytest.raises(lab.UserError, match="cannot"):
        lab.run(RECIPE, tmp_path / "file" / "run", progress=False)


def test_a_diverged_run_names_the_last_good_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    wild = dataclasses.replace(RECIPE.pruning, lr=1e30)
    with pytest.raises(lab.UserError, match=r"epoch 3, step \d+: the loss is") as error:
        lab.run(dataclasses.replace(RECIPE, pruning=wild), tmp_path, progress=False)
    assert "checkpoint.safetensors, after epoch 2" in str(error.value)


def test_export_is_the_pruned_network(finished, tmp_path):
    from safetensors.numpy import load_file

    from minihyperflows.cli import main

    out = tmp_path / "weights.safetensors"
    assert main(["export", str(finished[0]), str(out)]) == 0
    weights = load_file(out)
    data = lab.load("digits")
    net = lab.build_network(RECIPE, data, np.random.default_rng(9))
    net.load_state_dict(weights)
    assert lab.evaluate(net, data) == finished[1]["test_accuracy"]
    zeros = sum(int((w == 0).sum()) for k, w in weights.items() if k.endswith("weight"))
    assert zeros == 50_200 - 2_510


def test_records_of_runs_in_one_table(finished, tmp_path):
    from minihyperflows.lab.records import collect, read_records

    collect([finished[0]], tmp_path / "table.csv")
    (row,) = read_records(tmp_path / "table.csv")
    assert row["test_accuracy"] == finished[1]["test_accuracy"]
    assert {"recipe", "dataset", "seed", "date", "commit", "command", "numpy"} <= set(row)
    with pytest.raises(lab.UserError, match="no finished run"):
        collect([tmp_path], tmp_path / "table.csv")
