"""``bench.gpu_runs`` and ``bench.packs``: runs in pieces, and what comes back of them."""

from __future__ import annotations

import csv
import dataclasses
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
from support.gpu import needs_compiler

import minihyperflows as mh
from minihyperflows import flows
from minihyperflows.bench import gpu_runs, packs
from minihyperflows.data.datasets import Dataset
from minihyperflows.errors import OutOfTimeError, UserError
from minihyperflows.lab import recipes, runs
from minihyperflows.lab.checkpoint import load_checkpoint, read_json
from minihyperflows.lab.training import build_network, evaluate

IMAGES = 12


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """The recipe's network and data are small, and its stages last two epochs each."""
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (IMAGES, 8, 8, 1), np.uint8), rng.integers(0, 3, IMAGES)
    data = Dataset("tiny", x, y, x, y, ("a", "b", "c"), (0.5,), (0.25,))
    recipe = recipes.find("vgg19-cifar10")
    recipe = dataclasses.replace(recipe, model="lenet300", batch_size=8).scaled(1 / 80)
    recipe = dataclasses.replace(recipe, pruning=dataclasses.replace(recipe.pruning, lr=0.01))
    monkeypatch.setattr(runs, "load", lambda name, data_dir: data)
    monkeypatch.setitem(recipes.RECIPES, "vgg19-cifar10", recipe)
    monkeypatch.setattr(runs, "_draw", lambda folder, records: None)
    return data


def command(out, *more):
    options = ["--recipes", "vgg19-cifar10", "--targets", "0.6,0.8", "--emulate", *more]
    return gpu_runs.main(["--out", str(out), *options])


def metrics(folder):
    with open(folder / "metrics.csv", encoding="utf-8", newline="") as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


def an_epoch_is_a_second(monkeypatch):
    """A clock that stands still but for one second per epoch."""
    now = 0.0
    real = runs.Trainer.run_epoch

    def run_epoch(trainer):
        nonlocal now
        now += 1
        return real(trainer)

    monkeypatch.setattr(runs.Trainer, "run_epoch", run_epoch)
    return SimpleNamespace(monotonic=lambda: now)


@pytest.mark.slow
@needs_compiler
def test_runs_in_pieces_are_runs_in_one(tmp_path, monkeypatch, capsys):
    whole, pieces, packed = tmp_path / "whole", tmp_path / "pieces", tmp_path / "pack"
    assert command(whole, "--pack", str(packed), "--pack-dense") == 0
    printed = capsys.readouterr().out
    assert "vgg19-cifar10-0.6-seed0: dense" in printed
    assert "all runs are finished" in printed
    monkeypatch.setattr(runs, "time", an_epoch_is_a_second(monkeypatch))
    monkeypatch.setattr(gpu_runs, "time", runs.time)
    timeline = recipes.find("vgg19-cifar10").with_target(0.6).timeline
    for _ in range(timeline.epochs + timeline.epochs - timeline.dense):  # one dense stage for both
        assert "all runs are finished" not in capsys.readouterr().out
        assert command(pieces, "--minutes", str(1 / 60)) == 0
    assert "all runs are finished" in capsys.readouterr().out
    first, second = (f"vgg19-cifar10-{target}-seed0" for target in ("0.6", "0.8"))
    for name in (first, second):
        assert metrics(whole / name) == metrics(pieces / name)
        assert len(metrics(whole / name)) > 3
    assert read_json(whole / second / "summary.json")["dense_from"] == str(whole / first)

    # what comes back
    assert {file.name for file in packed.iterdir()} == {"records.zip", "networks.zip.0"}
    with zipfile.ZipFile(packed / "records.zip") as records:
        assert f"{first}/metrics.csv" in records.namelist()
        assert f"{second}/summary.json" in records.namelist()
    archive = packs.unpack(packed)
    check_pruned_network(archive, whole / second)

    # and begins anew elsewhere
    again = tmp_path / "again"
    assert command(again, "--unpack", str(packed)) == 0
    summary = read_json(again / second / "summary.json")
    assert summary["dense_from"].endswith("rounded to float16")
    before, after = metrics(whole / second), metrics(again / second)
    assert after[0] == before[0]  # the dense epochs' records come along
    assert float(after[-1]["density"]) == pytest.approx(float(before[-1]["density"]), abs=0.02)


