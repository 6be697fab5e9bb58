"""CuPy's array, played by NumPy's."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from minihyperflows.emulator.recording import forbid, perform

# Around each array lie as many bytes as CuPy aligns arrays to, with all bits set: NaN for a kernel
# that reads there, and after one that writes there they differ.
MARGIN = 512
UNTOUCHED = b"\xff" * MARGIN


class ndarray:  # noqa: N801 - CuPy's name
    """A NumPy array in disguise: what works with CuPy's works, the rest raises, as there.

    Attributes:
        host: the array of NumPy.
        base: the array of this kind whose memory it shares, or None.
        margins: the memory before and after it; none if NumPy allocated it.
    """

    __module__ = "cupy"
    __hash__ = None  # type: ignore[assignment]

    def __init__(
        self,
        host: np.ndarray,
        base: ndarray | None = None,
        margins: tuple[np.ndarray, ...] = (),
    ) -> None:
        self.host, self.base, self.margins = host, base, margins

    # -- views, which need no GPU (the metadata and most operators are added below) ---------------

    @property
    def data(self) -> Any:
        """The memory; ``data.ptr`` is its address."""
        return SimpleNamespace(ptr=self.host.ctypes.data)

    @property
    def T(self) -> ndarray:  # noqa: N802 - CuPy's name
        return view_of(self, self.host.T)

    @property
    def real(self) -> ndarray:
        return view_of(self, self.host.real) if self.host.dtype.kind == "c" else self

    @property
    def imag(self) -> ndarray:
        return view_of(self, self.host.imag)

    def __len__(self) -> int:
        return len(self.host)

    def reshape(self, *shape: Any, order: Any = "C") -> ndarray:
        return view_or_copy(self, self.host.reshape(*shape, order=order), "a reshape that copies")

    def ravel(self) -> ndarray:
        return view_or_copy(self, self.host.ravel(), "a ravel that copies")

    def transpose(self, *axes: Any) -> ndarray:
        return view_of(self, self.host.transpose(*axes))

    def swapaxes(self, a: int, b: int) -> ndarray:
        return view_of(self, self.host.swapaxes(a, b))

    def squeeze(self, axis: Any = None) -> ndarray:
        return view_of(self, self.host.squeeze(axis))

    def view(self, dtype: Any = None) -> ndarray:
        return view_of(self, self.host.view() if dtype is None else self.host.view(dtype))

    def __getitem__(self, index: Any) -> ndarray:
        host = self.host[bare(index)]
        if isinstance(host, np.ndarray) and np.may_share_memory(host, self.host):
            return view_of(self, host)
        if isinstance(host, np.generic) and _is_plain(index):  # an element is an array of shape ()
            places = index if isinstance(index, tuple) else (index,)
            slices = tuple(slice(i, i + 1 or None) for i in places)
            return view_of(self, self.host[slices].reshape(()))
        forbid("indexing by an array")
        return ndarray(np.asarray(host))

    # -- what a GPU does -------------------------------------------------------------------------

    def __setitem__(self, index: Any, value: Any) -> None:
        forbid("assigning to elements")
        self.host[bare(index)] = bare(value)

    def fill(self, value: Any) -> None:
        forbid("fill")
        self.host.fill(value)

    def astype(self, dtype: Any, copy: bool = True, order: Any = "K") -> ndarray:
        if not copy and self.host.dtype == dtype:
            return self
        forbid("astype")
        return place(self.host.astype(dtype, order=order))

    def copy(self, order: Any = "C") -> ndarray:
        source, target = self.host, place(np.empty_like(self.host, order=order), copy=False)
        perform(lambda: np.copyto(target.host, source))
        return target

    # -- what brings values to the host and back -------------------------------------------------

    def get(self) -> np.ndarray:
        forbid("reading values")
        return self.host.copy()

    def set(self, host: np.ndarray) -> None:
        forbid("writing values from the host")
        if type(host) is not np.ndarray or host.dtype != self.dtype or host.shape != self.shape:
            raise ValueError(f"set needs a NumPy array of {self.dtype} and shape {self.shape}")
        self.host[...] = host

    def item(self, *index: int) -> Any:
        forbid("reading a value")
        return self.host.item(*index)

    def tolist(self) -> Any:
        forbid("reading values")
        return self.host.tolist()

    def __float__(self) -> float:
        return float(self.item())

    def __int__(self) -> int:
        return int(self.item())

    def __index__(self) -> int:
        return self.item().__index__()

    def __bool__(self) -> bool:
        return bool(self.item())

    def __repr__(self) -> str:
        return repr(self.host)

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        raise TypeError(
            "Implicit conversion to a NumPy array is not allowed. "
            "Please use `.get()` to construct a NumPy array explicitly."
        )

    # -- NumPy's functions -----------------------------------------------------------------------

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **kwargs: Any) -> Any:
        return call(getattr(ufunc, method), inputs, kwargs)

    def __array_function__(self, function: Any, types: Any, args: Any, kwargs: Any) -> Any:
        return call(function, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"module 'cupy': ndarray has no attribute {name!r}")


METADATA = ("shape", "dtype", "size", "ndim", "nbytes", "itemsize", "strides", "flags")
REDUCTIONS = ("sum", "mean", "max", "min", "any", "all", "argmax", "argmin", "var", "std")

BINARY = {
    **{"add": np.add, "sub": np.subtract, "mul": np.multiply, "truediv": np.true_divide},
    **{"floordiv": np.floor_divide, "mod": np.remainder, "pow": np.power, "matmul": np.matmul},
    **{"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor},
}
COMPARISONS = {
    **{"lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal},
    **{"eq": np.equal, "ne": np.not_equal},
}
UNARY = {"neg": np.negative, "abs": np.absolute, "invert": np.invert, "pos": np.positive}


def _add_metadata(name: str) -> None:
    setattr(ndarray, name, property(lambda self: getattr(self.host, name)))


def _add_reduction(name: str) -> None:
    def method(self: ndarray, *args: Any, **kwargs: Any) -> Any:
        return call(getattr(np, name), (self, *args), kwargs)

    setattr(ndarray, name, method)


def _add_operator(name: str, ufunc: np.ufunc) -> None:
    def method(self: ndarray, *others: Any) -> Any:
        if any(getattr(other, "__array_ufunc__", True) is None for other in others):
            return NotImplemented  # it wants to do this itself, as our tensors do
        return call(ufunc, (self, *others), {})

    setattr(ndarray, f"__{name}__", method)


def _add_reflected_operators(name: str, ufunc: np.ufunc) -> None:
    def reflected(self: ndarray, other: Any) -> Any:
        return call(ufunc, (other, self), {})

    def in_place(self: ndarray, other: Any) -> Any:
        return call(ufunc, (self, other), {"out": self})

    setattr(ndarray, f"__r{name}__", reflected)
    setattr(ndarray, f"__i{name}__", in_place)


for _name in METADATA:
    _add_metadata(_name)
for _name in REDUCTIONS:
    _add_reduction(_name)
for _name, _ufunc in (BINARY | COMPARISONS | UNARY).items():
    _add_operator(_name, _ufunc)
for _name, _ufunc in BINARY.items():
    _add_reflected_operators(_name, _ufunc)


# -- memory --------------------------------------------------------------------------------------


def place(host: np.ndarray, copy: bool = True) -> ndarray:
    """An array like ``host``, which is contiguous in some order, in memory with margins.

    Args:
        copy: with the contents of ``host``; else with any.
    """
    if host.dtype.hasobject:
        raise ValueError(f"Unsupported dtype {host.dtype}")
    memory = np.empty(host.nbytes + 3 * MARGIN, np.uint8)
    start = MARGIN + -memory.ctypes.data % MARGIN
    end = start + host.nbytes
    placed: np.ndarray = np.ndarray(host.shape, host.dtype, memory, start, host.strides)
    if copy:
        placed[...] = host
    margins = memory[start - MARGIN : start], memory[end : end + MARGIN]
    for margin in margins:
        margin.fill(0xFF)
    return ndarray(placed, margins=margins)


def overrun(x: ndarray) -> bool:
    """Whether something was written to the margins of ``x`` (which are repaired)."""
    margins = x.margins if x.base is None else x.base.margins
    touched = [margin for margin in margins if margin.tobytes() != UNTOUCHED]
    for margin in touched:
        margin.fill(0xFF)
    return bool(touched)


# -- between the two worlds ----------------------------------------------------------------------


def view_of(x: ndarray, host: np.ndarray) -> ndarray:
    """``host``, which is a view of the memory of ``x``, in disguise."""
    return ndarray(host, base=x if x.base is None else x.base)


def view_or_copy(x: ndarray, host: np.ndarray, what: str) -> ndarray:
    """``host``, which may be a view of ``x`` or a copy (``what``; no graph can hold that)."""
    if host is x.host:
        return x
    if host.size == 0 or np.may_share_memory(host, x.host):
        return view_of(x, host)
    forbid(what)
    return ndarray(host)


def call(function: Any, args: Any, kwargs: Any) -> Any:
    """A function of NumPy on the arrays behind the disguise; its results in disguise."""
    forbid(f"{getattr(function, '__name__', function)}")
    out = kwargs.get("out")
    result = function(*(bare(a) for a in args), **{k: bare(v) for k, v in kwargs.items()})
    if out is not None:
        return out[0] if isinstance(out, tuple) else out
    return disguised(result, args)


def bare(value: Any) -> Any:
    """``value`` without the disguise; TypeError for an array of NumPy's own."""
    if isinstance(value, ndarray):
        return value.host
    if isinstance(value, np.ndarray):
        raise TypeError("Unsupported type <class 'numpy.ndarray'>")
    if isinstance(value, tuple | list):
        return type(value)(bare(v) for v in value)
    return value


def disguised(value: Any, sources: Any = ()) -> Any:
    """Arrays (and NumPy's scalars, which CuPy has none of) as arrays of this module."""
    if isinstance(value, np.ndarray | np.generic):
        array = np.asarray(value)
        shared = (
            s for s in sources if isinstance(s, ndarray) and np.may_share_memory(s.host, array)
        )
        return ndarray(array, base=next(shared, None))
    if isinstance(value, tuple | list):
        return type(value)(disguised(v, sources) for v in value)
    return value


def _is_plain(index: Any) -> bool:
    places = index if isinstance(index, tuple) else (index,)
    return all(isinstance(i, int | np.integer) for i in places)
