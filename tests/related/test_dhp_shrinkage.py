"""Proximal operators against their definition, and the closed form of free shrinkage."""

from __future__ import annotations

import numpy as np
import pytest

from minihyperflows.nn import Parameter
from minihyperflows.nn.optim import SGD
from minihyperflows.related.dhp import FreeShrinkage, proximal_step, shrink_norm, soft_threshold

EPOCH = 781  # steps, with batches of 64 on CIFAR-10


@pytest.mark.parametrize("z", [-2.0, -0.31, -0.05, 0.0, 0.3, 1.7])
def test_soft_thresholding_is_the_argmin(z: float) -> None:
    """U4: of 1/2 (x - z)^2 + tau |x|, over a grid."""
    tau, x = 0.3, np.linspace(-3, 3, 600_001)
    best = x[np.argmin((x - z) ** 2 / 2 + tau * abs(x))]
    assert soft_threshold(np.array([z]), tau) == pytest.approx(best, abs=1e-5)


@pytest.mark.parametrize("scale", [0.1, 1.0])
def test_shrinking_the_norm_is_the_argmin(scale: float) -> None:
    """Of 1/2 |x - z|^2 + tau |x|_2, over a grid in the plane: at zero, and not at zero."""
    tau, z = 0.3, scale * np.array([0.5, -0.8])
    grid = np.linspace(-1, 1, 801)
    x = np.stack(np.meshgrid(grid, grid), axis=-1)
    value = ((x - z) ** 2).sum(axis=-1) / 2 + tau * np.sqrt((x**2).sum(axis=-1))
    best = x.reshape(-1, 2)[np.argmin(value)]
    np.testing.assert_allclose(shrink_norm(z, tau), best, atol=2e-3)
    assert (shrink_norm(z, tau) == 0).all() == (scale == 0.1)


def test_proximal_operators_keep_signs_zeros_and_dtype() -> None:
    z = np.array([-1, -0.1, -0.0, 0.0, 0.1, 1], np.float32)
    for proximal in (soft_threshold, shrink_norm):
        assert proximal(z, 0.2).dtype == np.float32
        assert (proximal(z, 0.2) * z >= 0).all()
        np.testing.assert_array_equal(proximal(z, 0.0), z)
    np.testing.assert_array_equal(soft_threshold(z, 0.2) == 0, [0, 1, 1, 1, 1, 0])
    np.testing.assert_array_equal(shrink_norm(np.zeros(3), 0.0), np.zeros(3))


def latents_after(shrinkage: FreeShrinkage, z: np.ndarray, steps: int) -> np.ndarray:
    """|z| after steps of SGD with a gradient of zero, each followed by the proximal step."""
    latent = Parameter(z.copy())
    sgd = SGD([latent], shrinkage.lr, shrinkage.momentum, shrinkage.weight_decay)
    latent.grad = np.zeros_like(z)
    for _ in range(steps):
        sgd.step()
        proximal_step(latent, shrinkage.subtracted, threshold=0.0)
    return abs(latent.data)


@pytest.mark.slow
@pytest.mark.parametrize(("l1", "decay"), [(3e-4, 1e-4), (0.0, 1e-4), (3e-4, 0.0)])
def test_the_closed_form_is_what_ten_thousand_steps_do(l1: float, decay: float) -> None:
    """U4. The momentum takes ten steps to begin, which is all that the formula leaves out."""
    shrinkage = FreeShrinkage(l1, weight_decay=decay)
    z = np.linspace(-3, 3, 401)
    sizes = latents_after(shrinkage, z, 10_000)
    np.testing.assert_allclose(sizes, shrinkage.size_after(10_000, abs(z)), atol=2e-3)
    lost = abs(z) < shrinkage.largest_lost(10_000)
    assert np.mean((sizes < 5e-3) == lost) > 0.99


def test_the_largest_latent_lost_ends_at_the_threshold() -> None:
    for shrinkage in (FreeShrinkage(3e-4), FreeShrinkage(3e-4, weight_decay=0.0)):
        size = shrinkage.largest_lost(5000, threshold=0.01)
        assert shrinkage.size_after(5000, size) == pytest.approx(0.01, abs=1e-12)


@pytest.mark.parametrize(
    ("l1", "decay", "epochs", "lost"),
    [
        *((3e-4, 1e-4, epochs, lost) for epochs, lost in [(5, 0.120), (10, 0.286), (15, 0.506)]),
        *((l1, 1e-4, 20, lost) for l1, lost in [(3e-4, 0.752), (2e-4, 0.563), (1e-4, 0.311)]),
        (3e-4, 0.0, 20, 0.364),
        (0.0, 1e-4, 20, 0.019),
    ],
)
def test_fractions_lost(l1: float, decay: float, epochs: int, lost: float) -> None:
    """The published settings; l1 and weight decay alone lose far less than together."""
    shrinkage = FreeShrinkage(l1, weight_decay=decay)
    assert shrinkage.fraction_lost(epochs * EPOCH) == pytest.approx(lost, abs=6e-4)


def test_the_lambda_for_a_search_of_given_length() -> None:
    for decay in (1e-4, 0.0):
        shrinkage = FreeShrinkage.losing(0.4, 2000, weight_decay=decay)
        assert shrinkage.l1 > 0
        assert shrinkage.fraction_lost(2000) == pytest.approx(0.4, abs=1e-12)
    with pytest.raises(ValueError, match="weight decay alone"):
        FreeShrinkage.losing(0.1, 200 * EPOCH)
    for fraction in (0.0, 1.0, float("nan")):
        with pytest.raises(ValueError, match="fraction"):
            FreeShrinkage.losing(fraction, 100)


@pytest.mark.parametrize(("gradient", "held"), [(0.9, True), (1.1, False)])
def test_a_latent_stays_at_zero_below_a_tenth_of_lambda(gradient: float, held: bool) -> None:
    """The gradient passes through the momentum, the proximal step does not."""
    l1, momentum = 1e-2, 0.9
    latent = Parameter(np.zeros(1))
    sgd = SGD([latent], 0.1, momentum)
    latent.grad = np.array([gradient * l1 * (1 - momentum)])
    for _ in range(300):
        sgd.step()
        proximal_step(latent, 0.1 * l1, threshold=-1.0)
    assert (latent.data[0] == 0) == held


def test_a_latent_with_its_floor_of_entries_left_shrinks_no_more() -> None:
    z = np.array([1.0, -0.5, 0.3, 0.004])
    latent = Parameter(z.copy())
    proximal_step(latent, 0.1, threshold=5e-3, floor=3)
    np.testing.assert_array_equal(latent.data, z)
    proximal_step(latent, 0.1, threshold=5e-3, floor=2)
    np.testing.assert_array_equal(latent.data, soft_threshold(z, 0.1))
    proximal_step(latent, 0.1, floor=0, proximal=shrink_norm)
    np.testing.assert_array_equal(latent.data, shrink_norm(soft_threshold(z, 0.1), 0.1))
