"""Importance scores: one number for each weight or filter; what scores lowest is removed first.

With theta a weight, g = dL/dtheta its gradient, (Hg) its entry of the product of the Hessian of the
loss with the gradient, and sums over the weights of a filter, or over the single weight:

    magnitude                     sqrt(sum theta^2)                     the norm
    loss_preservation             sum |theta g|                         first-order Taylor, SNIP
    biased_loss_preservation      sum |theta| |theta g|                 the same, the small first
    grasp                         sum theta (Hg), with its sign         GraSP
    gradient_norm_preservation    |sum theta (Hg)|
    first_order                   |sum theta g|                         the change of loss itself
    distance                      sqrt(sum (theta - theta_0)^2)         from the initial theta_0
    random                        uniform on [0, 1)

For one weight the sum is one term, so loss_preservation and first_order are the same number. A
filter's terms may cancel: behind batch norm in training mode with eps = 0, first_order is exactly 0
for every filter, and grasp is minus the squared norm of the filter's gradient (chapter 15).

The first five are those of Lubana & Dick 2021 (arXiv 2009.11839), who explain them by the flow of
gradient descent. In their code the network is in evaluation mode; the temperature T, by which the
logits are divided, is 5 for the losses, 200 for GraSP, 1 for gradient-norm preservation; and
``initial`` gives the biased score its second form, sum |theta - theta_0| |theta g|. GraSP is due to
Wang, Zhang, Grosse 2020 (arXiv 2002.07376), with -theta (Hg) and the highest removed; SNIP to Lee,
Ajanthan, Torr 2019 (arXiv 1810.02340).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from minihyperflows.engine.backend import to_device, to_numpy
from minihyperflows.engine.graph import no_grad
from minihyperflows.engine.tensor import Tensor
from minihyperflows.nn.layers import Weighted, weighted_layers
from minihyperflows.nn.module import Module
from minihyperflows.related.derivatives import Arrays, Landscape

Total: TypeAlias = Callable[[np.ndarray], np.ndarray]


def each_weight(terms: np.ndarray) -> np.ndarray:
    """Every weight is a group by itself."""
    return terms


def each_filter(terms: np.ndarray) -> np.ndarray:
    """The sum over each filter, or each neuron of a linear layer: (C_out, ...) -> (C_out,)."""
    return terms.reshape(len(terms), -1).sum(axis=1)


LEVELS: dict[str, Total] = {"weight": each_weight, "filter": each_filter}


# -- the scores ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Quantities:
    """What the score of a layer's weights is made of, arrays of the weight's shape (C_out, ...).

    Attributes:
        weight: theta.
        gradient: g; zeros if the score does not use it. Likewise:
        curvature: Hg.
        distance: theta - theta_0.
        rng: for random scores.
    """

    weight: np.ndarray
    gradient: np.ndarray
    curvature: np.ndarray
    distance: np.ndarray
    rng: np.random.Generator | None = None


def magnitude(q: Quantities, total: Total) -> np.ndarray:
    """sqrt(sum theta^2)."""
    return np.sqrt(total(q.weight**2))


def loss_preservation(q: Quantities, total: Total) -> np.ndarray:
    """sum |theta g|: how much each removal changes the loss to first order, signs forgotten."""
    return total(abs(q.weight * q.gradient))


def biased_loss_preservation(q: Quantities, total: Total) -> np.ndarray:
    """sum |theta - theta_0| |theta g|, with theta_0 = 0 unless ``initial`` is given."""
    return total(abs(q.distance) * abs(q.weight * q.gradient))


def grasp(q: Quantities, total: Total) -> np.ndarray:
    """sum theta (Hg): half of what the removal takes off |g|^2, to first order.

    The lowest, the most negative, are those whose removal raises the gradient's norm the most.
    """
    return total(q.weight * q.curvature)


def gradient_norm_preservation(q: Quantities, total: Total) -> np.ndarray:
    """|sum theta (Hg)|: the lowest leave the gradient's norm as it is."""
    return abs(total(q.weight * q.curvature))


def first_order(q: Quantities, total: Total) -> np.ndarray:
    """|sum theta g|: by how much the removal changes the loss, to first order."""
    return abs(total(q.weight * q.gradient))


def distance(q: Quantities, total: Total) -> np.ndarray:
    """sqrt(sum (theta - theta_0)^2): how far training has moved the weights."""
    return np.sqrt(total(q.distance**2))


def random(q: Quantities, total: Total) -> np.ndarray:
    """Uniform on [0, 1), one number for each group."""
    if q.rng is None:
        raise ValueError("random scores need rng, a numpy.random.Generator")
    return q.rng.random(total(q.weight).shape)


