"""Does a hypernetwork make a weight from which channels can be cut?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from minihyperflows.engine.graph import no_grad
from minihyperflows.engine.tensor import Tensor
from minihyperflows.nn import Parameter, init
from minihyperflows.testing.gradients import check_problem
from minihyperflows.testing.problem import Problem

Array = np.ndarray
SHAPES = ((5, 3, 3, 4), (4, 1, 1, 6), (6, 3, 3, 1), (5, 4))  # convolutions, depthwise, linear
DRAWS = 600  # hypernetworks whose weights have to have the right variance together


def check_hypernetwork(
    make: Callable[[tuple[int, ...], np.random.Generator], Any],
    zero_slices: bool = False,
    rng: np.random.Generator | int = 0,
) -> None:
    """Check the hypernetwork of one layer, such as :class:`minihyperflows.related.dhp.HyperLayer`.

    For the weights of ordinary, pointwise and depthwise convolutions and of linear layers, in
    float64: ``generate(z_in, z_out)`` returns a tensor of the shape asked for. What belongs to
    output o and input i depends on no other latents than z_out[o] and z_in[i], so that cutting the
    weight is the same as making it for fewer channels, but on these it does depend. The gradients
    of both latents and of every parameter are right, also where one latent is both. Over many new
    hypernetworks and latents from N(0, 1) a weight has mean 0 and variance 1 / fan-in. Example::

        check_hypernetwork(lambda shape, rng: dhp.HyperLayer(shape, rng=rng, dtype=np.float64))

    Args:
        make: (shape, rng) -> a new one, an ``nn.Module``. ``shape`` is the weight's, (out, kH, kW,
            in) or (out, in); a depthwise convolution has in = 1.
        zero_slices: whether a latent of 0 must also make a slice of 0, whatever the parameters.
        rng: seed or generator for everything that is drawn.

    Raises:
        AssertionError: says which of these fails, and for which shape.
    """
    rng = np.random.default_rng(rng)
    for shape in SHAPES:
        layer, z_in, z_out = make(shape, rng), *_latents(shape, rng)
        _check_shape(shape, layer, z_in, z_out)
        for parameter in layer.parameters():  # biases often start at 0, which hides mistakes
            parameter.data = rng.standard_normal(parameter.shape)
        _check_locality(shape, layer, z_in, z_out)
        check_problem(_problem(shape, layer, [z_in, z_out]), rng)
        if zero_slices:
            _check_zero_slices(shape, layer, z_in, z_out)
    square = (3, 3, 3, 3)
    check_problem(_problem(square, make(square, rng), [rng.standard_normal(3)]), rng)
    for shape in SHAPES:
        _check_variance(shape, make, rng)


def _latents(shape: tuple[int, ...], rng: np.random.Generator) -> tuple[Array, Array]:
    return rng.standard_normal(shape[-1]), rng.standard_normal(shape[0])


def _weight(layer: Any, z_in: Array, z_out: Array) -> Array:
    with no_grad():
        return layer.generate(Tensor(z_in), Tensor(z_out)).data


def _check_shape(shape: tuple[int, ...], layer: Any, z_in: Array, z_out: Array) -> None:
    weight = layer.generate(Parameter(z_in), Parameter(z_out))
    if not isinstance(weight, Tensor) or weight.shape != shape:
        found = f"shape {weight.shape}" if isinstance(weight, Tensor) else type(weight).__name__
        raise AssertionError(f"for a weight of shape {shape} generate returns {found}")
    if weight.dtype != np.float64:
        raise AssertionError(f"latents of float64 give a weight of {weight.dtype}: make float64")


def _check_locality(shape: tuple[int, ...], layer: Any, z_in: Array, z_out: Array) -> None:
    """Moving one latent changes its slice, and nothing else."""
    before = _weight(layer, z_in, z_out)
    for name, latent, axis in (("z_out", z_out, 0), ("z_in", z_in, len(shape) - 1)):
        for i in range(latent.size):
            moved = latent.copy()
            moved[i] += 0.5
            pair = (z_in, moved) if axis == 0 else (moved, z_out)
            changed = np.moveaxis(_weight(layer, *pair) != before, axis, 0)
            if not changed[i].any():
                raise AssertionError(f"{shape}: the weight does not depend on {name}[{i}]")
            if np.delete(changed, i, axis=0).any():
                raise AssertionError(
                    f"{shape}: {name}[{i}] also moves weights of other channels, so a weight that "
                    "is cut differs from one that is made for fewer channels"
                )


def _problem(shape: tuple[int, ...], layer: Any, latents: list[Array]) -> Problem:
    """The weight as a function of its latents (one: both are the same) and all parameters."""
    parameters = layer.named_parameters()

    def run(values: list[Array]) -> tuple[list[Tensor], Tensor]:
        leaves: list[Tensor] = [Parameter(value) for value in values[: len(latents)]]
        for parameter, value in zip(parameters.values(), values[len(latents) :], strict=True):
            parameter.data, parameter.grad = value, None
        return [*leaves, *parameters.values()], layer.generate(leaves[0], leaves[-1])

    def evaluate(values: list[Array]) -> Array:
        with no_grad():
            return run(values)[1].data

    def gradients(values: list[Array], cotangent: Array) -> list[Array | None]:
        leaves, weight = run(values)
        if not weight.requires_grad:
            raise AssertionError(f"{shape}: the weight depends on nothing: is the graph cut?")
        weight.backward(cotangent)
        return [leaf.grad for leaf in leaves]

    roles = ["a latent in both roles"] if len(latents) == 1 else ["z_in", "z_out"]
    names = [f"{shape}: {name}" for name in (*roles, *(f"parameter {k}" for k in parameters))]
    values = [*latents, *(parameter.data for parameter in parameters.values())]
    return Problem(values, names, evaluate, gradients)


def _check_zero_slices(shape: tuple[int, ...], layer: Any, z_in: Array, z_out: Array) -> None:
    for name, latent, axis in (("z_out", z_out, 0), ("z_in", z_in, len(shape) - 1)):
        zero = latent.copy()
        zero[0] = 0.0
        weight = _weight(layer, z_in, zero) if axis == 0 else _weight(layer, zero, z_out)
        left = abs(weight.take(0, axis)).max()
        if left > 0:
            raise AssertionError(f"{shape}: with {name}[0] = 0 its slice has a weight {left:.3g}")


def _check_variance(
    shape: tuple[int, ...],
    make: Callable[[tuple[int, ...], np.random.Generator], Any],
    rng: np.random.Generator,
) -> None:
    draws = np.stack([_weight(make(shape, rng), *_latents(shape, rng)) for _ in range(DRAWS)])
    fan_in = init.fan_in(shape)
    mean, variance = draws.mean() * fan_in**0.5, (draws**2).mean() * fan_in
    if abs(mean) > 0.1 or not 0.8 < variance < 1.25:
        raise AssertionError(
            f"{shape}: over {DRAWS} draws a first weight has mean {mean:.2f} / sqrt(fan-in) and "
            f"variance {variance:.2f} / fan-in, where 0 and 1 are expected"
        )
