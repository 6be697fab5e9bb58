"""Recipes as data, and the learning rates that follow from them."""

import dataclasses
import json

import pytest

from minihyperflows.lab import RECIPES, Recipe, UserError
from minihyperflows.lab.recipes import PressureSettings, find
from minihyperflows.lab.runs import command_for


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
    with pytest.raises(UserError, match=f"a whole number from 1 to 10,000, not {updates}"):
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


# -- constant pressure, and fields by name ---------------------------------------------------------


def test_a_constant_pressure_takes_target_and_regrowth_away():
    recipe = RECIPES["vgg19-small-cifar10"].with_gamma(2)
    assert (recipe.target_sparsity, recipe.pressure.gamma, recipe.timeline.regrowth) == (None, 2, 0)
    assert recipe.dense_settings() == RECIPES["vgg19-small-cifar10"].dense_settings()
    assert recipe.with_gamma(3).with_gamma(2) == recipe
    with pytest.raises(UserError, match="aims at no sparsity"):
        recipe.with_target(0.9)
    for gamma in (-1, float("nan"), float("inf")):
        with pytest.raises(UserError, match="from 0 on"):
            recipe.with_gamma(gamma)
    with pytest.raises(UserError, match=r"pruning\.epochs is at least 1"):
        recipe.with_fields({"pruning.epochs": 0})


def test_without_a_target_there_must_be_a_constant_pressure_and_no_landing():
    recipe = RECIPES["lenet300-digits-gamma"]
    with pytest.raises(UserError, match=r"a target_sparsity, or a constant pressure\.gamma"):
        recipe.with_fields({"pressure.gamma": None})
    with pytest.raises(UserError, match="regrowth lands on a target"):
        recipe.with_fields({"regrowth.epochs": 2})
    free = recipe.with_fields({"regrowth.epochs": 2, "regrowth.land": False})
    assert free.timeline.regrowth == 2


def test_fields_by_name():
    recipe = RECIPES["lenet300-mnist-gamma"]
    fields = {"presence.optimizer": "sgd", "presence.init": [2e-4, 5e-4], "pressure.floor": -3e-4}
    changed = recipe.with_fields(fields)
    assert changed.presence.init == (2e-4, 5e-4)
    assert (changed.presence.optimizer, changed.pressure.floor) == ("sgd", -3e-4)
    assert recipe.with_fields({}) == recipe
    vgg = RECIPES["vgg19-small-cifar10"].with_fields({"model_options.width": 0.5})
    assert vgg.model_options == {"width": 0.5, "stem_stride": 2}


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("presence.optimiser", "sgd", "no field 'presence.optimiser'; it has .*presence.optimizer"),
        ("nonsense", 1, "no field"),
        ("presence", 1, "no field"),
        ("name.x", 1, "no field"),
        ("presence.lr", "fast", "a number from 0 on, not 'fast'"),
        ("presence.lr", None, "a number from 0 on, not None"),
        ("presence.lr", float("nan"), "a number from 0 on, not nan"),
        ("presence.init", 0.1, r"a list \[low, high\] of two finite numbers"),
        ("batch_size", 12.5, "a whole number from 1 on, not 12.5"),
        ("augment", 1, "true or false, not 1"),
        ("pressure.floor", "low", "a finite number, or null, not 'low'"),
        ("target_sparsity", 98, "between 0 and 1"),
    ],
)
def test_fields_that_do_not_fit(name, value, words):
    with pytest.raises(UserError, match=words):
        RECIPES["lenet300-digits"].with_fields({name: value})


@pytest.mark.parametrize(
    ("recipe", "options"),
    [
        (RECIPES["lenet300-digits"].with_target(0.9), "--target-sparsity 0.9"),
        (RECIPES["lenet300-mnist-gamma"].with_gamma(2**-6), "--gamma 0.015625"),
        (cifar().with_gamma(2), "--gamma 2.0"),
        (
            RECIPES["lenet300-digits-gamma"].with_fields({"presence.init": [0.1, 0.2]}),
            "--gamma 1.0 --set 'presence.init=[0.1,0.2]'",
        ),
        (
            RECIPES["lenet300-digits"].scaled(0.1),
            "--target-sparsity 0.95 --set dense.epochs=3 --set pruning.epochs=8 "
            "--set regrowth.epochs=4",
        ),
    ],
)
def test_the_command_that_repeats_a_run(recipe, options):
    command = f"minihyperflows prune {recipe.name} {options} --device cpu --seed 3"
    assert command_for(recipe, 3, "cpu") == command


def test_a_recipe_that_is_not_listed_has_no_command():
    assert command_for(cifar(name="mine"), 0, "cpu").startswith("lab.run(recipe")
