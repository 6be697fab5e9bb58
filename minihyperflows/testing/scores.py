"""Does a score of importance keep its contract, and does it estimate what it says?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np

from minihyperflows import functional as F
from minihyperflows.engine.tensor import Tensor
from minihyperflows.nn import BatchNorm2d, Conv2d, Flatten, Linear, Module, ReLU, Sequential
from minihyperflows.related.derivatives import Landscape
from minihyperflows.related.scores import LEVELS, layers_by_weight

Scores: TypeAlias = Callable[[Module, np.ndarray, np.ndarray], Mapping[str, np.ndarray]]

INPUTS, HIDDEN, CLASSES = 6, 7, 3
FRACTIONS = (0.1, 0.01)  # of a group that is left before it is removed
GROUPS = 3  # so many of each layer are removed
# Sums in another order differ by so much of a score, or of the largest score of its layer
TOLERANCE, SINGLE_TOLERANCE = (1e-6, 1e-9), (1e-4, 1e-5)


def check_score(
    score: Scores,
    level: str = "weight",
    loss_order: int | None = None,
    rng: np.random.Generator | int = 0,
) -> None:
    """Check a score of importance, a function like :func:`minihyperflows.related.scores`.

    ``score(net, x, labels)`` must have a real and finite array for the weight of every convolution
    and linear layer, under its name in ``net.named_parameters()``, and leave parameters, buffers
    and modes of the network as they were. Neither the order of the images nor the names of hidden
    units may matter, beyond round-off in the precision of what is returned: units that change
    places take their scores along. Which scores are high is not judged, unless ``loss_order`` is
    given. Example::

        check_score(lambda net, x, labels: importance(net, x, labels, "grasp"))

    Args:
        score: takes a network, images and labels.
        level: "weight": an array has the weight's shape; "filter": one number for each filter of a
            convolution and each neuron of a linear layer.
        loss_order: for a score that estimates by how much the loss changes if the weight, or all
            weights of the filter, are set to 0, with its sign: to which order in them, 1 or 2. Then
            its error must fall at least like that power, plus one, of the size of what is removed.
        rng: seed or generator for weights and images.

    Raises:
        AssertionError: says what went wrong.
    """
    if level not in LEVELS:
        raise ValueError(f"level must be one of {', '.join(LEVELS)}, not {level!r}")
    rng = np.random.default_rng(rng)
    _check_form(score, level, rng)
    _check_symmetry(score, level, rng)
    if loss_order is not None:
        _check_order(score, level, loss_order, rng)


# -- form ----------------------------------------------------------------------------------------


def _check_form(score: Scores, level: str, rng: np.random.Generator) -> None:
    options: dict[str, Any] = {"rng": rng, "dtype": np.float64}
    net = Sequential(
        *(Conv2d(2, 4, 3, padding=1, **options), BatchNorm2d(4, dtype=np.float64), ReLU()),
        *(Flatten(), Linear(36, CLASSES, **options)),
    )
    x, labels = rng.standard_normal((8, 3, 3, 2)), rng.integers(0, CLASSES, 8)
    before = {name: tensor.data.copy() for name, tensor in net.named_tensors().items()}
    for training in (True, False):
        net.train(training)
        found = score(net, x, labels)
        _check_arrays(found, net, level)
        if any(module.training != training for _, module in net.named_modules()):
            raise AssertionError("the score leaves the network in another mode than it was in")
        for name, tensor in net.named_tensors().items():
            if not np.array_equal(tensor.data, before[name]):
                raise AssertionError(f"the score changes {name!r} of the network")


def _check_arrays(found: Mapping[str, np.ndarray], net: Module, level: str) -> None:
    layers = layers_by_weight(net)
    if set(found) != set(layers):
        raise AssertionError(
            f"the scores have the names {sorted(found)}, the weights of convolutions and linear "
            f"layers are {sorted(layers)}"
        )
    for name, layer in layers.items():
        wanted = LEVELS[level](np.zeros(layer.weight.shape)).shape
        array = np.asarray(found[name])
        if array.shape != wanted:
            raise AssertionError(
                f"the scores of {name!r} have shape {array.shape}; at the level of a {level} it is "
                f"{wanted}, for a weight of shape {layer.weight.shape}"
            )
        if np.iscomplexobj(array) or not np.isfinite(array).all():
            raise AssertionError(f"some scores of {name!r} are not finite real numbers")


# -- symmetry ------------------------------------------------------------------------------------


class _Network(Module):
    """Two linear layers with a smooth activation between them."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.first = Linear(INPUTS, HIDDEN, rng=rng, dtype=np.float64)
        self.last = Linear(HIDDEN, CLASSES, rng=rng, dtype=np.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.tanh(self.first(x)))


