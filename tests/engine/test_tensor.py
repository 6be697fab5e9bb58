"""The tensor: what it keeps, what it computes, and what it says when it is misused."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import minihyperflows as mh
from minihyperflows import functional as F
from minihyperflows.engine import ops


def leaf(*shape: int, dtype: Any = np.float64) -> mh.Tensor:
    values = np.random.default_rng(1).standard_normal(shape).astype(dtype)
    return mh.Tensor(values, requires_grad=True)


# -- no hidden copies ------------------------------------------------------------------------------


def test_a_tensor_keeps_the_array_it_is_given(rng: np.random.Generator) -> None:
    array = rng.standard_normal((3, 4))
    x = mh.Tensor(array)
    assert x.data is array
    assert x.numpy() is array
    assert x.detach().data is array
    assert x.to("cpu").data is array


def test_views_stay_views(rng: np.random.Generator) -> None:
    array = rng.standard_normal((3, 4))
    x = mh.Tensor(array, requires_grad=True)
    views = [x[1:], x[:, 0], x[..., None], x.T, x.reshape(4, 3), x.reshape(-1)]
    views += [x.transpose(1, 0), F.flatten(x)]
    for y in views:
        assert np.shares_memory(y.data, array)
    assert not np.shares_memory(x[[0, 1]].data, array)


def test_no_operation_writes_into_its_operands(rng: np.random.Generator) -> None:
    x, y = mh.Tensor(rng.standard_normal((3, 3)), True), mh.Tensor(rng.uniform(1, 2, (3, 3)), True)
    before = x.data.copy(), y.data.copy()
    x += y
    x *= 2
    x -= y
    x /= y
    (x**2).sum().backward()
    np.testing.assert_array_equal(y.data, before[1])
    assert y.grad is not None


def test_attributes() -> None:
    x = mh.Tensor(np.zeros((2, 3), np.float32))
    assert (x.shape, x.ndim, x.size, x.dtype, x.device) == ((2, 3), 2, 6, np.float32, "cpu")
    assert len(x) == 2
    assert mh.Tensor(np.float32(2.5)).item() == 2.5
    assert mh.Tensor(3).item() == 3
    assert mh.Tensor([[1, 2]]).shape == (1, 2)


def test_repr() -> None:
    assert repr(mh.Tensor([1.0, 2.0])) == "Tensor([1. 2.])"
    assert repr(mh.Tensor([1.0], requires_grad=True)) == "Tensor([1.], requires_grad=True)"
    assert repr(-mh.Tensor([1.0], requires_grad=True)) == "Tensor([-1.], made by Negate)"


def test_truth_is_that_of_the_values() -> None:
    assert not mh.Tensor(np.zeros(1))
    assert mh.Tensor(2.0)
    with pytest.raises(ValueError, match="ambiguous"):
        bool(mh.Tensor(np.zeros(2)))


# -- operators -------------------------------------------------------------------------------------

OPERATORS = [operator.add, operator.sub, operator.mul, operator.truediv]


@pytest.mark.parametrize("op", OPERATORS)
@pytest.mark.parametrize("constant", [2, 2.5, True, np.float32(2.5), np.arange(1.0, 4), [1, 2, 3]])
def test_constants_on_either_side(op: Callable, constant: Any) -> None:
    x = mh.Tensor(np.array([[1.0, 2.0, 4.0]]), requires_grad=True)
    np.testing.assert_array_equal(op(x, constant).data, op(x.data, np.asarray(constant)))
    np.testing.assert_array_equal(op(constant, x).data, op(np.asarray(constant), x.data))
    op(constant, x).sum().backward()
    assert x.grad.shape == x.shape


def test_an_array_on_the_left_gives_a_tensor(rng: np.random.Generator) -> None:
    array, x = rng.standard_normal((3, 3)), leaf(3, 3)
    for op in (*OPERATORS, operator.matmul):
        y = op(array, x)
        assert isinstance(y, mh.Tensor)
        np.testing.assert_array_equal(y.data, op(array, x.data))
        y.backward(np.ones(y.shape))
    with pytest.raises(TypeError):
        array += x  # in place there is nowhere to record it


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.complex64])
def test_python_numbers_do_not_upcast(dtype: Any) -> None:
    x = mh.Tensor(np.ones(3, dtype), requires_grad=True)
    y = 1 - (2.5 * x + 3) / 2 + (x - 0.5) ** 3 + x ** np.float64(2)
    assert y.dtype == dtype
    y.backward(np.ones(3))
    assert x.grad.dtype == dtype


def test_dtypes_mix_as_in_numpy() -> None:
    x = leaf(3, dtype=np.float32)
    y = x * np.ones(3)
    assert y.dtype == np.float64
    y.sum().backward()
    assert x.grad.dtype == np.float32  # a gradient is in the dtype of its leaf


def test_integer_tensors_compute_but_have_no_gradient() -> None:
    x = mh.Tensor([1, 2, 3])
    assert (x + 1).dtype == np.int64
    assert (x * leaf(3)).requires_grad
    np.testing.assert_array_equal((x - 1).data, [0, 1, 2])
    with pytest.raises(TypeError, match="only real or complex tensors have gradients, not int64"):
        mh.Tensor([1, 2, 3], requires_grad=True)
    with pytest.raises(TypeError, match="not bool"):
        mh.Tensor([True], requires_grad=True)


# -- indexing --------------------------------------------------------------------------------------

INDICES = {
    "int": 1,
    "negative": -1,
    "slice": slice(None, None, -2),
    "ellipsis": (..., 0),
    "none": (slice(None), None, 1),
    "ints": (1, 2, 0),
    "list": [0, 2, 0],
    "array": np.array([[0, 1], [1, 1]]),
    "mixed": (np.array([0, 1]), slice(None), np.array([0, 0])),
    "boolean": np.arange(24).reshape(3, 4, 2) % 3 == 0,
    "boolean row": np.array([True, False, True]),
    "empty": slice(0, 0),
    "empty list": np.array([], int),
    "zero": (),
}


@pytest.mark.parametrize("index", INDICES.values(), ids=INDICES)
def test_indexing(index: Any, rng: np.random.Generator) -> None:
    x = leaf(3, 4, 2)
    y = x[index]
    np.testing.assert_array_equal(y.data, x.data[index])
    c = rng.standard_normal(y.shape)
    y.backward(c)
    expected = np.zeros(x.shape)
    np.add.at(expected, index, c)
    np.testing.assert_array_equal(x.grad, expected)


def test_indexing_with_tensors_and_iterating() -> None:
    x = leaf(3, 2)
    np.testing.assert_array_equal(x[mh.Tensor([2, 0])].data, x.data[[2, 0]])
    np.testing.assert_array_equal(x[mh.Tensor([True, False, True])].data, x.data[[0, 2]])
    rows = list(x)
    assert [row.shape for row in rows] == [(2,)] * 3
    (rows[0] + rows[2]).sum().backward()
    np.testing.assert_array_equal(x.grad, [[1, 1], [0, 0], [1, 1]])


# -- shapes ----------------------------------------------------------------------------------------


def test_empty_and_zero_dimensional_arrays() -> None:
    empty = leaf(0, 3)
    (empty * 2 + 1).sum().backward()
    assert empty.grad.shape == (0, 3)
    assert F.softmax(leaf(0, 3)).shape == (0, 3)
    assert F.flatten(leaf(0, 2, 2)).shape == (0, 4)
    assert (leaf(0, 3) @ leaf(3, 2)).shape == (0, 2)

    weight = leaf(4, 3)
    F.linear(leaf(0, 3), weight).sum().backward()
    np.testing.assert_array_equal(weight.grad, np.zeros((4, 3)))

    scalar = leaf()
    (scalar * scalar + scalar[...]).backward()
    assert scalar.grad.shape == ()
    assert scalar.sum().shape == scalar.max().shape == scalar.T.shape == ()


@pytest.mark.parametrize("method", ["sum", "mean", "max"])
@pytest.mark.parametrize("keepdims", [False, True])
@pytest.mark.parametrize("axis", [None, 0, -1, (0, 2), (-1, 0), (0, 1, 2), (), np.int64(1)])
def test_axes(method: str, axis: Any, keepdims: bool, rng: np.random.Generator) -> None:
    x = leaf(2, 3, 4)
    y = getattr(x, method)(axis=axis, keepdims=keepdims)
    expected = getattr(x.data, method)(axis=axis, keepdims=keepdims)
    np.testing.assert_allclose(y.data, expected, rtol=1e-15)
    assert y.shape == expected.shape
    c = rng.standard_normal(y.shape)
    y.backward(c)
    again = x.data + 1e-6 * x.grad / np.linalg.norm(x.grad)
    rise = (c * (getattr(again, method)(axis=axis, keepdims=keepdims) - expected)).sum()
    np.testing.assert_allclose(rise / 1e-6, np.linalg.norm(x.grad), rtol=1e-5)


def test_reshape_and_transpose_take_numbers_or_a_tuple() -> None:
    x = leaf(2, 3, 4)
    assert x.reshape(6, 4).shape == x.reshape((6, 4)).shape == x.reshape([6, -1]).shape == (6, 4)
    assert x.transpose(2, 0, 1).shape == x.transpose((2, 0, 1)).shape == (4, 2, 3)
    assert x.transpose().shape == x.T.shape == (4, 3, 2)


# -- devices ---------------------------------------------------------------------------------------


class FakeCupyArray:
    """Looks as if it lay on a GPU."""

    shape, dtype, ndim, size = (2, 3), np.dtype(np.float32), 2, 6


FakeCupyArray.__module__ = "cupy"


def test_devices_do_not_mix() -> None:
    on_gpu, on_cpu = mh.Tensor(FakeCupyArray()), leaf(2, 3)
    assert on_gpu.device == "cuda"
    message = (
        r"Add: inputs on different devices \(shape \(2, 3\) on cpu and shape \(2, 3\) on cuda\): "
    )
    with pytest.raises(mh.DeviceError, match=message):
        on_gpu + on_cpu
    with pytest.raises(mh.DeviceError, match="Linear: inputs on different devices"):
        F.linear(on_cpu, on_gpu)
    with pytest.raises(mh.DeviceError, match="labels and logits lie on different devices"):
        F.cross_entropy(on_cpu, FakeCupyArray())


def without_cupy(name: str) -> Any:
    raise ImportError(f"No module named {name!r}")


def test_without_cupy_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minihyperflows.engine.backend.importlib.import_module", without_cupy)
    assert mh.cuda_available() is False
    with pytest.raises(mh.DeviceError, match=r"no GPU is available: install CuPy"):
        leaf(2).to("cuda")
    with pytest.raises(mh.DeviceError, match="unknown device 'tpu': choose one of cpu, cuda"):
        leaf(2).to("tpu")


def test_a_broken_driver_means_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def __getattr__(self, name: str) -> Any:
            raise RuntimeError("cudaErrorInsufficientDriver")

    monkeypatch.setattr("minihyperflows.engine.backend.importlib.import_module", lambda _: Broken())
    assert mh.cuda_available() is False


# -- misuse ----------------------------------------------------------------------------------------

MISUSE: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "add": (
        lambda: leaf(2, 3) + leaf(4),
        mh.ShapeError,
        r"Add: shapes \(2, 3\) and \(4,\) do not broadcast together",
    ),
    "divide by a list": (lambda: leaf(2) / [1, 2, 3], mh.ShapeError, r"Divide: .*\(2,\).*\(3,\)"),
    "matmul": (
        lambda: leaf(2, 3) @ leaf(2, 3),
        mh.ShapeError,
        r"MatMul: shapes \(2, 3\) and \(2, 3\) are not",
    ),
    "matmul of vectors": (lambda: leaf(3) @ leaf(3), mh.ShapeError, r"MatMul: .*\(3,\)"),
    "matmul with a number": (lambda: leaf(2, 3) @ 2, mh.ShapeError, r"\(2, 3\) and \(\)"),
    "matmul of batches": (
        lambda: leaf(2, 3, 4) @ leaf(5, 4, 3),
        mh.ShapeError,
        r"MatMul: shapes \(2,\) and \(5,\) do not broadcast",
    ),
    "linear": (
        lambda: F.linear(leaf(2, 3), leaf(4, 5)),
        mh.ShapeError,
        r"Linear: input of shape \(2, 3\) does not fit a weight of shape \(4, 5\)",
    ),
    "linear bias": (
        lambda: F.linear(leaf(2, 3), leaf(4, 3), leaf(3)),
        mh.ShapeError,
        r"Linear: bias of shape \(3,\) does not fit a weight of shape \(4, 3\)",
    ),
    "conv": (
        lambda: F.conv2d(leaf(1, 5, 5, 3), leaf(4, 3, 3, 2)),
        mh.ShapeError,
        r"Conv2d: input of shape \(1, 5, 5, 3\) and weight of shape \(4, 3, 3, 2\)",
    ),
    "reshape": (
        lambda: leaf(2, 3).reshape(4, 2),
        mh.ShapeError,
        r"Reshape: 6 elements of shape \(2, 3\) do not fill \(4, 2\)",
    ),
    "transpose": (lambda: leaf(2, 3).transpose(0), mh.ShapeError, "do not permute"),
    "transpose twice": (lambda: leaf(2, 3).transpose(0, 0), ValueError, "repeated axis"),
    "transpose axis": (lambda: leaf(2, 3).transpose(0, 5), ValueError, "Transpose: axis 5"),
    "axis": (lambda: leaf(2, 3).sum(axis=2), ValueError, "Sum: axis 2 is out of bounds"),
    "axis of a number": (lambda: leaf().mean(axis=0), ValueError, "Mean: axis 0"),
    "axis twice": (lambda: leaf(2, 3).max(axis=(0, 0)), ValueError, "repeated axis"),
    "empty max": (lambda: leaf(0, 3).max(axis=0), mh.ShapeError, r"Max: shape \(0, 3\)"),
    "index": (lambda: leaf(2)[5], IndexError, "out of bounds"),
    "concatenate": (
        lambda: F.concatenate([leaf(2, 3), leaf(2, 4)]),
        mh.ShapeError,
        r"Concatenate: shapes \(2, 3\), \(2, 4\)",
    ),
    "concatenate along nothing": (
        lambda: F.concatenate([leaf(2), leaf(2)], axis=1),
        mh.ShapeError,
        r"\(2,\), \(2,\) must have axis 1",
    ),
    "concatenate numbers": (lambda: F.concatenate([leaf(), 2.0]), mh.ShapeError, r"\(\), \(\)"),
    "concatenate nothing": (lambda: F.concatenate([]), mh.ShapeError, "nothing to concatenate"),
    "power": (lambda: leaf(2) ** leaf(2), TypeError, "must be a real number, not Tensor"),
    "no number": (lambda: leaf(2) + "two", TypeError, "a tensor holds numbers, not str"),
    "none": (lambda: leaf(2) * None, TypeError, "a tensor holds numbers, not NoneType"),
    "tensor of strings": (lambda: mh.Tensor(["a"]), TypeError, "a tensor holds numbers, not list"),
    "tensor of a tensor": (lambda: mh.Tensor(leaf(2)), TypeError, "is a Tensor already"),
    "tensor of tensors": (lambda: mh.Tensor([leaf(2), leaf(2)]), TypeError, "lose its gradient"),
    "numpy": (lambda: np.asarray(leaf(2)), TypeError, r"with \.numpy\(\)"),
    "numpy function": (lambda: np.exp(leaf(2)), TypeError, "does not support ufuncs"),
    "class": (lambda: mh.apply(ops.Exp, leaf(2)), TypeError, "apply needs a Function instance"),
}


@pytest.mark.parametrize(("call", "error", "message"), MISUSE.values(), ids=MISUSE)
def test_misuse(call: Callable, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


LABELS: dict[str, tuple[Any, type[Exception], str]] = {
    "too large": ([0, 3], ValueError, r"from 0 to 3 are out of range for 3 classes \(0 to 2\)"),
    "negative": ([0, -1], ValueError, "labels from -1 to 0 are out of range"),
    "floats": ([0.0, 1.0], TypeError, "labels must be integers, not float64"),
    "booleans": ([True, False], TypeError, "labels must be integers, not bool"),
    "too many": ([0, 1, 2], mh.ShapeError, r"labels of shape \(3,\) do not fit .* \(2, 3\)"),
    "one hot": (np.eye(3, dtype=int)[:2], mh.ShapeError, r"labels of shape \(2, 3\)"),
    "one number": (1, mh.ShapeError, r"labels of shape \(\)"),
}


@pytest.mark.parametrize(("labels", "error", "message"), LABELS.values(), ids=LABELS)
def test_wrong_labels(labels: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        F.cross_entropy(leaf(2, 3), labels)


def test_wrong_logits() -> None:
    with pytest.raises(mh.ShapeError, match=r"logits of shape \(2,\), which must be \(N, K\)"):
        F.cross_entropy(leaf(2), [0, 1])
    with pytest.raises(mh.ShapeError, match="an empty batch has no mean loss"):
        F.cross_entropy(leaf(0, 3), np.zeros(0, int))
    with pytest.raises(ValueError, match=r"label_smoothing must lie in \[0, 1\], not 1.5"):
        F.cross_entropy(leaf(2, 3), [0, 1], label_smoothing=1.5)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int32, np.uint64])
def test_labels_of_any_integer_type(dtype: Any) -> None:
    logits = leaf(2, 3)
    expected = F.cross_entropy(logits, [2, 0]).item()
    assert F.cross_entropy(logits, np.array([2, 0], dtype)).item() == expected
    assert F.cross_entropy(logits, mh.Tensor(np.array([2, 0], dtype))).item() == expected


def test_a_tensor_with_one_device_error_is_a_value_error() -> None:
    """All errors of misuse can be caught as the standard ones."""
    assert issubclass(mh.ShapeError, ValueError)
    assert issubclass(mh.DeviceError, ValueError)
    assert issubclass(mh.GraphError, RuntimeError)
    assert issubclass(mh.NonFiniteLossError, ArithmeticError)
