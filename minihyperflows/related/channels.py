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

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import chain, count
from typing import Any, NamedTuple

from minihyperflows.engine.conv import Conv2d
from minihyperflows.engine.graph import Function, Intermediate
from minihyperflows.engine.norm import BatchNorm, Normalise
from minihyperflows.engine.ops import (
    Elementwise,
    Exp,
    Linear,
    Log,
    LogSoftmax,
    Negate,
    Power,
    Reduction,
    ReLU,
    Reshape,
    Sigmoid,
    Softmax,
    Tanh,
    axes_of,
)
from minihyperflows.engine.pooling import Pool2d
from minihyperflows.engine.tensor import Tensor
from minihyperflows.nn.counting import Recording, functions_behind, trace
from minihyperflows.nn.layers import BatchNorm2d, Weighted
from minihyperflows.nn.module import Module

# Operations that work on every number by itself
POINTWISE = (Elementwise, Negate, Power, Exp, Log, Tanh, Sigmoid, ReLU)
# Operations whose output has the channels of their inputs
KEEPS_CHANNELS = (*POINTWISE, Pool2d, BatchNorm, Normalise, Reduction, Softmax, LogSoftmax)
INPUT = "input"  # the name of the group of the images' channels


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that several layers share, so that one choice of them holds for all.

    Layers are called by their dotted names in the network, in the order of definition.

    Attributes:
        name: that of the first layer that makes the channels. "input" for the images' own, with a
            number if that is the name of something else: a layer, or another constant.
        size: C, the number of channels.
        outputs: layers whose outputs these are: axis 0 of their weights, and their biases.
        depthwise: those of ``outputs`` that only filter each channel; their weights (C, kH, kW, 1)
            have no axis for inputs, and ``inputs`` does not list them.
        norms: batch norms over these channels.
        inputs: layers that read them, the last axis of their weights, with the number of inputs
            for each channel: 1, or H W for a linear layer after an (H, W, C) map was flattened.
            The inputs k C + c belong to channel c.
        removable: False for the channels of the images and for the outputs of the network; and
            where something else has an entry for each of them: a constant that they are multiplied
            by or added to, a softmax over them, a weight that is computed from another.
        stretched: whether a tensor with a single channel, such as an attention map, is broadcast
            over them.
        tied: those of ``outputs`` that share the weight of an earlier one.
    """

    name: str
    size: int
    outputs: tuple[str, ...] = ()
    depthwise: tuple[str, ...] = ()
    norms: tuple[str, ...] = ()
    inputs: Mapping[str, int] = field(default_factory=dict)
    removable: bool = True
    stretched: bool = False
    tied: tuple[str, ...] = ()


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
    recording = trace(net, input_shape)
    if not recording.operations:
        raise ValueError("no channels to find: the network has no parameters")
    tracer = Tracer(net, recording)
    tracer.follow_all()
    return collect(net, tracer)


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
        outputs, inputs: the axes of each weight, and the vectors (C,) of biases and batch norms.
        depthwise: weights of depthwise convolutions.
        constants: axes of what cutting does not change, by identity: the images, other arrays, and
            parameters that belong to no layer.
        images: those of tensors among them.
        fixed: further axes whose channels must stay.
        stretched: axes that something with one channel is broadcast over.
    """

    def __init__(self, net: Module, recording: Recording) -> None:
        self.recording = recording
        members = [m for _, m in net.named_modules() if isinstance(m, Weighted | BatchNorm2d)]
        self._known = {p for m in members for p in (m.weight, m.bias) if p is not None}
        norms = [m for m in members if isinstance(m, BatchNorm2d)]
        self._statistics = {id(norm.running_var.data) for norm in norms}
        self.axes: dict[Function, Axis] = {}
        self.outputs: dict[Tensor, Axis] = {}
        self.inputs: dict[Tensor, Axis] = {}
        self.depthwise: set[Tensor] = set()
        self.constants: dict[int, Axis] = {}
        self.images: list[Axis] = []
        self.fixed: list[Axis] = []
        self.stretched: list[Axis] = []
        self._parents: list[int] = []  # a forest; the root of a tree is the space's number

    def follow_all(self) -> None:
        """Take in the operations that compute activations, not those that compute weights."""
        operations = self.recording.operations
        needed = {operations[-1]}
        for function in reversed(operations):
            if function in needed:
                read = [x for x in function.inputs if x is not weight_in_use(function)]
                needed |= {x.creator for x in read if isinstance(x, Intermediate)}
        for function in operations:
            if function in needed:
                self.axes[function] = self._follow(function)
        self.fixed.append(self.axes[operations[-1]])

    def spaces(self, axes: Iterable[Axis]) -> set[int]:
        """The numbers of the spaces that ``axes`` have been joined to."""
        return {self.space(axis) for axis in axes}

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
        """The last axis of an input of an operation; of a weight the axis of its outputs."""
        if isinstance(x, Intermediate):
            return self.axes[x.creator]
        axes: dict[Any, Axis] = self.constants if self._is_constant(x) else self.outputs
        key = id(x) if self._is_constant(x) else x
        if key not in axes:
            axes[key] = self._new()
            if axes is self.constants and isinstance(x, Tensor):
                self.images.append(axes[key])
        return axes[key]

    def _is_constant(self, x: Any) -> bool:
        """Whether ``x`` is neither computed nor a parameter of a layer."""
        return not (isinstance(x, Intermediate) or (isinstance(x, Tensor) and x in self._known))

    def _follow(self, function: Function) -> Axis:
        """The last axis of what ``function`` makes."""
        if isinstance(function, Conv2d | Linear):
            return self._weighted(function)
        if isinstance(function, Reshape):
            return self._reshape(function)
        if isinstance(function, KEEPS_CHANNELS):
            return self._same_channels(function)
        raise ValueError(f"{function.name}: it is not known what it does to channels")

    # -- convolutions and linear layers ----------------------------------------------------------

    def _weighted(self, function: Function) -> Axis:
        axis, weight = self._axis(function.inputs[0]), self.recording.weight_of(function)
        made = self._axis(weight)
        if self._in_place(function):
            self._reads(function, weight, axis)
        else:  # transposed, for example: rows are not what they are elsewhere
            if weight not in self.inputs:
                self.inputs[weight] = self.constants[id(weight)] = self._new()
            self.fixed += [made, axis, self.inputs[weight]]
            made = self.constants[id(function)] = self._new()
        if self._has_partners(function, weight):
            self.fixed += [made, axis]
        for bias in function.inputs[2:]:
            self.join(self._axis(bias), made, "a bias")
        return made

    def _in_place(self, function: Function) -> bool:
        """Whether every entry of the weight in use was computed from that entry of the weight."""
        return all(isinstance(f, POINTWISE) for f in functions_behind(weight_in_use(function)))

    def _has_partners(self, function: Function, weight: Tensor) -> bool:
        """Whether the weight was computed with other arrays, which would not lose their rows."""
        others = [x for x in self.recording.leaves_of(function) if x is not weight]
        return any(math.prod(_shape(x)) > 1 for x in others)

    def _reads(self, function: Function, weight: Tensor, axis: Axis) -> None:
        groups = getattr(function, "groups", 1)
        if groups == 1:
            self.join(self.inputs.setdefault(weight, axis), axis, "a layer used twice")
        elif weight.shape[0] == groups and weight.shape[-1] == 1:
            self.join(self._axis(weight), axis, "a depthwise convolution")
            self.depthwise.add(weight)
        else:
            raise ValueError(
                f"a convolution of {groups} groups with a weight of shape {weight.shape} "
                "is neither an ordinary nor a depthwise one"
            )

    # -- everything else -------------------------------------------------------------------------

    def _reshape(self, function: Function) -> Axis:
        before, after = function.inputs[0].shape, function.output_shape
        axis = self._axis(function.inputs[0])
        if after[-1] % before[-1]:
            raise ValueError(f"Reshape: from {before} to {after} channels do not stay together")
        return Axis(axis.space, axis.repeats * (after[-1] // before[-1]))

    def _same_channels(self, function: Function) -> Axis:
        """Joins the inputs that have the channels of the output; others are broadcast."""
        if isinstance(function, Reduction) and _over_channels(function, function.axis):
            raise ValueError(f"{function.name}: it reduces the axis of channels")
        channels = function.output_shape[-1:]
        whole = [x for x in function.inputs if _shape(x)[-1:] == channels]
        if channels == (1,):  # one entry of an array is not one for each channel
            whole = [x for x in whole if isinstance(x, Tensor | Intermediate)]
        axes = [self._axis(x) for x in whole]
        for axis in axes[1:]:
            self.join(axis, axes[0], function.name)
        tensors = [x for x in function.inputs if isinstance(x, Tensor | Intermediate)]
        if any(_shape(x)[-1:] == (1,) != channels for x in tensors):
            self.stretched.append(axes[0])
        if self._has_entries(function):
            self.fixed.append(axes[0])
        return axes[0]

    def _has_entries(self, function: Function) -> bool:
        """Whether it does to each channel what depends on the others, or on an array that is not an
        input: statistics that are not of a layer."""
        if isinstance(function, Softmax | LogSoftmax):
            return _over_channels(function, function.axis)
        return isinstance(function, Normalise) and id(function.var) not in self._statistics


def weight_in_use(function: Function) -> Any:
    """What a convolution or linear layer multiplies by; None for other operations."""
    return function.inputs[1] if isinstance(function, Conv2d | Linear) else None


def _shape(x: Any) -> tuple[int, ...]:
    """Of a tensor, an array, or a number, which has none."""
    return getattr(x, "shape", ())


def _over_channels(function: Function, axis: int | tuple[int, ...] | None) -> bool:
    """Whether the last axis is among those that ``function`` takes together; the lengths alone do
    not say, since another axis may be as long."""
    ndim = len(function.inputs[0].shape)
    return ndim - 1 in axes_of(axis, ndim, function.name)


# -- names ---------------------------------------------------------------------------------------


def collect(net: Module, tracer: Tracer) -> dict[str, ChannelGroup]:
    """The groups from the axes that ``tracer`` has found, with the network's names."""
    modules = [(n, m) for n, m in net.named_modules() if isinstance(m, Weighted | BatchNorm2d)]
    known = {p for _, m in modules for p in (m.weight, m.bias)}
    if strange := [n for n, p in net.named_parameters().items() if p not in known]:
        raise ValueError(f"{', '.join(strange)}: not of a convolution, linear layer or batch norm")
    used = [(n, m) for n, m in modules if m.weight in tracer.outputs]
    made = {n: tracer.space(tracer.outputs[m.weight]) for n, m in used}
    read = {n: tracer.space(tracer.inputs[m.weight]) for n, m in used if m.weight in tracer.inputs}
    first = {m.weight: n for n, m in reversed(used)}
    fixed = tracer.spaces([*tracer.fixed, *tracer.constants.values()])
    stretched = tracer.spaces(tracer.stretched)
    from_layers = [made[n] for n, m in used if isinstance(m, Weighted)]
    images, constants = (map(tracer.space, a) for a in (tracer.images, tracer.constants.values()))
    order = [*images, *(s for s in constants if s not in from_layers), *from_layers]
    groups: dict[str, ChannelGroup] = {}
    for space in dict.fromkeys(order):  # each once
        makers = [(n, m) for n, m in used if made[n] == space]
        outputs = tuple(n for n, m in makers if isinstance(m, Weighted))
        readers = {n: tracer.inputs[m.weight].repeats for n, m in used if read.get(n) == space}
        if not (makers or readers):
            continue
        sizes = [m.weight.shape[0] for _, m in makers]
        sizes += [m.weight.shape[-1] // readers[n] for n, m in used if n in readers]
        name = outputs[0] if outputs else _free_name([*groups, *dict(net.named_modules())])
        groups[name] = ChannelGroup(
            name=name,
            size=sizes[0],
            outputs=outputs,
            depthwise=tuple(n for n, m in makers if m.weight in tracer.depthwise),
            norms=tuple(n for n, m in makers if isinstance(m, BatchNorm2d)),
            inputs=readers,
            removable=space not in fixed,
            stretched=space in stretched,
            tied=tuple(n for n, m in makers if isinstance(m, Weighted) and first[m.weight] != n),
        )
    return groups


def _free_name(taken: Collection[str]) -> str:
    """ "input", or that with the first number that makes it another name than those taken."""
    numbered = (f"{INPUT} {i}" for i in count(2))
    return next(name for name in chain([INPUT], numbered) if name not in taken)
