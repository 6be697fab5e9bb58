"""From a searched network to an ordinary, narrower one, and its batch norm's statistics."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping

import numpy as np

from minihyperflows.engine.backend import xp_of
from minihyperflows.engine.graph import no_grad
from minihyperflows.engine.tensor import Tensor
from minihyperflows.nn import BatchNorm2d, Module, weighted_layers
from minihyperflows.nn.restore import in_mode, restored
from minihyperflows.related.cutting import cut
from minihyperflows.related.dhp.network import GeneratedWeight, HyperNetwork


def extract(network: HyperNetwork, keep: Mapping[str, np.ndarray] | None = None) -> Module:
    """An ordinary network of the channels that survive, with the weights as generated for them.

    A copy: the search may go on. Rows and columns of generated weights are what a hypernetwork with
    fewer rows and columns would generate (16.14), so the weights are generated whole and cut.

    What the copy computes differs from what ``network`` does as far as the cut channels still
    contributed. It is then trained like any other network; the authors take their full schedule,
    with a new optimiser.

    Args:
        network: after a search.
        keep: masks of the channels to keep, by group; None: ``network.kept()``.
    """
    net = generated(network)
    cut(net, network.groups, network.kept() if keep is None else keep)
    return net


def reestimate_norms(net: Module, batches: Iterable[Tensor]) -> None:
    """Make running statistics the means of the statistics of ``batches``, in place.

    Those of a network that was just cut are what its layers received before. No weight changes, so
    this tells how much of the function gap is a matter of statistics. Modes are put back. A norm
    that the network uses several times has the mean over all uses.
    """
    norms = [m for _, m in net.named_modules() if isinstance(m, BatchNorm2d)]
    momenta = restored([(norm, "momentum") for norm in norms])
    with no_grad(), in_mode(net, training=True), momenta:
        for k, x in enumerate(batches):
            if k == 0:
                _begin_means(norms)
            net(x)


def _begin_means(norms: Iterable[BatchNorm2d]) -> None:
    """Let the running statistics be the means of all batches from here on."""
    for norm in norms:
        norm.momentum, seen = None, norm.num_batches_tracked
        seen.data = xp_of(seen.data).zeros_like(seen.data)


def generated(network: HyperNetwork) -> Module:
    """An ordinary network with the generated weights, not cut, that computes the same: a copy."""
    net = copy.deepcopy(network).net
    layers = [
        m for m in weighted_layers(net).values() if isinstance(m.weight_gate, GeneratedWeight)
    ]
    with no_grad():
        weights = [layer.effective_weight().data for layer in layers]
    for layer, weight in zip(layers, weights, strict=True):
        layer.weight.data, layer.weight.role, layer.weight_gate = weight, "weight", None
    net.zero_grad()
    return net
