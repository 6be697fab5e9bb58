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
by hand. Nothing is noticed on another device, which one would have to wait for.
"""

from __future__ import annotations

from collections.abc import Iterable
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
    """The numbers of ``array``, or those at every k-th place: 97 or more.

    k is odd and about a 97th of the size, which shares no factor with a batch of 32, 100 or 128
    images. So the places wander over the whole image, not along one column or its border.
    """
    numbers = array.reshape(-1) if array.flags.c_contiguous else array.flat  # neither is a copy
    return numbers[:: (array.size // SAMPLE) | 1].tobytes()


def kept_by(
    function: Function, inputs: tuple[Any, ...], arrays: list[Array], given: list[Any]
) -> tuple[list[Kept], list[Version]]:
    """What ``function``, which was just applied, keeps and somebody outside the graph may change.

    Args:
        function: keeps what ``backward`` needs in its attributes.
        inputs, arrays: what it was applied to, as recorded and as ``forward`` received it. Watched
            are leaves, constants and views, which may be of a leaf.
        given: its attributes before ``forward``: what its constructor was given, labels say.
    """
    held = {id(owner(array)) for array in _arrays(vars(function).values())}
    if not held:
        return [], []
    kept = [Kept(array, look(array)) for array in _arrays(given) if id(owner(array)) in held]
    versions = []
    for x, array in zip(inputs, arrays, strict=True):
        if type(array) is not np.ndarray or id(owner(array)) not in held:
            continue
        if array.base is not None or getattr(x, "creator", None) is None:
            kept.append(Kept(array, look(array)))
            if hasattr(x, "version"):  # a leaf
                versions.append(Version(x, x.version))
    return kept, versions


def owner(array: np.ndarray) -> Any:
    """What the memory of ``array`` belongs to: itself, or what it is a view of."""
    return array if array.base is None else array.base


def _arrays(values: Iterable[Any]) -> list[np.ndarray]:
    """The NumPy arrays among ``values``, and in tuples and lists there (an index, say)."""
    found = []
    for value in values:
        kind = type(value)
        if kind is np.ndarray:
            found.append(value)
        elif kind is tuple or kind is list:
            found += [item for item in value if type(item) is np.ndarray]
    return found


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