def _check_symmetry(score: Scores, level: str, rng: np.random.Generator) -> None:
    net = _Network(rng)
    x, labels = rng.standard_normal((20, INPUTS)), rng.integers(0, CLASSES, 20)
    plain = _arrays(score(net, x, labels))
    _require_same(plain, _arrays(score(net, x, labels)), "a second call gives")
    order = rng.permutation(len(x))
    shuffled = _arrays(score(net, x[order], labels[order]))
    _require_same(plain, shuffled, "with the images in another order there are")
    places = rng.permutation(HIDDEN)
    net.first.weight.data = net.first.weight.data[places]
    net.first.bias.data = net.first.bias.data[places]  # type: ignore[union-attr]
    net.last.weight.data = net.last.weight.data[:, places]
    moved = {"first.weight": plain["first.weight"][places], "last.weight": plain["last.weight"]}
    if level == "weight":
        moved["last.weight"] = moved["last.weight"][:, places]
    renamed = _arrays(score(net, x, labels))
    _require_same(moved, renamed, "with the hidden units in another order there are")


def _arrays(scores: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Copies; whole numbers as floating ones, these in the precision that they have."""
    return {name: np.asarray(array) * 1.0 for name, array in scores.items()}


def _require_same(
    expected: Mapping[str, np.ndarray], found: Mapping[str, np.ndarray], what: str
) -> None:
    for name, array in expected.items():
        rtol, of_largest = TOLERANCE if array.dtype.itemsize >= 8 else SINGLE_TOLERANCE
        atol = of_largest * abs(array).max(initial=0)
        if not np.allclose(found[name], array, rtol=rtol, atol=atol):
            raise AssertionError(f"{what} other scores of {name!r}")


# -- the change of the loss ----------------------------------------------------------------------


def _check_order(score: Scores, level: str, order: int, rng: np.random.Generator) -> None:
    """Make groups smaller, and see how fast the error of the estimate falls."""
    net = _Network(rng)
    x, labels = rng.standard_normal((20, INPUTS)), rng.integers(0, CLASSES, 20)
    landscape = Landscape(net, x, labels)
    for name in layers_by_weight(net):
        weight = net.named_parameters()[name]
        full = weight.data
        for i in rng.choice(full.shape[0], GROUPS, replace=False):
            place = (int(i), *map(int, rng.integers(full.shape[1:]))) if level == "weight" else i
            changes, estimates = [], []
            for fraction in FRACTIONS:
                weight.data = full.copy()
                weight.data[place] *= fraction
                estimates.append(float(score(net, x, labels)[name][place]))
                smaller = landscape.loss()
                weight.data = weight.data.copy()
                weight.data[place] = 0
                changes.append(landscape.loss() - smaller)
            weight.data = full
            _require_order(f"{name!r}[{place}]", np.array(estimates), np.array(changes), order)


def _require_order(what: str, estimates: np.ndarray, changes: np.ndarray, order: int) -> None:
    errors = abs(estimates - changes)
    fall = (FRACTIONS[1] / FRACTIONS[0]) ** (order + 0.5)  # half a power of leeway
    if not errors[1] <= errors[0] * fall + 1e-13:
        raise AssertionError(
            f"{what}: with {FRACTIONS[0]:g} of it left the loss changes by {changes[0]:.4g}, the "
            f"score says {estimates[0]:.4g}; with {FRACTIONS[1]:g} left, {changes[1]:.4g} and "
            f"{estimates[1]:.4g}. For an estimate of order {order} the error should have fallen by "
            f"{(FRACTIONS[0] / FRACTIONS[1]) ** (order + 1):.0f}, it fell by "
            f"{errors[0] / max(errors[1], 1e-300):.3g}"
        )
