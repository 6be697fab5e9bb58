"""The tensor: an array that remembers how it was made.

Operators are written out in the class body, each one line, so that a reader (and an editor) finds
``Tensor.__add__`` where it is defined.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np

from minihyperflows.engine import numbers, ops, twins
from minihyperflows.engine.backend import Array, device_of, to_device, to_numpy, xp_of
from minihyperflows.engine.changes import kept_by
from minihyperflows.engine.errors import DeviceError, GraphError, NonFiniteLossError, ShapeError
from minihyperflows.engine.graph import (
    Function,
    Intermediate,
    add_to_leaf,
    backpropagate,
    is_recording,
)

Axis: TypeAlias = int | tuple[int, ...] | None


class Tensor:
    """An array, and after :meth:`backward` the gradient of a loss with respect to it.

    Args:
        array: a NumPy or CuPy array (kept, not copied), or anything ``numpy.asarray`` takes.
        requires_grad: whether ``backward`` should fill in ``grad``.

    Attributes:
        data: the array.
        grad: dL/d(data), an array of the same shape, or None. Several backward passes add up.
        gradient_buffer: an array of the same shape, perhaps of another dtype, in whose memory
            ``grad`` is to lie; None: in new memory.
        version: how often the package's own optimisers have changed ``data`` in place. Who writes
            into ``data`` by hand may add 1: a graph that needs the old values then notices.
        creator: the :class:`~minihyperflows.engine.graph.Function` that made it; None for a leaf.
    """

    # Let `array + tensor` reach Tensor.__radd__ instead of becoming an array of tensors, and keep
    # NumPy's functions from cutting the graph silently.
    __array_ufunc__ = None

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        raise TypeError(
            "NumPy cannot compute with a Tensor, which would lose its gradient: use the tensor's "
            "methods and minihyperflows.functional, or take its values with .numpy()"
        )

    def __init__(self, array: Any, requires_grad: bool = False) -> None:
        if isinstance(array, Tensor):
            raise TypeError("this is a Tensor already: use it as it is, or its .detach()")
        self.data: Array = _numbers(array)
        if requires_grad and self.data.dtype.kind not in "fc":
            raise TypeError(
                f"only real or complex tensors have gradients, not {self.data.dtype}: "
                "convert the array first, for example with .astype(np.float32)"
            )
        self.requires_grad = requires_grad
        self.grad: Array | None = None
        self.gradient_buffer: Array | None = None
        self.version = 0
        self.creator: Function | None = None

    # -- what it is ------------------------------------------------------------------------------

    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape

    @property
    def ndim(self) -> int:
        return self.data.ndim

    @property
    def size(self) -> int:
        return self.data.size

    @property
    def dtype(self) -> np.dtype:
        return self.data.dtype

    @property
    def device(self) -> str:
        """Where the data lies: "cpu" or "cuda"."""
        return device_of(self.data)

    def numpy(self) -> np.ndarray:
        """The values as a NumPy array: the tensor's own memory on the CPU, a copy from a GPU."""
        return to_numpy(self.data)

    def item(self) -> Any:
        """The value of a one-element tensor as a Python number."""
        return self.data.item()

    def detach(self) -> Tensor:
        """The same values, cut off from the graph."""
        return Tensor(self.data)

    def to(self, device: str) -> Tensor:
        """The same values on another device, cut off from the graph."""
        return Tensor(to_device(self.data, device), self.requires_grad)

    def __len__(self) -> int:
        return len(self.data)

    def __bool__(self) -> bool:
        return bool(self.data)

    def __repr__(self) -> str:
        made_by = f", made by {self.creator.name}" if self.creator else ""
        needs = ", requires_grad=True" if self.requires_grad and not self.creator else ""
        return f"Tensor({np.array2string(self.numpy(), prefix='Tensor(')}{needs}{made_by})"

    # -- gradients -------------------------------------------------------------------------------

    def backward(self, cotangent: Any = None) -> None:
        """Add dL/dx to ``x.grad`` for every leaf x that this tensor was computed from.

        Args:
            cotangent: dL/d(self), of this tensor's shape; left out, this tensor is itself the
                scalar loss L.

        The recorded graph is freed, so that its memory is free as soon as this returns.

        Raises:
            GraphError: nothing here requires a gradient, no cotangent for a tensor that is not a
                scalar, a graph that an earlier backward freed, or an array that the graph needs
                and that was changed since (:mod:`minihyperflows.engine.changes`).
            ShapeError: the cotangent has another shape.
            NonFiniteLossError: the loss is NaN or infinite.
        """
        if not self.requires_grad:
            raise GraphError(
                "backward of a tensor that depends on nothing with requires_grad=True "
                "(or was computed under no_grad)"
            )
        if self.creator is None:
            add_to_leaf(self, [self._first_cotangent(cotangent)])
        else:
            backpropagate(self.creator, [self._first_cotangent(cotangent)])

    def _first_cotangent(self, cotangent: Any) -> Array:
        xp = xp_of(self.data)
        if cotangent is None:
            if self.size != 1:
                raise GraphError(
                    f"backward of a tensor of shape {self.shape} needs a cotangent of that shape; "
                    "only a scalar loss can do without"
                )
            if not bool(xp.isfinite(self.data).all()):
                raise NonFiniteLossError(f"the loss is {self.item()}: its gradient is meaningless")
            return xp.ones_like(self.data)
        array = xp.array(cotangent.data if isinstance(cotangent, Tensor) else cotangent)  # a copy
        if array.dtype.kind != "c":  # a complex cotangent stays complex
            array = array.astype(self.dtype, copy=False)
        if array.shape != self.shape:
            raise ShapeError(f"cotangent of shape {array.shape} for a tensor of shape {self.shape}")
        return array

    # -- operators -------------------------------------------------------------------------------

    def __add__(self, other: Any) -> Tensor:
        return apply(ops.Add(), self, other)

    def __radd__(self, other: Any) -> Tensor:
        return apply(ops.Add(), other, self)

    def __sub__(self, other: Any) -> Tensor:
        return apply(ops.Subtract(), self, other)

    def __rsub__(self, other: Any) -> Tensor:
        return apply(ops.Subtract(), other, self)

    def __mul__(self, other: Any) -> Tensor:
        return apply(ops.Multiply(), self, other)

    def __rmul__(self, other: Any) -> Tensor:
        return apply(ops.Multiply(), other, self)

    def __truediv__(self, other: Any) -> Tensor:
        return apply(ops.Divide(), self, other)

    def __rtruediv__(self, other: Any) -> Tensor:
        return apply(ops.Divide(), other, self)

    def __matmul__(self, other: Any) -> Tensor:
        return apply(ops.MatMul(), self, other)

    def __rmatmul__(self, other: Any) -> Tensor:
        return apply(ops.MatMul(), other, self)

    def __pow__(self, exponent: float) -> Tensor:
        return apply(ops.Power(exponent), self)

    def __neg__(self) -> Tensor:
        return apply(ops.Negate(), self)

    def __getitem__(self, index: Any) -> Tensor:
        index = index.data if isinstance(index, Tensor) else index
        return apply(ops.GetItem(index), self)

    # -- methods ---------------------------------------------------------------------------------

    def exp(self) -> Tensor:
        return apply(ops.Exp(), self)

    def log(self) -> Tensor:
        return apply(ops.Log(), self)

    def sum(self, axis: Axis = None, keepdims: bool = False) -> Tensor:
        return apply(ops.Sum(axis, keepdims), self)

    def mean(self, axis: Axis = None, keepdims: bool = False) -> Tensor:
        return apply(ops.Mean(axis, keepdims), self)

    def max(self, axis: Axis = None, keepdims: bool = False) -> Tensor:
        return apply(ops.Max(axis, keepdims), self)

    def reshape(self, *shape: int | Sequence[int]) -> Tensor:
        return apply(ops.Reshape(ops.one_tuple(shape)), self)

    def transpose(self, *axes: int | Sequence[int]) -> Tensor:
        return apply(ops.Transpose(ops.one_tuple(axes) or None), self)

    @property
    def T(self) -> Tensor:  # noqa: N802 - NumPy's name
        return self.transpose()


