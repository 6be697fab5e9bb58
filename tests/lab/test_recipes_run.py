"""The convolutional recipes run from end to end: in full size, and the small ones."""

import dataclasses
import importlib.util
import json

import numpy as np
import pytest
from support import SCRIPTS

from minihyperflows import lab
from minihyperflows.cli import main
from minihyperflows.flows.gates import counts
from minihyperflows.lab import runs

SMALL = ["vgg19-small-cifar10", "resnet50-small-cifar10", "vgg19-small-shapes32"]
WEIGHTS = {"vgg19-cifar10": 20_024_000, "resnet50-cifar10": 23_467_712}
SHORT = 1e-9  # times the epochs: one for each stage


@pytest.mark.slow
@pytest.mark.parametrize("name", WEIGHTS)
def test_the_papers_recipes_run_in_full_size(name):
    """All the weights, three stages of one batch each: what 320 epochs on CIFAR-10 consist of."""
    recipe = dataclasses.replace(lab.RECIPES[name].scaled(SHORT), batch_size=4)
    data = lab.make_shapes32(train=4, test=4)
    rng = np.random.default_rng(0)
    net = lab.build_network(recipe, data, rng)
    records = list(lab.train(net, data, recipe, rng=rng))
    assert [r.stage for r in records] == ["dense", "pruning", "regrowth"]
    assert all(np.isfinite(r.train_loss) for r in records)
    assert [r.lr_weights for r in records] == [0.1, 0.1, 0.001]
    present, total = map(sum, zip(*counts(net).values(), strict=True))
    assert total == WEIGHTS[name]
    assert present == int(total * 0.02)


@pytest.fixture
def few_images(monkeypatch):
    data = lab.make_shapes32(train=256, test=50)
    monkeypatch.setattr(runs, "load", lambda name, root: data)


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_the_small_recipes_run_and_land(name, few_images, tmp_path):
    recipe = lab.RECIPES[name].scaled(SHORT)
    summary = lab.run(recipe, tmp_path, progress=False)
    assert summary["sparsity"] == pytest.approx(0.95, abs=1e-5)
    assert lab.Recipe.from_json(json.loads((tmp_path / "recipe.json").read_text())) == recipe
    assert summary["recipe"]["model_options"] == recipe.model_options
    assert 1_000_000 < summary["weights"] < 1_600_000
    full = {"vgg19": 795_969_526, "resnet50": 2_592_227_318}[recipe.model]
    assert summary["flops_dense"] < full / 50


@pytest.mark.parametrize("name", SMALL)
def test_the_small_recipes_are_what_they_say(name):
    recipe = lab.RECIPES[name]
    paper = lab.RECIPES[f"{recipe.model}-cifar10"]
    stages = recipe.timeline
    assert (stages.dense, stages.pruning, stages.regrowth) == (3, 5, 2)
    for stage, start, end in (("dense", 0.05, 0.01), ("pruning", 0.03, 0.01)):
        ours, theirs = getattr(recipe, stage), getattr(paper, stage)
        assert ours.lr_at(1) == start
        assert ours.lr_at(ours.epochs + 1) == pytest.approx(end)  # where the cosine arrives
        for same in ("optimizer", "momentum", "nesterov", "weight_decay", "label_smoothing"):
            assert getattr(ours, same) == getattr(theirs, same)
    assert recipe.regrowth.lr_at(1) == 0.01
    assert recipe.regrowth.lr_at(3) == pytest.approx(0)
    assert (recipe.augment, recipe.batch_size, recipe.target_sparsity) == (True, 128, 0.95)
    assert recipe.pressure == lab.recipes.PressureSettings(step=0.3, updates_per_epoch=4)
    assert set(paper.deviations) < set(recipe.deviations)  # the paper's, and those of the size


@pytest.mark.slow
def test_a_small_recipe_as_a_user_runs_it(tmp_path, capsys):
    """From files in the layout of CIFAR-10, by the command line."""
    write_cifar(tmp_path / "data", train=40, test=10)
    command = ["prune", "vgg19-small-cifar10", "--epochs-scale", str(SHORT)]
    command += ["--data-dir", str(tmp_path / "data"), "--out", str(tmp_path / "run")]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "vgg19 on cifar10 to sparsity 95.00%, 1 dense + 1 pruning + 1 regrowth" in printed
    assert "1,252,784" in printed


def write_cifar(folder, train, test):
    path = SCRIPTS / "make_shapes32.py"
    spec = importlib.util.spec_from_file_location("make_shapes32", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.main([str(folder), "--train", str(train), "--test", str(test)]) == 0
