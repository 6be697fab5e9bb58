"""One rule for numbers: what a dtype means in an operation.

``apply`` brings the inputs of an operation into one dtype, and the result has that dtype too.

1. **The widest float wins**, as in NumPy: float32 with float64 is float64, and float64 with
   complex64 is complex128. Whole numbers (booleans and integers) adapt to the floats beside them,
   as in PyTorch: int64 with float32 is float32, where NumPy says float64. So labels and pixels do
   not double the memory of a network that meets them.
2. **A number has no dtype**, be it Python's or a NumPy scalar, and neither has a constant array of
   shape (). Only its kind counts: a float makes whole numbers floats, a complex number makes floats
   complex. So ``np.sqrt(2) * x`` is ``2**0.5 * x``. NumPy would give float64 for a float32 x, and a
   network would change its dtype because a factor came from one of NumPy's functions. A Tensor has
   a dtype, of whatever shape it is. (So has an array of shape () on another device: asking for its
   value would mean to wait.)
3. **Whole numbers alone** stay whole where the result is whole, with NumPy's arithmetic, which
   wraps around: in sums, differences, products, powers by 0, 1, 2, ..., and wherever numbers are
   only picked or moved (``Arithmetic.WHOLE`` and ``NONE``). All other operations need floats
   (``Arithmetic.FLOAT``) and turn them into float64, NumPy's dtype of a Python float: so
   ``Tensor([1, 2]).exp()`` is ``Tensor([1.0, 2.0]).exp()``.
4. **Half precision is for storing.** An operation computes in float32, sums above all, and rounds
   the result, and each gradient, once. Other devices do that themselves, so they get float16 as it
   is, also beside float32 (a bias, say).
5. **A gradient has the dtype of its input**, and the cotangent that of the output. A complex one
   stays complex, which is what derivatives by a complex step need.

A Function that does not say what its ``arithmetic`` is gets its arrays as they are: an index among
them must stay whole.
"""

from __future__ import annotations

import enum
from numbers import Integral
from typing import TYPE_CHECKING, Any

import numpy as np

from minihyperflows.engine.backend import Array, xp_of
from minihyperflows.engine.blas import one_blas_thread

if TYPE_CHECKING:
    from minihyperflows.engine.graph import Function


class Arithmetic(enum.Enum):
    """What an operation does with the numbers that it is given."""

    FLOAT = "computes with floats: whole numbers are converted"
    WHOLE = "computes; the result of whole numbers is whole"
    NONE = "picks numbers, or moves them"


HALF, SINGLE = np.dtype(np.float16), np.dtype(np.float32)
DEFAULT = np.dtype(np.float64)  # of whole numbers where floats are needed, and of Python's floats

# Nothing is to be done for an operation all of whose arrays have one and the same of these.
COMPUTED_AS_THEY_ARE = {np.dtype(t) for t in (np.float32, np.float64, np.complex64, np.complex128)}


def is_whole(dtype: np.dtype) -> bool:
    """Whether it is a dtype of booleans or integers."""
    return dtype.kind in "biu"


def number(value: Any) -> Any:
    """A number, or a NumPy array of shape (), as Python's number; anything else as it is."""
    if isinstance(value, np.ndarray) and value.shape == ():
        value = value[()]
    if isinstance(value, bool | np.bool_):
        return bool(value)
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, float | np.floating):
        return float(value)
    return complex(value) if isinstance(value, complex | np.complexfloating) else value


def common_dtype(*inputs: Any) -> np.dtype:
    """The dtype in which these arrays and numbers meet: points 1 and 2, and NumPy's for whole
    numbers alone."""
    dtypes = [np.dtype(a.dtype) for a in inputs if hasattr(a, "dtype")]
    kinds = [type(a)() for a in inputs if type(a) in (float, complex)]
    floats = [d for d in dtypes if not is_whole(d)]
    if not floats and not kinds:
        return np.result_type(*dtypes)
    return np.result_type(*(floats or [DEFAULT]), *kinds)


def float_dtype(*inputs: Any) -> np.dtype:
    """The same where floats are needed: point 3."""
    common = common_dtype(*inputs)
    return DEFAULT if is_whole(common) else common


def computing_dtype(dtype: Any) -> np.dtype:
    """The dtype in which numbers of ``dtype`` are added up: point 4."""
    return SINGLE if dtype == HALF else np.dtype(dtype)


def converted(inputs: Any, dtype: np.dtype) -> list[Any]:
    """The arrays among ``inputs`` in ``dtype``, themselves if they have it; numbers as they are."""
    return [a.astype(dtype, copy=False) if hasattr(a, "dtype") else a for a in inputs]


def as_floats(*inputs: Any) -> list[Any]:
    """Arrays to compute with, all of one dtype; None and numbers as they are."""
    return converted(inputs, computing_dtype(float_dtype(*inputs)))


@one_blas_thread
def forward(function: Function, inputs: list[Any]) -> Array:
    """``function.forward`` of NumPy arrays and Python numbers, by the rule."""
    dtypes = {a.dtype for a in inputs if hasattr(a, "dtype")}
    if not dtypes:  # numbers alone
        inputs = [np.asarray(a) for a in inputs]
        dtypes = {a.dtype for a in inputs}
    plain = len(dtypes) <= 1 and dtypes <= COMPUTED_AS_THEY_ARE
    if plain or function.arithmetic is None:
        return function.forward(*inputs)
    dtype = _meeting_dtype(function, inputs)
    function.rounds_to_half = dtype == HALF
    if is_whole(dtype):
        return function.forward(*inputs)
    if function.arithmetic is Arithmetic.NONE or not function.rounds_to_half:
        return function.forward(*converted(inputs, dtype))
    return rounded(function.forward(*converted(inputs, SINGLE)), HALF)


def whole_as_floats(function: Function, inputs: list[Any]) -> list[Any]:
    """``inputs`` with whole numbers converted where ``function`` needs floats, or meets some.

    On another device the rest happens by itself: point 4.
    """
    whole = [hasattr(a, "dtype") and is_whole(a.dtype) for a in inputs]
    if function.arithmetic is None or not any(whole):
        return inputs
    dtype = _meeting_dtype(function, inputs)
    if is_whole(dtype):
        return inputs
    return [a.astype(dtype) if w else a for a, w in zip(inputs, whole, strict=True)]


def _meeting_dtype(function: Function, inputs: list[Any]) -> np.dtype:
    needs_floats = function.arithmetic is Arithmetic.FLOAT
    return float_dtype(*inputs) if needs_floats else common_dtype(*inputs)


def backward(function: Function, cotangent: Array) -> Any:
    """``function.backward`` of a cotangent, which is float32 where ``forward`` computed so."""
    if function.rounds_to_half and cotangent.dtype == HALF:
        cotangent = cotangent.astype(SINGLE)
    return function.backward(cotangent)


def rounded(gradient: Array, dtype: Any) -> Array:
    """``gradient`` in ``dtype``, itself if it has that, or if it is complex: point 5."""
    keep = gradient.dtype == dtype or gradient.dtype.kind == "c"
    return gradient if keep else xp_of(gradient).asarray(gradient, dtype=dtype)
