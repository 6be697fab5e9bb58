"""``cupy`` itself: NumPy's functions on arrays in disguise."""

from __future__ import annotations

import importlib.machinery
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

from minihyperflows.emulator import recording
from minihyperflows.emulator.array import (
    bare,
    call,
    disguised,
    ndarray,
    place,
    view_of,
    view_or_copy,
)
from minihyperflows.emulator.compilation import RawModule
from minihyperflows.emulator.streams import CUDA, MemoryPool


class Cupy(ModuleType):
    """The module. What is not defined here is NumPy's, behind the disguise."""

    __spec__ = importlib.machinery.ModuleSpec("cupy", None)
    __version__ = "emulated"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or not hasattr(np, name):
            raise AttributeError(f"module 'cupy' has no attribute {name!r}")
        attribute = getattr(np, name)
        if isinstance(attribute, np.ufunc):
            return Ufunc(attribute)
        if isinstance(attribute, type) or not callable(attribute):
            return attribute  # dtypes, constants
        return _function(name, attribute)


def _function(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def disguise(*args: Any, **kwargs: Any) -> Any:
        return call(function, args, kwargs)

    disguise.__name__ = name
    return disguise


class Ufunc:
    """One of NumPy's universal functions."""

    def __init__(self, ufunc: np.ufunc) -> None:
        self._ufunc = ufunc
        self.__name__ = ufunc.__name__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return call(self._ufunc, args, {k: v for k, v in kwargs.items() if v is not None})

    def at(self, *args: Any) -> None:
        """NumPy's ``ufunc.at``: unbuffered, in place."""
        call(self._ufunc.at, args, {})


# -- functions that are not quite NumPy's: the types of their results, or what a graph may hold ----


def asarray(value: Any, dtype: Any = None, order: Any = None) -> ndarray:
    """``value`` as an array of the GPU: copied from the host, or itself if it is one already."""
    if isinstance(value, ndarray) and dtype in (None, value.dtype):
        return view_or_copy(value, np.asarray(value.host, order=order), "asarray that copies")
    return _from(value, dtype, order or "K")


def array(value: Any, dtype: Any = None, copy: bool = True, order: Any = "K") -> ndarray:
    """A new array of the GPU."""
    if isinstance(value, ndarray) and dtype in (None, value.dtype):
        return value.copy() if copy else value
    return _from(value, dtype, order)


def _from(value: Any, dtype: Any, order: Any) -> ndarray:
    recording.forbid("making an array")
    host = value.host if isinstance(value, ndarray) else value
    return place(np.array(host, dtype=dtype, order=order))


def ascontiguousarray(value: ndarray, dtype: Any = None) -> ndarray:
    """``value`` row by row: itself, or a copy."""
    return asarray(value, dtype, order="C")


def empty(shape: Any, dtype: Any = float, order: Any = "C") -> ndarray:
    """An array whose values nobody may rely on: they are NaN whenever a graph is replayed."""
    array = place(np.empty(shape, dtype, order=order), copy=False)
    if array.dtype.kind in "fc":
        recording.perform(lambda: array.host.fill(np.nan))
    return array


def zeros(shape: Any, dtype: Any = float, order: Any = "C") -> ndarray:
    """An array of zeros, whenever a graph is replayed."""
    array = place(np.empty(shape, dtype, order=order), copy=False)
    recording.perform(lambda: array.host.fill(0))
    return array


def asnumpy(value: Any) -> np.ndarray:
    """A copy on the host."""
    return value.get() if isinstance(value, ndarray) else np.asarray(value)


def copyto(target: ndarray, source: Any, where: Any = True) -> None:
    """target[where] = source[where]."""
    recording.forbid("copyto")
    np.copyto(target.host, bare(source), where=bare(where))


def sliding_window_view(x: ndarray, *args: Any, **kwargs: Any) -> ndarray:
    """NumPy's function of that name: a view."""
    return view_of(x, np.lib.stride_tricks.sliding_window_view(x.host, *args, **kwargs))


def broadcast_to(x: Any, shape: Any) -> ndarray:
    """NumPy's function of that name: a view."""
    view = np.broadcast_to(bare(x), shape)
    return view_of(x, view) if isinstance(x, ndarray) else disguised(view)


def make_cupy() -> ModuleType:
    """The module ``cupy``."""
    module = Cupy("cupy")
    contents = {
        **{"ndarray": ndarray, "RawModule": RawModule, "cuda": CUDA},
        "lib": SimpleNamespace(
            stride_tricks=SimpleNamespace(sliding_window_view=sliding_window_view)
        ),
        "is_available": lambda: True,
        "get_default_memory_pool": MemoryPool,
    }
    functions = (asarray, array, empty, zeros, ascontiguousarray, asnumpy, copyto, broadcast_to)
    contents |= {function.__name__: function for function in functions}
    for name, value in contents.items():
        setattr(module, name, value)
    return module
