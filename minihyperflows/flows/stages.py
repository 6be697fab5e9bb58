"""The stages of a run, and the landing that makes regrowth end on the target.

dense -> pruning -> regrowth: train without gates; add gates and pressure; take the pressure away,
so that removed weights with enough flux come back (chapter 09).
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from numbers import Real

from minihyperflows.engine.backend import Array, xp_of
from minihyperflows.engine.errors import DoubtfulResultWarning
from minihyperflows.flows.gates import count_present, is_present, presences
from minihyperflows.nn import Module
from minihyperflows.nn.counting import kept_weights

FAR = 0.1  # of the weights: a landing that moves more is doubtful

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


def land(net: Module, target_density: float) -> int:
    """Make exactly the target's number of weights present: those with the largest t.

    t adds up the flux that a weight has felt, so it ranks all weights, present and removed. Moving
    the gate's threshold from 0 to the right rank removes the weights that came back last, or
    brings back those that were about to return. (The threshold stays at 0; the t between it and
    the rank are moved across.)

    Why a rank: without pressure the density rises by an amount that depends on the network, the
    data and the learning rates, so no fixed starting point makes regrowth end at a given sparsity.
    The pruning stage therefore aims at fewer weights than the target, regrowth runs until the
    target is reached or half of its epochs are over, and this function closes the remaining gap;
    from there on the topology is frozen (chapter 09).

    Args:
        target_density: the fraction of all gated weights to keep, in [0, 1]. Their number is
            rounded down.

    Returns:
        How many weights were brought back (positive) or removed (negative).

    Raises:
        ValueError: ``target_density`` is not a fraction, there are no gates, or a t is NaN, which
            has no rank.

    Warns:
        DoubtfulResultWarning: more than a tenth of the weights moved (:func:`far_landing`).
    """
    if not (isinstance(target_density, Real) and 0 <= target_density <= 1):
        raise ValueError(f"the density to land on is a fraction in [0, 1], not {target_density}")
    named = {name: p.data for name, p in presences(net).items()}
    if not named:
        raise ValueError("this network has no gates: attach them first with flows.attach")
    for name, t in named.items():
        if xp_of(t).isnan(t).any():
            raise ValueError(f"{name} holds NaN, which has no rank: has the training diverged?")
    arrays = list(named.values())
    total = sum(t.size for t in arrays)
    keep = kept_weights(float(target_density), total)
    change = keep - sum(count_present(t) for t in arrays)
    if change:
        _move_threshold(arrays, change)
    if warning := far_landing(change, total):
        warnings.warn(warning, DoubtfulResultWarning, stacklevel=2)
    return change


def far_landing(change: int, total: int) -> str | None:
    """What is doubtful about a landing that moved ``change`` of ``total`` weights; None if nothing.

    The rank by t says which weights are next to come or go while they are few. Of many at once it
    says little, and the accuracy falls.
    """
    if abs(change) <= FAR * total:
        return None
    how = "brought back" if change > 0 else "removed"
    return (
        f"landing {how} {abs(change):,} of {total:,} weights at once, more than a tenth, which "
        "costs accuracy: more pruning epochs, or updates_per_epoch, bring the density nearer"
    )


def _move_threshold(arrays: list[Array], change: int) -> None:
    """Bring back the ``change`` removed weights with the largest t, or remove the ``-change``
    present ones with the smallest. In a tie the earlier weight moves.

    The ranking compares all t in the widest of their dtypes; each is then moved to the nearest
    number across the threshold that its own dtype holds in full precision.
    """
    xp = xp_of(arrays[0])
    flat = xp.concatenate([t.real.reshape(-1) for t in arrays])
    candidates = xp.flatnonzero(is_present(flat) == (change < 0))
    moves = xp.zeros(flat.size, bool)
    moves[candidates[_smallest(abs(flat[candidates]), abs(change))]] = True
    start = 0
    for t in arrays:
        here = moves[start : start + t.size].reshape(t.shape)
        t[here] = 0.0 if change > 0 else -xp.finfo(t.dtype).tiny
        start += t.size


def _smallest(values: Array, count: int) -> Array:
    """Where the ``count`` (from 1) smallest values are; in a tie the earlier ones.

    The beginning of a stable argsort, without sorting the rest: seconds less for 20 million.
    """
    xp = xp_of(values)
    largest = xp.partition(values, count - 1)[count - 1]
    below = xp.flatnonzero(values < largest)
    ties = xp.flatnonzero(values == largest)
    return xp.concatenate([below, ties[: count - below.size]])
