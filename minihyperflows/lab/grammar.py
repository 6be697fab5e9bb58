"""What the command line says of a recipe, and the words that say it again.

Each option that changes a recipe stands here once, with both directions: what it makes of a recipe,
and what it says of one. :func:`changed` goes forwards, for ``prune`` and ``sweep``. The command
that a run's record shows is the inverse, :func:`words_for`, which trusts its words only if they
lead back to the recipe.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from minihyperflows.errors import UserError
from minihyperflows.lab.checkpoint import to_json
from minihyperflows.lab.console import Parser
from minihyperflows.lab.recipes import PARTS, RECIPES, Recipe


@dataclass(frozen=True)
class Change:
    """An option that changes a recipe.

    Attributes:
        flag: its name.
        of: the command that alone has it; None: all that run something.
        options: for argparse.
        apply: the recipe with the option's value.
        value: what the option has to be for a recipe on a device; None: it needs none.
    """

    flag: str
    of: str | None
    options: dict[str, Any]
    apply: Callable[[Recipe, Any], Recipe]
    value: Callable[[Recipe, str], Any]

    @property
    def name(self) -> str:
        """Under which argparse keeps the value."""
        return self.flag.removeprefix("--").replace("-", "_")


# In the order in which they are applied; ``--set`` comes before all of them.
CHANGES = (
    Change(
        "--epochs-scale",
        None,
        {"type": float, "metavar": "X", "help": "make every stage X times as long"},
        lambda recipe, factor: recipe if factor == 1 else recipe.scaled(factor),
        lambda recipe, device: None,  # the stages' own lengths say it
    ),
    Change(
        "--gamma",
        "prune",
        {"type": float, "metavar": "G", "help": "a constant pressure: no target, no regrowth"},
        Recipe.with_gamma,
        lambda recipe, device: recipe.pressure.gamma if recipe.target_sparsity is None else None,
    ),
    Change(
        "--target-sparsity",
        "prune",
        {"type": float, "metavar": "S", "help": "fraction of the weights to remove"},
        Recipe.with_target,
        lambda recipe, device: recipe.target_sparsity,
    ),
    Change(
        "--precision",
        "prune",
        {
            "choices": ("float16", "float32"),
            "help": "of activations on a GPU; default: the recipe's, float16",
        },
        lambda recipe, dtype: dataclasses.replace(recipe, gpu_dtype=dtype),
        lambda recipe, device: recipe.gpu_dtype if device == "cuda" else None,
    ),
)


def add_plugins(parser: argparse.ArgumentParser) -> None:
    """Give the parser of a command that runs something the option ``--plugin``."""
    parser.add_argument(
        "--plugin",
        action="append",
        default=[],
        dest="plugins",
        metavar="FILE.py",
        help="import this file first, which registers what a recipe or a setting names; repeatable",
    )


def add_changes(parser: argparse.ArgumentParser, command: str) -> None:
    """Give the parser of ``command`` the options that change a recipe."""
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="fields",
        metavar="FIELD=VALUE",
        help="change a field of the recipe, say pressure.floor=-0.3; repeatable",
    )
    for change in CHANGES:
        if change.of in (None, command):
            parser.add_argument(change.flag, **change.options)


def changed(recipe: Recipe, options: argparse.Namespace) -> Recipe:
    """The recipe with everything that the options change.

    Raises:
        UserError: something does not fit.
    """
    if options.fields:
        recipe = recipe.with_fields(dict(_field(text) for text in options.fields))
    for change in CHANGES:
        value = getattr(options, change.name, None)
        if value is not None:
            recipe = change.apply(recipe, value)
    return recipe


def words_for(recipe: Recipe, device: str) -> list[str] | None:
    """The options of ``prune`` that make the recipe of that name this one; None if none do."""
    known = RECIPES.get(recipe.name)
    if known is None:
        return None
    if device != "cuda":  # which computes in another precision than this one says
        recipe = dataclasses.replace(recipe, gpu_dtype=known.gpu_dtype)
    words = []
    for change in CHANGES:
        if (value := change.value(recipe, device)) is not None:
            words += [change.flag, value if isinstance(value, str) else to_json(value)]
    try:
        here, there = _values(recipe), _values(_said(known, words))
        for name, value in here.items():
            if value != there.get(name):
                words += ["--set", f"{name}={to_json(value, separators=(',', ':'))}"]
        return words if _said(known, words) == recipe else None
    except UserError:  # a recipe that was made by hand
        return None


def _values(recipe: Recipe) -> dict[str, Any]:
    """All fields by dotted name, as JSON has them. (Options of a model and the like are one value:
    singly, one that is not there any more could not be said.)"""
    values = json.loads(to_json(dataclasses.asdict(recipe)))
    parts = {f"{k}.{name}": v for k in PARTS for name, v in values[k].items()}
    return parts | {name: value for name, value in values.items() if name not in PARTS}


def _said(known: Recipe, words: Sequence[str]) -> Recipe:
    parser = Parser(prog="prune", add_help=False)
    add_changes(parser, "prune")
    return changed(known, parser.parse_args(words))


def _field(text: str) -> tuple[str, Any]:
    """``presence.init=[0.1,0.2]`` -> its name and value: JSON, or a text without quotes."""
    name, separator, value = text.partition("=")
    if not separator:
        raise UserError(f"--set {text} has no value: write FIELD=VALUE")
    try:
        return name, json.loads(value)
    except (ValueError, RecursionError):
        return name, value
