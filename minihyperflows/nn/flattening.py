"""Weights behind a flattened map: here its order is (H, W, C), in PyTorch (C, H, W).

A linear layer that reads a flattened map has a weight for every pixel and channel, in the order in
which they are flattened. So a weight of PyTorch's has the right shape here and the wrong order.
No other layer has an order of its own: convolutions are turned by ``load_state_dict``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from minihyperflows.engine.errors import ShapeError


def from_torch_flatten(weight: Any, channels: int) -> np.ndarray:
    """The weight of a linear layer that reads flattened maps, from PyTorch's order to ours.

    Args:
        weight: (out, C H W), an array or a tensor of PyTorch's on the CPU.
        channels: C of the maps. H and W need not be known.

    Returns:
        (out, H W C), a new array.

    Raises:
        ShapeError: the inputs are not a multiple of ``channels``, or it is not a matrix.
    """
    array = _matrix(weight, channels)
    return array.reshape(len(array), channels, -1).swapaxes(1, 2).reshape(array.shape).copy()


def to_torch_flatten(weight: Any, channels: int) -> np.ndarray:
    """The way back: (out, H W C) to (out, C H W)."""
    array = _matrix(weight, channels)
    return array.reshape(len(array), -1, channels).swapaxes(1, 2).reshape(array.shape).copy()


def _matrix(weight: Any, channels: int) -> np.ndarray:
    array = np.asarray(weight.detach() if hasattr(weight, "detach") else weight)
    if array.ndim != 2 or channels < 1 or array.shape[1] % channels:
        raise ShapeError(
            f"a weight of shape {array.shape} does not read flattened maps of {channels} channels"
        )
    return array


def flattened_otherwise(state: Mapping[str, Any], shapes: Mapping[str, Any]) -> Iterator[str]:
    """A sentence for each weight of ``state`` that seems to read maps flattened by PyTorch.

    That is a matrix behind a convolution of C channels that reads C k numbers with k > 1, and a
    tensor of PyTorch's. (An array shows no sign of where it comes from: who makes arrays of a
    state first has to think of the order.)

    Args:
        state: the arrays to load, by name.
        shapes: of the parameters of the network, by name, in the order of definition.
    """
    channels: int | None = None
    for name, shape in shapes.items():
        if len(shape) == 4:
            channels = shape[0]
        elif len(shape) == 2:
            reads_a_map = channels and shape[1] > channels and shape[1] % channels == 0
            if reads_a_map and _is_of_torch(state[name]):
                yield (
                    f"{name} comes from PyTorch, where maps are flattened as (C, H, W); here it is "
                    f"(H, W, C): if it reads a flattened map, load "
                    f"nn.from_torch_flatten(weight, channels={channels}) in its place"
                )
            channels = None


def _is_of_torch(value: Any) -> bool:
    return type(value).__module__.partition(".")[0] == "torch"
