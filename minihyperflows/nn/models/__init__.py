"""Whole networks, built for images of MNIST's and CIFAR's sizes."""

from minihyperflows.nn.models.lenet import LeNet300, lenet300
from minihyperflows.nn.models.mobilenet import (
    MobileNetV1,
    MobileNetV2,
    mobilenet_v1,
    mobilenet_v2,
)
from minihyperflows.nn.models.resnets import ResNet, resnet, resnet50
from minihyperflows.nn.models.vgg import VGG, vgg13, vgg19

__all__ = [
    "VGG",
    "LeNet300",
    "MobileNetV1",
    "MobileNetV2",
    "ResNet",
    "lenet300",
    "mobilenet_v1",
    "mobilenet_v2",
    "resnet",
    "resnet50",
    "vgg13",
    "vgg19",
]
