"""Which channels of a network can only be removed together.

A filter makes a channel, and the channel has readers: its batch norm and the weights of the next
layer. Where tensors are added, as around a residual block, both sides must keep the same channels,
so all the filters behind them form one group. A depthwise convolution takes each channel by itself:
its filter goes with the channel that it reads.

Nobody has to list the groups. One image is sent through the network, and each operation says what
it does to the channels, which are the last axis of every tensor: a sum joins two groups, a
convolution begins a new one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from minihyperflows.engine.conv import Conv2d
from minihyperflows.engine.graph import Function, Intermediate
from minihyperflows.engine.norm import BatchNorm
from minihyperflows.engine.ops import (
    Elementwise,
    Exp,
    Linear,
    Log,
    Negate,
    Power,
    Reduction,
    ReLU,
    Reshape,
    Sigmoid,
    Tanh,
)
from minihyperflows.engine.pooling import Pool2d
from minihyperflows.engine.tensor import Tensor
from minihyperflows.nn.counting import trace, weight_behind
from minihyperflows.nn.layers import BatchNorm2d, Weighted
from minihyperflows.nn.module import Module, Parameter

# Operations whose output has the channels of their inputs
KEEPS_CHANNELS = (
    *(Elementwise, Negate, Power, Exp, Log, Tanh, Sigmoid, ReLU),
    *(Pool2d, BatchNorm, Reduction),
)
INPUT = "input"  # the name of the group of the images' channels


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that several layers share, so that one choice of them holds for all.

    Layers are called by their dotted names in the network, in the order of definition.

    Attributes:
        name: that of the first layer that makes the channels; "input" for the images' own.
        size: C, the number of channels.
        outputs: layers whose outputs these are: axis 0 of their weights, and their biases.
        depthwise: those of ``outputs`` that only filter each channel; their weights (C, kH, kW, 1)
            have no axis for inputs, and ``inputs`` does not list them.
        norms: batch norms over these channels.
        inputs: layers that read them, the last axis of their weights, with the number of inputs
            for each channel: 1, or H W for a linear layer after an (H, W, C) map was flattened.
            The inputs k C + c belong to channel c.
        removable: False for the channels of the images and for the outputs of the network.
    """

    name: str
    size: int
    outputs: tuple[str, ...] = ()
    depthwise: tuple[str, ...] = ()
    norms: tuple[str, ...] = ()
    inputs: Mapping[str, int] = field(default_factory=dict)
    removable: bool = True


def channel_groups(net: Module, input_shape: tuple[int, ...]) -> dict[str, ChannelGroup]:
    """The groups of channels of ``net`` by name, in the order of definition.

    Every convolution and linear layer is in ``outputs`` of one group and, unless it is depthwise,
    in ``inputs`` of one. A ResNet's first group is "conv1": the first convolution and the last ones
    of the first stage's blocks, whose outputs are all added.

    Args:
        net: made of convolutions, linear layers, batch norm and operations that keep channels
            apart.
        input_shape: of one image, (H, W, C).

    Raises:
        ValueError: the network has no layers, or parameters outside of its layers; an operation
            mixes channels in a way that is not known here, for example a convolution with groups
            that is not depthwise; or the call is inside ``no_grad``.
    """
    tracer = Tracer()
    operations = trace(net, input_shape)
    if not operations:
        raise ValueError("no channels to find: the network has no parameters")
    for function in operations:
        tracer.follow(function)
    return collect(net, tracer, tracer.axes[operations[-1]])


def sizes(groups: Mapping[str, ChannelGroup]) -> dict[str, int]:
    """How many channels each group has."""
    return {name: group.size for name, group in groups.items()}


def group_of_outputs(groups: Mapping[str, ChannelGroup]) -> dict[str, str]:
    """For every layer the name of the group that its outputs are in."""
    return {layer: name for name, group in groups.items() for layer in group.outputs}


def group_of_inputs(groups: Mapping[str, ChannelGroup]) -> dict[str, str]:
    """For every layer the name of the group that it reads; for a depthwise one that it is in."""
    return {
        layer: name for name, group in groups.items() for layer in (*group.inputs, *group.depthwise)
    }


# -- following the channels through the operations -----------------------------------------------


class Axis(NamedTuple):
    """The last axis of a tensor, or one of a weight: ``repeats`` times the channels of a space."""

    space: int
    repeats: int = 1


