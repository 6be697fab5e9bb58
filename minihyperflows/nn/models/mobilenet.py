"""MobileNets for 32 x 32 images: V1 (Howard et al. 2017) and V2 (Sandler et al. 2018)."""

from __future__ import annotations

from typing import Any

import numpy as np

from minihyperflows.engine.tensor import Tensor
from minihyperflows.nn.layers import BatchNorm2d, Linear, ReLU, Sequential
from minihyperflows.nn.models.blocks import conv, means_of_maps, scale_channels
from minihyperflows.nn.module import Module

# V1: (output channels, stride) of the thirteen separable convolutions
PLAN = (
    (64, 1),
    (128, 2),
    (128, 1),
    (256, 2),
    (256, 1),
    (512, 2),
    *[(512, 1)] * 5,
    (1024, 2),
    (1024, 1),
)

# V2: (expansion, output channels, blocks, stride of the first of them) of the seven stages
STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
LAST = 1280  # channels that the classifier reads; never fewer


class MobileNetV1(Module):
    """Each block filters every channel by itself (3x3, depthwise), then mixes channels (1x1).

    The first convolution has stride 1, because the images are small: maps of 32 down to 2 pixels.
    """

    def __init__(
        self, num_classes: int, width: float, rng: np.random.Generator, dtype: Any
    ) -> None:
        channels = scale_channels(32, width)
        blocks: list[Module] = [_conv_bn_relu(3, channels, 3, rng=rng, dtype=dtype)]
        for out_channels, stride in PLAN:
            out = scale_channels(out_channels, width)
            depthwise = _conv_bn_relu(channels, channels, 3, stride, channels, rng=rng, dtype=dtype)
            blocks.append(
                Sequential(depthwise, _conv_bn_relu(channels, out, 1, rng=rng, dtype=dtype))
            )
            channels = out
        self.features = Sequential(*blocks)
        self.classifier = Linear(channels, num_classes, rng=rng, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(means_of_maps(self.features(x)))


class InvertedResidual(Module):
    """y = x + project(filter(expand(x))), without "x +" where the size changes.

    ``expand`` mixes ``channels`` into ``expansion`` times as many (1x1; left out for 1), ``filter``
    is depthwise (3x3), ``project`` mixes them into ``out`` (1x1, without ReLU).
    """

    def __init__(
        self, channels: int, out: int, expansion: int, stride: int, **options: Any
    ) -> None:
        inside = expansion * channels
        layers: list[Module] = []
        if expansion > 1:
            layers.append(_conv_bn_relu(channels, inside, 1, **options))
        layers.append(_conv_bn_relu(inside, inside, 3, stride, inside, **options))
        layers += [conv(inside, out, 1, **options), BatchNorm2d(out, dtype=options["dtype"])]
        self.conv = Sequential(*layers)
        self.residual = stride == 1 and channels == out

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return x + y if self.residual else y


class MobileNetV2(Module):
    """Blocks that are narrow outside and wide inside: :class:`InvertedResidual`.

    As in :class:`MobileNetV1` the first convolution has stride 1, and so has the second stage: maps
    of 32 down to 4 pixels. Its activation is ReLU, where Sandler et al. cut at 6 as well.
    """

    def __init__(
        self, num_classes: int, width: float, rng: np.random.Generator, dtype: Any
    ) -> None:
        options: dict[str, Any] = {"rng": rng, "dtype": dtype}
        channels = scale_channels(32, width)
        blocks: list[Module] = [_conv_bn_relu(3, channels, 3, **options)]
        for expansion, out_channels, count, first_stride in STAGES:
            out = scale_channels(out_channels, width)
            for stride in (first_stride, *[1] * (count - 1)):
                blocks.append(InvertedResidual(channels, out, expansion, stride, **options))
                channels = out
        last = scale_channels(LAST, max(1.0, width))
        self.features = Sequential(*blocks, _conv_bn_relu(channels, last, 1, **options))
        self.classifier = Linear(last, num_classes, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(means_of_maps(self.features(x)))


def _conv_bn_relu(channels: int, out: int, *shape: int, **options: Any) -> Sequential:
    convolution = conv(channels, out, *shape, **options)
    return Sequential(convolution, BatchNorm2d(out, dtype=options["dtype"]), ReLU())


def mobilenet_v1(
    num_classes: int = 10,
    width: float = 1.0,
    *,
    rng: np.random.Generator,
    dtype: Any = np.float32,
) -> MobileNetV1:
    """MobileNet-V1 for 32 x 32 images. ``width`` scales the channels of every layer."""
    return MobileNetV1(num_classes, width, rng, dtype)


def mobilenet_v2(
    num_classes: int = 10,
    width: float = 1.0,
    *,
    rng: np.random.Generator,
    dtype: Any = np.float32,
) -> MobileNetV2:
    """MobileNet-V2 for 32 x 32 images. ``width`` scales the channels of every layer; those that
    the classifier reads only if it is above 1."""
    return MobileNetV2(num_classes, width, rng, dtype)
