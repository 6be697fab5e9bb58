"""What a Function keeps for ``backward`` must not change before ``backward`` reads it.

A step of an optimiser, or the next batch written into the same array, between the forward and the
backward pass would silently give the gradient of another function. So the graph notes how those
arrays look that somebody outside may write to, and ``backward`` refuses to start if one of them
looks different.

To compare all the numbers would take as long as a pass over memory for each. So of a large array
the look is a sample of about a hundred numbers: two microseconds, which no training step notices,
and enough for what rewrites an array. What changes a few numbers of a large array, as a step does
where most gradients are zero, can miss the sample. Therefore the optimisers of this package count
their changes too (``Tensor.version``). Left over is only who writes a few numbers of a large array
by hand. Nothing is noticed on a GPU, which one would have to wait for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from minihyperflows.engine.backend import Array
from minihyperflows.engine.errors import GraphError

if TYPE_CHECKING:
    from minihyperflows.engine.graph import Function

SAMPLE = 97  # numbers of a large array; a prime, see look


class Kept(NamedTuple):
    """An array that a Function keeps, and how it looked after ``forward``."""

    array: np.ndarray
    look: bytes


class Version(NamedTuple):
    """A leaf whose array a Function keeps, and its ``version`` at ``forward``."""

    leaf: Any
    version: int


def look(array: np.ndarray) -> bytes:
    """The numbers of ``array``, or those at every k-th place, of which there are 97 or more.

    k is odd and about a 97th of the size, which shares no factor with a batch of 32, 100 or 128
    images. So the places wander over the whole image, not along one column or its border.
    """
    return array.ravel()[:: (array.size // SAMPLE) | 1].tobytes()


def arrays_of(function: Function) -> list[np.ndarray]:
    """The NumPy arrays that ``function`` holds, in tuples and lists (an index, say) too."""
    values = list(vars(function).values())
    for value in values:
        if type(value) is tuple or type(value) is list:
            values += value
    return [value for value in values if type(value) is np.ndarray]


def kept_by(
    function: Function, inputs: tuple[Any, ...], arrays: list[Array], given: list[np.ndarray]
) -> tuple[list[Kept], list[Version]]:
    """What ``function``, which was just applied, keeps and somebody outside the graph may change.

    Args:
        function: keeps what ``backward`` needs in its attributes.
        inputs, arrays: what it was applied to, as recorded and as ``forward`` received it. Watched
            are leaves, constants and views, which may be of a leaf.
        given: what it held before ``forward``: what its constructor was given, labels for example.
    """
    held = arrays_of(function)
    if not held:
        return [], []
    outside = [*given, *(a for x, a in zip(inputs, arrays, strict=True) if _from_outside(x, a))]
    kept = [Kept(array, look(array)) for array in outside if _holds(held, array)]
    leaves = [x for x in inputs if hasattr(x, "version") and _holds(held, x.data)]
    return kept, [Version(leaf, leaf.version) for leaf in leaves]


def _from_outside(x: Any, array: Array) -> bool:
    made_here = getattr(x, "creator", None) is not None and array.base is None
    return type(array) is np.ndarray and not made_here


def _holds(held: list[np.ndarray], array: Array) -> bool:
    """Whether ``array``, or a view of it, is among ``held``."""
    owner = array if array.base is None else array.base
    return any(v is array or v.base is owner for v in held)


def require_unchanged(function: Function) -> None:
    """Raise unless everything that ``function`` keeps is as it was after ``forward``.

    Raises:
        GraphError: names the operation and the shape of the array.
    """
    for leaf, version in function.versions:
        if leaf.version != version:
            raise GraphError(_message(function, leaf.shape))
    for array, before in function.kept:
        if look(array) != before:
            raise GraphError(_message(function, array.shape))


def _message(function: Function, shape: tuple[int, ...]) -> str:
    return (
        f"an array of shape {shape}, which {function.name} needs for its backward pass, was "
        "changed after the forward pass: call backward before optimiser steps and before arrays "
        "are filled again, or compute the loss again"
    )
