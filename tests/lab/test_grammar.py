"""The command that a record shows makes the recipe again (``lab.grammar``)."""

from __future__ import annotations

import shlex

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from minihyperflows import cli
from minihyperflows.errors import UserError
from minihyperflows.lab.grammar import changed, words_for
from minihyperflows.lab.recipes import RECIPES, Recipe
from minihyperflows.lab.runs import command_for

VALUES = {
    "dense.epochs": ["0", "1", "7"],
    "dense.lr": ["0.01", "1e-5", "3"],
    "dense.optimizer": ["sgd", "adam"],
    "pruning.schedule": ["cosine", "constant"],
    "pruning.nesterov": ["true", "false"],
    "regrowth.epochs": ["0", "3"],
    "regrowth.land": ["true", "false"],
    "target_sparsity": ["0.5", "null"],
    "pressure.gamma": ["0.1", "null"],
    "pressure.floor": ["-0.3", "null"],
    "pressure.updates_per_epoch": ["1", "4"],
    "presence.init": ["[0.1,0.2]", "[-0.5,0.5]"],
    "augment": ["true", "false"],
    "gpu_dtype": ["float32", "float16"],
    "model_options": ["{}", '{"width":0.5}'],
}
FROZEN = {"regrowth.epochs": 2, "regrowth.land": False}
FIELDS = st.lists(
    st.sampled_from(sorted(VALUES)).flatmap(
        lambda name: st.sampled_from(VALUES[name]).map(lambda value: f"{name}={value}")
    ),
    max_size=4,
)


PARSER = cli.build_parser()


def recipe_of(words: list[str]) -> Recipe:
    """What ``minihyperflows`` with these words runs."""
    options = PARSER.parse_args(words)
    return changed(RECIPES[options.recipe], options)


@pytest.mark.slow
@given(
    name=st.sampled_from(sorted(RECIPES)),
    fields=FIELDS,
    gamma=st.none() | st.floats(0, 1e6, exclude_min=True),
    target=st.none() | st.floats(0, 1, exclude_min=True, exclude_max=True),
    scale=st.sampled_from([None, "0.05", "2"]),
    precision=st.sampled_from([None, "float16", "float32"]),
)
def test_every_command_has_an_inverse(
    name: str,
    fields: list[str],
    gamma: float | None,
    target: float | None,
    scale: str | None,
    precision: str | None,
) -> None:
    words = ["prune", name, *(word for field in fields for word in ("--set", field))]
    chosen = {"gamma": gamma, "target-sparsity": target, "epochs-scale": scale}
    for option, value in {**chosen, "precision": precision}.items():
        words += [] if value is None else [f"--{option}", str(value)]
    try:
        recipe = recipe_of(words)
    except UserError:
        assume(False)
    for device in ("cpu", "cuda"):
        program, *again = shlex.split(command_for(recipe, 3, device))
        assert program == "minihyperflows", words
        options = PARSER.parse_args(again)
        assert (options.device, options.seed) == (device, 3)
        found = recipe_of(again)
        if device == "cpu":  # which computes in another precision than the recipe's for a GPU
            assert found.to_json() | {"gpu_dtype": recipe.gpu_dtype} == recipe.to_json()
        else:
            assert found == recipe


def test_a_recipe_that_no_options_make() -> None:
    """Fields come before a constant gamma, which takes the regrowth stage away."""
    recipe = RECIPES["lenet300-digits"].with_gamma(1).with_fields(FROZEN)
    assert words_for(recipe, "cpu") is None


@pytest.mark.parametrize("command", ["prune", "sweep"])
def test_options_that_change_a_recipe_are_described(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        PARSER.parse_args([command, "--help"])
    text = capsys.readouterr().out
    assert "--set FIELD=VALUE" in text
    assert ("--gamma G" in text) == (command == "prune")
