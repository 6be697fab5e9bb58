"""Residual networks for 32 x 32 images (He et al. 2016), with torchvision's names."""

from __future__ import annotations

from typing import Any

import numpy as np

from minihyperflows.engine.tensor import Tensor
from minihyperflows.nn.layers import BatchNorm2d, Linear, Sequential
from minihyperflows.nn.models.blocks import check_stem_stride, conv, means_of_maps, scale_channels
from minihyperflows.nn.module import Module


class BasicBlock(Module):
    """y = relu(x' + bn2(conv2(relu(bn1(conv1(x)))))) with two 3x3 convolutions.

    x' is x, or where the shape changes a 1x1 convolution of it with batch norm.
    """

    expansion = 1

    def __init__(self, channels: int, width: int, stride: int, **options: Any) -> None:
        self.conv1 = conv(channels, width, 3, stride, **options)
        self.bn1 = BatchNorm2d(width, dtype=options["dtype"])
        self.conv2 = conv(width, width, 3, **options)
        self.bn2 = BatchNorm2d(width, dtype=options["dtype"])
        self.downsample = shortcut(channels, width, stride, **options)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1.then_relu(self.conv1(x))
        return self.bn2.then_relu(self.conv2(y), self.downsample(x) if self.downsample else x)


class Bottleneck(Module):
    """1x1 down to ``width`` channels, 3x3, 1x1 up to four times ``width``, and the shortcut.

    The stride is on the 3x3 convolution, as in torchvision (version 1.5 of the network).
    """

    expansion = 4

    def __init__(self, channels: int, width: int, stride: int, **options: Any) -> None:
        out = width * self.expansion
        self.conv1 = conv(channels, width, 1, **options)
        self.bn1 = BatchNorm2d(width, dtype=options["dtype"])
        self.conv2 = conv(width, width, 3, stride, **options)
        self.bn2 = BatchNorm2d(width, dtype=options["dtype"])
        self.conv3 = conv(width, out, 1, **options)
        self.bn3 = BatchNorm2d(out, dtype=options["dtype"])
        self.downsample = shortcut(channels, out, stride, **options)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1.then_relu(self.conv1(x))
        y = self.bn2.then_relu(self.conv2(y))
        return self.bn3.then_relu(self.conv3(y), self.downsample(x) if self.downsample else x)


def shortcut(channels: int, out: int, stride: int, **options: Any) -> Sequential | None:
    """The projection of a block's input where its shape changes; None where it does not.

    The first networks for CIFAR padded channels with zeros instead. A projection has weights, so
    pruning can choose which channels reach the next stage.
    """
    if channels == out and stride == 1:
        return None
    projection = conv(channels, out, 1, stride, **options)
    return Sequential(projection, BatchNorm2d(out, dtype=options["dtype"]))


class ResNet(Module):
    """A 3x3 convolution, stages of residual blocks, the average of the map, a linear layer.

    No max-pool at the start: the images are small. Every stage but the first halves the map, which
    the first convolution makes ``stem_stride`` times smaller than the image.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        stages: tuple[tuple[int, int], ...],  # (blocks, channels) of each stage
        num_classes: int,
        width: float,
        rng: np.random.Generator,
        dtype: Any,
        stem_stride: int = 1,
    ) -> None:
        check_stem_stride(stem_stride, (1, 2, 4))
        options = {"rng": rng, "dtype": dtype}
        channels = scale_channels(stages[0][1], width)
        self.conv1 = conv(3, channels, 3, stem_stride, **options)
        self.bn1 = BatchNorm2d(channels, dtype=dtype)
        for number, (blocks, stage_channels) in enumerate(stages, start=1):
            out = scale_channels(stage_channels, width)
            layers: list[Module] = []
            for i in range(blocks):
                stride = 2 if number > 1 and i == 0 else 1
                layers.append(block(channels, out, stride, **options))
                channels = out * block.expansion
            setattr(self, f"layer{number}", Sequential(*layers))
        self.stages = len(stages)
        self.fc = Linear(channels, num_classes, rng=rng, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1.then_relu(self.conv1(x))
        for number in range(1, self.stages + 1):
            x = getattr(self, f"layer{number}")(x)
        return self.fc(means_of_maps(x))


def resnet50(
    num_classes: int = 10,
    width: float = 1.0,
    *,
    stem_stride: int = 1,
    rng: np.random.Generator,
    dtype: Any = np.float32,
) -> ResNet:
    """ResNet-50 for 32 x 32 images: 23,467,712 weights that pruning can gate (ten classes).

    Args:
        num_classes: the outputs of the linear layer.
        width: scales the channels of every layer.
        stem_stride: stride of the first convolution, 1, 2 or 4. All maps have that many times
            smaller sides, so a step costs 1, 1/4 or 1/16: for CPUs. The weights
            are the same.
        rng: draws the initial weights.
        dtype: of weights and activations.

    Raises:
        ValueError: another stem_stride, or a width that is not positive.
    """
    stages = ((3, 64), (4, 128), (6, 256), (3, 512))
    return ResNet(Bottleneck, stages, num_classes, width, rng, dtype, stem_stride)


def resnet(
    depth: int,
    num_classes: int = 10,
    width: float = 1.0,
    *,
    rng: np.random.Generator,
    dtype: Any = np.float32,
) -> ResNet:
    """The narrow ResNets for CIFAR: 20, 56, 110 of basic blocks, 164 of bottlenecks.

    Three stages of 16, 32 and 64 channels with n blocks each: depth = 6 n + 2 for basic blocks (two
    convolutions each), 9 n + 2 for bottlenecks (three each).
    """
    if depth not in (20, 56, 110, 164):
        raise ValueError(f"there is no ResNet-{depth} here: choose a depth of 20, 56, 110 or 164")
    block = Bottleneck if depth == 164 else BasicBlock
    blocks = (depth - 2) // (9 if block is Bottleneck else 6)
    stages = ((blocks, 16), (blocks, 32), (blocks, 64))
    return ResNet(block, stages, num_classes, width, rng, dtype)
