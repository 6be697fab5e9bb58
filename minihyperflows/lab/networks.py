"""The network and the data set that a recipe names."""

from __future__ import annotations

import inspect
import os
from typing import Any

import numpy as np

from minihyperflows.data.datasets import Dataset
from minihyperflows.lab import registry
from minihyperflows.lab.recipes import Recipe
from minihyperflows.nn import Module


def load(name: str, root: str | os.PathLike[str] | None = None) -> Dataset:
    """The data set called ``name``: digits, shapes32, mnist, cifar10, cifar100 or a registered one.

    Args:
        name: of the data set.
        root: the folder with MNIST's or CIFAR's files; see
            :func:`minihyperflows.data.datasets.data_folder` for where it is by default.

    Raises:
        UserError: an unknown name; files that are missing, damaged or not what they should be.
    """
    return registry.make("dataset", name, root=root)


def build(recipe: Recipe, classes: int, image: tuple[int, ...], rng: np.random.Generator) -> Module:
    """The recipe's network for images of the shape ``image``, with fresh weights.

    Raises:
        UserError: there is no such network.
    """
    options: dict[str, Any] = {"num_classes": classes, **recipe.model_options}
    if "in_features" in inspect.signature(registry.find("model", recipe.model)).parameters:
        options["in_features"] = int(np.prod(image))
    dtype = np.dtype(recipe.dtype)
    return registry.make("model", recipe.model, rng=rng, dtype=dtype, **options)
