"""The same networks and the same training step in PyTorch, to measure and to compare with.

Written as a PyTorch user would write them, with torchvision's names, so that a state dict of ours
loads as it is, presences included. This is the only module that imports PyTorch, which is optional:
``bench/steps.py`` loads it when it is asked to.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
import torch.nn as tnn
import torch.nn.functional as tF

from minihyperflows.flows.gates import KAPPA, PRESENCE
from minihyperflows.lab.recipes import PresenceTraining, Recipe, WeightTraining
from minihyperflows.nn.models.blocks import scale_channels
from minihyperflows.nn.models.vgg import VGG19, Plan

# name in the records -> memory format of the activations and the weights
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}

# -- gates ---------------------------------------------------------------------------------------


class GatedWeight(torch.autograd.Function):
    """w' = w m with m = 1 where t >= 0, else 0;  dL/dw = m c,  dL/dt = kappa w c."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, presence: torch.Tensor) -> torch.Tensor:
        mask = presence >= 0
        ctx.save_for_backward(weight, mask)
        return weight * mask

    @staticmethod
    def backward(ctx: Any, c: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weight, mask = ctx.saved_tensors
        return c * mask, (c * weight).mul_(KAPPA)


def effective_weight(layer: Conv2d | Linear) -> torch.Tensor:
    """The weight that ``layer`` computes with: gated if it has a presence."""
    if layer.presence is None:
        return layer.weight
    gated: torch.Tensor = GatedWeight.apply(layer.weight, layer.presence)
    return gated


class Linear(tnn.Linear):
    """PyTorch's layer with an optional gate."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.presence: tnn.Parameter | None
        self.register_parameter(PRESENCE, None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return tF.linear(x, effective_weight(self), self.bias)


class Conv2d(tnn.Conv2d):
    """PyTorch's layer, of the size-preserving kind and without a bias, with an optional gate."""

    def __init__(self, in_channels: int, out_channels: int, size: int, stride: int = 1) -> None:
        super().__init__(in_channels, out_channels, size, stride, size // 2, bias=False)
        self.presence: tnn.Parameter | None
        self.register_parameter(PRESENCE, None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return tF.conv2d(x, effective_weight(self), None, self.stride, self.padding)


def attach(net: tnn.Module, init: tuple[float, float]) -> None:
    """Give every convolution and linear layer a presence t per weight, drawn from ``init``."""
    for layer in net.modules():
        if isinstance(layer, Conv2d | Linear):
            layer.presence = tnn.Parameter(torch.empty_like(layer.weight).uniform_(*init))


def presences(net: tnn.Module) -> list[tnn.Parameter]:
    """The presence parameters of ``net``."""
    return [p for name, p in net.named_parameters() if name.endswith(f".{PRESENCE}")]


def weights(net: tnn.Module) -> list[tnn.Parameter]:
    """All other parameters of ``net``."""
    return [p for name, p in net.named_parameters() if not name.endswith(f".{PRESENCE}")]


def pressure(parameters: Iterable[torch.Tensor]) -> torch.Tensor:
    """The mean of all presence parameters together."""
    parameters = list(parameters)
    total = torch.stack([t.sum() for t in parameters]).sum()
    return total / sum(t.numel() for t in parameters)


# -- networks ------------------------------------------------------------------------------------


class LeNet300(tnn.Module):
    """in -> 300 -> 100 -> classes with ReLU between; takes images of one channel."""

    def __init__(self, in_features: int, num_classes: int) -> None:
        super().__init__()
        self.fc1 = Linear(in_features, 300)
        self.fc2 = Linear(300, 100)
        self.fc3 = Linear(100, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.fc1(x.flatten(1)))
        return self.fc3(torch.relu(self.fc2(x)))


class VGG(tnn.Module):
    """3x3 convolutions, each with batch norm and ReLU; an average of the last map; linear."""

    def __init__(self, plan: Plan, num_classes: int, width: float) -> None:
        super().__init__()
        layers: list[tnn.Module] = []
        channels = 3
        for item in plan:
            if isinstance(item, str):
                layers.append(tnn.MaxPool2d(2))
                continue
            out = scale_channels(item, width)
            layers += [Conv2d(channels, out, 3), tnn.BatchNorm2d(out), tnn.ReLU(inplace=True)]
            channels = out
        self.features = tnn.Sequential(*layers)
        self.pool = tnn.AvgPool2d(2)
        self.classifier = Linear(channels, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.pool(self.features(x)).flatten(1))


class Bottleneck(tnn.Module):
    """1x1 down, 3x3 (with the stride), 1x1 up to four times the width, and the shortcut."""

    expansion = 4

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        out = width * self.expansion
        self.conv1, self.bn1 = Conv2d(channels, width, 1), tnn.BatchNorm2d(width)
        self.conv2, self.bn2 = Conv2d(width, width, 3, stride), tnn.BatchNorm2d(width)
        self.conv3, self.bn3 = Conv2d(width, out, 1), tnn.BatchNorm2d(out)
        self.downsample = shortcut(channels, out, stride)
        self.relu = tnn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        y += x if self.downsample is None else self.downsample(x)
        return self.relu(y)


class BasicBlock(tnn.Module):
    """Two 3x3 convolutions, the first with the stride, and the shortcut."""

    expansion = 1

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = Conv2d(channels, width, 3, stride), tnn.BatchNorm2d(width)
        self.conv2, self.bn2 = Conv2d(width, width, 3), tnn.BatchNorm2d(width)
        self.downsample = shortcut(channels, width, stride)
        self.relu = tnn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += x if self.downsample is None else self.downsample(x)
        return self.relu(y)


def shortcut(channels: int, out: int, stride: int) -> tnn.Sequential | None:
    """The projection of a block's input where its shape changes; None where it does not."""
    if channels == out and stride == 1:
        return None
    return tnn.Sequential(Conv2d(channels, out, 1, stride), tnn.BatchNorm2d(out))


class ResNet(tnn.Module):
    """A 3x3 convolution, stages of residual blocks, the average of the map, a linear layer."""

    def __init__(
        self,
        block: type[Bottleneck] | type[BasicBlock],
        stages: tuple[tuple[int, int], ...],  # (blocks, channels) of each stage
        num_classes: int,
        width: float,
    ) -> None:
        super().__init__()
        channels = scale_channels(stages[0][1], width)
        self.conv1, self.bn1 = Conv2d(3, channels, 3), tnn.BatchNorm2d(channels)
        self.relu = tnn.ReLU(inplace=True)
        for number, (blocks, stage_channels) in enumerate(stages, start=1):
            out = scale_channels(stage_channels, width)
            layers: list[tnn.Module] = []
            for i in range(blocks):
                layers.append(block(channels, out, 2 if number > 1 and i == 0 else 1))
                channels = out * block.expansion
            setattr(self, f"layer{number}", tnn.Sequential(*layers))
        self.stages = len(stages)
        self.fc = Linear(channels, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        for number in range(1, self.stages + 1):
            x = getattr(self, f"layer{number}")(x)
        return self.fc(x.mean((2, 3)))


def lenet300(in_features: int = 784, num_classes: int = 10) -> LeNet300:
    """The twin of :func:`minihyperflows.models.lenet300`."""
    return LeNet300(in_features, num_classes)


def vgg19(num_classes: int = 10, width: float = 1.0) -> VGG:
    """The twin of :func:`minihyperflows.models.vgg19`."""
    return VGG(VGG19, num_classes, width)


def resnet50(num_classes: int = 10, width: float = 1.0) -> ResNet:
    """The twin of :func:`minihyperflows.models.resnet50`."""
    return ResNet(Bottleneck, ((3, 64), (4, 128), (6, 256), (3, 512)), num_classes, width)


def resnet20(num_classes: int = 10, width: float = 1.0) -> ResNet:
    """The twin of ``minihyperflows.models.resnet(20)``."""
    return ResNet(BasicBlock, ((3, 16), (3, 32), (3, 64)), num_classes, width)


# -- the training step ---------------------------------------------------------------------------


def to_torch(array: np.ndarray, memory_format: torch.memory_format) -> torch.Tensor:
    """(N, H, W, C) -> a tensor (N, C, H, W) in ``memory_format``, in memory of its own."""
    view = torch.from_numpy(array).permute(0, 3, 1, 2)
    return torch.empty(view.shape, dtype=view.dtype, memory_format=memory_format).copy_(view)


def _in_format(net: Any, memory_format: torch.memory_format) -> tnn.Module:
    """``net`` with its parameters in ``memory_format``; Any, since the stubs lack this overload."""
    return net.to(memory_format=memory_format)


def make_optimizer(
    params: list[tnn.Parameter], settings: WeightTraining | PresenceTraining, lr: float
) -> torch.optim.Optimizer:
    """PyTorch's optimiser for ``settings``, fused: on the CPU several times as fast as foreach."""
    decay = getattr(settings, "weight_decay", 0.0)
    if settings.optimizer == "adam":
        return torch.optim.Adam(params, lr, weight_decay=decay, fused=True)
    nesterov = getattr(settings, "nesterov", False)
    return torch.optim.SGD(params, lr, settings.momentum, 0, decay, nesterov, fused=True)


class TrainingStep:
    """One Hyperflows step on one batch: call it to run it.

    Args:
        net: a gated network.
        x: images (N, H, W, C).
        labels: (N,).
        recipe: its pruning stage says which optimisers, and how smooth the labels.
        lr: of both optimisers.
        gamma: the pressure.
        memory_format: the name of one of ``FORMATS``.
    """

    def __init__(
        self,
        net: tnn.Module,
        x: np.ndarray,
        labels: np.ndarray,
        recipe: Recipe,
        lr: float,
        gamma: float,
        memory_format: str,
    ) -> None:
        self.net = _in_format(net, FORMATS[memory_format])
        self.x = to_torch(x, FORMATS[memory_format])
        self.labels = torch.from_numpy(labels)
        self.gamma, self.smoothing = gamma, recipe.pruning.label_smoothing
        self.presences = presences(net)
        self.optimizers = [
            make_optimizer(weights(net), recipe.pruning, lr),
            make_optimizer(self.presences, recipe.presence, lr),
        ]

    def gradients(self) -> float:
        """The loss with the pressure; leaves the gradients of weights and presences."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        loss = tF.cross_entropy(self.net(self.x), self.labels, label_smoothing=self.smoothing)
        loss = loss + self.gamma * pressure(self.presences)
        loss.backward()
        return loss.item()

    def __call__(self) -> None:
        self.gradients()
        for optimizer in self.optimizers:
            optimizer.step()


class Convolution:
    """One convolution without a bias and its gradients.

    Args:
        x: (N, H, W, C_in); weight: (C_out, kH, kW, C_in / groups), as in our engine.
        stride, padding, groups: of the convolution.
        image_gradient: whether dL/dx is wanted; a network's first layer needs none.
        memory_format: the name of one of ``FORMATS``.
    """

    def __init__(
        self,
        x: np.ndarray,
        weight: np.ndarray,
        stride: tuple[int, int],
        padding: tuple[int, int],
        groups: int,
        image_gradient: bool,
        memory_format: str,
    ) -> None:
        self.x = to_torch(x, FORMATS[memory_format]).requires_grad_(image_gradient)
        self.weight = to_torch(weight, FORMATS[memory_format]).requires_grad_()
        self.options: dict[str, Any] = {"stride": stride, "padding": padding, "groups": groups}
        self.cotangent = torch.ones_like(self.forward().detach())

    def forward(self) -> torch.Tensor:
        """y (N, C_out, H', W')."""
        self.x.grad = self.weight.grad = None
        return tF.conv2d(self.x, self.weight, None, **self.options)

    def backward(self, y: torch.Tensor) -> None:
        """Gradients of the sum of ``y``."""
        y.backward(self.cotangent)
