"""Filters that go for good: a smaller ordinary network, and how to score what goes together."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from minihyperflows.engine.backend import to_device
from minihyperflows.nn.counting import floor_of
from minihyperflows.nn.module import Module
from minihyperflows.related.channels import ChannelGroup, channel_groups
from minihyperflows.related.cutting import checked, cut

COMBINATIONS: dict[str, Callable[..., np.ndarray]] = {"mean": np.mean, "sum": np.sum, "max": np.max}


def remove_filters(
    net: Module, keep: Mapping[str, np.ndarray], input_shape: tuple[int, ...]
) -> Module:
    """A smaller copy of ``net`` without the filters that ``keep`` leaves out.

    It computes what ``net`` computes with the outputs of those filters, behind batch norm and the
    activation f, set to zero. Where f(0) = 0, as for ReLU and tanh, this is what
    :func:`zero_filters` does; a sigmoid makes 1/2 of its zeros. Their batch norm's entries and the
    next layers' inputs are gone too, so the copy is an ordinary network, with fewer operations, to
    train with a new optimiser.

    Args:
        net: without gates or masks; it stays as it is.
        keep: for some of the :func:`~minihyperflows.related.channels.channel_groups` of ``net``, by
            name, a boolean mask (C,) of the channels to keep, at least one; :func:`fewest`, if the
            smaller network is to have the same groups.
        input_shape: of one image, (H, W, C).

    Raises:
        KeyError, ValueError: as :func:`~minihyperflows.related.cutting.cut`.
    """
    smaller = copy.deepcopy(net)
    cut(smaller, channel_groups(smaller, input_shape), keep)
    return smaller


def zero_filters(
    net: Module, keep: Mapping[str, np.ndarray], input_shape: tuple[int, ...]
) -> Module:
    """A copy of ``net`` of the same size in which the filters that ``keep`` leaves out give zeros.

    Their weights are 0, and so are the biases, scales and shifts behind them, so an activation
    makes f(0) of them: 0 for ReLU and tanh. Arguments and errors as for :func:`remove_filters`.
    """
    zeroed = copy.deepcopy(net)
    groups = channel_groups(zeroed, input_shape)
    modules: dict[str, Any] = dict(zeroed.named_modules())
    for name, mask in checked(zeroed, groups, keep).items():
        for member in (*groups[name].outputs, *groups[name].norms):
            for tensor in (modules[member].weight, modules[member].bias):
                if tensor is not None:
                    factor = mask.astype(tensor.dtype).reshape(-1, *[1] * (tensor.ndim - 1))
                    tensor.data = tensor.data * to_device(factor, tensor.device)
    return zeroed


def channel_scores(
    scores: Mapping[str, np.ndarray],
    groups: Mapping[str, ChannelGroup],
    combine: str = "mean",
) -> dict[str, np.ndarray]:
    """One score for each removable channel, (C,) by the names of the groups.

    A channel goes with all the filters that make it, one in each layer of its group. Their mean
    puts a residual stream on the footing of a layer inside a block; their sum is the first-order
    cost of the whole removal, where scores add up. Depthwise filters inherit the score of the
    channel that they filter, so they do not count (as in the code of Lubana & Dick 2021). A filter
    that layers share counts once.

    Args:
        scores: (C,) for each layer's weight, from ``importance(..., level="filter")``.
        groups: the network's.
        combine: "mean", "sum" or "max" over the layers of a group.
    """
    check_combine(combine)
    found = {}
    for name, group in groups.items():
        if group.removable:
            others = {*group.depthwise, *group.tied}
            makers = [layer for layer in group.outputs if layer not in others]
            stacked = np.stack([scores[f"{layer}.weight"] for layer in makers])
            found[name] = COMBINATIONS[combine](stacked, axis=0)
    return found


def check_combine(combine: str) -> None:
    """Raise a ValueError unless ``COMBINATIONS`` has it."""
    if combine not in COMBINATIONS:
        raise ValueError(f"combine must be one of {', '.join(COMBINATIONS)}, not {combine!r}")


def widths(groups: Mapping[str, ChannelGroup]) -> dict[str, int]:
    """How many channels each removable group has."""
    return {name: group.size for name, group in groups.items() if group.removable}


def safeguard(groups: Mapping[str, ChannelGroup], fraction: float = 0.05) -> dict[str, int]:
    """floor(fraction C) + 1 channels of each group, to keep in any case.

    The code of Lubana & Dick 2021 exempts so many filters of a layer, the last ones by index; here
    ``keep_highest(..., least=safeguard(groups))`` exempts the best. It is never less than
    :func:`fewest`.
    """
    return {
        name: max(floor_of(fraction, size) + 1, fewest(groups[name]))
        for name, size in widths(groups).items()
    }


def fewest(group: ChannelGroup) -> int:
    """How many channels a group must keep: 1, or 2 where that one would be something else.

    A depthwise convolution of one channel would be an ordinary one, whose output is a group of its
    own. And a single channel cannot be told from the attention map, or what else has one channel,
    that is broadcast over it: they would be one group. The network would have other groups in the
    next round.
    """
    return 2 if group.depthwise or group.stretched else 1
