"""How latents shrink: proximal operators, and what they do when the data say nothing.

A step of SGD is followed by a proximal step, the exact minimiser of 1/2 |x - z|^2 + tau |x|_1 with
tau = lr lambda, (16.8). It stands outside the momentum mu. A steady gradient g moves a latent by
lr g / (1 - mu) per step, so it holds the latent in place at |g| = lambda (1 - mu), (16.10): the
pull is that of an l1 penalty of lambda / 10 in the loss, for mu = 0.9. Weight decay goes through
the momentum, which makes it ten times as strong. Chapter 16.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from minihyperflows.engine.backend import Array, xp_of


def soft_threshold(z: Array, tau: float) -> Array:
    """argmin over x of 1/2 |x - z|^2 + tau |x|_1: zeros are exact.

    It is sign(z) max(|z| - tau, 0), (16.9).
    """
    xp = xp_of(z)
    return xp.sign(z) * xp.maximum(abs(z) - tau, 0)


def shrink_norm(z: Array, tau: float) -> Array:
    """argmin over x of 1/2 |x - z|^2 + tau |x|_2 = (1 - tau / max(|z|_2, tau)) z.

    The authors' alternative: all entries shrink by one factor, so all vanish together or none.
    """
    xp = xp_of(z)
    norm = max(float(xp.sqrt((z * z).sum())), tau)
    return z if norm == 0 else (1 - tau / norm) * z


@dataclass(frozen=True)
class FreeShrinkage:
    """The path of a latent whose loss gradient is zero, under weight decay and the proximal step.

    With momentum mu every step multiplies |z| by about 1 - r, r = lr wd / (1 - mu), and subtracts
    q = lr lambda. In continuous time, d|z|/dS = -r |z| - q, so after S steps

        |z(S)| = max((|z(0)| + q / r) e^(-r S) - q / r, 0),   or |z(0)| - q S where r = 0   (16.11)

    The two multiply: the decay brings latents into reach of the subtraction. What a search does
    beyond this is what the data contribute.

    Attributes:
        l1: lambda.
        lr: the learning rate.
        weight_decay: wd, on the latents.
        momentum: mu.
    """

    l1: float
    lr: float = 0.1
    weight_decay: float = 1e-4
    momentum: float = 0.9

    @property
    def subtracted(self) -> float:
        """q = lr lambda, per step."""
        return self.lr * self.l1

    @property
    def decay(self) -> float:
        """r = lr wd / (1 - mu), per step."""
        return self.lr * self.weight_decay / (1 - self.momentum)

    def size_after(self, steps: float, size: Array | float) -> Array:
        """|z(S)| of latents that start at |z(0)| = ``size``."""
        q, r = self.subtracted, self.decay
        if r == 0:
            return np.maximum(size - q * steps, 0)
        return np.maximum((size + q / r) * math.exp(-r * steps) - q / r, 0)

    def largest_lost(self, steps: float, threshold: float = 5e-3) -> float:
        """The |z(0)| that is just below ``threshold`` = T after S steps: smaller ones are lost.

        (T + q / r) e^(r S) - q / r,   or T + q S where r = 0.
        """
        q, r = self.subtracted, self.decay
        if r == 0:
            return threshold + q * steps
        return threshold * math.exp(r * steps) + q * math.expm1(r * steps) / r

    def fraction_lost(self, steps: float, threshold: float = 5e-3) -> float:
        """The part of the latents drawn from N(0, 1) that is below T after S steps, (16.12)."""
        return math.erf(self.largest_lost(steps, threshold) / math.sqrt(2))

    @classmethod
    def losing(
        cls,
        fraction: float,
        steps: float,
        *,
        threshold: float = 5e-3,
        lr: float = 0.1,
        weight_decay: float = 1e-4,
        momentum: float = 0.9,
    ) -> FreeShrinkage:
        """The shrinkage that loses ``fraction`` of N(0, 1) latents in ``steps``: its ``l1`` is the
        lambda for a search of that length.

        Raises:
            ValueError: no lambda does, or weight decay alone loses more.
        """
        if not 0 < fraction < 1:
            raise ValueError(f"fraction must lie in (0, 1), not {fraction}")
        size = NormalDist().inv_cdf((1 + fraction) / 2)  # P(|z| < size) = fraction
        without = cls(0.0, lr, weight_decay, momentum)
        r = without.decay
        sum_of_steps = math.expm1(r * steps) / r if r else steps
        l1 = (size - without.largest_lost(steps, threshold)) / (lr * sum_of_steps)
        if l1 < 0:
            raise ValueError(
                f"weight decay alone loses more than {fraction} of the latents in {steps} steps"
            )
        return cls(l1, lr, weight_decay, momentum)
