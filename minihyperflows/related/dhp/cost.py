"""Multiplications of a network as a function of the number of channels in each group."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from minihyperflows.nn import Module, weighted_layers
from minihyperflows.nn.counting import layer_uses
from minihyperflows.related.channels import ChannelGroup, group_of_inputs, group_of_outputs, sizes


@dataclass(frozen=True)
class LayerCost:
    """The multiplications that one layer needs for one image, for any widths.

    Attributes:
        layer: its name.
        outputs: the group of the channels that it makes.
        inputs: the group that it reads; None for a depthwise layer, which has one input per output.
        per_pair: multiplications for each pair of channels: H' W' kH kW, or the inputs that a
            linear layer has for each channel.
        per_output: those of the batch norm behind it, 2 H' W' for each channel; 0 without one.
    """

    layer: str
    outputs: str
    inputs: str | None
    per_pair: int
    per_output: int

    def macs(self, widths: Mapping[str, int], norms: bool = False) -> int:
        """Multiplications of the layer, with ``norms`` those of its batch norm too."""
        read = 1 if self.inputs is None else widths[self.inputs]
        return widths[self.outputs] * (self.per_pair * read + self.per_output * norms)


def macs(costs: Sequence[LayerCost], widths: Mapping[str, int], norms: bool = False) -> int:
    """Multiplications (each with its addition: MACs) that one image needs, (16.13).

    Convolutions and linear layers without their biases. The authors' code counts batch norm as
    well, 2 C H W: that is ``norms``, about 1 % of a ResNet-20, and hardly changes a ratio.
    """
    return sum(cost.macs(widths, norms) for cost in costs)


def widths_at(
    ratio: float,
    costs: Sequence[LayerCost],
    groups: Mapping[str, ChannelGroup],
    floors: Mapping[str, int] | None = None,
    shares: Mapping[str, float] | None = None,
) -> dict[str, int]:
    """Widths that cost at most ``ratio`` of the multiplications: a control for a search.

    Every removable group gets the same fraction s of its channels, or s times its share: random
    shares give random widths. s is the largest that costs no more; widths are rounded.

    Args:
        ratio: the multiplications to keep, over those of the whole network.
        costs: of the layers.
        groups: of the channels.
        floors: the fewest channels of some groups, 1 for the others: with ``HyperNetwork.floors``
            the control keeps whole what the search keeps whole.
        shares: of some groups, in [0, 1]; 1 for the others.

    Raises:
        ValueError: the fewest channels cost more.
    """
    floors, shares = floors or {}, shares or {}
    whole = sizes(groups)

    def widths(s: float) -> dict[str, int]:
        scaled = {n: max(floors.get(n, 1), round(s * shares.get(n, 1.0) * whole[n])) for n in whole}
        return {n: min(scaled[n], c) if groups[n].removable else c for n, c in whole.items()}

    # A ratio a / b, times b, may be rounded to just below a: the widths that cost a must pass.
    limit = ratio * macs(costs, whole) * (1 + 1e-12)
    if macs(costs, widths(0.0)) > limit:
        raise ValueError(f"the fewest channels cost more than {ratio} of the multiplications")
    low, high = 0.0, 1 / min([share for share in shares.values() if share > 0], default=1)
    if macs(costs, widths(high)) <= limit:
        return widths(high)
    for _ in range(50):  # halve the interval that s lies in
        middle = (low + high) / 2
        low, high = (middle, high) if macs(costs, widths(middle)) <= limit else (low, middle)
    return widths(low)


def layer_costs(
    net: Module, input_shape: tuple[int, ...], groups: Mapping[str, ChannelGroup]
) -> list[LayerCost]:
    """The costs of the convolutions and linear layers of ``net``, in the order of computation.

    A layer that is used several times costs that much more; one that is not used is left out. Every
    layer whose outputs are in a group with batch norms is taken to be followed by one.

    Args:
        net: without gates.
        input_shape: of one image, (H, W, C).
        groups: :func:`~minihyperflows.related.channels.channel_groups` of ``net``.
    """
    return _costs(net, groups, output_pixels(net, input_shape))


def layer_weights(net: Module, groups: Mapping[str, ChannelGroup]) -> list[LayerCost]:
    """The same for the weights themselves: :func:`macs` of these is the number of weights.

    So whatever counts multiplications counts weights instead (and with ``norms`` the scales and
    shifts behind them).
    """
    made = group_of_outputs(groups)
    tied = {layer for group in groups.values() for layer in group.tied}
    counted = [name for name in weighted_layers(net) if name in made and name not in tied]
    return _costs(net, groups, dict.fromkeys(counted, 1))


def output_pixels(net: Module, input_shape: tuple[int, ...]) -> dict[str, int]:
    """H' W' of the outputs of each convolution, 1 for a linear layer, in the order of computation.

    In how many multiplications every weight of the layer takes part, in all its uses together.
    """
    pixels: dict[str, int] = {}
    for name, function in layer_uses(net, input_shape):
        pixels[name] = pixels.get(name, 0) + math.prod(function.output_shape[:-1])
    return pixels


def _costs(
    net: Module, groups: Mapping[str, ChannelGroup], pixels: Mapping[str, int]
) -> list[LayerCost]:
    """The costs, if a weight of a layer takes part in ``pixels`` multiplications."""
    layers = weighted_layers(net)
    made, read = group_of_outputs(groups), group_of_inputs(groups)
    costs = []
    for name, places in pixels.items():
        per_output = layers[name].weight[0].size
        group = groups[made[name]]
        depthwise = name in group.depthwise
        costs.append(
            LayerCost(
                layer=name,
                outputs=group.name,
                inputs=None if depthwise else read[name],
                per_pair=places * per_output // (1 if depthwise else groups[read[name]].size),
                per_output=2 * places if group.norms else 0,
            )
        )
    return costs
