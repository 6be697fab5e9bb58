"""Initial values. Every draw comes from the generator that is handed in."""

from __future__ import annotations

from typing import Any

import numpy as np


def require_generator(rng: Any) -> None:
    """Raise TypeError, saying what to write, unless ``rng`` is a ``numpy.random.Generator``."""
    if not isinstance(rng, np.random.Generator):
        raise TypeError(
            f"rng must be a numpy.random.Generator, such as np.random.default_rng(0), not {rng!r}"
        )


def fan_in(shape: tuple[int, ...]) -> int:
    """How many inputs each output of a weight sums over: the weights (out, ...) of one output."""
    return int(np.prod(shape[1:]))


def uniform(
    shape: tuple[int, ...], bound: float, rng: np.random.Generator, dtype: Any = np.float32
) -> np.ndarray:
    """Uniform on [-bound, bound). Drawn in float64, so that every dtype sees the same numbers."""
    require_generator(rng)
    return rng.uniform(-bound, bound, shape).astype(dtype)


def kaiming_uniform(
    shape: tuple[int, ...], rng: np.random.Generator, dtype: Any = np.float32
) -> np.ndarray:
    """Uniform with variance 2 / fan_in: bound sqrt(6 / fan_in).

    Keeps the scale of the signal through ReLU layers (He et al. 2015).
    """
    return uniform(shape, float(np.sqrt(6 / fan_in(shape))), rng, dtype)


def lecun_uniform(
    shape: tuple[int, ...], rng: np.random.Generator, dtype: Any = np.float32
) -> np.ndarray:
    """Uniform with bound 1 / sqrt(fan_in), PyTorch's default for linear and convolution layers."""
    return uniform(shape, float(np.sqrt(1 / fan_in(shape))), rng, dtype)
