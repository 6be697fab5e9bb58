"""The check of pruners: it passes those of the package and objects to broken ones."""

from __future__ import annotations

import numpy as np
import pytest

from minihyperflows.related import pruners
from minihyperflows.related.pruners import Gradual, Iterative, Magnitude, Movement, Random, RigL
from minihyperflows.testing.pruners import check_pruner


@pytest.mark.parametrize(
    "make",
    [
        *(Random, Magnitude, Iterative),
        lambda s: Gradual(s, every=10),
        lambda s: Movement(s, every=5),
        lambda s: RigL(s, every=10),
    ],
)
@pytest.mark.parametrize("sparsity", [0.5, 0.93])
def test_the_package_s_pruners_pass(make, sparsity: float) -> None:
    check_pruner(make, sparsity)


class OneTooMany(Magnitude):
    def prepare(self) -> None:
        self.keep_largest(self.magnitudes(), self.kept + 1)


class TooLate(Gradual):
    """Its last step never comes."""

    def after_step(self, step: int) -> None:
        super().after_step(step - 60)


class OfItsOwnAccord(Random):
    def prepare(self) -> None:
        self.rng = np.random.default_rng(id(self))
        super().prepare()


class Numbers(Magnitude):
    def after_step(self, step: int) -> None:
        for mask in self.masks.values():
            mask.present = mask.present.astype(float)


class Flat(Magnitude):
    def after_step(self, step: int) -> None:
        for mask in self.masks.values():
            mask.present = mask.present.reshape(-1)


class OnItsOwn(Magnitude):
    """Masks that the network does not know."""

    def prepare(self) -> None:
        super().prepare()
        self.masks = {name: pruners.Mask(mask.weight) for name, mask in self.masks.items()}


class ForgetsTheMasks(Magnitude):
    def finish(self) -> None:
        pass


class ForgetsTheZeros(Magnitude):
    def finish(self) -> None:
        for mask in self.masks.values():
            mask.present = np.ones_like(mask.present)
        super().finish()


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (OneTooMany, "31 of 300 weights are present; a sparsity of 0.9 leaves 30"),
        (TooLate, "300 of 300"),
        (OfItsOwnAccord, "draw from self.rng"),
        (Numbers, "after step 1 the mask of layer '0' is of float64"),
        (Flat, "of shape"),
        (OnItsOwn, "taken off its layer"),
        (ForgetsTheMasks, "leaves masks"),
        (ForgetsTheZeros, "changes what the network computes"),
    ],
)
def test_broken_pruners_are_found(broken: type[pruners.Pruner], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_pruner(broken)
