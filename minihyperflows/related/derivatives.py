"""The loss of a network as a function of all its parameters at once, and its derivatives.

The Hessian H is never formed. Its product with a vector v comes from the *complex step*: the
gradient g is an analytic function of the parameters theta, so for a small real h

    g(theta + i h v) = g(theta) + i h H v - h^2 ...        H v = Im g(theta + i h v) / h.

Nothing is subtracted, so h can be so small that the rest is below round-off. The engine's ordinary
backward pass on complex numbers computes it, at about four times the cost of a gradient. Source:
Lyness & Moler 1967 for derivatives; chapter 15.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import numpy as np

from minihyperflows import functional as F
from minihyperflows.engine.backend import Array, to_device, to_numpy
from minihyperflows.engine.graph import no_grad
from minihyperflows.engine.tensor import Tensor
from minihyperflows.nn.layers import weighted_layers
from minihyperflows.nn.module import Buffer, Module
from minihyperflows.nn.restore import restored

Arrays: TypeAlias = dict[str, np.ndarray]
STEP = 2.0**-67  # h, about 7e-21: h^2 is far below round-off, h itself a number in float32 too
MODES = ("train", "eval")


class Landscape:
    """L(theta): the mean loss of ``net`` on given images, for any values of its parameters.

    theta is one vector of all parameters, in the order of ``net.named_parameters()``; its current
    value is ``weights``; frozen ones, which training leaves alone, are among them. The network is
    only borrowed: afterwards its parameters, gradients (those that masks keep too), buffers and
    modes are as before.

    With a weight decay lambda the loss is L + lambda / 2 |theta|^2, its gradient g + lambda theta,
    its Hessian H + lambda I.

    Args:
        net: the network. Gates and masks of its layers count.
        x: images (N, ...).
        labels: (N,) integers.
        temperature: T, by which the logits are divided: softmax(f / T).
        mode: "train": batch norm normalises with the statistics of the batch, which couples its
            images; "eval": with its running statistics.
        batch_size: how many images go through the network at once, at least 1; None: all. Without
            batch norm in training mode it changes nothing. With it, L is the mean of the losses of
            separate batches, as SGD sees them; a last batch that is smaller counts less.
        weight_decay: lambda.

    Raises:
        ValueError: for an unknown mode, a temperature that is not positive, a batch size below 1,
            or no images.
    """

    def __init__(
        self,
        net: Module,
        x: Any,
        labels: Any,
        temperature: float = 1.0,
        mode: str = "train",
        batch_size: int | None = None,
        weight_decay: float = 0.0,
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, not {mode!r}")
        if not temperature > 0:
            raise ValueError(f"the temperature must be positive, not {temperature}")
        if len(x) == 0 or len(x) != len(labels):
            raise ValueError(f"{len(x)} images and {len(labels)} labels: one each, at least one")
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, or None for all, not {batch_size}")
        self.net, self.x, self.labels = net, x, labels
        self.temperature, self.mode = temperature, mode
        self.batch_size = len(x) if batch_size is None else batch_size
        self.weight_decay = weight_decay
        self.parameters = net.named_parameters()

    # -- vectors and named arrays ----------------------------------------------------------------

    @property
    def weights(self) -> np.ndarray:
        """theta as it is now."""
        return self.vector({name: to_numpy(p.data) for name, p in self.parameters.items()})

    def vector(self, arrays: Arrays) -> np.ndarray:
        """Arrays shaped like the parameters, one after another."""
        return np.concatenate([arrays[name].reshape(-1) for name in self.parameters])

    def arrays(self, vector: np.ndarray) -> Arrays:
        """The parts of ``vector`` that belong to each parameter, by name, in its shape (views)."""
        ends = np.cumsum([p.size for p in self.parameters.values()])
        parts = np.split(vector, ends[:-1])
        named = zip(self.parameters.items(), parts, strict=True)
        return {name: part.reshape(p.shape) for (name, p), part in named}

    # -- the loss and its derivatives ------------------------------------------------------------

    def loss(self, weights: np.ndarray | None = None) -> float:
        """L at ``weights``; left out, at the network's own."""
        weights = self.weights if weights is None else weights
        with no_grad(), self._borrowed(weights):
            mean = sum(share * loss.item() for share, loss in self._losses(weights.dtype))
        return float(mean) + self.weight_decay / 2 * float(weights @ weights)

    def gradient(self, weights: np.ndarray | None = None) -> np.ndarray:
        """g = dL/dtheta at ``weights``, real or complex; left out, at the network's own."""
        weights = self.weights if weights is None else weights
        with self._borrowed(weights):
            for share, loss in self._losses(weights.dtype):
                (loss * share).backward()
            gradient = self.vector({n: _gradient(p) for n, p in self.parameters.items()})
        return gradient + weights.dtype.type(self.weight_decay) * weights

    def hessian_product(self, v: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
        """H v at ``weights`` by the complex step, in the precision of ``v``.

        v is brought to a largest entry of 1 before, so that h suits it.
        """
        weights = self.weights if weights is None else weights
        size = abs(v).max(initial=0.0)
        if size == 0:
            return np.zeros_like(v)
        kind = np.result_type(v, 1j)  # complex64 for float32
        moved = weights.astype(kind)
        moved.imag = v / size * STEP
        return self.gradient(moved).imag / STEP * size

    # -- the network, borrowed -------------------------------------------------------------------

    def _losses(self, dtype: np.dtype) -> Iterator[tuple[float, Tensor]]:
        """For each batch its share of the images, and its loss."""
        device = next(iter(self.parameters.values())).device
        real = np.empty(0, dtype).real.dtype
        for start in range(0, len(self.x), self.batch_size):
            batch = slice(start, start + self.batch_size)
            x = Tensor(to_device(np.asarray(self.x[batch], real), device))
            labels = to_device(np.asarray(self.labels[batch]), device)
            loss = F.cross_entropy(self.net(x) / self.temperature, labels)
            yield len(labels) / len(self.x), loss

    @contextmanager
    def _borrowed(self, weights: np.ndarray) -> Iterator[None]:
        """The network with these weights, in this mode, without gradients; then as it was."""
        with restored(self._changed()):
            self.net.train(self.mode == "train")
            for layer in weighted_layers(self.net).values():
                layer.weight_in_use = None
            for tensor in self.net.named_tensors().values():
                tensor.grad = tensor.gradient_buffer = None
                if isinstance(tensor, Buffer):
                    tensor.data = _in_precision(tensor.data, weights.dtype)
            for name, part in self.arrays(weights).items():
                parameter = self.parameters[name]
                parameter.data = to_device(part, parameter.device)
                parameter.requires_grad = True  # a frozen one has a derivative too
            yield

    def _changed(self) -> Iterator[tuple[object, str]]:
        """What a pass through the network, or getting ready for it, assigns to."""
        for _, module in self.net.named_modules():
            yield module, "training"
        for layer in weighted_layers(self.net).values():
            yield layer, "weight_in_use"
            if hasattr(layer.weight_gate, "received"):  # the gradient that a pruner's mask keeps
                yield layer.weight_gate, "received"
        for tensor in self.net.named_tensors().values():
            for name in ("data", "grad", "gradient_buffer", "requires_grad"):
                yield tensor, name


def _in_precision(array: Array, dtype: np.dtype) -> Array:
    """A copy, for batch norm to write to: of a float array in the (real) precision of ``dtype``."""
    return array.astype(np.empty(0, dtype).real.dtype if array.dtype.kind == "f" else array.dtype)


def _gradient(parameter: Tensor) -> np.ndarray:
    """Its gradient; zeros if the loss does not depend on it."""
    if parameter.grad is None:
        return np.zeros(parameter.shape, parameter.dtype)
    return to_numpy(parameter.grad)


# -- by name -------------------------------------------------------------------------------------


def gradient(net: Module, x: Any, labels: Any, temperature: float = 1.0, **options: Any) -> Arrays:
    """g = dL/dtheta, keyed like ``net.named_parameters()``; see :class:`Landscape`."""
    landscape = Landscape(net, x, labels, temperature, **options)
    return landscape.arrays(landscape.gradient())


def hessian_gradient_product(
    net: Module,
    x: Any,
    labels: Any,
    temperature: float = 1.0,
    mode: str = "train",
    batch_size: int | None = None,
    dtype: Any = np.float64,
) -> Arrays:
    """H g with g = dL/dtheta and H = d^2L/dtheta^2, keyed like ``net.named_parameters()``.

    H couples all parameters, so g contains those of batch norm and biases too.

    Args:
        net, x, labels, temperature, mode, batch_size: as for :class:`Landscape`. Both g and H are
            means over all images.
        dtype: of the computation and the result, whatever the network's: float64, exact to
            round-off; or float32, half the time and memory.
    """
    landscape = Landscape(net, x, labels, temperature, mode, batch_size)
    weights = landscape.weights.astype(dtype)
    product = landscape.hessian_product(landscape.gradient(weights), weights)
    return landscape.arrays(product.astype(dtype, copy=False))


def hessian(landscape: Landscape, weights: np.ndarray | None = None) -> np.ndarray:
    """H itself, (P, P), column by column: for networks of a few hundred parameters."""
    identity = np.eye(math.prod(landscape.weights.shape))
    return np.stack([landscape.hessian_product(e, weights) for e in identity], axis=1)