def check_pruned_network(archive, folder):
    """Its weights are those of the checkpoint, rounded."""
    state, about = packs.pruned_network(archive, folder.name)
    assert about["seed"] == 0
    arrays, _ = load_checkpoint(folder / "checkpoint.safetensors")
    net = {k.removeprefix("net."): v for k, v in arrays.items() if k.startswith("net.")}
    assert set(state) == set(net)
    mask = net["fc1.presence"] >= 0
    np.testing.assert_array_equal(state["fc1.presence"] >= 0, mask)
    np.testing.assert_allclose(state["fc1.weight"], net["fc1.weight"] * mask, rtol=1e-3, atol=1e-7)
    recipe = recipes.find("vgg19-cifar10")
    data = runs.load("", None)
    loaded = build_network(recipe, data, np.random.default_rng(1))
    flows.attach(loaded, rng=np.random.default_rng(1))
    loaded.load_state_dict(state)
    assert flows.density(loaded) == pytest.approx(1 - 0.8, abs=1e-4)
    assert 0 <= evaluate(loaded, data) <= 1


def test_stopping_on_the_cpu(tmp_path):
    recipe = recipes.find("vgg19-cifar10").with_target(0.6)
    for epoch in range(1, 4):
        with pytest.raises(OutOfTimeError, match=f"stopped after epoch {epoch}"):
            runs.run(recipe, tmp_path / "a", progress=False, stop_at=0.0)
    runs.run(recipe, tmp_path / "a", progress=False)
    runs.run(recipe, tmp_path / "b", progress=False)
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b")


def test_packed_networks(rng):
    state = {
        "conv.weight": rng.standard_normal((5, 3, 3, 3)).astype(np.float32),
        "conv.presence": rng.uniform(-1, 1, (5, 3, 3, 3)).astype(np.float32),
        "fc.weight": rng.standard_normal((4, 5)).astype(np.float32),
        "bn.weight": rng.standard_normal(5).astype(np.float32),
        "bn.num_batches_tracked": np.array(7),
    }
    packed = packs.packed_network(state)
    assert packed["conv.weight.bits"].nbytes == 17
    found = packs.unpacked_network(packed)
    assert list(found) == ["conv.weight", "conv.presence", *list(state)[2:]]
    mask = state["conv.presence"] >= 0
    np.testing.assert_array_equal(found["conv.presence"], np.where(mask, 1, -1))
    np.testing.assert_allclose(found["conv.weight"], state["conv.weight"] * mask, rtol=1e-3)
    np.testing.assert_allclose(found["fc.weight"], state["fc.weight"], rtol=1e-3)
    for name in ("bn.weight", "bn.num_batches_tracked"):
        np.testing.assert_array_equal(found[name], state[name])


def test_large_packs_have_parts_and_a_limit(tmp_path, monkeypatch):
    recipe = recipes.find("vgg19-cifar10").with_target(0.6)
    runs.run(recipe, tmp_path / "a", progress=False)
    monkeypatch.setattr(packs, "PART_BYTES", 20_000)
    out = tmp_path / "pack"
    assert packs.pack([tmp_path / "a"], out, [tmp_path / "a"], limit=1_000_000) == []
    parts = sorted(out.glob("networks.zip.*"))
    assert len(parts) > 2
    assert max(part.stat().st_size for part in parts) <= 20_000
    assert packs.unpack(out).namelist() == ["a/pruned.npz", "a/dense.npz"]
    parts[-1].unlink()
    with pytest.raises(UserError, match="does not hold all parts"):
        packs.unpack(out)
    (missing,) = packs.pack([tmp_path / "a"], out, [tmp_path / "a"], limit=60_000)
    assert missing.startswith("the dense network of a")


@pytest.mark.skipif(mh.cuda_available(), reason="there is a GPU")
def test_without_a_gpu_there_is_one_line_and_status_2(tmp_path, capsys):
    assert gpu_runs.main(["--out", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: no GPU is available")
