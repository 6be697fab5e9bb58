"""Removing channels for good: the network gets narrower, and stays an ordinary one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from minihyperflows.engine.backend import to_device, to_numpy
from minihyperflows.nn import Buffer, Module, Parameter, weighted_layers
from minihyperflows.nn.init import fan_in
from minihyperflows.related.channels import ChannelGroup, channel_groups


def cut(net: Module, groups: Mapping[str, ChannelGroup], keep: Mapping[str, np.ndarray]) -> None:
    """Remove channels from ``net``, in place: where they are made, and wherever they are read.

    Weights lose rows and columns, biases and batch norms their entries; kernels stay whole. Names
    and kinds of layers stay, so the ``state_dict`` is that of a network built with these widths.
    Gradients are dropped; make a new optimiser.

    Args:
        net: without gates.
        groups: its :func:`~minihyperflows.related.channels.channel_groups`, from before.
        keep: for some of the groups a boolean mask (C,) of the channels to keep.

    Raises:
        KeyError: there is no such group.
        ValueError: a mask of another length, one that keeps nothing, or one that removes channels
            of the images or of the network's outputs; gates. Nothing has changed then.
    """
    modules = dict(net.named_modules())
    for name, mask in checked(net, groups, keep).items():
        group = groups[name]
        for layer in group.depthwise:
            modules[layer].groups = int(mask.sum())
        for tensor in _tensors_made(modules, group):
            _keep(tensor, mask, axis=0)
        for weight, repeats in _weights_reading(modules, group):
            _keep(weight, np.tile(mask, repeats), axis=-1)
    net.zero_grad()


def set_widths(net: Module, input_shape: tuple[int, ...], widths: Mapping[str, int]) -> None:
    """Make a newly built ``net`` as narrow as ``widths`` says, in place: a network from scratch.

    Each group keeps its first channels. The initial weights are drawn with a variance that is
    proportional to 1 / fan-in, so those of layers that have lost inputs are scaled up: what comes
    out is distributed as if the network had been built with these widths.

    Args:
        net: with its initial weights.
        input_shape: of one image, (H, W, C).
        widths: the number of channels of some of the groups, by name.

    Raises:
        KeyError, ValueError: as :func:`cut`.
    """
    groups = channel_groups(net, input_shape)
    fans = {layer: fan_in(layer.weight.shape) for layer in weighted_layers(net).values()}
    cut(net, groups, {name: np.arange(groups[name].size) < n for name, n in widths.items()})
    scales: dict[Parameter, float] = {}
    for layer, fan in fans.items():
        for parameter in (layer.weight, layer.bias):
            if parameter is not None:  # one that layers share is scaled once
                scales[parameter] = (fan / fan_in(layer.weight.shape)) ** 0.5
    for parameter, scale in scales.items():
        parameter.data = parameter.data * scale


def checked(
    net: Module, groups: Mapping[str, ChannelGroup], keep: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """``keep`` as arrays of bool, if these channels can be removed from ``net``.

    Raises:
        KeyError, ValueError: as :func:`cut`.
    """
    masks = {name: np.asarray(mask, dtype=bool) for name, mask in keep.items()}
    for name, mask in masks.items():
        _check(groups[name], mask)
    if any(layer.weight_gate for layer in weighted_layers(net).values()):
        raise ValueError("the network has gates: take them off before channels are removed")
    return masks


def _check(group: ChannelGroup, mask: np.ndarray) -> None:
    if mask.shape != (group.size,):
        raise ValueError(f"{group.name} has {group.size} channels, its mask shape {mask.shape}")
    if not mask.any():
        raise ValueError(f"{group.name} would have no channels left")
    if not (group.removable or mask.all()):
        raise ValueError(
            f"{group.name}: its channels cannot be removed: they are those of images or outputs, "
            "or they meet something else with an entry for each of them, such as a constant"
        )


def _tensors_made(modules: Mapping[str, Any], group: ChannelGroup) -> list[Parameter | Buffer]:
    """What has one row or entry for each channel, each once, however many layers share it."""
    tensors: dict[Parameter | Buffer | None, None] = {}
    for name in (*group.outputs, *group.norms):
        tensors |= dict.fromkeys((modules[name].weight, modules[name].bias))
    for name in group.norms:
        tensors |= dict.fromkeys((modules[name].running_mean, modules[name].running_var))
    return [tensor for tensor in tensors if tensor is not None]


def _weights_reading(
    modules: Mapping[str, Any], group: ChannelGroup
) -> list[tuple[Parameter, int]]:
    """The weights whose last axis stands for the channels, each once, with the inputs for each: the
    inputs k C + c belong to channel c."""
    return list({modules[name].weight: n for name, n in group.inputs.items()}.items())


def _keep(tensor: Parameter | Buffer, mask: np.ndarray, axis: int) -> None:
    kept = to_numpy(tensor.data).compress(mask, axis=axis)
    tensor.data = to_device(kept, tensor.device)
