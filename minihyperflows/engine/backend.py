"""The only module that knows that both NumPy and CuPy exist.

The device is a property of the data: an operation asks :func:`xp_of` which module its arrays
belong to and calls that. CuPy is optional and imported lazily, so this file is also the only one
with an ``import`` inside a function.
"""

from __future__ import annotations

import ctypes
import importlib
from types import ModuleType
from typing import Any

import numpy as np

from minihyperflows.engine.errors import DeviceError

# A NumPy or CuPy array. The two share their methods, not a base class.
Array = Any

DEVICES = ("cpu", "cuda")


def device_of(array: Array) -> str:
    """``"cuda"`` for a CuPy array, ``"cpu"`` for everything else (NumPy arrays, scalars, lists)."""
    kind = type(array)
    if kind is np.ndarray:  # asked some hundred times a step
        return "cpu"
    return "cuda" if kind.__module__.partition(".")[0] == "cupy" else "cpu"


def xp_of(array: Array) -> ModuleType:
    """The array module (``numpy`` or ``cupy``) that ``array`` belongs to."""
    return np if device_of(array) == "cpu" else cupy()


def cuda_available() -> bool:
    """True if CuPy is installed and sees a GPU. False otherwise, never an exception."""
    try:
        return cupy().cuda.runtime.getDeviceCount() > 0
    except Exception:  # a broken driver raises CuPy's own errors: all of them mean "no GPU"
        return False


def to_device(array: Array, device: str) -> Array:
    """``array`` on ``device`` ("cpu" or "cuda"); the same object if it is there already.

    Raises:
        DeviceError: the device is unknown, or "cuda" without CuPy and a GPU.
    """
    if device not in DEVICES:
        raise DeviceError(f"unknown device {device!r}: choose one of {', '.join(DEVICES)}")
    if device == device_of(array):
        return array
    if device == "cpu":
        return to_numpy(array)
    require_gpu()
    return cupy().asarray(array)


def require_gpu() -> None:
    """Raise the DeviceError that says what to do, unless there is a GPU."""
    if not cuda_available():
        raise DeviceError(
            'no GPU is available: install CuPy (pip install "minihyperflows[gpu]") on a machine '
            "with an NVIDIA GPU, or use the cpu device"
        )


def to_numpy(array: Array) -> np.ndarray:
    """``array`` as a NumPy array, copied only if it lives on a GPU."""
    return np.asarray(array) if device_of(array) == "cpu" else cupy().asnumpy(array)


def contiguous(array: Array) -> Array:
    """``array`` in C order: itself if it is that already, else a copy.

    NumPy's ``ascontiguousarray`` would give an array of shape () the shape (1,).
    """
    return array if array.flags.c_contiguous else xp_of(array).ascontiguousarray(array)


def cupy() -> ModuleType:
    """CuPy itself, for what NumPy has nothing like: kernels, streams, graphs."""
    return importlib.import_module("cupy")


def cuda_library(name: str) -> ctypes.CDLL:
    """One of NVIDIA's libraries, "cublas" say: the file that CuPy uses."""
    pathfinder = importlib.import_module("cuda.pathfinder")  # comes with CuPy
    return ctypes.CDLL(pathfinder.load_nvidia_dynamic_lib(name).abs_path)
