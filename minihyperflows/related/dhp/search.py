"""The search: train latents and hypernetworks, shrink the latents, stop at the FLOPs target."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from minihyperflows.engine.backend import Array, xp_of
from minihyperflows.nn import Parameter
from minihyperflows.nn.optim import SGD, Optimizer
from minihyperflows.related.dhp.network import THRESHOLD, HyperNetwork
from minihyperflows.related.dhp.shrinkage import soft_threshold


@dataclass
class Search:
    """The searching stage of DHP, one step at a time::

        search = Search(network, target=0.5, l1=2e-4)
        for x, y in batches:
            network.zero_grad()
            F.cross_entropy(network(x), y).backward()
            search.step()
            if search.reached:
                break

    Minimises L + wd / 2 |everything|^2 + lambda sum of |z|_1. A step is one of SGD for everything,
    latents included, and after it, outside the momentum, :func:`proximal_step` for every latent. No
    mask is applied to the network during the search. Source: the authors' code; the defaults are
    those of its CIFAR-10 scripts, where lambda is 2e-4 for ResNet-20, 3e-4 for ResNet-56 and 1e-4
    for ResNet-110 and -164, with 781 steps in an epoch and 100 epochs at most. For a search of a
    given length :meth:`~minihyperflows.related.dhp.FreeShrinkage.losing` says what to try.

    The search ends where the caller ends it: look at the ``ratio`` that it has reached.

    Attributes:
        network: what is searched.
        target: the fraction of the multiplications to keep.
        l1: lambda.
        lr: the learning rate, which may be changed between steps.
        momentum, weight_decay: of SGD.
        latent_decay: the weight decay of the latents; None: the same.
        stop_limit: the target counts as reached this much above it.
        check_every: steps between two looks at the multiplications. A large lambda needs a small
            number, or the search overshoots.
        proximal: the proximal operator, a function of the latent's values and tau = lr lambda.
        weight_optimizer, latent_optimizer: put others here for another rule, such as Adam.
        steps: how many there were.
        history: (steps, ratio) at the beginning and at every look.
    """

    network: HyperNetwork
    target: float
    l1: float
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    latent_decay: float | None = None
    stop_limit: float = 0.02
    check_every: int = 100
    proximal: Callable[[Array, float], Array] = soft_threshold
    weight_optimizer: Optimizer = field(init=False)
    latent_optimizer: Optimizer = field(init=False)
    steps: int = field(default=0, init=False)
    history: list[tuple[int, float]] = field(init=False)

    def __post_init__(self) -> None:
        decay = self.weight_decay if self.latent_decay is None else self.latent_decay
        latents = self.network.latents.values()
        self.weight_optimizer = SGD(
            self.network.parameters(), self.lr, self.momentum, self.weight_decay
        )
        self.latent_optimizer = SGD(latents, self.lr, self.momentum, decay)
        self.history = [(0, self.network.flops_ratio())]

    @property
    def ratio(self) -> float:
        """The fraction of the multiplications that was left at the last look."""
        return self.history[-1][1]

    @property
    def reached(self) -> bool:
        """Whether ratio - target <= stop_limit."""
        return self.ratio - self.target <= self.stop_limit

    def step(self) -> None:
        """One step along the gradients that are there, then the proximal step.

        Raises:
            ValueError: an optimiser has parameters that the network has not, as after
                :meth:`HyperNetwork.replace`: the new ones would never move.
        """
        self._check_optimizers()
        for optimizer in (self.weight_optimizer, self.latent_optimizer):
            optimizer.lr = self.lr
            optimizer.step()
        for name, latent in self.network.latents.items():
            floor, tau = self.network.floors[name], self.lr * self.l1
            proximal_step(latent, tau, self.network.threshold, floor, self.proximal)
        self.steps += 1
        if self.steps % self.check_every == 0:
            self.history.append((self.steps, self.network.flops_ratio()))

    def _check_optimizers(self) -> None:
        there = set(self.network.named_tensors().values())
        for optimizer in (self.weight_optimizer, self.latent_optimizer):
            if not there.issuperset(optimizer.params):
                raise ValueError(
                    "the network has other parameters than when the search began: replace "
                    "hypernetworks first, then make the Search"
                )

    def state_dict(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Everything that the next step depends on: arrays, and plain JSON values.

        The network is in it, the settings are not.
        """
        arrays: dict[str, np.ndarray] = {}
        for prefix, part in self._parts().items():
            arrays |= {f"{prefix}.{name}": value for name, value in part.state_dict().items()}
        return arrays, {"steps": self.steps, "history": self.history}

    def load_state_dict(self, arrays: Mapping[str, np.ndarray], values: Mapping[str, Any]) -> None:
        """Continue where the search whose :meth:`state_dict` this is stopped."""
        for prefix, part in self._parts().items():
            inside = {k: v for k, v in arrays.items() if k.startswith(f"{prefix}.")}
            part.load_state_dict({k.removeprefix(f"{prefix}."): v for k, v in inside.items()})
        self.steps = int(values["steps"])
        self.history = [(int(step), float(ratio)) for step, ratio in values["history"]]

    def _parts(self) -> dict[str, HyperNetwork | Optimizer]:
        return {
            "network": self.network,
            "weights": self.weight_optimizer,
            "latents": self.latent_optimizer,
        }


def proximal_step(
    latent: Parameter,
    tau: float,
    threshold: float = THRESHOLD,
    floor: int = 0,
    proximal: Callable[[Array, float], Array] = soft_threshold,
) -> None:
    """z <- proximal(z, tau) if more than ``floor`` entries of z have |z| >= threshold; in place.

    So a latent stops shrinking for good once only ``floor`` are left, which the loss and the weight
    decay still move.
    """
    z = latent.data
    alive = (abs(z) >= threshold).sum()
    z[...] = xp_of(z).where(alive > floor, proximal(z, tau), z)
