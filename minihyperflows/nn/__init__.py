"""Networks: modules, layers, initial values."""

from minihyperflows.nn import init, models, optim
from minihyperflows.nn.flattening import from_torch_flatten, to_torch_flatten
from minihyperflows.nn.layers import (
    AvgPool2d,
    BatchNorm2d,
    Conv2d,
    Flatten,
    Linear,
    MaxPool2d,
    ReLU,
    Sequential,
    Weighted,
    weight_groups,
    weighted_layers,
)
from minihyperflows.nn.module import Buffer, Module, Parameter

__all__ = [
    "AvgPool2d",
    "BatchNorm2d",
    "Buffer",
    "Conv2d",
    "Flatten",
    "Linear",
    "MaxPool2d",
    "Module",
    "Parameter",
    "ReLU",
    "Sequential",
    "Weighted",
    "from_torch_flatten",
    "init",
    "models",
    "optim",
    "to_torch_flatten",
    "weight_groups",
    "weighted_layers",
]
