"""The gate: which weights are present, and the flux that removed weights still feel.

Every weight w of a convolution or linear layer gets a presence parameter t of its own. The layer
computes with w where t >= 0 and with zero elsewhere (chapter 06). Source: arXiv 2504.05349,
sections on topology and flow; the authors' code, mask functions.
"""

from __future__ import annotations

from typing import cast

import numpy as np

from minihyperflows.engine.backend import Array, contiguous, xp_of
from minihyperflows.engine.graph import Function
from minihyperflows.engine.memory import empty
from minihyperflows.engine.numbers import Arithmetic
from minihyperflows.engine.tensor import Tensor, apply
from minihyperflows.engine.threads import elementwise
from minihyperflows.nn import Module, Parameter, Weighted, weight_groups, weighted_layers
from minihyperflows.nn.init import require_generator
from minihyperflows.nn.module import HINTS

# The declared derivative of the gate, which has none of its own: a step is flat on both sides. A
# quarter is the largest slope of the logistic function, which the gate once was. A constant
# factor scales all fluxes alike; what matters is its size against the pressure.
KAPPA = 0.25

PRESENCE = "presence"  # role of the presence parameters, and the last part of their names
HINTS[PRESENCE] = "attach presence parameters first with flows.attach, or remove them"


def is_present(t: Array) -> Array:
    """Boolean mask of the weights that are in use: t >= 0. Zero, -0.0 too, is present."""
    return t.real >= 0


class Gate(Function):
    """m = 1 where t >= 0, else 0;  declared dL/dt = kappa c, everywhere."""

    arithmetic = Arithmetic.FLOAT

    def forward(self, t: Array) -> Array:
        return is_present(t).astype(t.dtype)

    def backward(self, c: Array) -> Array:
        return KAPPA * c


class GatedWeight(Function):
    """w' = w m with m = gate(t), in one operation;  dL/dw = m c,  dL/dt = kappa w c.

    The gradient of t has the same formula whether the weight is present or not: c is the gradient
    with respect to the weight *in use*, which exists for a removed weight too. That number,
    kappa w dL/dw', is the flux.
    """

    arithmetic = Arithmetic.FLOAT

    def forward(self, weight: Array, t: Array) -> Array:
        xp = xp_of(t)
        self.weight, self.mask = contiguous(weight), empty(xp, t.shape, bool)
        gated = empty(xp, t.shape, xp.result_type(weight, t))

        def work(w: Array, t: Array, mask: Array, gated: Array) -> None:
            mask[...] = is_present(t)
            xp.multiply(w, mask, out=gated)

        elementwise(work, self.weight, contiguous(t), self.mask, gated)
        return gated

    def backward(self, c: Array) -> tuple[Array | None, Array | None]:
        xp, c = xp_of(c), contiguous(c)
        if not self.needs[1]:
            return c * self.mask, None
        weight_gradient, flux = (empty(xp, c.shape, c.dtype) for _ in range(2))

        def work(w: Array, mask: Array, c: Array, weight_gradient: Array, flux: Array) -> None:
            xp.multiply(c, mask, out=weight_gradient)
            xp.multiply(c, w, out=flux)
            flux *= KAPPA

        elementwise(work, self.weight, self.mask, c, weight_gradient, flux)
        return weight_gradient if self.needs[0] else None, flux


def gate(t: Tensor) -> Tensor:
    """1 where t >= 0, else 0; the backward pass multiplies the cotangent by 0.25 everywhere.

    ``weight * gate(t)`` is the definition; :class:`GatedWeight` computes the same in one pass.
    """
    return apply(Gate(), t)


class Gated(Weighted):
    """A layer of any class that :func:`attach` gave a gate: how a type checker knows it."""

    presence: Parameter


class WeightGate:
    """The gate of one weight: turns it into the weight in use, in every layer that shares it."""

    def __init__(self, presence: Parameter) -> None:
        self.presence = presence

    def __call__(self, weight: Tensor) -> Tensor:
        return apply(GatedWeight(), weight, self.presence)


def count_present(t: Array) -> int:
    """How many of the weights behind ``t`` are in use."""
    return int(xp_of(t).count_nonzero(is_present(t)))


# -- networks ------------------------------------------------------------------------------------


