"""The stages of a run, and the regrowth that ends exactly on the target.

dense -> pruning -> regrowth: train without gates; add gates and pressure; take the pressure away,
so that removed weights with enough flux come back (chapter 09).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from minihyperflows.engine.backend import Array, xp_of
from minihyperflows.flows.gate import is_present, presences
from minihyperflows.nn import Module

DENSE, PRUNING, REGROWTH = STAGES = ("dense", "pruning", "regrowth")


@dataclass(frozen=True)
class Timeline:
    """How many epochs each stage lasts. Epochs are counted from 1, stages follow each other."""

    dense: int
    pruning: int
    regrowth: int

    def __post_init__(self) -> None:
        if min(self.dense, self.regrowth) < 0 or self.pruning < 1:
            raise ValueError(f"a run needs at least one pruning epoch and none negative: {self}")

    @property
    def epochs(self) -> int:
        """The length of the whole run."""
        return self.dense + self.pruning + self.regrowth

    def locate(self, epoch: int) -> tuple[str, int]:
        """The stage of ``epoch`` and its number within that stage, from 1."""
        if not 1 <= epoch <= self.epochs:
            raise ValueError(f"epoch {epoch} is not in 1 ... {self.epochs}")
        if epoch <= self.dense:
            return DENSE, epoch
        if epoch <= self.dense + self.pruning:
            return PRUNING, epoch - self.dense
        return REGROWTH, epoch - self.dense - self.pruning


class RegrowthController:
    """Lets removed weights come back at an even pace until the density is the target's, then stops.

    Without pressure the density rises by an amount that depends on the network, the data and the
    learning rates, so no fixed starting point ends at a given sparsity. Therefore the pruning stage
    aims at a density below the target (a share of the final weights is left to regrowth), and this
    controller closes the gap by feedback: the density should rise along a straight line that
    reaches the target after half of the regrowth epochs, and each epoch the learning rate of t is
    doubled if the density is behind and halved if it is ahead. :func:`admit` then ends the regrowth
    on the very step at which the target is reached; from there on the topology is frozen.

    Args:
        target_density: where to stop.
        start_density: the density at the end of the pruning stage.
        epochs: length of the regrowth stage.
        lr_scale: factor on the learning rate of t in the first regrowth epoch.
    """

    FASTEST = 128.0  # the learning rate of t is never raised beyond this factor

    def __init__(
        self, target_density: float, start_density: float, epochs: int, lr_scale: float
    ) -> None:
        self.target_density, self.start_density = target_density, start_density
        self.epochs, self.lr_scale = epochs, lr_scale

    def expected(self, epoch: int) -> float:
        """The density that regrowth should have reached after ``epoch`` of its epochs."""
        progress = min(1.0, 2 * epoch / self.epochs)
        return self.start_density + (self.target_density - self.start_density) * progress

    def update(self, epoch: int, density: float) -> float:
        """Take the density after ``epoch`` (from 1) and return the factor for the next epoch."""
        factor = 2.0 if density < self.expected(epoch) else 0.5
        self.lr_scale = min(self.lr_scale * factor, self.FASTEST)
        return self.lr_scale

    def state_dict(self) -> dict[str, float]:
        """What the controller remembers between epochs."""
        return {"start_density": self.start_density, "lr_scale": self.lr_scale}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Continue where the controller that wrote ``state`` stopped."""
        self.start_density = float(state["start_density"])
        self.lr_scale = float(state["lr_scale"])


def admit(net: Module, target_density: float) -> bool:
    """True once the density has reached ``target_density``, trimmed to be just that.

    If the last step brought back more weights than fit, those with the largest t stay, and the
    rest, the ones that came back last, are set just below the gate's threshold. The density is
    then the largest multiple of 1/N that does not exceed the target.
    """
    parameters = list(presences(net).values())
    total = sum(p.size for p in parameters)
    room = int(target_density * total + 1e-9)  # 0.02 * 50200 is 1003.9999999999999
    present = sum(int(is_present(p.data).sum()) for p in parameters)
    if present < room:
        return False
    if present > room:
        _remove_smallest([p.data for p in parameters], present - room)
    return True


def _remove_smallest(arrays: list[Array], count: int) -> None:
    """Set the ``count`` smallest non-negative entries of all arrays together to the largest
    number below zero."""
    xp = xp_of(arrays[0])
    flat = xp.concatenate([t.reshape(-1) for t in arrays])
    candidates = xp.flatnonzero(flat >= 0)
    order = xp.argsort(flat[candidates], kind="stable")  # ties: the earlier weight goes
    flat[candidates[order[:count]]] = -xp.finfo(flat.dtype).tiny
    start = 0
    for t in arrays:
        t[...] = flat[start : start + t.size].reshape(t.shape)
        start += t.size
