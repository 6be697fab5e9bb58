"""Counting the work of a network: floating-point operations, dense and sparse."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from minihyperflows.engine.backend import to_device
from minihyperflows.engine.conv import Conv2d
from minihyperflows.engine.graph import Function, is_recording, reverse_topological_order
from minihyperflows.engine.ops import Linear
from minihyperflows.engine.tensor import Tensor
from minihyperflows.nn.module import Module, Parameter
from minihyperflows.nn.restore import in_mode, restored


def flops(net: Module, input_shape: tuple[int, ...]) -> dict[str, int]:
    """Floating-point operations of each convolution and linear layer for one image.

    A layer with K weights per output (kH kW C_in / groups, or in_features) multiplies K times and
    adds K - 1 times for each output: outputs (2 K - 1). A layer that is used several times counts
    each time, one that is not used has no entry. Biases and batch norm are not counted, as in the
    authors' code.

    Args:
        net: the network; one image of zeros is sent through it.
        input_shape: of one image, (H, W, C).

    Raises:
        ValueError: inside ``no_grad``.
    """
    names = {id(p): name.removesuffix(".weight") for name, p in net.named_parameters().items()}
    operations: dict[str, int] = {}
    for function in trace(net, input_shape):
        if isinstance(function, Linear | Conv2d):
            name = names[id(weight_behind(function))]
            operations[name] = operations.get(name, 0) + _operations(function)
    return operations


def trace(net: Module, input_shape: tuple[int, ...]) -> list[Function]:
    """The operations that one image of zeros (H, W, C) goes through, first to last.

    In evaluation mode, so that nothing of ``net`` changes; every module's mode is put back. Frozen
    parameters count like others: meanwhile all of them require a gradient, since operations are
    recorded for the sake of gradients only.

    Raises:
        ValueError: inside ``no_grad``, where nothing is recorded.
    """
    if not is_recording():
        raise ValueError("the operations of a network are found by recording them: leave no_grad()")
    parameters = [t for t in net.named_tensors().values() if isinstance(t, Parameter)]
    like = next(iter(net.parameters()), None)
    if like is None:
        return []
    image = Tensor(to_device(np.zeros((1, *input_shape), like.dtype), like.device))
    with in_mode(net, training=False), restored([(p, "requires_grad") for p in parameters]):
        for parameter in parameters:
            parameter.requires_grad = True
        output = net(image)
    return reverse_topological_order(output.creator)[::-1] if output.creator else []


def sparse_flops(dense: Mapping[str, int], density: Mapping[str, float]) -> dict[str, int]:
    """The operations that remain when each layer keeps the fraction ``density`` of its weights.

    Rounded down, layer by layer. Layers without an entry in ``density`` count as dense.
    """
    return {name: int(count * density.get(name, 1.0)) for name, count in dense.items()}


def weight_behind(function: Function) -> Tensor:
    """The parameter behind the weight that ``function`` used, followed through its gate."""
    weight = function.inputs[1]
    while weight.creator is not None:
        weight = weight.creator.inputs[0]
    return weight


def _operations(function: Function) -> int:
    per_output = int(np.prod(weight_behind(function).shape[1:]))
    return int(np.prod(function.output_shape)) * (2 * per_output - 1)


def kept_weights(density: float, total: int) -> int:
    """How many of ``total`` weights a density leaves: the largest whole number not above it."""
    return int(density * total + 1e-6)  # 0.02 * 50200 is 1003.9999999999999
