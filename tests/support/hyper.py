"""Networks of hypernetworks for tests."""

from __future__ import annotations

from typing import Any

import numpy as np

from minihyperflows import models, nn
from minihyperflows.related.dhp import HyperNetwork
from minihyperflows.related.dhp.network import GeneratedWeight

IMAGE = (32, 32, 3)


def build(name: str, rng: np.random.Generator, dtype: Any = np.float32) -> nn.Module:
    """A model; ResNet-20 and larger in full, the others narrow."""
    if name.startswith("resnet"):
        return models.resnet(int(name[6:]), rng=rng, dtype=dtype)
    if name == "lenet300":
        return models.lenet300(3 * 32 * 32, rng=rng, dtype=dtype)
    return getattr(models, name)(width=0.125, rng=rng, dtype=dtype)


def hyper_network(name: str, dtype: Any = np.float32, **options: Any) -> HyperNetwork:
    rng = np.random.default_rng(0)
    return HyperNetwork(build(name, rng, dtype), IMAGE, rng=rng, **options)


def latent_of_outputs(network: HyperNetwork) -> dict[str, nn.Parameter]:
    """For each layer the latent vector that its hypernetwork takes for its outputs."""
    return {name: gate.z_out for name, gate in gates(network).items()}


def gates(network: HyperNetwork) -> dict[str, GeneratedWeight]:
    found = {}
    for name, layer in network.net.named_modules():
        if isinstance(layer, nn.Weighted) and isinstance(layer.weight_gate, GeneratedWeight):
            found[name] = layer.weight_gate
    return found


def scatter_latents(network: HyperNetwork, seed: int = 1) -> None:
    """Latents around the threshold: about 60 % above."""
    rng = np.random.default_rng(seed)
    for latent in network.latents.values():
        latent.data[...] = 0.01 * rng.standard_normal(latent.shape)
