"""Whole networks, built for images of MNIST's and CIFAR's sizes."""

from minihyperflows.nn.models.lenet import LeNet300, lenet300

__all__ = ["LeNet300", "lenet300"]
