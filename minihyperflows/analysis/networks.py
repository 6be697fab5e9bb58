"""Small networks, on which chapters and studies measure what takes too long on larger ones."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from minihyperflows import nn
from minihyperflows.data.datasets import Dataset
from minihyperflows.nn import Module


class HasDtype(Protocol):
    """A recipe, say: it names the type of the weights."""

    @property
    def dtype(self) -> str: ...


def small_convnet(recipe: HasDtype, data: Dataset, rng: np.random.Generator) -> Module:
    """Two convolutions with stride 2 and two linear layers: 11,208 weights for 8 x 8 pixels."""
    dtype = np.dtype(recipe.dtype)
    side = -(-data.train_x.shape[1] // 4)
    return nn.Sequential(
        nn.Conv2d(data.train_x.shape[3], 8, 3, stride=2, padding=1, rng=rng, dtype=dtype),
        nn.ReLU(),
        nn.Conv2d(8, 32, 3, stride=2, padding=1, rng=rng, dtype=dtype),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * side**2, 64, rng=rng, dtype=dtype),
        nn.ReLU(),
        nn.Linear(64, len(data.classes), rng=rng, dtype=dtype),
    )


def perceptron(recipe: HasDtype, data: Dataset, rng: np.random.Generator) -> Module:
    """One hidden layer of 60 units: 4,440 weights for 8 x 8 pixels."""
    dtype = np.dtype(recipe.dtype)
    pixels = int(np.prod(data.train_x.shape[1:]))
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(pixels, 60, rng=rng, dtype=dtype),
        nn.ReLU(),
        nn.Linear(60, len(data.classes), rng=rng, dtype=dtype),
    )
