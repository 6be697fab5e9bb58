"""MobileNet-V1 for 32 x 32 images (Howard et al. 2017)."""

from __future__ import annotations

from typing import Any

import numpy as np

from minihyperflows import functional as F
from minihyperflows.engine.tensor import Tensor
from minihyperflows.nn.layers import BatchNorm2d, Linear, ReLU, Sequential
from minihyperflows.nn.models.blocks import conv, scale_channels
from minihyperflows.nn.module import Module

# (output channels, stride) of the thirteen separable convolutions
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
        x = self.features(x)
        _, rows, columns, _ = x.shape
        return self.classifier(F.flatten(F.avg_pool2d(x, (rows, columns))))


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