@dataclass(frozen=True)
class Score:
    """A formula, and which derivatives of the loss it uses: of order 0, 1 or 2."""

    formula: Callable[[Quantities, Total], np.ndarray]
    order: int


SCORES = {
    "magnitude": Score(magnitude, 0),
    "loss_preservation": Score(loss_preservation, 1),
    "biased_loss_preservation": Score(biased_loss_preservation, 1),
    "grasp": Score(grasp, 2),
    "gradient_norm_preservation": Score(gradient_norm_preservation, 2),
    "first_order": Score(first_order, 1),
    "distance": Score(distance, 0),
    "random": Score(random, 0),
}


# -- of a network --------------------------------------------------------------------------------


def importance(
    net: Module,
    x: Any,
    labels: Any,
    score: str = "loss_preservation",
    level: str = "weight",
    temperature: float = 1.0,
    mode: str = "train",
    *,
    batch_size: int | None = None,
    initial: Mapping[str, np.ndarray] | None = None,
    rng: np.random.Generator | None = None,
    dtype: Any = np.float64,
) -> Arrays:
    """Scores of the weights of all convolutions and linear layers, keyed like named_parameters().

    Remove the lowest first. Biases and batch norm have no scores of their own: a bias and a batch
    norm's scale and shift go when their filter goes. They do count in the loss, so that Hg contains
    their share. Weights that a gate or mask has removed count as zero, and score 0 (random scores
    apart).

    Args:
        net: the network, afterwards as before.
        x: images (N, ...); the loss is the mean over them.
        labels: (N,) integers.
        score: one of ``SCORES``; the module says what they are.
        level: "weight": scores have the weight's shape; "filter": (C_out,), one for each filter of
            a convolution and each neuron of a linear layer.
        temperature: T; the logits are divided by it. Without effect on magnitude and its like.
        mode: "train": batch norm normalises with the batch, so that the filters before it have no
            scale that matters; "eval": with its running statistics, where they have one.
        batch_size: how many images at once; see :class:`Landscape` on what that means for batch
            norm in training mode.
        initial: the weights theta_0 of the beginning by name, for "distance", and for the second
            form of "biased_loss_preservation". Where filters have been removed, those of the same
            filters: the parameters of the initial network after the same ``remove_filters``.
        rng: for "random".
        dtype: float64, or float32 where half the time matters more than the last digits of Hg.

    Raises:
        ValueError: an unknown score, level or mode; no ``rng`` or ``initial`` where it is needed.
    """
    chosen = _look_up(score, SCORES, "score")
    total = _look_up(level, LEVELS, "level")
    landscape = Landscape(net, x, labels, temperature, mode, batch_size)
    theta = landscape.weights.astype(dtype)
    g = landscape.gradient(theta) if chosen.order >= 1 else np.zeros_like(theta)
    curvature = landscape.hessian_product(g, theta) if chosen.order >= 2 else np.zeros_like(theta)
    g_by_name, curvature_by_name = landscape.arrays(g), landscape.arrays(curvature)
    scores = {}
    for name, layer in layers_by_weight(net).items():
        weight = to_numpy(layer.weight.data).astype(dtype)
        quantities = Quantities(
            weight=in_use(layer, weight),
            gradient=g_by_name[name],
            curvature=curvature_by_name[name],
            distance=in_use(layer, weight - _start(name, score, initial)),
            rng=rng,
        )
        scores[name] = chosen.formula(quantities, total)
    return scores


def layers_by_weight(net: Module) -> dict[str, Weighted]:
    """The convolutions and linear layers by the names of their weights, as in
    ``net.named_parameters()``: a layer that is used in several places has one name."""
    layers = list(weighted_layers(net).values())
    by_weight = {layer.weight: layer for layer in reversed(layers)}
    named = net.named_parameters().items()
    return {name: by_weight[p] for name, p in named if p in by_weight}


def in_use(layer: Weighted, array: np.ndarray) -> np.ndarray:
    """``array``, of the weight's shape, with zeros where a gate or mask has removed the weight."""
    if layer.weight_gate is None:
        return array
    with no_grad():
        weight = Tensor(to_device(array, layer.weight.device))
        return to_numpy(layer.weight_gate(weight).data)


def _start(name: str, score: str, initial: Mapping[str, np.ndarray] | None) -> Any:
    """theta_0, or 0."""
    if initial is not None:
        return initial[name]
    if score == "distance":
        raise ValueError("the distance needs initial, the weights of the beginning by name")
    return 0


def _look_up(name: str, table: Mapping[str, Any], kind: str) -> Any:
    if name not in table:
        raise ValueError(f"{kind} must be one of {', '.join(table)}, not {name!r}")
    return table[name]
