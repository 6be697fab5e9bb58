"""Small networks drawn at random, whose blocks lie in nested containers and may share weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from minihyperflows import Tensor, nn
from minihyperflows import functional as F

CHANNELS, SIDE, CLASSES = 2, 6, 3
KINDS = ("plain", "residual", "bottleneck", "depthwise", "tied", "twice", "bare")


class Block(nn.Module):
    """Layers one after another, whose result may be added to what went in."""

    def __init__(self, layers: Any, residual: bool = False) -> None:
        self.layers, self.residual = layers, residual

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for layer in modules_in(self.layers):
            y = layer(y)
        return x + y if self.residual else y


class NestedNetwork(nn.Module):
    """A stem, blocks in nested containers, and a classifier of one or several layers.

    Attributes:
        made: gives the layers and norms that were made, in order. (A function, since a list would
            be a place where they are found.)
    """

    def __init__(self, rng: np.random.Generator, dtypes: tuple[Any, ...] = (np.float32,)) -> None:
        self._rng, self._dtypes = rng, dtypes
        self._width = int(rng.integers(2, 5))
        made: list[Any] = []
        self.made, self._note = (lambda: tuple(made)), made.append
        self.stem = self._conv(CHANNELS, self._width, 3)
        blocks = [self._block(str(rng.choice(KINDS))) for _ in range(rng.integers(1, 5))]
        self.body = nested(blocks, rng)
        size = self._width * SIDE * SIDE
        if rng.random() < 0.5:
            self.head = [self._linear(size, CLASSES)]
        else:  # a classifier with a tied pair in it
            first, second = self._linear(size, 4), self._linear(4, 4)
            third = self._linear(4, 4)
            third.weight = second.weight
            self.head = [first, [nn.ReLU(), second], {"act": nn.ReLU(), "again": third}]
            self.head.append(self._linear(4, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        for block in modules_in(self.body):
            x = block(x)
        x = F.flatten(x)
        for layer in modules_in(self.head):
            x = layer(x)
        return x

    # -- drawing ---------------------------------------------------------------------------------

    def _options(self) -> dict[str, Any]:
        return {"rng": self._rng, "dtype": self._dtypes[self._rng.integers(len(self._dtypes))]}

    def _conv(self, inputs: int, outputs: int, size: int, groups: int = 1) -> nn.Conv2d:
        bias = bool(self._rng.integers(2))
        options = self._options()
        layer = nn.Conv2d(inputs, outputs, size, 1, size // 2, groups, bias, **options)
        self._note(layer)
        return layer

    def _linear(self, inputs: int, outputs: int) -> nn.Linear:
        layer = nn.Linear(inputs, outputs, bool(self._rng.integers(2)), **self._options())
        self._note(layer)
        return layer

    def _norm(self) -> nn.BatchNorm2d:
        layer = nn.BatchNorm2d(self._width, dtype=self._options()["dtype"])
        self._note(layer)
        return layer

    def _block(self, kind: str) -> Block:
        w = self._width
        if kind == "plain":
            return Block((self._conv(w, w, 3), self._norm(), nn.ReLU()))
        if kind == "residual":
            layers = [self._conv(w, w, 3), nn.ReLU(), [self._conv(w, w, 3), self._norm()]]
            return Block(layers, residual=True)
        if kind == "bottleneck":
            narrow = [self._conv(w, 1, 1), {"3x3": self._conv(1, 1, 3)}, (self._conv(1, w, 1),)]
            return Block(narrow, residual=True)
        if kind == "depthwise":
            return Block([self._conv(w, w, 3, groups=w), self._conv(w, w, 1)])
        if kind == "tied":  # two layers with one weight and biases of their own
            first, second = self._conv(w, w, 3), self._conv(w, w, 3)
            second.weight = first.weight
            return Block({"first": first, "act": nn.ReLU(), "rest": [second, nn.ReLU()]})
        layer = self._conv(w, w, 1)
        return Block([layer, [nn.ReLU(), layer]] if kind == "twice" else layer)


def modules_in(container: Any) -> Iterator[nn.Module]:
    """The modules in nested lists, tuples and dictionaries, in order."""
    if isinstance(container, nn.Module):
        yield container
        return
    for item in container.values() if isinstance(container, dict) else container:
        yield from modules_in(item)


def nested(items: list[Any], rng: np.random.Generator) -> Any:
    """``items`` in their order, in containers of random kinds and depth."""
    if len(items) > 1 and rng.random() < 0.7:
        at = int(rng.integers(1, len(items)))
        items = [nested(items[:at], rng), nested(items[at:], rng)]
    kind = rng.integers(3)
    if kind == 2:
        return {f"part{i}": item for i, item in enumerate(items)}
    return tuple(items) if kind else list(items)


def images(rng: np.random.Generator, count: int = 4) -> Tensor:
    return Tensor(rng.standard_normal((count, SIDE, SIDE, CHANNELS)).astype(np.float32))
