"""The check of hypernetworks: it passes those of the package and objects to broken ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from minihyperflows.engine.tensor import Tensor
from minihyperflows.related.dhp import HyperLayer
from minihyperflows.testing import check_hypernetwork


def build(kind: type[HyperLayer], bias: bool = True, embedding: int = 8) -> Any:
    return lambda shape, rng: kind(shape, embedding, bias, rng=rng, dtype=np.float64)


@pytest.mark.slow
@pytest.mark.parametrize("embedding", [1, 8])
@pytest.mark.parametrize("bias", [True, False])
def test_the_package_s_hypernetworks_pass(bias: bool, embedding: int) -> None:
    check_hypernetwork(build(HyperLayer, bias, embedding), zero_slices=not bias)


def test_with_biases_a_latent_of_zero_leaves_a_slice() -> None:
    with pytest.raises(AssertionError, match=r"z_out\[0\] = 0 its slice has a weight"):
        check_hypernetwork(build(HyperLayer), zero_slices=True)


class Transposed(HyperLayer):
    def generate(self, z_in: Tensor, z_out: Tensor) -> Tensor:
        weight = super().generate(z_in, z_out)
        return weight.transpose(-1, *range(1, len(self.shape) - 1), 0)


class Centred(HyperLayer):
    """A latent that loses its mean tells every channel about all the others."""

    def generate(self, z_in: Tensor, z_out: Tensor) -> Tensor:
        return super().generate(z_in, z_out - z_out.mean())


class Deaf(HyperLayer):
    """In everything else it is right, gradients and variance too."""

    def latent_matrix(self, z_in: Tensor, z_out: Tensor) -> Tensor:
        return z_out.reshape(-1, 1) + 0.0 * z_in.reshape(1, -1)


class Detached(HyperLayer):
    """Reads its latents, but no gradient reaches them."""

    def generate(self, z_in: Tensor, z_out: Tensor) -> Tensor:
        return super().generate(z_in.detach(), z_out)


class Large(HyperLayer):
    """He's variance, twice as large."""

    def generate(self, z_in: Tensor, z_out: Tensor) -> Tensor:
        return super().generate(z_in, z_out) * 2**0.5


class OneNumber(HyperLayer):
    def generate(self, z_in: Tensor, z_out: Tensor) -> Tensor:
        return super().generate(z_in, z_out).sum()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (Transposed, "generate returns shape"),
        (OneNumber, "generate returns shape"),
        (Centred, "also moves weights of other channels"),
        (Deaf, r"the weight does not depend on z_in\[0\]"),
        (Detached, "z_in gets no gradient"),
        (Large, "variance"),
    ],
)
def test_broken_hypernetworks_are_found(broken: type[HyperLayer], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_hypernetwork(build(broken))


def test_single_precision_is_noticed() -> None:
    with pytest.raises(AssertionError, match="make float64"):
        check_hypernetwork(lambda shape, rng: Narrow(shape, rng=rng, dtype=np.float64))


class Narrow(HyperLayer):
    def generate(self, z_in: Tensor, z_out: Tensor) -> Tensor:
        return Tensor(super().generate(z_in, z_out).data.astype(np.float32))
