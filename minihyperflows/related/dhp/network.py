"""A network whose weights are made by hypernetworks, and which channels its latents would keep.

Every group of channels (``related.channels``) has one latent vector, so tensors that are added lose
the same channels, and a depthwise filter goes with its channel. The layers of the network stay as
they are: the ``weight_gate`` of each puts a generated weight in the place of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from minihyperflows import functional as F
from minihyperflows.engine.backend import to_numpy
from minihyperflows.engine.tensor import Tensor
from minihyperflows.nn import Linear, Module, Parameter, Weighted, weighted_layers
from minihyperflows.nn.counting import ceil_of
from minihyperflows.related.channels import (
    ChannelGroup,
    channel_groups,
    group_of_inputs,
    group_of_outputs,
    sizes,
)
from minihyperflows.related.dhp.cost import layer_costs, macs
from minihyperflows.related.dhp.layers import EMBEDDING, HyperLayer, draw_latent

REPLACED = "replaced"  # role of the weights of layers that compute with a generated one
THRESHOLD = 5e-3  # T: a latent of this size or more keeps its channel
MINIMUM = 4  # channels that every group keeps


@dataclass
class GeneratedWeight:
    """The ``weight_gate`` of one layer: puts the generated weight in the place of its own.

    Attributes:
        hypernetwork: makes the weight.
        z_in: one entry for each channel that the layer reads.
        z_out: one for each that it makes.
        repeats: inputs for each channel, k C + c for channel c: more than 1 after flattening.
    """

    hypernetwork: HyperLayer
    z_in: Parameter
    z_out: Parameter
    repeats: int = 1

    def __call__(self, weight: Tensor) -> Tensor:
        z_in = F.concatenate([self.z_in] * self.repeats) if self.repeats > 1 else self.z_in
        return self.hypernetwork.generate(z_in, self.z_out)


class HyperNetwork(Module):
    """``net`` with weights that hypernetworks generate; calling it calls ``net``.

    The linear layer that makes the network's outputs keeps its own weight, as does any other whose
    outputs cannot be removed; so do batch norms, biases, and layers that the network does not use.
    Layers that share a weight share a hypernetwork, which has the name of the first.
    ``parameters()`` and ``latents`` together are all that is trained; the weights that are not used
    any more have a role of their own, "replaced", and stay as they are.

    A latent belongs to a group of channels and has its name. In place of the latent of what it
    reads, a depthwise convolution has one of its own with one entry, ``"<layer>.input"``.

    Args:
        net: an ordinary network; its layers get their gates.
        input_shape: of one image, (H, W, C).
        embedding: m, the numbers between latent matrix and weight.
        hyper_bias: whether the hypernetworks have biases, as the authors' have.
        threshold: T, the smallest |z| that keeps a channel; may be changed later.
        minimum: the number of channels that every group keeps.
        classifier_keeps: the fraction of the last layer's input channels to keep at least. With 1,
            the authors' choice for ResNets, none of them is pruned.
        rng: draws latents and hypernetworks.

    Attributes:
        groups: the groups of channels, by name.
        latents: the latent vectors, by name; their role is "latent".
        layers: the hypernetworks, by the name of the layer whose weight they make.
        floors: for each latent the number of entries that it keeps at least: all, if it is not to
            be pruned.
        costs: the multiplications of each layer, as functions of the widths. May be replaced, by
            :func:`~minihyperflows.related.dhp.cost.layer_weights`; then weights are what counts.

    Raises:
        ValueError: an option out of range, layers that have gates already, or channels that cannot
            be grouped.
    """

    def __init__(
        self,
        net: Module,
        input_shape: tuple[int, ...],
        *,
        embedding: int = EMBEDDING,
        hyper_bias: bool = True,
        threshold: float = THRESHOLD,
        minimum: int = MINIMUM,
        classifier_keeps: float = 1.0,
        rng: np.random.Generator,
    ) -> None:
        if embedding < 1 or minimum < 1 or not 0 <= classifier_keeps <= 1:
            raise ValueError(
                f"embedding ({embedding}) and minimum ({minimum}) must be at least 1, "
                f"classifier_keeps ({classifier_keeps}) a fraction"
            )
        weighted = weighted_layers(net)
        if any(layer.weight_gate for layer in weighted.values()):
            raise ValueError("the network has gates already, and a layer has room for one only")
        self.net, self.threshold = net, threshold
        self.groups = channel_groups(net, input_shape)
        self.costs = layer_costs(net, input_shape, self.groups)
        self.latents: dict[str, Parameter] = {}
        self.layers: dict[str, HyperLayer] = {}
        made = group_of_outputs(self.groups)
        generated = {
            n: m
            for n, m in weighted.items()
            if n in made and not _makes_scores(m, self.groups[made[n]])
        }
        gates: dict[Parameter, GeneratedWeight] = {}  # layers that share a weight share its gate
        for name, layer in generated.items():
            if layer.weight not in gates:
                gates[layer.weight] = self._gate(name, layer, embedding, hyper_bias, rng)
            layer.weight_gate, layer.weight.role = gates[layer.weight], REPLACED
        ordinary = set(weighted) - set(generated)
        self.floors = {
            name: _floor(self.groups.get(name), latent.size, minimum, ordinary, classifier_keeps)
            for name, latent in self.latents.items()
        }
        if (device := next(iter(weighted.values())).weight.device) != "cpu":
            self.to(device)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def replace(self, layer: str, hypernetwork: HyperLayer) -> None:
        """Let another hypernetwork make the weight of the layer of this name; the latents stay.

        Do it before a :class:`Search` begins, whose optimiser lists the parameters that there are
        then. It need not be a :class:`HyperLayer`: a module with a method ``generate(z_in, z_out)``
        that returns the weight will do.

        Raises:
            ValueError: no hypernetwork makes the weight of such a layer.
        """
        if layer not in self.layers:
            made = ", ".join(self.layers)
            raise ValueError(f"no hypernetwork makes the weight of {layer!r}; they make {made}")
        gate = weighted_layers(self.net)[layer].weight_gate
        assert isinstance(gate, GeneratedWeight)
        self.layers[layer] = gate.hypernetwork = hypernetwork

    def _gate(
        self, name: str, layer: Weighted, embedding: int, bias: bool, rng: np.random.Generator
    ) -> GeneratedWeight:
        """The gate of the layer ``name``, with a new hypernetwork and the latents of its groups."""
        options: dict[str, Any] = {"rng": rng, "dtype": layer.weight.dtype}
        z_in, repeats = self._input_latent(name, layer, options)
        z_out = self._latent(group_of_outputs(self.groups)[name], layer.weight.shape[0], options)
        self.layers[name] = HyperLayer(layer.weight.shape, embedding, bias, **options)
        return GeneratedWeight(self.layers[name], z_in, z_out, repeats)

    def _latent(self, name: str, size: int, options: dict[str, Any]) -> Parameter:
        """The latent vector called ``name``, drawn if it is not there yet."""
        if name not in self.latents:
            self.latents[name] = draw_latent(size, **options)
        return self.latents[name]

    def _input_latent(
        self, name: str, layer: Weighted, options: dict[str, Any]
    ) -> tuple[Parameter, int]:
        """The latent of what a layer reads, and how many inputs there are for each entry."""
        group = self.groups[group_of_inputs(self.groups)[name]]
        if name in group.depthwise:
            return self._latent(f"{name}.input", 1, options), 1
        return self._latent(group.name, group.size, options), group.inputs[name]

    # -- what the latents would keep -------------------------------------------------------------

    def kept(self) -> dict[str, np.ndarray]:
        """For each group with a latent a boolean mask of the channels that survive.

        Channel i survives if |z_i| >= T, or if it is among the group's ``floors`` largest.
        """
        return {
            name: survivors(to_numpy(latent.data), self.threshold, self.floors[name])
            for name, latent in self.latents.items()
            if name in self.groups
        }

    def sizes(self) -> dict[str, int]:
        """The number of channels that there are, for every group."""
        return sizes(self.groups)

    def widths(self) -> dict[str, int]:
        """The number of channels that survive, for every group."""
        return self.sizes() | {name: int(mask.sum()) for name, mask in self.kept().items()}

    def flops_ratio(self) -> float:
        """Multiplications of the network with the surviving channels, over those of the whole."""
        return macs(self.costs, self.widths()) / macs(self.costs, self.sizes())

    def latent_counts(self) -> dict[str, LatentCount]:
        """How many entries of each latent are small, and how many are zero: not the same.

        A channel is cut when its latent is below the threshold, which may be before it is zero.
        """
        found = {name: abs(to_numpy(latent.data)) for name, latent in self.latents.items()}
        return {
            name: LatentCount(z.size, int((z < self.threshold).sum()), int((z == 0).sum()))
            for name, z in found.items()
        }


@dataclass(frozen=True)
class LatentCount:
    """The entries of one latent: all, those below the threshold, those that are exactly 0."""

    size: int
    below: int
    zero: int


def survivors(z: np.ndarray, threshold: float, floor: int) -> np.ndarray:
    """True where |z| >= threshold, and at the ``floor`` largest |z|; in a tie at the earlier ones.

    The authors write |z| >= min(threshold, the ``floor``-th largest |z|), which keeps every channel
    where that one is zero.
    """
    kept = abs(z) >= threshold
    kept[np.argsort(-abs(z), kind="stable")[:floor]] = True
    return kept


def _makes_scores(layer: Weighted, group: ChannelGroup) -> bool:
    """Whether this is a linear layer whose outputs must stay, such as a classifier."""
    return isinstance(layer, Linear) and not group.removable


def _floor(
    group: ChannelGroup | None, size: int, minimum: int, ordinary: set[str], keeps: float
) -> int:
    """The fewest entries that the latent of ``group`` (None: a layer's own) may be left with."""
    if group is None or not group.removable:
        return size
    wanted = ceil_of(keeps, size) if ordinary & set(group.inputs) else 0
    return min(size, max(minimum, wanted))
