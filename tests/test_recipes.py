"""Recipes as data, and the learning rates that follow from them."""

import dataclasses
import json

import pytest

from minihyperflows.lab import RECIPES, Recipe, UserError
from minihyperflows.lab.recipes import PressureSettings, find


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_survive_json(name):
    recipe = RECIPES[name]
    assert Recipe.from_json(json.loads(json.dumps(recipe.to_json()))) == recipe
    assert recipe.name == name
    assert recipe.deviations


def test_an_old_recipe_file_still_loads():
    """From before the scheduler could update within an epoch."""
    recipe = RECIPES["lenet300-digits"]
    values = json.loads(json.dumps(recipe.to_json()))
    del values["pressure"]["updates_per_epoch"]
    assert Recipe.from_json(values) == recipe
    assert recipe.pressure.updates_per_epoch == 1


def test_a_recipe_file_of_another_version_is_one_clear_line():
    values = RECIPES["lenet300-digits"].to_json()
    with pytest.raises(UserError, match=r"not one of this version.*brilliance"):
        Recipe.from_json(values | {"brilliance": 3})
    with pytest.raises(UserError, match="not one of this version"):
        Recipe.from_json(values | {"dense": {"lr": 0.1}})


@pytest.mark.parametrize("updates", [0, -1, 1.5])
def test_updates_per_epoch_are_whole_and_positive(updates):
    with pytest.raises(UserError, match=f"from 1 on, not {updates}"):
        PressureSettings(updates_per_epoch=updates)


def cifar(**changes):
    return dataclasses.replace(RECIPES["resnet50-cifar10"], **changes)


# epoch of the pruning run -> learning rate of the weights, in the authors' code (P=100, R=160)
AUTHORS = {
    1: 0.1, 25: 0.0869, 50: 0.0532, 75: 0.0186, 100: 0.003357, 101: 0.003333, 102: 0.000999,
    110: 0.000951, 130: 0.000574, 160: 0.0001006,
}  # fmt: skip


def rates(recipe, epoch):
    """(weights, factor for t) in an epoch counted from the end of the dense stage."""
    stage, k = recipe.timeline.locate(recipe.dense.epochs + epoch)
    if stage == "pruning":
        return recipe.pruning.lr_at(k), 1.0
    late = recipe.late_epochs
    return recipe.regrowth.lr_at(k, late), recipe.regrowth.presence_lr_factor(k, late)


def test_the_authors_timeline():
    recipe = cifar(authors_timeline=True)
    assert recipe.timeline.locate(160 + 101)[0] == "pruning"  # one epoch longer
    assert recipe.timeline.locate(160 + 102) == ("regrowth", 1)
    assert recipe.timeline.epochs == 320
    for epoch, lr in AUTHORS.items():
        assert rates(recipe, epoch)[0] == pytest.approx(lr, rel=6e-3 if lr < 1e-3 else 2e-3), epoch
    factors = {102: 0.75, 103: 0.5625, 110: 0.0751, 151: 0.0}
    for epoch, factor in factors.items():
        assert rates(recipe, epoch)[1] == pytest.approx(factor, rel=2e-3), epoch


def test_the_default_timeline_ends_the_pressure_with_its_stage():
    recipe = cifar()
    assert recipe.timeline.locate(160 + 100)[0] == "pruning"
    assert recipe.timeline.locate(160 + 101) == ("regrowth", 1)
    assert rates(recipe, 101) == (pytest.approx(0.001), 1.0)


def test_multistep():
    dense = RECIPES["vgg19-cifar10"].dense
    lrs = [dense.lr_at(epoch) for epoch in (1, 80, 81, 120, 121, 160)]
    assert lrs == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])


def test_scaling_keeps_every_stage_alive():
    recipe = RECIPES["lenet300-digits"]
    assert [recipe.scaled(0.001).timeline.epochs, recipe.scaled(2).timeline.epochs] == [3, 300]
    with pytest.raises(UserError, match="positive"):
        recipe.scaled(0)


@pytest.mark.parametrize("target", [0, 1, 98, -0.5, float("nan")])
def test_a_target_is_a_fraction(target):
    with pytest.raises(UserError, match="between 0 and 1"):
        RECIPES["lenet300-digits"].with_target(target)


def test_unknown_names_are_answered_with_the_known_ones():
    with pytest.raises(UserError, match="lenet300-digits"):
        find("lenet301")
