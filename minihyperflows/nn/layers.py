"""The layers that networks are built from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np

from minihyperflows import functional as F
from minihyperflows.engine.tensor import Tensor
from minihyperflows.nn import init
from minihyperflows.nn.module import Buffer, Module, Parameter

# shape, generator, dtype -> initial values
WeightInit: TypeAlias = Callable[[tuple[int, ...], np.random.Generator, Any], np.ndarray]


class Weighted(Module):
    """A layer with a ``weight``, and the one hook that pruning needs.

    ``weight_gate`` is a function that turns the weight into the weight to compute with. Without it
    the layer is dense.

    ``weight_in_use``, if there is one, is that weight ready made, for who keeps it up to date
    outside of the graph.
    """

    weight: Parameter
    bias: Parameter | None
    weight_gate: Callable[[Tensor], Tensor] | None = None
    weight_in_use: Tensor | None = None

    def effective_weight(self) -> Tensor:
        """The weight that ``forward`` uses: gated if there is a gate."""
        if self.weight_in_use is not None:
            return self.weight_in_use
        return self.weight if self.weight_gate is None else self.weight_gate(self.weight)

    def _set_parameters(
        self,
        shape: tuple[int, ...],
        bias: bool,
        rng: np.random.Generator,
        dtype: Any,
        torch_axes: tuple[int, ...] | None = None,
        weight_init: WeightInit = init.lecun_uniform,
    ) -> None:
        self.weight = Parameter(weight_init(shape, rng, dtype), torch_axes)
        bound = 1 / float(np.sqrt(init.fan_in(shape)))
        self.bias = Parameter(init.uniform(shape[:1], bound, rng, dtype)) if bias else None


def weighted_layers(net: Module) -> dict[str, Weighted]:
    """The convolutions and linear layers of ``net`` by name, in the order of definition.

    Layers may share a weight: what is done to weights, not to layers, goes by
    :func:`weight_groups`.
    """
    return {name: m for name, m in net.named_modules() if isinstance(m, Weighted)}


def weight_groups(net: Module) -> dict[str, list[Weighted]]:
    """The convolutions and linear layers of ``net``, those that share a weight together.

    Tied weights are one weight: it is gated, counted and pruned once, for all of its layers. A
    group has the name of its first layer, which is how ``net.named_parameters()`` calls the weight
    (``"<name>.weight"``); most groups have one layer.
    """
    groups: dict[int, tuple[str, list[Weighted]]] = {}
    for name, layer in weighted_layers(net).items():
        groups.setdefault(id(layer.weight), (name, []))[1].append(layer)
    return dict(groups.values())


class Linear(Weighted):
    """y = x W^T + b with W (out_features, in_features); PyTorch's default initialisation."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        rng: np.random.Generator,
        dtype: Any = np.float32,
    ) -> None:
        self._set_parameters((out_features, in_features), bias, rng, dtype)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.effective_weight(), self.bias)


class Conv2d(Weighted):
    """Convolution of (N, H, W, C_in) to (N, H', W', C_out); see :func:`functional.conv2d`."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        size: F.Pair,
        stride: F.Pair = 1,
        padding: F.Pair = 0,
        groups: int = 1,
        bias: bool = True,
        *,
        weight_init: WeightInit = init.lecun_uniform,
        rng: np.random.Generator,
        dtype: Any = np.float32,
    ) -> None:
        if in_channels % groups or out_channels % groups:
            raise ValueError(
                f"{in_channels} input and {out_channels} output channels do not fall into "
                f"{groups} groups"
            )
        rows, columns = (size, size) if isinstance(size, int) else size
        shape = (out_channels, rows, columns, in_channels // groups)
        to_oihw = (0, 3, 1, 2)
        self._set_parameters(shape, bias, rng, dtype, to_oihw, weight_init)
        self.stride, self.padding, self.groups = stride, padding, groups

    def forward(self, x: Tensor) -> Tensor:
        weight = self.effective_weight()
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.groups)


class BatchNorm2d(Module):
    """Normalises each channel over the batch, then scales and shifts it; PyTorch's names.

    ``momentum`` is the weight of a batch in the running statistics; with None they are the means
    over all batches so far.
    """

    def __init__(
        self,
        channels: int,
        momentum: float | None = 0.1,
        eps: float = 1e-5,
        *,
        dtype: Any = np.float32,
    ) -> None:
        self.weight = Parameter(np.ones(channels, dtype))
        self.bias = Parameter(np.zeros(channels, dtype))
        self.running_mean = Buffer(np.zeros(channels, dtype))
        self.running_var = Buffer(np.ones(channels, dtype))
        self.num_batches_tracked = Buffer(np.zeros((), np.int64))
        self.momentum, self.eps = momentum, eps

    def forward(self, x: Tensor) -> Tensor:
        return self._normalise(x)

    def then_relu(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """relu(self(x) + residual), with fewer passes over memory; without a residual none is
        added."""
        return self._normalise(x, residual, relu=True)

    def _normalise(self, x: Tensor, residual: Tensor | None = None, relu: bool = False) -> Tensor:
        momentum = self.momentum
        if momentum is None:
            momentum = 1 / (int(self.num_batches_tracked.data) + 1)
        return F.batch_norm(
            x,
            self.weight,
            self.bias,
            self.running_mean.data,
            self.running_var.data,
            self.training,
            momentum,
            self.eps,
            residual,
            relu,
            self.num_batches_tracked.data,
        )


class ReLU(Module):
    """max(x, 0), element by element."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x)


class MaxPool2d(Module):
    """The largest value in each window; see :func:`functional.max_pool2d`."""

    def __init__(self, size: F.Pair, stride: F.Pair | None = None) -> None:
        self.size, self.stride = size, stride

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(x, self.size, self.stride)


class AvgPool2d(Module):
    """The mean of each window; see :func:`functional.avg_pool2d`."""

    def __init__(self, size: F.Pair, stride: F.Pair | None = None) -> None:
        self.size, self.stride = size, stride

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, self.size, self.stride)


class Flatten(Module):
    """(N, ...) -> (N, everything else)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.flatten(x)


class Sequential(Module):
    """Modules applied one after another, named "0", "1", ... as in PyTorch.

    A batch norm and the ReLU right after it are computed as one (:meth:`BatchNorm2d.then_relu`).
    """

    def __init__(self, *modules: Module) -> None:
        for i, module in enumerate(modules):
            setattr(self, str(i), module)

    def __len__(self) -> int:
        return len(list(self.children()))

    def __getitem__(self, i: int) -> Module:
        return [module for _, module in self.children()][i]

    def forward(self, x: Tensor) -> Tensor:
        modules = [module for _, module in self.children()]
        merged = False
        for module, after in zip(modules, [*modules[1:], None], strict=True):
            if merged:  # this ReLU is done already
                merged = False
            elif type(module) is BatchNorm2d and type(after) is ReLU:
                x, merged = module.then_relu(x), True
            else:
                x = module(x)
        return x
