"""Arrays and gradients: the reverse-mode automatic differentiation engine.

Read in this order: ``graph`` (functions, their order, the backward pass), ``tensor``, ``ops``;
``windows``, ``conv``, ``im2col``, ``winograd``, ``pooling``; ``norm``. Four modules serve the
others: ``numbers`` (what a dtype means in an operation), ``threads`` (blocks of large arrays,
shared among threads), ``memory`` (large arrays used again) and ``backend``, the one place that
knows about GPUs.
"""

from minihyperflows.engine.backend import cuda_available
from minihyperflows.engine.errors import (
    DeviceError,
    DoubtfulResultWarning,
    GraphError,
    NonFiniteLossError,
    ShapeError,
)
from minihyperflows.engine.graph import Function, no_grad
from minihyperflows.engine.tensor import Tensor, apply

__all__ = [
    "DeviceError",
    "DoubtfulResultWarning",
    "Function",
    "GraphError",
    "NonFiniteLossError",
    "ShapeError",
    "Tensor",
    "apply",
    "cuda_available",
    "no_grad",
]