def attach(
    net: Module, init: tuple[float, float] = (0.2, 0.5), *, rng: np.random.Generator
) -> None:
    """Give every convolution and linear layer of ``net`` a presence parameter t per weight.

    t is drawn uniformly from ``init`` (low, high), so every weight starts present if low >= 0. Its
    distance from 0 is how long a weight without flux lasts: with Adam at learning rate 0.001 and
    the default (0.2, 0.5), 200 to 500 steps.

    Layers that share a weight share its t, whose flux is the sum of what they feel. (What reads a
    weight without being a layer itself, such as an embedding tied to a classifier, has no gate.)

    Raises:
        ValueError: gates are attached already, there is nothing to gate, or ``init`` is not a
            range.
        TypeError: ``rng`` is not a ``numpy.random.Generator``.
    """
    low, high = init
    if not -np.inf < low <= high < np.inf:
        raise ValueError(f"init must be (low, high) with low <= high, both finite, not {init}")
    require_generator(rng)
    groups = list(weight_groups(net).values())
    if not groups:
        raise ValueError("nothing to gate: the network has no convolution or linear layer")
    if any(layer.weight_gate for layers in groups for layer in layers):
        raise ValueError("gates are attached already: flows.detach(net) removes them")
    for layers in groups:
        presence = _draw_presence(layers[0].weight, low, high, rng)
        for layer in layers:
            layer.presence = presence  # found by named_tensors, so it is saved and moved
            layer.weight_gate = WeightGate(presence)


def _draw_presence(
    weight: Parameter, low: float, high: float, rng: np.random.Generator
) -> Parameter:
    t = rng.uniform(low, high, weight.shape).astype(weight.dtype)
    presence = Parameter(t, weight.torch_axes, role=PRESENCE)
    if weight.device != "cpu":
        presence.data = presence.to(weight.device).data
    return presence


def gated_groups(net: Module) -> dict[str, list[Gated]]:
    """The layers of ``net`` that have a gate, those that share a weight together, by the name of
    the first.

    Raises:
        ValueError: layers that share a weight have gates of their own, so that there is not one
            network without gates that computes the same.
    """
    gated: dict[str, list[Gated]] = {}
    for name, layers in weight_groups(net).items():
        gates = {id(vars(layer).get(PRESENCE)): layer for layer in layers}
        if len(gates) > 1:
            raise ValueError(
                f"the layers that share {name}.weight do not share its gate: tie weights first, "
                "then call flows.attach"
            )
        if isinstance(vars(layers[0]).get(PRESENCE), Parameter):
            gated[name] = cast(list[Gated], layers)
    return gated


def gated_layers(net: Module) -> dict[str, Gated]:
    """The layers of ``net`` that have a gate, by name; of those that share a weight the first.

    So each gated weight is here once.
    """
    return {name: layers[0] for name, layers in gated_groups(net).items()}


def presences(net: Module) -> dict[str, Parameter]:
    """The presence parameters by name (``"<layer>.presence"``); none of them is in
    ``net.named_parameters()``."""
    return net.named_parameters(role=PRESENCE)


def detach(net: Module) -> None:
    """Remove the gates; the weights keep their values, removed ones come back to life."""
    for layer in weighted_layers(net).values():
        if PRESENCE in vars(layer):
            layer.weight_gate = None
            delattr(layer, PRESENCE)


def to_dense(net: Module) -> None:
    """Write the zeros into the weights and remove the gates: the same function, an ordinary net."""
    for layer in gated_layers(net).values():
        layer.weight.data = layer.weight.data * is_present(layer.presence.data)
    detach(net)


# -- counting ------------------------------------------------------------------------------------


def counts(net: Module) -> dict[str, tuple[int, int]]:
    """(present weights, all weights) of every gated layer, by layer name.

    Weights that layers share count once, for the first of them.
    """
    return {
        name: (count_present(layer.presence.data), layer.weight.size)
        for name, layer in gated_layers(net).items()
    }


def layer_density(net: Module) -> dict[str, float]:
    """The fraction of each gated layer's weights that is present, in [0, 1]."""
    return {name: present / total for name, (present, total) in counts(net).items()}


def density(net: Module) -> float:
    """The fraction of all gated weights that is present, in [0, 1]; sparsity is 1 - density.

    Raises:
        ValueError: the network has no gates.
    """
    per_layer = counts(net).values()
    if not per_layer:
        raise ValueError("this network has no gates: attach them first with flows.attach")
    return sum(present for present, _ in per_layer) / sum(total for _, total in per_layer)
