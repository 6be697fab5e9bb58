"""The neighbours of Hyperflows: other answers to the question which weights matter."""

from minihyperflows.related import dhp
from minihyperflows.related.channels import ChannelGroup, channel_groups
from minihyperflows.related.derivatives import Landscape, gradient, hessian_gradient_product
from minihyperflows.related.filters import remove_filters
from minihyperflows.related.rounds import prune_filters, prune_weights
from minihyperflows.related.scores import SCORES, importance

__all__ = [
    "SCORES",
    "ChannelGroup",
    "Landscape",
    "channel_groups",
    "dhp",
    "gradient",
    "hessian_gradient_product",
    "importance",
    "prune_filters",
    "prune_weights",
    "remove_filters",
]
