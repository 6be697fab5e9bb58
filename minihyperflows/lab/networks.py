"""The networks that a recipe can name, and what their options may be."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from minihyperflows.data.datasets import NAMES
from minihyperflows.errors import UserError
from minihyperflows.lab import ranges
from minihyperflows.nn import Module, models

if TYPE_CHECKING:
    from minihyperflows.lab.recipes import Recipe

MODELS: dict[str, Callable[..., Module]] = {
    name: getattr(models, name)
    for name in models.__all__
    if inspect.isfunction(getattr(models, name))
}

# Arguments of a model that follow from the data set, the seed and the recipe's dtype.
DECIDED = ("num_classes", "in_features", "rng", "dtype")


def unknown_names(model: str, dataset: str, options: Mapping[str, Any]) -> Iterator[str]:
    """A sentence for each name that a recipe uses and nothing has, and for options out of range."""
    if not (ranges.text().holds(dataset) and ranges.text().holds(model)):
        return  # that is said already
    if dataset not in NAMES:
        yield f"dataset is {ranges.either(NAMES)}, not {ranges.shown(dataset)}"
    if model not in MODELS:
        yield f"model is {ranges.either(tuple(MODELS))}, not {ranges.shown(model)}"
        return
    known = options_of(model)
    for name, value in options.items():
        if name in DECIDED:
            yield f"model_options.{name} cannot be set: the rest of the recipe decides it"
        elif name not in known:
            yield f"{model} has no option {name!r}, but {', '.join(known) or 'none'}"
        elif wrong := ranges.mistake(f"model_options.{name}", known[name], value):
            yield wrong
    for name in ranges.needed_by(MODELS[model]):
        if name not in DECIDED and name not in options:
            yield f"{model} needs model_options.{name}, {known[name].words}"


def options_of(model: str) -> dict[str, ranges.Range]:
    """The options of a model and what they may be."""
    return ranges.options_of(MODELS[model], without=DECIDED)


def build(recipe: Recipe, classes: int, image: tuple[int, ...], rng: np.random.Generator) -> Module:
    """The recipe's network for images of the shape ``image``, with fresh weights.

    Raises:
        UserError: there is no such network.
    """
    if recipe.model not in MODELS:
        raise UserError(
            f"recipe {recipe.name!r} asks for an unknown model {recipe.model!r}: choose one of "
            f"{', '.join(MODELS)}"
        )
    model = MODELS[recipe.model]
    options: dict[str, Any] = {"num_classes": classes, **recipe.model_options}
    if "in_features" in inspect.signature(model).parameters:
        options["in_features"] = int(np.prod(image))
    try:
        return model(rng=rng, dtype=np.dtype(recipe.dtype), **options)
    except (ValueError, OverflowError, MemoryError) as error:
        chosen = ", ".join(f"{name}={value!r}" for name, value in recipe.model_options.items())
        raise UserError(f"cannot build {recipe.model} with ({chosen}): {error}") from error
