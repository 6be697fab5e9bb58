"""What the convolutional networks share."""

from __future__ import annotations

from typing import Any

import numpy as np

from minihyperflows import functional as F
from minihyperflows.engine.tensor import Tensor
from minihyperflows.nn import init
from minihyperflows.nn.layers import Conv2d


def scale_channels(channels: int, width: float) -> int:
    """``channels`` times ``width``, rounded, at least 1."""
    if not width > 0:
        raise ValueError(f"width must be positive, not {width}")
    return max(1, round(channels * width))


def check_stem_stride(stride: int, choices: tuple[int, ...]) -> None:
    """Raise ValueError, which names the ``choices``, for another stride of the first convolution.

    A stride above 1 is for small experiments on a CPU: every map of the network has stride^2 times
    fewer pixels, and the work falls with them, while the weights, what pruning is about, stay the
    same in number and shape.
    """
    if stride not in choices:
        names = f"{', '.join(map(str, choices[:-1]))} or {choices[-1]}"
        raise ValueError(f"stem_stride must be {names}, not {stride!r}")


def conv(
    in_channels: int,
    out_channels: int,
    size: int,
    stride: int = 1,
    groups: int = 1,
    *,
    rng: np.random.Generator,
    dtype: Any,
) -> Conv2d:
    """A convolution that keeps the size of the map (at stride 1), without a bias.

    The initial weights are He et al.'s (bound sqrt(6 / fan_in)), as in the authors' CIFAR scripts.
    """
    return Conv2d(
        in_channels,
        out_channels,
        size,
        stride,
        size // 2,
        groups,
        bias=False,
        weight_init=init.kaiming_uniform,
        rng=rng,
        dtype=dtype,
    )


def means_of_maps(x: Tensor) -> Tensor:
    """The mean of each map: (N, H, W, C) -> (N, C)."""
    _, rows, columns, _ = x.shape
    return F.flatten(F.avg_pool2d(x, (rows, columns)))
