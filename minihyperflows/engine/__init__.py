"""Arrays and gradients: the reverse-mode automatic differentiation engine.

Read in this order: ``graph`` (functions, their order, the backward pass), ``tensor``, ``ops``;
``windows``, ``conv``, ``im2col``, ``winograd``, ``pooling``; ``norm``. Four modules serve the
others: ``numbers`` (what a dtype means in an operation), ``threads`` (blocks of large arrays,
shared among threads), ``memory`` (large arrays used again) and ``backend`` (the device of an array,
and NumPy or CuPy). None of them needs to know what follows.

How an operation finds its twin on a GPU:

1. ``apply(ops.ReLU(), x)`` looks where x lies. If it is a NumPy array, ``ReLU`` computes.
2. Otherwise it asks ``twins.forward``, which imports ``engine.gpu`` when it is first asked.
3. Each module there registers its twins: ``@on_gpu(ops.ReLU) class ReLU(ops.ReLU)``.
4. ``twin_of`` looks for a twin of exactly this type, not of a subclass that somebody wrote,
5. gives it the attributes of the function, and asks ``takes(x)``: do its kernels take this array?
6. If so, the twin computes, and the graph records it: ``backward`` is the twin's too.
7. If not, or if there is no twin, ``ReLU`` computes, with CuPy's functions in place of NumPy's.
8. The sums of gradients, which belong to no operation, are ``threads.add`` and ``threads.copy``.
   They are marked with ``@by_device``, and have twins in the same registry.
"""

from minihyperflows.engine.backend import cuda_available
from minihyperflows.engine.errors import (
    DeviceError,
    DoubtfulResultWarning,
    GraphError,
    NonFiniteLossError,
    ShapeError,
)
from minihyperflows.engine.graph import Function, no_grad
from minihyperflows.engine.tensor import Tensor, apply

__all__ = [
    "DeviceError",
    "DoubtfulResultWarning",
    "Function",
    "GraphError",
    "NonFiniteLossError",
    "ShapeError",
    "Tensor",
    "apply",
    "cuda_available",
    "no_grad",
]
