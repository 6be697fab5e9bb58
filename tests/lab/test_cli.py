"""The command line as a user meets it."""

import json
import subprocess
import sys

import pytest

import minihyperflows
from minihyperflows.cli import main


def run(*arguments, cwd=None):
    command = [sys.executable, "-m", "minihyperflows", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, encoding="utf-8")


@pytest.mark.slow
def test_the_main_job_in_short(tmp_path):
    done = run("prune", "--epochs-scale", "0.03", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for word in ("test accuracy", "sparsity", "95.00%", "2,510", "FLOPs", "records and plots"):
        assert word in done.stdout
    assert "100%" in done.stderr  # the progress bar
    folder = tmp_path / "runs" / "lenet300-digits-0.95-seed0"
    assert (folder / "summary.json").exists()
    again = run("prune", "--epochs-scale", "0.03", cwd=tmp_path)
    assert again.returncode == 0
    assert "finished already" in again.stdout
    other = ["prune", "--epochs-scale", "0.03", "--target-sparsity", "0.9", "--dense-from", folder]
    assert run(*other, "--out", tmp_path / "b").returncode == 0
    summary = json.loads((tmp_path / "b" / "summary.json").read_text(encoding="utf-8"))
    assert summary["dense_from"] == str(folder)
    refused = run(*other, "--out", tmp_path / "c", "--seed", 3)
    assert refused.returncode == 2
    assert "seed 0 there, seed 3 here" in refused.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["prune", "nonsense"], ["unknown recipe", "lenet300-digits"]),
        (["prune", "--target-sparsity", "98"], ["between 0 and 1", "98"]),
        (["prune", "--epochs-scale", "0"], ["positive"]),
        (["prune", "--gamma", "-1"], ["pressure.gamma is a number from 0 on, or null, not -1"]),
        (["prune", "--gamma", "1", "--target-sparsity", "0.9"], ["aims at no sparsity"]),
        (["prune", "--set", "pruning.epoch=3"], ["no field 'pruning.epoch'"]),
        (["prune", "lenet300-mnist", "--data-dir", "nowhere"], ["nowhere"]),
        (["prune", "--dense-from", "nowhere"], ["there is no", "nowhere", "dense.safetensors"]),
        (["export", "nowhere", "out.safetensors"], ["no checkpoint at nowhere"]),
        (["collect", "nowhere", "--out", "x.csv"], ["no finished run"]),
    ],
)
def test_mistakes_get_one_line_and_status_2(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert line.startswith("error: ")
    for word in words:
        assert word in line
    assert not list(tmp_path.rglob("*.*")), "something was half-written"


@pytest.mark.slow
def test_a_constant_pressure(tmp_path, monkeypatch, capsys):
    """As a run of a sweep says that it can be repeated."""
    monkeypatch.chdir(tmp_path)
    command = ["prune", "lenet300-digits-gamma", "--gamma", "4", "--set", "pruning.epochs=3"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "under constant pressure 4, 0 dense + 3 pruning + 0 regrowth epochs" in printed
    assert "\nconstant pressure 4; " in printed
    folder = tmp_path / "runs" / "lenet300-digits-gamma-gamma4-seed0"
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    assert summary["target_sparsity"] is None
    assert summary["command"] == (
        "minihyperflows prune lenet300-digits-gamma --gamma 4.0 --set pruning.epochs=3 "
        "--device cpu --seed 0"
    )
    assert summary["sparsity"] == summary["sparsity_before_regrowth"]


@pytest.mark.slow
def test_no_traceback_from_a_real_process(tmp_path):
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    done = run("prune", "--out", tmp_path / "file", "--epochs-scale", "0.01")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: cannot")


@pytest.mark.skipif(minihyperflows.cuda_available(), reason="there is a GPU here")
def test_cuda_without_a_gpu_says_what_to_install(tmp_path, capsys):
    assert main(["prune", "--device", "cuda", "--out", str(tmp_path / "run")]) == 2
    assert "install CuPy" in capsys.readouterr().err


def test_recipes_and_info_and_version(capsys):
    assert main(["recipes"]) == 0
    assert "vgg19-cifar100" in capsys.readouterr().out
    assert main(["info"]) == 0
    assert "numpy" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0


@pytest.mark.parametrize("arguments", [[], ["prune", "--seed", "-1"], ["prune", "--device", "tpu"]])
def test_usage_errors_have_status_2(arguments, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
