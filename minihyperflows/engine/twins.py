"""How an operation finds its twin on a GPU: the registry that :func:`~minihyperflows.apply` asks.

Operations are written with NumPy's functions. CuPy has them too, so every operation runs on a GPU
as it is. Where speed counts, ``engine/gpu`` has a twin: a subclass that computes with kernels::

    @on_gpu(ops.ReLU)
    class ReLU(ops.ReLU):
        def takes(self, x): ...  # whether the kernels compute with these arrays
        def forward(self, x): ...
        def backward(self, c): ...

The operations do not know of their twins, which import them and not the other way round. So who
reads ``ops``, ``conv`` or ``norm`` reads only the method.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache, wraps
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from minihyperflows.engine import numbers
from minihyperflows.engine.backend import Array, device_of

if TYPE_CHECKING:
    from minihyperflows.engine.graph import Function

P = ParamSpec("P")
T = TypeVar("T")

_registered: dict[Any, Any] = {}


def on_gpu(original: Any) -> Callable[[T], T]:
    """Decorator that registers what computes in place of ``original`` where arrays lie on a GPU.

    Args:
        original: a Function, for a subclass of it that also has ``takes(*arrays)``; or a function
            made with :func:`by_device`, for a function of the same arguments.
    """

    def register(twin: T) -> T:
        _registered[original] = twin
        return twin

    return register


@cache
def _twins() -> dict[Any, Any]:
    """The twins, imported when the first array of a GPU comes."""
    importlib.import_module("minihyperflows.engine.gpu")
    return _registered


def twin_of(function: Function, arrays: list[Any]) -> Function:
    """The twin of ``function`` for these arrays of a GPU: ``function`` itself if there is none, or
    if it does not take them.

    Twins are found by the exact type, so a subclass that somebody writes is never replaced. The
    attributes of both are one and the same dictionary: the twin knows what the constructor was
    given, and the function what becomes of it.
    """
    kind = _twins().get(type(function))
    if kind is None:
        return function
    twin = kind.__new__(kind)
    twin.__dict__ = vars(function)
    return twin if twin.takes(*arrays) else function


def forward(function: Function, arrays: list[Any]) -> tuple[Function, Array]:
    """The function that computes ``function`` of these arrays of a GPU, and the result.

    Only whole numbers are converted first. Kernels and CuPy take half precision as it is, also
    beside float32, and compute as :mod:`~minihyperflows.engine.numbers` demands.
    """
    arrays = numbers.whole_as_floats(function, arrays)
    twin = twin_of(function, arrays)
    return twin, twin.forward(*arrays)


def by_device(function: Callable[P, T]) -> Callable[P, T]:
    """Decorator of a function of arrays, which on a GPU leaves the work to its twin there.

    The first argument, an array, decides.
    """

    @wraps(function)
    def chosen(*args: P.args, **kwargs: P.kwargs) -> T:
        if device_of(args[0]) == "cpu":
            return function(*args, **kwargs)
        result: T = _twins()[chosen](*args, **kwargs)
        return result

    return chosen
