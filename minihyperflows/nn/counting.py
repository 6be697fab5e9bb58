"""Counting the work of a network: floating-point operations, dense and sparse."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from minihyperflows.engine.backend import to_device
from minihyperflows.engine.conv import Conv2d
from minihyperflows.engine.graph import (
    Function,
    Intermediate,
    is_recording,
    no_grad,
    reverse_topological_order,
)
from minihyperflows.engine.ops import Linear
from minihyperflows.engine.tensor import Tensor
from minihyperflows.nn.layers import weight_groups, weighted_layers
from minihyperflows.nn.module import Module, Parameter
from minihyperflows.nn.restore import in_mode, restored

EPSILON = float(np.finfo(np.float64).eps)

# -- operations ----------------------------------------------------------------------------------


def flops(net: Module, input_shape: tuple[int, ...]) -> dict[str, int]:
    """Floating-point operations of each convolution and linear layer for one image.

    A layer with K weights per output (kH kW C_in / groups, or in_features) multiplies K times and
    adds K - 1 times for each output: outputs (2 K - 1). A layer that is used several times counts
    each time, one that is not used has no entry; layers that share a weight count as the first of
    them. Biases and batch norm are not counted, as in the authors' code, nor is what a gate or a
    hypernetwork does to make the weight.

    Args:
        net: the network; one image of zeros is sent through it.
        input_shape: of one image, (H, W, C).

    Raises:
        ValueError: inside ``no_grad``, or no parameter is behind the weight of an operation.
    """
    operations: dict[str, int] = {}
    for name, function in layer_uses(net, input_shape):
        per_output = math.prod(function.inputs[1].shape[1:])
        count = math.prod(function.output_shape) * (2 * per_output - 1)
        operations[name] = operations.get(name, 0) + count
    return operations


def layer_uses(net: Module, input_shape: tuple[int, ...]) -> Iterator[tuple[str, Function]]:
    """Every convolution and product with a weight that one image goes through, first to last, with
    the name of the layer: the first one that has this weight.

    A weight that belongs to no layer lends its own name. Arguments and errors as for :func:`flops`.
    """
    names: dict[Tensor, str] = {m[0].weight: name for name, m in weight_groups(net).items()}
    for name, tensor in net.named_tensors().items():
        names.setdefault(tensor, name.removesuffix(".weight"))
    recording = trace(net, input_shape)
    for function in recording.operations:
        if isinstance(function, Linear | Conv2d):
            yield names[recording.weight_of(function)], function


def sparse_flops(dense: Mapping[str, int], density: Mapping[str, float]) -> dict[str, int]:
    """The operations that remain when each layer keeps the fraction ``density`` of its weights.

    Rounded down (:func:`floor_of`), layer by layer. Layers without an entry in ``density`` count as
    dense.
    """
    return {name: floor_of(density.get(name, 1.0), count) for name, count in dense.items()}


# -- what goes on in a network -------------------------------------------------------------------


class Recording(NamedTuple):
    """What one image goes through in a network.

    Attributes:
        operations: first to last.
        weights: for the weight in use of each layer, which is a leaf of this recording, the layer's
            own weight.
        layers: the weights of all layers.
    """

    operations: list[Function]
    weights: dict[Tensor, Parameter]
    layers: frozenset[Parameter]

    def leaves_of(self, function: Function) -> list[Any]:
        """The tensors and arrays that the weight of a convolution or product was computed from.

        In place of a weight in use the layer's own weight.
        """
        x = function.inputs[1]
        inputs = [x, *(i for f in functions_behind(x) for i in f.inputs)]
        leaves = [i for i in inputs if not isinstance(i, Intermediate)]
        return [self.weights.get(i, i) if isinstance(i, Tensor) else i for i in leaves]

    def weight_of(self, function: Function) -> Parameter:
        """The parameter behind the weight of a convolution or product, however it was computed.

        Of several the one that is a layer's weight; then one of the same shape, as a mask is; then
        the first.

        Raises:
            ValueError: there is none.
        """
        found = [leaf for leaf in self.leaves_of(function) if isinstance(leaf, Parameter)]
        if not found:
            raise ValueError(
                f"{function.name}: no parameter is behind its weight of shape "
                f"{function.inputs[1].shape}: only weights that are learned belong to a layer"
            )
        shape = function.inputs[1].shape
        return min(found, key=lambda p: (p not in self.layers, p.shape != shape))


def trace(net: Module, input_shape: tuple[int, ...]) -> Recording:
    """The operations that one image of zeros (H, W, C) goes through.

    In evaluation mode, so that nothing of ``net`` changes; every module's mode is put back. Frozen
    parameters count like others: meanwhile all of them require a gradient, since operations are
    recorded for the sake of gradients only. What gates do to the weights is not recorded: every
    layer has its weight ready made (``Weighted.weight_in_use``).

    Raises:
        ValueError: inside ``no_grad``, where nothing is recorded.
    """
    if not is_recording():
        raise ValueError("the operations of a network are found by recording them: leave no_grad()")
    layers = list(weighted_layers(net).values())
    parameters = [t for t in net.named_tensors().values() if isinstance(t, Parameter)]
    known = frozenset(layer.weight for layer in layers)
    if not parameters:
        return Recording([], {}, known)
    like = parameters[0]
    image = Tensor(to_device(np.zeros((1, *input_shape), like.dtype), like.device))
    touched = [*((p, "requires_grad") for p in parameters), *((m, "weight_in_use") for m in layers)]
    weights: dict[Tensor, Parameter] = {}
    with in_mode(net, training=False), restored(touched):
        for parameter in parameters:
            parameter.requires_grad = True
        for layer in layers:
            with no_grad():
                in_use = Tensor(layer.effective_weight().data, requires_grad=True)
            layer.weight_in_use, weights[in_use] = in_use, layer.weight
        output = net(image)
    order = reverse_topological_order(output.creator)[::-1] if output.creator else []
    return Recording(order, weights, known)


def functions_behind(x: Any) -> list[Function]:
    """The operations that an input of an operation was computed by, each once; none for a leaf."""
    found: dict[Function, None] = {}
    stack = [x]
    while stack:
        item = stack.pop()
        if isinstance(item, Intermediate) and item.creator not in found:
            found[item.creator] = None
            stack += reversed(item.creator.inputs)
    return list(found)


# -- fractions of a whole ------------------------------------------------------------------------


def floor_of(fraction: float, total: int) -> int:
    """floor(fraction total), for the fraction that is meant: of 100 things 0.29 are 29.

    0.29 * 100 is 28.999999999999996, and 1 - 0.9 is 0.09999999999999998. A product that is as near
    to a whole number as round-off can bring it is that number.
    """
    product = fraction * total
    return _whole(product, total, math.floor(product))


def ceil_of(fraction: float, total: int) -> int:
    """ceil(fraction total), for the fraction that is meant: of 25 things 0.28 are 7."""
    product = fraction * total
    return _whole(product, total, math.ceil(product))


def _whole(product: float, total: int, otherwise: int) -> int:
    nearest = round(product)
    # A fraction in [0, 1], such as 1 - s, is known to an ulp of 1 or so; the product adds another.
    return nearest if abs(product - nearest) <= 4 * EPSILON * total else otherwise


def kept_weights(density: float, total: int) -> int:
    """How many of ``total`` weights a density leaves: the largest whole number not above it."""
    return floor_of(density, total)
