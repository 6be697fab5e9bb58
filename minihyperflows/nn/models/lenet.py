"""LeNet-300-100: the classic fully connected network of the pruning literature."""

from __future__ import annotations

from typing import Any

import numpy as np

from minihyperflows import functional as F
from minihyperflows.engine.tensor import Tensor
from minihyperflows.nn.layers import Linear
from minihyperflows.nn.module import Module


class LeNet300(Module):
    """in -> 300 -> 100 -> classes with ReLU between. 266,200 weights for MNIST's 784 inputs."""

    def __init__(
        self, in_features: int, num_classes: int, rng: np.random.Generator, dtype: Any
    ) -> None:
        self.fc1 = Linear(in_features, 300, rng=rng, dtype=dtype)
        self.fc2 = Linear(300, 100, rng=rng, dtype=dtype)
        self.fc3 = Linear(100, num_classes, rng=rng, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.fc1(F.flatten(x)))
        return self.fc3(F.relu(self.fc2(x)))


def lenet300(
    in_features: int = 784,
    num_classes: int = 10,
    *,
    rng: np.random.Generator,
    dtype: Any = np.float32,
) -> LeNet300:
    """A LeNet-300-100 with layers ``fc1``, ``fc2``, ``fc3``. Flattens its input (N, ...)."""
    return LeNet300(in_features, num_classes, rng, dtype)
