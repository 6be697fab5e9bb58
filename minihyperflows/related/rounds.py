"""Prune, train, prune, train: the loop of iterative pruning by a score.

Each round trains, scores, and removes the lowest of one ranking of the whole network; then whoever
runs the loop trains what is left to the end. Training and scoring are handed in as functions, since
data, learning rates and epochs are the business of the caller. So ``train`` makes a new optimiser
each time, as Lubana & Dick 2021 do::

    def score(net):
        return importance(net, x, labels, "loss_preservation", "filter", temperature=5, mode="eval")

    for pruned in prune_filters(net, (32, 32, 3), 0.75, rounds=5, train=one_epoch, score=score):
        net = pruned.net
    finish_training(net)
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

import numpy as np

from minihyperflows.nn.layers import weight_groups, weighted_layers
from minihyperflows.nn.module import Module
from minihyperflows.related.channels import ChannelGroup, channel_groups
from minihyperflows.related.filters import (
    channel_scores,
    check_combine,
    fewest,
    remove_filters,
    widths,
)
from minihyperflows.related.pruners import attach_masks
from minihyperflows.related.ranking import Masks, keep_highest, kept_fraction, least_of

Train: TypeAlias = Callable[[Module], object]
Scores: TypeAlias = Callable[[Module], Mapping[str, np.ndarray]]


@dataclass(frozen=True)
class Round:
    """What a round of pruning leaves.

    Attributes:
        number: of the round, from 1.
        net: the network to go on with; a new one where filters were removed.
        keep: what stays of what the round began with, as boolean masks: by layer for weights, by
            group of channels for filters.
        kept, total: how many weights or channels there are now, and were before the first round.
    """

    number: int
    net: Module
    keep: Masks
    kept: int
    total: int

    @property
    def sparsity(self) -> float:
        """The fraction that has been removed."""
        return 1 - self.kept / self.total


def prune_weights(
    net: Module,
    sparsity: float,
    rounds: int,
    train: Train,
    score: Scores,
    *,
    least: int = 0,
    exclude: Collection[str] = (),
) -> Iterator[Round]:
    """Remove single weights in ``rounds`` rounds, until the fraction ``sparsity`` is gone.

    The layers of ``net`` get masks, which stay on for the training after the last round. Removed
    weights stay removed. :func:`finish` writes the zeros.

    Args:
        net: a network without masks or gates.
        sparsity: P, of the weights of all layers that are not excluded.
        rounds: n; after round k the fraction :func:`~ranking.kept_fraction` is left, rounded.
        train: trains the network, in place, before each round; it may do nothing, for pruning at
            initialisation.
        score: gives the scores of the network's weights, keyed like ``named_parameters()``.
        least: so many weights of each layer stay, whatever their scores; with 0 a layer may vanish.
        exclude: names of layers that are not pruned, nor others that share their weights.

    Raises:
        ValueError: at the call, before anything is trained or masked: there are no such rounds, no
            such sparsity, or no such layers; or more must stay than is left. In the first round:
            the layers have masks or gates already.
    """
    layers = weighted_layers(net)
    if unknown := sorted(set(exclude) - set(layers)):
        raise ValueError(f"no layer {', '.join(unknown)} to exclude: there are {', '.join(layers)}")
    excluded = {layers[name].weight for name in exclude}
    weights = {name: group[0].weight for name, group in weight_groups(net).items()}
    sizes = {name: weight.size for name, weight in weights.items() if weight not in excluded}
    course = _course(sizes, dict.fromkeys(sizes, least), sparsity, rounds)
    return _weights_in_rounds(net, list(sizes), course, train, score, least)


def _course(
    sizes: Mapping[str, int], safe: Mapping[str, int], sparsity: float, rounds: int
) -> list[int]:
    """How many of all are kept after each round; so many of each, if they exist, are safe."""
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, not {rounds}")
    if not sizes:
        raise ValueError("nothing to prune: no layer or group of channels may lose anything")
    total, fixed = sum(sizes.values()), sum(min(safe[n], size) for n, size in sizes.items())
    course = [round(kept_fraction(k, rounds, sparsity) * total) for k in range(1, rounds + 1)]
    if course[-1] < fixed:
        raise ValueError(
            f"a sparsity of {sparsity:g} leaves {course[-1]} of {total}, but {fixed} must stay: "
            "lower the sparsity or least"
        )
    return course


def _weights_in_rounds(
    net: Module,
    layers: Sequence[str],
    course: Sequence[int],
    train: Train,
    score: Scores,
    least: int,
) -> Iterator[Round]:
    """The rounds after which there are as many weights as ``course`` says."""
    attached = attach_masks(net)
    masks = {name: attached[name] for name in layers}
    total = sum(mask.present.size for mask in masks.values())
    for k, kept in enumerate(course, start=1):
        train(net)
        found = score(net)
        scores = {name: found[f"{name}.weight"] for name in masks}
        present = {name: mask.present for name, mask in masks.items()}
        keep = keep_highest(scores, kept, least, present)
        for name, mask in masks.items():
            mask.present = keep[name]
        yield Round(k, net, keep, kept, total)


def finish(net: Module) -> None:
    """Write the zeros of the masks into the weights and take the masks off: the same function."""
    for layer in weighted_layers(net).values():
        if layer.weight_gate is not None:
            layer.weight.data = layer.effective_weight().data
            layer.weight_gate = None


def prune_filters(
    net: Module,
    input_shape: tuple[int, ...],
    sparsity: float,
    rounds: int,
    train: Train,
    score: Scores,
    *,
    combine: str = "mean",
    least: int | Mapping[str, int] = 1,
) -> Iterator[Round]:
    """Remove channels in ``rounds`` rounds, until the fraction ``sparsity`` is gone.

    Every round makes a smaller network; the one handed in is trained before the first, and then
    left alone. Channels that only exist together, around residual blocks and depthwise layers,
    count once.

    Args:
        net: the network to begin with.
        input_shape: of one image, (H, W, C).
        sparsity: P, of the channels of all groups that can be pruned.
        rounds: n; after round k the fraction :func:`~ranking.kept_fraction` is left, rounded.
        train: trains a network, in place, before each round.
        score: gives (C,) scores of a network's filters, keyed like ``named_parameters()``.
        combine: how the filters of a group share a score; see :func:`~filters.channel_scores`.
        least: how many channels of each group stay in any case: one number, or one for every group
            by name. It counts as :func:`~filters.fewest` where it is less.

    Raises:
        ValueError: at the call, before anything is trained: there are no such rounds, no such
            sparsity, no such way to combine, or no such groups; or more must stay than is left.
    """
    check_combine(combine)
    groups = channel_groups(net, input_shape)
    safe = _safe(groups, least)
    course = _course(widths(groups), safe, sparsity, rounds)
    plan = [(kept, safe) for kept in course]
    return _filters_in_rounds(net, input_shape, plan, train, score, combine)


def prune_to_widths(
    net: Module,
    input_shape: tuple[int, ...],
    goals: Sequence[Mapping[str, int]],
    train: Train,
    score: Scores,
    *,
    combine: str = "mean",
) -> Iterator[Round]:
    """Remove channels until each group has a given number: the score ranks only within groups.

    With random scores and the widths that another score has led to, it is the control that tells
    the choice of widths from the choice of filters.

    Args:
        net, input_shape, train, score, combine: as for :func:`prune_filters`.
        goals: for each round how many channels to keep of each group that can be pruned, no more
            than before; at least :func:`~filters.fewest` are kept.

    Raises:
        ValueError: at the call, before anything is trained: goals for other groups, or with more
            channels than there are; no such way to combine.
    """
    check_combine(combine)
    groups = channel_groups(net, input_shape)
    safe = [_safe(groups, goal) for goal in goals]
    for before, after in pairwise([widths(groups), *safe]):
        if more := [name for name in after if after[name] > before[name]]:
            name = more[0]
            raise ValueError(f"{name}: {after[name]} of {before[name]} channels cannot be kept")
    plan = [(sum(goal.values()), goal) for goal in safe]
    return _filters_in_rounds(net, input_shape, plan, train, score, combine)


def _safe(groups: Mapping[str, ChannelGroup], least: int | Mapping[str, int]) -> dict[str, int]:
    """How many channels of each group stay in any case."""
    sizes = widths(groups)
    if isinstance(least, Mapping) and set(least) != set(sizes):
        raise ValueError(
            f"numbers of channels are needed for the groups {', '.join(sizes)}, there are some for "
            f"{', '.join(least)}"
        )
    return {name: max(least_of(least, name), fewest(groups[name])) for name in sizes}


def _filters_in_rounds(
    net: Module,
    input_shape: tuple[int, ...],
    plan: Sequence[tuple[int, Mapping[str, int]]],
    train: Train,
    score: Scores,
    combine: str,
) -> Iterator[Round]:
    """A round for each (kept, safe) of ``plan``: so many channels in all, and so many of each group
    in any case."""
    total = sum(widths(channel_groups(net, input_shape)).values())
    for k, (kept, safe) in enumerate(plan, start=1):
        train(net)
        scores = channel_scores(score(net), channel_groups(net, input_shape), combine)
        keep = keep_highest(scores, kept, safe)
        net = remove_filters(net, keep, input_shape)
        yield Round(k, net, keep, kept, total)
