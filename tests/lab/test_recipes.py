"""Recipes as data, and the learning rates that follow from them."""

import dataclasses
import json

import numpy as np
import pytest

from minihyperflows import lab
from minihyperflows.data.datasets import IMAGES
from minihyperflows.lab import RECIPES, Recipe, UserError, runs
from minihyperflows.lab.checks import require_usable
from minihyperflows.lab.recipes import OPTIONS, PressureSettings, fields_with_ranges, find, flat
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


# -- checked whole ---------------------------------------------------------------------------------

# The smallest bad value on either side of each field's range, and one of another kind.
WRONG = {
    "name": ["", "a/b", 3],
    "model": ["VGG", "models", "", 3],
    "dataset": ["cifar", 3],
    "batch_size": [0, -1, 1.5, True, "32"],
    "augment": [0, "yes"],
    "dtype": ["float16", "complex64", "int8", "O", 32],
    "gpu_dtype": ["float64", "bfloat16"],
    "target_sparsity": [0, 1, -0.1, 98, float("nan"), "0.5"],
    "deviations": ["text", [1]],
    "dense.epochs": [-1, 1.5, True, 10**7],
    "pruning.epochs": [0, -1],
    "dense.lr": [-1e-9, float("inf"), 1e39, "1e-3", None],
    "dense.end_lr": [-1],
    "dense.schedule": ["linear"],
    "dense.optimizer": ["adamw"],
    "dense.momentum": [-0.1, 1],
    "dense.nesterov": [1],
    "dense.weight_decay": [-1e-9],
    "dense.label_smoothing": [-0.1, 1.1],
    "regrowth.share": [-0.1, 1],
    "regrowth.lr_scale": [-1],
    "regrowth.lr_decay": [-0.1, 1.1],
    "regrowth.freeze_after": [-1],
    "presence.init": [0.1, [0.1], [0.1, 0.2, 0.3], [0.2, 0.1], [0, float("inf")], ["a", "b"]],
    "pressure.step": [0, -0.1],
    "pressure.exponent": [0, -1],
    "pressure.aggressivity": [-1, 1001],
    "pressure.floor": [float("nan"), "low"],
    "pressure.gamma": [-1, float("inf")],
    "pressure.updates_per_epoch": [0, 10**5],
    "model_options.width": [0.5],  # LeNet-300 has no options
    "model_options.num_classes": [5],
}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, vs in WRONG.items() for v in vs])
def test_what_a_field_may_not_be(name, value):
    with pytest.raises(UserError) as error:
        RECIPES["lenet300-digits"].with_fields({name: value})
    assert name.split(".")[-1] in str(error.value)
    assert ";" not in str(error.value)


def test_all_mistakes_are_told_at_once():
    fields = {"batch_size": 0, "dense.lr": -1, "model": "VGG", "pressure.step": 0, "nonsense": 1}
    with pytest.raises(UserError) as error:
        RECIPES["lenet300-digits"].with_fields(fields)
    wrong = str(error.value)
    assert wrong.count("; ") == 5  # one inside the list of known fields
    for name in ("batch_size", "dense.lr", "model is", "pressure.step", "no field 'nonsense'"):
        assert name in wrong


def test_every_field_has_a_range_and_the_recipes_are_in_them():
    words = fields_with_ranges()
    for recipe in RECIPES.values():
        names = {name.partition("_options.")[0] for name in flat(dataclasses.asdict(recipe))}
        assert names - set(OPTIONS) == set(words) - set(OPTIONS)
        assert recipe.with_fields({}) == recipe


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"authors_timeline": True, "regrowth.epochs": 0}, "authors_timeline takes an epoch"),
        ({"target_sparsity": 1 - 2**-53, "regrowth.share": 0.9}, "leaves nothing of any network"),
        ({"dense.optimizer": "sgd", "dense.nesterov": True, "dense.momentum": 0}, "needs a dense"),
        ({"pressure.exponent": 1000}, "passes the largest float32"),
        ({"pressure.exponent": 1e30}, "passes the largest float32"),
        ({"pressure.updates_per_epoch": 10_000, "pruning.epochs": 101}, "not 1,010,000"),
        ({"pressure.gamma": None, "target_sparsity": None}, "needs a target_sparsity"),
    ],
)
def test_fields_that_contradict_each_other(fields, words):
    with pytest.raises(UserError, match=words):
        RECIPES["lenet300-digits"].with_fields(fields)


@pytest.mark.parametrize("factor", [0, -1, float("nan"), float("inf"), "2", 1e9])
def test_what_epochs_are_not_scaled_by(factor):
    with pytest.raises(UserError):
        RECIPES["lenet300-digits"].scaled(factor)


def test_numbers_of_numpy_are_numbers():
    recipe = RECIPES["lenet300-digits"]
    changed = recipe.with_target(np.float32(0.9)).with_fields(
        {
            "batch_size": np.int64(64),
            "presence.init": np.array([0.1, 0.2]),
            "augment": np.bool_(True),
            "dense.lr": np.float64(0.01),
        }
    )
    values = json.loads(json.dumps(changed.to_json()))
    assert values["target_sparsity"] == float(np.float32(0.9))
    assert (changed.batch_size, changed.presence.init, changed.augment) == (64, (0.1, 0.2), True)
    assert type(changed.batch_size) is int
    assert type(changed.target_sparsity) is float
    assert type(dataclasses.replace(recipe, batch_size=np.int8(3)).batch_size) is int
    assert recipe.with_gamma(np.float64(2)).pressure.gamma == 2
    assert recipe.scaled(np.float32(0.5)) == recipe.scaled(0.5)


def with_model(model, dataset="shapes32", **options):
    return dataclasses.replace(
        RECIPES["vgg19-small-shapes32"], model=model, dataset=dataset, model_options=options
    )


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        (with_model("VGG"), "model is 'lenet300', .*, not 'VGG'"),
        (with_model("vgg19", dataset="cats"), "dataset is 'digits', .*, not 'cats'"),
        (with_model("resnet"), "resnet needs model_options.depth"),
        (with_model("resnet", depth=21), "there is no ResNet-21"),
        (with_model("vgg19", width=0), "width must be positive"),
        (with_model("vgg19", width="wide"), "model_options.width is a finite number"),
        (with_model("vgg19", stem_stride=3), "stem_stride must be 1 or 2"),
        (with_model("vgg19", colour=3), "vgg19 has no option 'colour', but width, stem_stride"),
        (with_model("vgg19", rng=3), "the rest of the recipe decides it"),
        (
            with_model("vgg19", "digits", width=0.05),
            r"cannot read the images of digits \(8 x 8 x 1",
        ),
        (with_model("lenet300").with_target(0.999999999), r"leaves none of the 952,600 weights"),
        (
            dataclasses.replace(with_model("vgg19", width=0.05, stem_stride=2), batch_size=1111),
            "the last of 10,000 images are a batch of one",
        ),
    ],
)
def test_what_would_end_a_run_is_found_before_data_are_read(recipe, words, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "load", None)
    with pytest.raises(UserError, match=words):
        lab.run(recipe, tmp_path / "run", progress=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", RECIPES)
def test_what_is_known_of_data_sets_fits_the_recipes(name):
    recipe = RECIPES[name]
    if recipe.model_options or recipe.model == "lenet300":
        require_usable(recipe)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["digits", "shapes32"])
def test_what_is_known_of_data_sets_is_so(name):
    data, known = lab.load(name), IMAGES[name]
    assert data.train_x.shape == (known.train, *known.shape)
    assert len(data.classes) == known.classes
