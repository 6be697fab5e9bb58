"""The support of a weight: minus the flux it has while it is removed (chapter 07).

    s = -kappa w dL/dw'  at w' = 0,

averaged over the training set at fixed topology. The pressure gamma / N outweighs it or not.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from minihyperflows import flows
from minihyperflows import functional as F
from minihyperflows.data.datasets import Dataset, normalise
from minihyperflows.engine import Tensor
from minihyperflows.flows.gates import is_present
from minihyperflows.nn import Module

CHUNK = 2000  # images at a time


@dataclasses.dataclass(frozen=True)
class Supports:
    """The supports of a network's weights, each counted as often as it stands for others.

    Attributes:
        values: s for every removed weight, and for a sample of the present ones.
        counts: 1 for a removed weight; for one of n present weights of which k are in the sample,
            n / k.
    """

    values: np.ndarray
    counts: np.ndarray

    def above(self, push: float) -> float:
        """The fraction of all weights whose support is larger than ``push``."""
        return float(self.counts[self.values > push].sum() / self.counts.sum())

    def presence(self, push: float) -> float:
        """The density if each weight is absent for the share push / s of the time, and those with
        s <= push for good."""
        wanted = self.values > push
        share = 1 - push / self.values[wanted]
        return float((self.counts[wanted] * share).sum() / self.counts.sum())

    def balance(self, density: float) -> float:
        """The push that just the fraction ``density`` of all weights outweighs."""
        order = np.argsort(-self.values)
        reached = np.cumsum(self.counts[order]) / self.counts.sum()
        last = min(int(np.searchsorted(reached, density)), order.size - 1)
        return float(self.values[order[last]])


def supports(
    net: Module,
    data: Dataset,
    label_smoothing: float,
    rng: np.random.Generator,
    sample: int = 200,
    images: int = 2000,
) -> Supports:
    """Measure the supports of a network with gates.

    Args:
        net: it is left as it was.
        data: the removed weights' support is the mean over its training set.
        label_smoothing: of the loss.
        rng: draws which present weights are sampled, and the images for them.
        sample: how many present weights to remove and measure, one at a time.
        images: on how many training images (the same for all of them).
    """
    everything = np.arange(len(data.train_y))
    removed = [-flux[~mask] for flux, mask in _fluxes(net, data, everything, label_smoothing)]
    layers = list(flows.presences(net).values())
    present = [(k, i) for k, t in enumerate(layers) for i in np.flatnonzero(is_present(t.data))]
    chosen = rng.permutation(len(present))[:sample]
    some = rng.permutation(everything)[:images]
    values = []
    for k, i in (present[c] for c in chosen):
        t = layers[k].data.reshape(-1)  # a view
        kept, t[i] = t[i], -1.0
        flux, _ = _fluxes(net, data, some, label_smoothing)[k]
        values.append(-flux.reshape(-1)[i])
        t[i] = kept
    off = np.concatenate(removed)
    share = len(present) / max(1, len(values))
    return Supports(
        np.concatenate([off, np.array(values)]).astype(np.float64),
        np.concatenate([np.ones(off.size), np.full(len(values), share)]),
    )


def _fluxes(
    net: Module, data: Dataset, chosen: np.ndarray, label_smoothing: float
) -> list[tuple[np.ndarray, np.ndarray]]:
    """(mean flux, mask) of each gated layer over the chosen training images."""
    layers = list(flows.presences(net).values())
    totals = [np.zeros(t.shape, t.dtype) for t in layers]
    for start in range(0, len(chosen), CHUNK):
        part = chosen[start : start + CHUNK]
        net.zero_grad()
        x = Tensor(normalise(data.train_x[part], data, layers[0].dtype))
        F.cross_entropy(net(x), data.train_y[part], label_smoothing).backward()
        for total, t in zip(totals, layers, strict=True):
            assert t.grad is not None
            total += t.grad * (len(part) / len(chosen))
    net.zero_grad()
    return [(total, is_present(t.data)) for total, t in zip(totals, layers, strict=True)]