def apply(function: Function, *inputs: Any) -> Tensor:
    """Apply ``function`` to ``inputs`` and, unless under ``no_grad``, record it for ``backward``.

    Args:
        function: a new instance of a :class:`Function`; an instance records one application.
        inputs: tensors, or arrays and numbers, which count as constants. Those of different
            dtypes are converted by the rule of :mod:`minihyperflows.engine.numbers`.

    Raises:
        DeviceError: the inputs lie on different devices.
        GraphError: the function was applied already.
        TypeError: ``function`` is not a Function, or an input holds no numbers.
    """
    if not isinstance(function, Function):
        raise TypeError(f"apply needs a Function instance, as in apply(Exp(), x), not {function}")
    if function.inputs or function.freed:
        raise GraphError(f"this {function.name} was applied already: make a new one for each use")
    arrays = [x.data if isinstance(x, Tensor) else _constant(x) for x in inputs]
    device = _common_device(function, arrays)
    needs = tuple([isinstance(x, Tensor) and x.requires_grad for x in inputs])
    recorded = is_recording() and any(needs)
    function.needs = needs if recorded else (False,) * len(needs)
    given = list(vars(function).values())
    if device == "cpu":
        result = numbers.forward(function, arrays)
    else:
        function, result = twins.forward(function, arrays)
    output = Tensor(result)
    if recorded:
        function.kept, function.versions = kept_by(function, inputs, arrays, given)
        function.inputs = tuple([_without_values(x) for x in inputs])
        function.output_shape = output.data.shape
        output.requires_grad, output.creator = True, function
    return output


def _without_values(x: Any) -> Any:
    """What the graph keeps of an input: leaves and constants as they are."""
    made = isinstance(x, Tensor) and x.creator is not None
    return Intermediate(x.creator, x.data.shape, x.data.dtype) if made else x


def _constant(value: Any) -> Any:
    """A number as Python's, so that it adapts to the other operand's dtype; else an array."""
    value = numbers.number(value)
    return value if isinstance(value, bool | int | float | complex) else _numbers(value)


def _numbers(value: Any) -> Array:
    """``value`` as an array: itself if it is one; TypeError if it holds anything but numbers."""
    array = np.asarray(value) if device_of(value) == "cpu" else value
    if array.dtype.kind in "OSUmM":
        raise TypeError(f"a tensor holds numbers, not {type(value).__name__} ({array.dtype})")
    return array


def _common_device(function: Function, arrays: list[Any]) -> str:
    """The device of the arrays; numbers lie on none. DeviceError if there are several."""
    devices = {device_of(a): a for a in arrays if hasattr(a, "shape")}
    if len(devices) > 1:
        shapes = " and ".join(f"shape {a.shape} on {d}" for d, a in sorted(devices.items()))
        raise DeviceError(
            f"{function.name}: inputs on different devices ({shapes}): move one with .to"
        )
    return next(iter(devices), "cpu")