class Tracer:
    """Gives every axis of channels a number, its space, and joins those that must be the same.

    Attributes:
        axes: the last axis of what each operation makes.
        outputs, inputs: the axes of each weight, and the vectors (C,) of batch norms.
        depthwise: weights of depthwise convolutions.
        images: axes of what is neither a parameter nor computed.
    """

    def __init__(self) -> None:
        self.axes: dict[Function, Axis] = {}
        self.outputs: dict[Tensor, Axis] = {}
        self.inputs: dict[Tensor, Axis] = {}
        self.depthwise: set[Tensor] = set()
        self.images: dict[Tensor, Axis] = {}
        self._parents: list[int] = []  # a forest; the root of a tree is the space's number

    def follow(self, function: Function) -> None:
        """Take in one operation; those before it come first."""
        if isinstance(function, Conv2d):
            self.axes[function] = self._convolution(function)
        elif isinstance(function, Linear):
            self._reads(weight_behind(function), self._axis(function.inputs[0]))
            self.axes[function] = self._makes(weight_behind(function), function.inputs[2:])
        elif isinstance(function, Reshape):
            self.axes[function] = self._reshape(function)
        elif isinstance(function, KEEPS_CHANNELS):
            self.axes[function] = self._elementwise(function)
        # anything else matters only if its result is used as an activation: see _axis

    def space(self, axis: Axis) -> int:
        """The number of the space that ``axis`` has been joined to."""
        i = axis.space
        while self._parents[i] != i:
            i = self._parents[i]
        return i

    def join(self, a: Axis, b: Axis, why: str) -> None:
        """From now on the channels of both are the same."""
        if a.repeats != b.repeats:
            raise ValueError(f"{why}: channels repeated {a.repeats} and {b.repeats} times")
        self._parents[self.space(a)] = self.space(b)

    def _new(self) -> Axis:
        self._parents.append(len(self._parents))
        return Axis(self._parents[-1])

    def _axis(self, x: Any) -> Axis:
        """The last axis of an input of an operation."""
        if isinstance(x, Intermediate):
            if x.creator not in self.axes:
                raise ValueError(f"{x.creator.name}: it is not known what it does to channels")
            return self.axes[x.creator]
        return self._leaf(x, self.outputs if isinstance(x, Parameter) else self.images)

    def _leaf(self, tensor: Tensor, axes: dict[Tensor, Axis]) -> Axis:
        if tensor not in axes:
            axes[tensor] = self._new()
        return axes[tensor]

    def _reads(self, weight: Tensor, axis: Axis) -> None:
        self.join(self.inputs.setdefault(weight, axis), axis, "a layer used twice")

    def _makes(self, weight: Tensor, biases: tuple[Any, ...]) -> Axis:
        axis = self._leaf(weight, self.outputs)
        for bias in biases:
            self.join(self._axis(bias), axis, "a bias")
        return axis

    def _convolution(self, function: Conv2d) -> Axis:
        weight, axis = weight_behind(function), self._axis(function.inputs[0])
        if function.groups == 1:
            self._reads(weight, axis)
        elif weight.shape[0] == function.groups and weight.shape[-1] == 1:
            self.join(self._leaf(weight, self.outputs), axis, "a depthwise convolution")
            self.depthwise.add(weight)
        else:
            raise ValueError(
                f"a convolution of {function.groups} groups with a weight of shape {weight.shape} "
                "is neither an ordinary nor a depthwise one"
            )
        return self._makes(weight, function.inputs[2:])

    def _reshape(self, function: Reshape) -> Axis:
        before, after = function.inputs[0].shape, function.output_shape
        axis = self._axis(function.inputs[0])
        if after[-1] % before[-1]:
            raise ValueError(f"Reshape: from {before} to {after} channels do not stay together")
        return Axis(axis.space, axis.repeats * (after[-1] // before[-1]))

    def _elementwise(self, function: Function) -> Axis:
        """Joins the inputs that have the channels of the output; others are broadcast."""
        channels = function.output_shape[-1:]
        if isinstance(function, Reduction) and _reduces_channels(function):
            raise ValueError(f"{function.name}: it reduces the axis of channels")
        whole = [x for x in function.inputs if isinstance(x, Tensor | Intermediate)]
        axes = [self._axis(x) for x in whole if x.shape[-1:] == channels]
        for axis in axes[1:]:
            self.join(axis, axes[0], function.name)
        return axes[0]


def _reduces_channels(function: Reduction) -> bool:
    """Whether the last axis is among those that it reduces; the lengths alone do not say, since
    another axis may be as long."""
    last = len(function.inputs[0].shape) - 1
    return last in function.axes(last + 1)


def collect(net: Module, tracer: Tracer, output: Axis) -> dict[str, ChannelGroup]:
    """The groups from the axes that ``tracer`` has found, with the network's names."""
    modules = [(n, m) for n, m in net.named_modules() if isinstance(m, Weighted | BatchNorm2d)]
    used = [(n, m) for n, m in modules if m.weight in tracer.outputs]
    known = {p for _, m in modules for p in (m.weight, m.bias)}
    if strange := [n for n, p in net.named_parameters().items() if p not in known]:
        raise ValueError(f"{', '.join(strange)}: not of a convolution, linear layer or batch norm")
    fixed = {tracer.space(axis) for axis in (output, *tracer.images.values())}
    spaces = [*(tracer.space(axis) for axis in tracer.images.values())]
    spaces += [tracer.space(tracer.outputs[m.weight]) for _, m in used if isinstance(m, Weighted)]
    groups = {}
    for space in dict.fromkeys(spaces):  # in the order of definition, each once
        makers = [(n, m) for n, m in used if tracer.space(tracer.outputs[m.weight]) == space]
        outputs = tuple(n for n, m in makers if isinstance(m, Weighted))
        readers = {
            n: tracer.inputs[m.weight].repeats
            for n, m in used
            if m.weight in tracer.inputs and tracer.space(tracer.inputs[m.weight]) == space
        }
        sizes = [m.weight.shape[0] for _, m in makers]
        sizes += [m.weight.shape[-1] // readers[n] for n, m in used if n in readers]
        name = outputs[0] if outputs else INPUT
        groups[name] = ChannelGroup(
            name=name,
            size=sizes[0],
            outputs=outputs,
            depthwise=tuple(n for n, m in makers if m.weight in tracer.depthwise),
            norms=tuple(n for n, m in makers if isinstance(m, BatchNorm2d)),
            inputs=readers,
            removable=space not in fixed,
        )
    return groups
