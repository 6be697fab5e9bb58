"""The hypernetwork of one layer: three small steps from two latent vectors to a weight.

A layer with n output and c input channels gets its weight from two latent vectors: z_in, of length
c, which it shares with the layers that make its input, and z_out, of length n (chapter 16). The
steps, for output channel o and input channel i, with an embedding of m numbers and u, v the place
in the kernel (a linear layer has none)::

    latent matrix   Z[o, i]       = z_out[o] z_in[i] + B0[o, i]                           (16.1)
    embedding       E[r, o, i]    = w1[r, o, i] Z[o, i] + b1[r, o, i]    r = 1 ... m      (16.2)
    explicit        W[o, u, v, i] = sum over r of W2[r, o, u, v, i] E[r, o, i] + b2[o, u, v, i]

the last of which is (16.3). There is no nonlinearity between them, so a weight is an affine
function of one number, Z[o, i]: see :meth:`HyperLayer.collapse`.

Source: Li, Gu, Zhang, Van Gool, Timofte, "DHP: differentiable meta pruning via hypernetworks",
ECCV 2020, arXiv 2003.13683, and the authors' code (github.com/ofsoundof/dhp, dhp_base.py). There
the axes are (in, out, ...); here they are those of the weight, (out, kH, kW, in), so that slices of
the hypernetwork and slices of the weight are the same slices.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from minihyperflows.engine.backend import xp_of
from minihyperflows.engine.tensor import Tensor
from minihyperflows.nn import init
from minihyperflows.nn.module import Module, Parameter

EMBEDDING = 8  # m
LATENT = "latent"  # role of the latent vectors; the rest of a hypernetwork are weights


class HyperLayer(Module):
    """Generates one layer's weight from its two latent vectors.

    Holds per pair of channels m + k^2 m numbers, and with biases 1 + m + k^2 more: 98 where a
    3x3 convolution has 9 (m = 8). The gradients are (16.7).

    Args:
        shape: of the weight: (n, kH, kW, c), (n, kH, kW, 1) for a depthwise convolution, whose
            z_in has one entry, or (n, c).
        embedding: m.
        bias: whether B0, b1 and b2 exist, as the authors have it. Without them a weight is
            proportional to z_out[o] z_in[i]: where a latent is zero, so is the slice.
        rng: draws w1 and W2; the biases start at 0.
        dtype: of all of them.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        embedding: int = EMBEDDING,
        bias: bool = True,
        *,
        rng: np.random.Generator,
        dtype: Any = np.float32,
    ) -> None:
        self.shape = shape
        out, inside = shape[0], shape[-1]
        matrix, stack = (out, inside), (embedding, out, inside)
        # Variance 1 for w1 and 1 / (m fan_in) for W2: a weight then has 1 / fan_in, (16.5).
        bound = float(np.sqrt(3 / (embedding * init.fan_in(shape))))
        self.w1 = Parameter(init.uniform(stack, float(np.sqrt(3)), rng, dtype))
        self.W2 = Parameter(init.uniform((embedding, *shape), bound, rng, dtype))
        self.B0 = Parameter(np.zeros(matrix, dtype)) if bias else None
        self.b1 = Parameter(np.zeros(stack, dtype)) if bias else None
        self.b2 = Parameter(np.zeros(shape, dtype)) if bias else None

    def generate(self, z_in: Tensor, z_out: Tensor) -> Tensor:
        """The weight, of shape ``shape``, from z_in (c,) and z_out (n,), step by step."""
        embedded = self.w1 * self.latent_matrix(z_in, z_out)  # (m, n, c)
        if self.b1 is not None:
            embedded = embedded + self.b1
        weight = (self.W2 * self._over_kernel(embedded)).sum(axis=0)  # (n, kH, kW, c)
        return weight if self.b2 is None else weight + self.b2

    def latent_matrix(self, z_in: Tensor, z_out: Tensor) -> Tensor:
        """Z = z_out z_in^T + B0, of shape (n, c)."""
        matrix = z_out.reshape(-1, 1) * z_in.reshape(1, -1)
        return matrix if self.B0 is None else matrix + self.B0

    def collapse(self) -> tuple[Tensor, Tensor]:
        """(slope, offset), both of the weight's shape: W = slope Z + offset, Z over the kernel.

        slope = sum over r of W2[r] w1[r],  offset = sum over r of W2[r] b1[r] + b2. (In (16.4) the
        part of Z that comes from B0 is counted as offset.)

        Worth it where one hypernetwork makes weights for many latents. In training it makes one a
        step, for which the two sums over W2 cost more than the single one of :meth:`generate`.
        """
        slope = (self.W2 * self._over_kernel(self.w1)).sum(axis=0)
        if self.b1 is None or self.b2 is None:
            return slope, Tensor(xp_of(slope.data).zeros_like(slope.data))
        return slope, (self.W2 * self._over_kernel(self.b1)).sum(axis=0) + self.b2

    def generate_collapsed(self, z_in: Tensor, z_out: Tensor) -> Tensor:
        """The same as :meth:`generate`, from (slope, offset)."""
        slope, offset = self.collapse()
        return slope * self._over_kernel(self.latent_matrix(z_in, z_out)) + offset

    def _over_kernel(self, x: Tensor) -> Tensor:
        """(..., n, c) -> (..., n, 1, 1, c), which broadcasts over the kernel's rows and columns."""
        ones = (1,) * (len(self.shape) - 2)
        return x.reshape(*x.shape[:-1], *ones, x.shape[-1])


def draw_latent(size: int, *, rng: np.random.Generator, dtype: Any = np.float32) -> Parameter:
    """A latent vector of one entry per channel, drawn from N(0, 1)."""
    return Parameter(rng.standard_normal(size).astype(dtype), role=LATENT)
