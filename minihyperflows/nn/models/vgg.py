"""VGG with batch norm, for 32 x 32 images (Simonyan & Zisserman 2015; CIFAR form)."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np

from minihyperflows import functional as F
from minihyperflows.engine.tensor import Tensor
from minihyperflows.nn.layers import (
    AvgPool2d,
    BatchNorm2d,
    Linear,
    MaxPool2d,
    ReLU,
    Sequential,
)
from minihyperflows.nn.models.blocks import check_stem_stride, conv, scale_channels
from minihyperflows.nn.module import Module

Plan: TypeAlias = tuple[int | str, ...]

# Output channels of the 3x3 convolutions; "M" halves the map.
VGG13: Plan = (64, 64, "M", 128, 128, "M", 256, 256, "M", 512, 512, "M", 512, 512)
VGG19: Plan = (64, 64, "M", 128, 128, "M", *[256] * 4, "M", *[512] * 4, "M", *[512] * 4)


class VGG(Module):
    """3x3 convolutions, each with batch norm and ReLU; an average of the last map; a linear layer.

    The layers' names are torchvision's (``features.0.weight``, ...), where convolutions have a
    bias; here batch norm takes its place. Maps of 32, 16, 8, 4 and 2 pixels; the fifth pooling of
    the original is a 2x2 average. With a stride of 2 in the first convolution they are 16, 8, 4, 2
    and 1, and nothing is left to average.
    """

    def __init__(
        self,
        plan: Plan,
        num_classes: int,
        width: float,
        rng: np.random.Generator,
        dtype: Any,
        stem_stride: int = 1,
    ) -> None:
        check_stem_stride(stem_stride, (1, 2))
        layers: list[Module] = []
        channels, stride = 3, stem_stride
        for item in plan:
            if isinstance(item, str):
                layers.append(MaxPool2d(2))
                continue
            out = scale_channels(item, width)
            layers.append(conv(channels, out, 3, stride, rng=rng, dtype=dtype))
            layers += [BatchNorm2d(out, dtype=dtype), ReLU()]
            channels, stride = out, 1
        self.features = Sequential(*layers)
        self.pool = AvgPool2d(2 // stem_stride)
        self.classifier = Linear(channels, num_classes, rng=rng, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(F.flatten(self.pool(self.features(x))))


def vgg13(
    num_classes: int = 10,
    width: float = 1.0,
    *,
    rng: np.random.Generator,
    dtype: Any = np.float32,
) -> VGG:
    """VGG-13 for 32 x 32 images. ``width`` scales the channels of every layer."""
    return VGG(VGG13, num_classes, width, rng, dtype)


def vgg19(
    num_classes: int = 10,
    width: float = 1.0,
    *,
    stem_stride: int = 1,
    rng: np.random.Generator,
    dtype: Any = np.float32,
) -> VGG:
    """VGG-19 for 32 x 32 images: 20,024,000 weights that pruning can gate (ten classes).

    Args:
        num_classes: the outputs of the linear layer.
        width: scales the channels of every layer.
        stem_stride: stride of the first convolution, 1 or 2. With 2 all maps have half the side,
            so a step costs a quarter: for CPUs. The weights are the same.
        rng: draws the initial weights.
        dtype: of weights and activations.

    Raises:
        ValueError: another stem_stride, or a width that is not positive.
    """
    return VGG(VGG19, num_classes, width, rng, dtype, stem_stride)
