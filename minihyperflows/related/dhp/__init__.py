"""DHP: widths found by gradient descent, through hypernetworks that generate the weights.

Each group of channels has a latent vector with one entry per channel, and each layer a small
hypernetwork that turns the latents of its inputs and outputs into its weight. Latents are trained
with everything else, and shrink; the network that is left when enough of them are small is trained
as an ordinary one::

    net = models.resnet(20, rng=rng)
    network = dhp.HyperNetwork(net, (32, 32, 3), rng=rng)
    search = dhp.Search(network, target=0.5, l1=2e-4)
    for x, y in batches:
        network.zero_grad()
        F.cross_entropy(network(x), y).backward()
        search.step()
        if search.reached:
            break
    compact = dhp.extract(network)  # an ordinary network, to be trained as any other

Source: Li, Gu, Zhang, Van Gool, Timofte, "DHP: differentiable meta pruning via hypernetworks",
ECCV 2020, arXiv 2003.13683, and the authors' code. Chapter 16.
"""

from minihyperflows.related.dhp.cost import (
    LayerCost,
    layer_costs,
    layer_weights,
    macs,
    output_pixels,
    widths_at,
)
from minihyperflows.related.dhp.extraction import extract, generated, reestimate_norms
from minihyperflows.related.dhp.layers import HyperLayer
from minihyperflows.related.dhp.network import HyperNetwork, LatentCount, survivors
from minihyperflows.related.dhp.search import Search, proximal_step
from minihyperflows.related.dhp.shrinkage import FreeShrinkage, shrink_norm, soft_threshold

__all__ = [
    "FreeShrinkage",
    "HyperLayer",
    "HyperNetwork",
    "LatentCount",
    "LayerCost",
    "Search",
    "extract",
    "generated",
    "layer_costs",
    "layer_weights",
    "macs",
    "output_pixels",
    "proximal_step",
    "reestimate_norms",
    "shrink_norm",
    "soft_threshold",
    "survivors",
    "widths_at",
]
