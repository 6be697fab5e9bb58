"""A function of arrays together with what is claimed to be its gradient."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from minihyperflows.engine.graph import Function, no_grad
from minihyperflows.engine.tensor import Tensor, apply
from minihyperflows.testing.compare import as_array

Array = np.ndarray
KINK_MARGIN = 1e-2  # how far `keep_away` moves inputs: much more than the step of a difference


@dataclass
class Problem:
    """A function of arrays and what is claimed to be its gradient.

    Attributes:
        inputs: the arrays to differentiate at.
        names: of the inputs, for messages.
        evaluate: the function, of a list like ``inputs``.
        gradients: (inputs, cotangent) -> one array (or None) for each input.
    """

    inputs: list[Array]
    names: list[str]
    evaluate: Callable[[list[Array]], Array]
    gradients: Callable[[list[Array], Array], list[Array | None]]

    @staticmethod
    def of_tensors(f: Any, inputs: list[Array]) -> Problem:
        """``f`` (see :func:`check_grad`) and its gradient by ``Tensor.backward``."""
        function = as_function(f)

        def evaluate(arrays: list[Array]) -> Array:
            with no_grad():
                return function(*map(Tensor, arrays)).data

        def gradients(arrays: list[Array], cotangent: Array) -> list[Array | None]:
            leaves = [Tensor(a.copy(), requires_grad=is_float(a)) for a in arrays]
            output = function(*leaves)
            if not output.requires_grad:
                raise AssertionError(
                    "the output depends on no input: the graph is cut, for example by .data, "
                    ".numpy(), .detach() or no_grad"
                )
            output.backward(cotangent)
            return [leaf.grad for leaf in leaves]

        names = [f"input {i} of shape {a.shape}" for i, a in enumerate(inputs)]
        return Problem(inputs, names, evaluate, gradients)

    def direction(self, rng: np.random.Generator) -> list[Array]:
        """A random direction for each input; zero for constants."""
        return [rng.standard_normal(a.shape) * is_float(a) for a in self.inputs]

    def moved(self, direction: list[Array], step: complex) -> list[Array]:
        """inputs + step direction."""
        pairs = zip(self.inputs, direction, strict=True)
        return [x + step * v if is_float(x) else x for x, v in pairs]

    def along(self, i: int, direction: Array) -> list[Array]:
        """``direction`` for input ``i``, zero for the others."""
        return [direction if k == i else np.zeros(a.shape) for k, a in enumerate(self.inputs)]

    def step_for(self, i: int, step: float) -> float:
        """``step``, relative to input ``i`` where that is larger than 1."""
        return step * max(1.0, float(abs(self.inputs[i]).max(initial=0.0)))


def as_function(f: Any) -> Callable[..., Tensor]:
    """A function of tensors from one, or from a Function: its class, an instance or a factory."""
    if isinstance(f, Function):
        return lambda *inputs: apply(copy.copy(f), *inputs)
    if isinstance(f, type) or not _needs_arguments(f):
        return lambda *inputs: apply(f(), *inputs)
    return f


def _needs_arguments(f: Callable[..., Any]) -> bool:
    """False for ``lambda: Scale(2.0)``, and for ``lambda s=s: Scale(s)``, made in a loop over s."""
    parameters = inspect.signature(f).parameters.values()
    return any(parameter.default is inspect.Parameter.empty for parameter in parameters)


def is_float(array: Array) -> bool:
    """True for real and complex numbers, False for integers, which count as constants."""
    return array.dtype.kind in "fc"


def keep_away(array: Array, kink: float) -> Array:
    """``array`` with the numbers closer than KINK_MARGIN to ``kink`` moved to that distance."""
    if not is_float(array):
        return array
    distance = array - kink
    far = np.maximum(abs(distance), KINK_MARGIN)
    return kink + np.where(distance < 0, -far, far)


def copy_of(value: Any) -> Array:
    """A copy of ``value`` to compute with: float64, or as it is if it holds integers."""
    array = np.array(as_array(value))
    return array.astype(np.float64) if array.dtype.kind == "f" else array
