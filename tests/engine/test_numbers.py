"""The rule for numbers (``engine.numbers``) as a table: all operations, all dtypes.

What is expected is written down here without the engine: the dtype of a result by
:func:`expected_dtype`, its values by the same operation in double precision on the same numbers.
"""

from __future__ import annotations

import inspect
import itertools
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from support.functions import functions_behind, functions_of_the_package

import minihyperflows as mh
from minihyperflows import flows, lab, nn, optim
from minihyperflows import functional as F
from minihyperflows.engine import conv
from minihyperflows.engine.backend import to_device
from minihyperflows.engine.graph import Function
from minihyperflows.engine.numbers import Arithmetic
from minihyperflows.engine.ops import unbroadcast
from minihyperflows.flows.gates import GatedWeight
from minihyperflows.flows.pressures import MeanPresence
from minihyperflows.related.pruners import Mask

WHOLE = [np.dtype(t) for t in (np.bool_, np.uint8, np.int64)]
FLOATS = [np.dtype(t) for t in (np.float16, np.float32, np.float64, np.complex64, np.complex128)]
HALF, SINGLE, DOUBLE = FLOATS[:3]
LABELS = np.array([2, 0, 1, 2, 1, 0])


@dataclass
class Operation:
    """One operation on tensors.

    Attributes:
        f: the operation.
        shapes: of its inputs. The first axis of the first is the batch.
        like_numpy: what NumPy does, if the result of whole numbers is whole; None if it is float64.
        roundings: how often the result is rounded.
    """

    f: Callable[..., mh.Tensor]
    shapes: tuple[tuple[int, ...], ...]
    like_numpy: Callable[..., Any] | None = None
    roundings: int = 1


def convolution(way: str) -> Callable[..., mh.Tensor]:
    return lambda *inputs: mh.apply(conv.Conv2d(padding=1, way=way), *inputs)


def normalisation(training: bool, relu: bool = False) -> Callable[..., mh.Tensor]:
    """Batch norm with running statistics, which are not to choose the dtype."""

    def f(x: mh.Tensor, *others: mh.Tensor) -> mh.Tensor:
        scale, shift, residual = (*others, None, None, None)[:3]
        running = np.full(3, 0.5), np.full(3, 1.5, np.float16)
        return F.batch_norm(x, scale, shift, *running, training, residual=residual, relu=relu)

    return f


def windows(x: np.ndarray) -> np.ndarray:
    return np.lib.stride_tricks.sliding_window_view(x, (2, 2), (1, 2))


IMAGES, FILTERS = (6, 5, 4, 3), (4, 3, 3, 3)
OPERATIONS = {
    "+": Operation(operator.add, ((6, 3), (3,)), operator.add),
    "-": Operation(operator.sub, ((6, 3), (6, 1)), operator.sub),
    "*": Operation(operator.mul, ((6, 3), (6, 3)), operator.mul),
    "/": Operation(operator.truediv, ((6, 3), (3,))),
    "@": Operation(operator.matmul, ((6, 3), (3, 4))),
    "neg": Operation(operator.neg, ((6, 3),), operator.neg),
    "**0": Operation(lambda x: x**0, ((6, 3),), lambda x: x**0),
    "**2": Operation(lambda x: x**2, ((6, 3),), lambda x: x**2),
    "**-1": Operation(lambda x: x**-1, ((6, 3),)),
    "**0.5": Operation(lambda x: x**0.5, ((6, 3),)),
    "getitem": Operation(lambda x: x[[0, 2, 2]], ((6, 3),), lambda x: x[[0, 2, 2]]),
    "exp": Operation(mh.Tensor.exp, ((6, 3),)),
    "log": Operation(mh.Tensor.log, ((6, 3),)),
    "sum": Operation(lambda x: x.sum(axis=0), ((6, 3),), lambda x: x.sum(axis=0)),
    "mean": Operation(lambda x: x.mean(axis=1), ((6, 3),)),
    "max": Operation(lambda x: x.max(axis=1), ((6, 3),), lambda x: x.max(axis=1)),
    "reshape": Operation(lambda x: x.reshape(3, -1), ((6, 3),), lambda x: x.reshape(3, -1)),
    "transpose": Operation(lambda x: x.transpose(1, 0), ((6, 3),), lambda x: x.T),
    "linear": Operation(F.linear, ((6, 3), (4, 3))),
    "linear, bias": Operation(F.linear, ((6, 3), (4, 3), (4,))),
    "conv2d": Operation(F.conv2d, (IMAGES, FILTERS)),
    "conv2d, depthwise": Operation(lambda *a: F.conv2d(*a, groups=3), (IMAGES, (3, 2, 2, 1), (3,))),
    "conv2d, im2col": Operation(convolution("im2col"), (IMAGES, FILTERS, (4,))),
    "conv2d, winograd2": Operation(convolution("winograd2"), (IMAGES, FILTERS, (4,))),
    "conv2d, winograd4": Operation(convolution("winograd4"), (IMAGES, FILTERS, (4,))),
    "max_pool2d": Operation(
        lambda x: F.max_pool2d(x, 2, 1), (IMAGES,), lambda x: windows(x).max((-1, -2))
    ),
    "avg_pool2d": Operation(lambda x: F.avg_pool2d(x, 3, 1), (IMAGES,)),
    "batch_norm, training": Operation(normalisation(True), (IMAGES, (3,), (3,))),
    "batch_norm, no scale": Operation(normalisation(True), (IMAGES,)),
    "batch_norm, residual": Operation(normalisation(True, relu=True), (IMAGES, (3,), (3,), IMAGES)),
    "batch_norm": Operation(normalisation(False), (IMAGES, (3,), (3,))),
    "batch_norm, and relu": Operation(
        normalisation(False, relu=True), (IMAGES, (3,), (3,), IMAGES), roundings=2
    ),
    "relu": Operation(F.relu, ((6, 3),), lambda x: x),
    "tanh": Operation(F.tanh, ((6, 3),)),
    "sigmoid": Operation(F.sigmoid, ((6, 3),)),
    "softmax": Operation(F.softmax, ((6, 3),)),
    "log_softmax": Operation(F.log_softmax, ((6, 3),)),
    "cross_entropy": Operation(lambda x: F.cross_entropy(x, LABELS, 0.1), ((6, 3),)),
    "concatenate": Operation(
        lambda *a: F.concatenate(a), ((6, 3), (2, 3)), lambda *a: np.concatenate(a)
    ),
    "flatten": Operation(F.flatten, (IMAGES,), lambda x: x.reshape(6, -1)),
    "gate": Operation(flows.gate, ((6, 3),)),
    "gated weight": Operation(lambda w, t: mh.apply(GatedWeight(), w, t), ((6, 3), (6, 3))),
    "pressure": Operation(lambda *t: mh.apply(MeanPresence(), *t), ((6, 3), (5,))),
    "masked weight": Operation(lambda w: Mask(nn.Parameter(np.ones((6, 3))))(w), ((6, 3),)),
}
every_operation = pytest.mark.parametrize("name", OPERATIONS)
NOT_FOR_BOOL = {"-", "neg"}  # NumPy and PyTorch refuse them too


def draw(shape: tuple[int, ...], dtype: np.dtype, rng: np.random.Generator) -> np.ndarray:
    """Positive numbers, which every operation takes: 1 to 3, or between 0.5 and 2."""
    if dtype.kind in "biu":
        return rng.integers(1, 4, shape).astype(dtype)
    imaginary = 0.1j * rng.standard_normal(shape) if dtype.kind == "c" else 0
    return (rng.uniform(0.5, 2.0, shape) + imaginary).astype(dtype)


def doubled(array: np.ndarray, kind: str) -> np.ndarray:
    return array.astype(complex if kind == "c" else float)


def expected_dtype(dtypes: list[np.dtype]) -> np.dtype:
    """Of a result that is not whole: NumPy's promotion of the floats; float64 of whole numbers."""
    floats = [d for d in dtypes if d.kind in "fc"]
    return np.result_type(*floats) if floats else DOUBLE


def combinations(inputs: int, dtypes: list[np.dtype], most: int = 64) -> list[tuple]:
    """All of them, or the equal ones and a seeded draw."""
    if len(dtypes) ** inputs <= most:
        return list(itertools.product(dtypes, repeat=inputs))
    draws = np.random.default_rng(7).integers(0, len(dtypes), (most, inputs))
    return [(d,) * inputs for d in dtypes] + [tuple(dtypes[i] for i in row) for row in draws]


def assert_rounded(
    found: np.ndarray,
    exact: np.ndarray,
    computed: np.dtype,
    roundings: int,
    what: str,
    scale: float = 1.0,
) -> None:
    """``found`` is ``exact``, computed in ``computed`` (float32 for half) and then rounded.

    ``scale`` is the size of what cancels in it, if that is larger than the result.
    """
    computing = SINGLE if computed == HALF else computed
    scale = abs(exact).max(initial=scale)
    limit = 100 * np.finfo(computing).eps * scale + np.finfo(found.dtype).smallest_subnormal
    limit = limit + 0.51 * roundings * np.finfo(found.dtype).eps * abs(exact)
    error = abs(found - exact)
    assert (error <= limit).all(), f"{what}: {(error / limit).max():.3g} times the limit"


@every_operation
def test_dtypes_and_values(name: str, rng: np.random.Generator) -> None:
    operation = OPERATIONS[name]
    for dtypes in combinations(len(operation.shapes), WHOLE + FLOATS):
        arrays = [draw(s, d, rng) for s, d in zip(operation.shapes, dtypes, strict=True)]
        what = f"{name} of {', '.join(map(str, dtypes))}"
        if operation.like_numpy and all(d.kind in "biu" for d in dtypes):
            if name in NOT_FOR_BOOL and set(dtypes) == {np.dtype(bool)}:
                with pytest.raises(TypeError, match="boolean"):
                    operation.f(*map(mh.Tensor, arrays))
                continue
            expected = operation.like_numpy(*arrays)
            found = operation.f(*map(mh.Tensor, arrays)).data
            assert found.dtype == expected.dtype, what
            np.testing.assert_array_equal(found, expected, what)
            continue
        leaves = [mh.Tensor(a, requires_grad=a.dtype.kind in "fc") for a in arrays]
        y = operation.f(*leaves)
        result = expected_dtype(list(dtypes))
        assert y.dtype == result, f"{what} is {y.dtype}"
        exact_leaves = [mh.Tensor(doubled(a, result.kind), True) for a in arrays]
        exact = operation.f(*exact_leaves)
        assert_rounded(y.data, exact.data, result, operation.roundings, what)
        if not y.requires_grad:  # of whole numbers alone
            continue
        c = rng.standard_normal(y.shape).astype(result)
        y.backward(c)
        exact.backward(doubled(c, result.kind))
        for i, (leaf, reference) in enumerate(zip(leaves, exact_leaves, strict=True)):
            if leaf.requires_grad:
                wanted = np.result_type(result, leaf.dtype) if result.kind == "c" else leaf.dtype
                assert leaf.grad.dtype == wanted, f"gradient {i} of {what} is {leaf.grad.dtype}"
                assert_rounded(
                    leaf.grad,
                    reference.grad,
                    result,
                    operation.roundings,
                    f"gradient {i} of {what}",
                )


def test_the_table_is_complete(rng: np.random.Generator) -> None:
    named = {name.split(",")[0] for name in OPERATIONS}
    functions = {
        n for n, f in inspect.getmembers(F, inspect.isfunction) if f.__module__ == F.__name__
    }
    assert functions <= named
    used = set()
    for operation in OPERATIONS.values():
        leaves = [mh.Tensor(draw(s, DOUBLE, rng), True) for s in operation.shapes]
        used |= functions_behind(operation.f(*leaves))
    defined = functions_of_the_package()
    abstract = {f for f in defined if defined & set(f.__subclasses__())}
    assert used == defined - abstract
    for f in used:
        assert f.__name__ == "Power" or isinstance(f.arithmetic, Arithmetic), f


# -- half precision is for storing -----------------------------------------------------------------

MANY = 70_000  # more than float16 can count to (65,504), and than it can count exactly (2,048)


def half(*shape: int, mean: float = 1.0) -> np.ndarray:
    return (mean + np.random.default_rng(3).uniform(-0.5, 0.5, shape)).astype(HALF)


MAPS = half(8, 32, 32, 16)
FAR = half(64, 16, 16, 3, mean=10)  # from zero, so that sums are large
PEAK = np.pad(half(1, 1, 1, 2), ((0, 0), (40, 39), (40, 39), (0, 0)))  # of every window

SUMS: dict[str, tuple[Callable[..., mh.Tensor], list[np.ndarray]]] = {
    "sum": (lambda x: x.sum(axis=0), [half(5000, 4)]),
    "sum to a scalar": (lambda x: x.sum(), [half(MANY, mean=0)]),
    "mean": (lambda x: x.mean(axis=0), [half(MANY, 2)]),
    "broadcasting": (lambda x, b: (x + b) * 2, [half(5000, 2), half(2)]),
    "broadcast factor": (lambda x, b: x * b, [half(5000, 2), half()]),
    "quotient": (lambda x, b: x / b, [half(8, mean=400), half(8, mean=400)]),  # b^2 is infinite
    "getitem": (lambda x: x[np.zeros(5000, int)], [half(3, 2)]),
    "max": (lambda x: x.max(axis=0), [np.ones((MANY, 2), HALF)]),  # all tie
    "linear": (F.linear, [half(5000, 40), half(3, 40), half(3)]),
    "wide linear": (F.linear, [half(2, MANY, mean=0), half(3, MANY, mean=0), half(3)]),
    "matmul": (operator.matmul, [half(3, 5000, mean=0), half(5000, 2)]),
    "conv2d": (lambda *a: F.conv2d(*a, padding=1), [MAPS, half(16, 3, 3, 16), half(16)]),
    "depthwise": (lambda *a: F.conv2d(*a, groups=16), [MAPS, half(16, 3, 3, 1), half(16)]),
    "avg_pool2d": (lambda x: F.avg_pool2d(x, 64, 1), [half(2, 65, 65, 3)]),
    "max_pool2d": (lambda x: F.max_pool2d(x, 40, 1), [PEAK]),
    "batch_norm": (lambda x: F.batch_norm(x, training=True), [FAR]),
    "batch_norm, scale": (
        lambda *a: F.batch_norm(*a, training=True), [FAR, half(3), half(3)],
    ),
    "batch_norm, given": (
        lambda *a: F.batch_norm(*a, half(3, mean=10), half(3)), [FAR, half(3), half(3)],
    ),
    "softmax": (F.softmax, [half(3, MANY)]),
    "log_softmax": (F.log_softmax, [half(3, 5000)]),
    "cross_entropy": (
        lambda x: F.cross_entropy(x, np.arange(MANY) % 3, 0.1), [half(MANY, 3, mean=3)],
    ),
    "pressure": (lambda *t: mh.apply(MeanPresence(), *t), [half(MANY), half(5000)]),
    "pressure, floor": (lambda *t: mh.apply(MeanPresence(0.9), *t), [half(MANY), half(5000)]),
}  # fmt: skip


@pytest.mark.parametrize("name", SUMS)
def test_sums_of_half_precision_accumulate_in_float32(name: str, rng: np.random.Generator) -> None:
    f, arrays = SUMS[name]
    leaves = [mh.Tensor(a, True) for a in arrays]
    exact_leaves = [mh.Tensor(a.astype(float), True) for a in arrays]
    y, exact = f(*leaves), f(*exact_leaves)
    assert y.dtype == HALF
    roundings = 2 if name == "broadcasting" else 1
    assert_rounded(y.data, exact.data, HALF, roundings, name)
    c = rng.uniform(0.5, 1.5, y.shape).astype(HALF) / np.float16(math.sqrt(y.size))
    y.backward(c)
    exact.backward(c.astype(float))
    for i, (leaf, reference) in enumerate(zip(leaves, exact_leaves, strict=True)):
        assert leaf.grad.dtype == HALF
        terms = float(abs(c).sum()) if leaf.size < y.size else 1.0  # summed over the batch
        what = f"gradient {i} of {name}"
        assert_rounded(leaf.grad, reference.grad, HALF, roundings, what, terms)


def test_unbroadcast_of_half_precision_accumulates_in_float32() -> None:
    """For Functions of a reader's own, which call it themselves."""
    ones = np.ones((5000, 2), HALF)
    np.testing.assert_array_equal(unbroadcast(ones, (2,)), np.full(2, 5000, HALF))


OPTIMIZERS: dict[str, Callable[..., optim.Optimizer]] = {
    "adam": lambda parameters: optim.Adam(parameters, lr=1e-2),
    "sgd": lambda parameters: optim.SGD(parameters, lr=0.1, momentum=0.9),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_network_in_half_precision_trains(name: str) -> None:
    """With gates, pressure, both ways of batch norm and the optimisers, on the CPU."""
    data = lab.load("digits")
    accuracies = []
    for dtype in (HALF, SINGLE):
        rng = np.random.default_rng(0)
        net = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1, rng=rng, dtype=dtype),
            nn.BatchNorm2d(16, dtype=dtype),
            nn.ReLU(),
            nn.Conv2d(16, 16, 3, padding=1, rng=rng, dtype=dtype),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(256, 10, rng=rng, dtype=dtype),
        )
        flows.attach(net, rng=rng)
        presences = list(flows.presences(net).values())
        weights = [p for p in net.parameters() if not any(p is t for t in presences)]
        steps = OPTIMIZERS[name](weights), optim.Adam(presences, lr=1e-3)
        for _ in range(30):
            chosen = rng.integers(0, len(data.train_y), 64)
            net.zero_grad()
            logits = net(mh.Tensor((data.train_x[chosen] / 255).astype(dtype)))
            loss = F.cross_entropy(logits, data.train_y[chosen]) + 0.1 * flows.pressure(net)
            assert loss.dtype == dtype
            loss.backward()
            for optimizer in steps:
                optimizer.step()
        assert {t.dtype for t in net.named_parameters().values()} == {dtype}
        logits = net.eval()(mh.Tensor((data.test_x / 255).astype(dtype))).data
        accuracies.append((logits.argmax(axis=1) == data.test_y).mean())
    assert accuracies[1] > 0.7, accuracies
    assert abs(accuracies[0] - accuracies[1]) < 0.06, accuracies


# -- a number has no dtype -------------------------------------------------------------------------

TWOS = [
    *(2, 2.0, 2 + 0j, np.int64(2), np.uint8(2), np.array(2)),
    *(np.float16(2), np.float32(2), np.float64(2), np.longdouble(2), np.array(2.0), np.sqrt(4)),
    *(np.complex64(2), np.complex128(2), np.array(2, np.complex64)),
]
PYTHONS = {"i": int, "u": int, "f": float, "c": complex}
OPERATORS = [operator.add, operator.sub, operator.mul, operator.truediv]


@pytest.mark.parametrize("dtype", WHOLE + FLOATS, ids=str)
def test_numpys_numbers_are_pythons(dtype: np.dtype, rng: np.random.Generator) -> None:
    """On both sides, forward and backward; also as an exponent."""
    array = draw((4, 2), dtype, rng)
    operations = [f for op in OPERATORS for f in (op, lambda x, n, op=op: op(n, x))]

    def power(x: mh.Tensor, n: Any) -> mh.Tensor:
        return x**n

    for f, two in itertools.product([*operations, power], TWOS):
        kind = np.asarray(two).dtype.kind
        if f is power and kind == "c":
            with pytest.raises(TypeError, match="must be a real number"):
                power(mh.Tensor(array), two)
            continue
        results = []
        for number in (two, PYTHONS[kind](2)):
            x = mh.Tensor(array, dtype.kind in "fc")
            y = f(x, number)
            if x.requires_grad:
                y.backward(np.linspace(-1, 1, 8).reshape(4, 2))
            results.append((y.data, x.grad))
        (y, gradient), (expected, expected_gradient) = results
        assert y.dtype == expected.dtype
        np.testing.assert_array_equal(y, expected)
        if dtype.kind in "fc":  # what NumPy makes of a Python number
            assert y.dtype == (array * PYTHONS[kind](2)).dtype
            assert gradient.dtype == expected_gradient.dtype
            assert gradient.dtype == dtype or kind == "c"
            np.testing.assert_array_equal(gradient, expected_gradient)


def test_a_tensor_has_a_dtype_whatever_its_shape() -> None:
    x = mh.Tensor(np.ones(3, np.float32), True)
    factor = mh.Tensor(np.array(2.0), True)
    y = factor * x
    assert y.dtype == np.float64
    y.sum().backward()
    assert (x.grad.dtype, factor.grad.dtype) == (np.float32, np.float64)
    assert (mh.Tensor([1, 2]) * 1.5).dtype == np.float64


def test_a_float32_network_stays_one() -> None:
    """One number from NumPy does not turn what follows into float64."""
    x = mh.Tensor(np.ones((2, 3), np.float32), True)
    w = mh.Tensor(np.ones((3, 3), np.float32), True)
    y = F.linear(np.sqrt(2) * x, w) / np.sqrt(np.float64(3)) + np.arange(3)
    assert y.dtype == np.float32


def test_cotangents_have_the_dtype_of_the_output() -> None:
    """What is float64 further on does not slow down what comes before."""
    seen = []

    class Watch(Function):
        def forward(self, x):
            return x

        def backward(self, cotangent):
            seen.append(cotangent.dtype)
            return cotangent

    x = mh.Tensor(np.ones(3, np.float32), True)
    (mh.apply(Watch(), x * 2) * np.ones(3)).sum().backward()
    (mh.apply(Watch(), x * 2) * np.ones(3)).sum().backward(np.array(1j))
    assert seen == [np.float32, np.complex128]
    assert x.grad.dtype == np.complex128


def test_a_function_of_a_readers_own_gets_its_arrays_as_they_are() -> None:
    class Pick(Function):
        def forward(self, x, index):
            assert [index.dtype, x.dtype] == [np.int64, HALF]
            return x[index]

    picked = mh.apply(Pick(), mh.Tensor(half(3)), np.array([2, 0]))
    np.testing.assert_array_equal(picked.data, half(3)[[2, 0]])


# -- whole numbers ---------------------------------------------------------------------------------


def pixels(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)


WAYS = {
    "choice": lambda x, w: F.conv2d(mh.Tensor(x), mh.Tensor(w), padding=1).data,
    "loop": lambda x, w: conv.conv2d_loop(x, w, padding=1),
    "im2col": lambda x, w: conv.conv2d_im2col(x, w, padding=1),
    "winograd2": lambda x, w: conv.conv2d_winograd(x, w, padding=1, m=2),
    "winograd4": lambda x, w: conv.conv2d_winograd(x, w, padding=1, m=4),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.bool_], ids=lambda d: d.__name__)
@pytest.mark.parametrize("weight", [np.uint8, np.float16, np.float32, np.float64])
def test_convolution_of_whole_numbers(way: str, dtype: type, weight: type) -> None:
    """All ways; with 16 channels, where Winograd's is chosen. Fractions once were cut off."""
    rng, x = np.random.default_rng(1), pixels(1, 8, 8, 16).astype(dtype)
    w = (1.1 * rng.uniform(0, 1, (16, 3, 3, 16)) ** 2).astype(weight)
    y = WAYS[way](x, w)
    assert y.dtype == (np.float64 if weight == np.uint8 else weight)
    exact = conv.conv2d_im2col(x.astype(float), w.astype(float), padding=1)
    assert_rounded(y, exact, y.dtype, 1, way)


@pytest.mark.parametrize("way", ["im2col", "winograd2", "winograd4"])
@pytest.mark.parametrize("dtypes", [("f2", "f4"), ("f4", "f2"), ("f2", "f2"), ("u1", "f4")])
def test_winograd_computes_in_float32_at_least(way: str, dtypes: tuple[str, str]) -> None:
    """The dtype of both inputs counts, not that of the weight alone; gradients too."""
    rng = np.random.default_rng(2)
    arrays = [rng.standard_normal((2, 8, 8, 16)) + 5, rng.standard_normal((16, 3, 3, 16))]
    arrays = [a.astype(d) for a, d in zip(arrays, dtypes, strict=True)]
    leaves = [mh.Tensor(a, a.dtype.kind == "f") for a in arrays]
    exact = [mh.Tensor(a.astype(float), True) for a in arrays]
    y, y64 = (convolution(way)(*tensors) for tensors in (leaves, exact))
    c = rng.standard_normal(y.shape).astype(y.dtype)
    y.backward(c)
    y64.backward(c.astype(float))
    pairs = [(y.data, y64.data), *((a.grad, b.grad) for a, b in zip(leaves, exact, strict=True))]
    for found, expected in pairs:
        if found is not None:  # float32's error, and then one rounding
            assert_rounded(found, expected, SINGLE, 1, way, 3 * abs(expected).max())


def test_the_choice_of_a_way_looks_at_both_inputs() -> None:
    function = conv.Conv2d(padding=1)
    x, w = np.ones((1, 8, 8, 16)), np.ones((16, 3, 3, 16))
    function.forward(x.astype(HALF), w.astype(np.float32))
    assert type(function.algorithm()).__name__ == "Winograd"
    assert function.x.dtype == function.weight.dtype == np.float32
    with pytest.raises(TypeError, match="winograd4 needs float32 at least, not float16"):
        conv.Conv2d(padding=1, way="winograd4").forward(x.astype(HALF), w.astype(HALF))


def test_whole_numbers_where_floats_are_needed() -> None:
    """The smallest cases of what once overflowed or was rounded to nothing."""
    grey = mh.Tensor(np.full((1, 2, 2, 1), 200, np.uint8))
    assert F.avg_pool2d(grey, 2).item() == 200
    small = mh.Tensor(np.array([[1, 2, 3]], np.uint8))
    np.testing.assert_allclose(
        F.softmax(small).data, [[0.09003057, 0.24472847, 0.66524096]], rtol=1e-7
    )
    loss = F.cross_entropy(small, [0])
    np.testing.assert_allclose(loss.item(), 2.4076059644443806, rtol=1e-12)
    threes = mh.Tensor(np.full((1, 4), 3, np.uint8))
    assert F.linear(grey.reshape(1, 4), threes).item() == 2400
    assert (grey.reshape(1, 4) @ threes.T).item() == 2400
    assert (mh.Tensor([1, 2]) ** -1).data.tolist() == [1.0, 0.5]
    assert (mh.Tensor([1, 2]) / 2).data.tolist() == [0.5, 1.0]
    assert mh.Tensor([True, False]).mean().item() == 0.5
    y = F.batch_norm(mh.Tensor(np.array([[1], [3]])), training=True, eps=0.0)
    assert y.data.tolist() == [[-1.0], [1.0]]
    layer = nn.Linear(2, 2, rng=np.random.default_rng(0))
    assert layer(mh.Tensor([[1, 2]])).dtype == np.float32  # float64 in NumPy


ON_A_GPU = ["linear, bias", "conv2d", "avg_pool2d", "softmax", "+", "/", "mean", "batch_norm"]


@pytest.mark.parametrize("name", ON_A_GPU)
def test_the_rule_holds_on_a_gpu(name: str, gpu: Any, rng: np.random.Generator) -> None:
    """Whole numbers are converted there too, alone and beside floats."""
    operation = OPERATIONS[name]
    f = operation.f if name != "batch_norm" else lambda *a: F.batch_norm(*a, training=True)
    for others in (SINGLE, HALF, WHOLE[1]):
        dtypes = [WHOLE[1], *[others] * (len(operation.shapes) - 1)]
        arrays = [draw(s, d, rng) for s, d in zip(operation.shapes, dtypes, strict=True)]
        expected = f(*map(mh.Tensor, arrays))
        y = f(*(mh.Tensor(to_device(a, "cuda")) for a in arrays))
        assert (y.device, y.dtype) == ("cuda", expected.dtype)
        eps = np.finfo(y.dtype).eps if y.dtype.kind == "f" else 0
        np.testing.assert_allclose(y.numpy(), expected.data, rtol=4 * eps, atol=20 * eps)


# -- empty batches ---------------------------------------------------------------------------------


REFUSED = {  # a mean and a variance of nothing
    "cross_entropy": "an empty batch has no mean loss",
    "batch_norm, training": "training needs at least 2",
    "batch_norm, no scale": "training needs at least 2",
    "batch_norm, residual": "training needs at least 2",
}
OF_NOTHING = {  # what cannot be the same with another batch
    "getitem": lambda x: x[:0],
    "cross_entropy": lambda x: F.cross_entropy(x, LABELS[:0]),
    "masked weight": lambda w: Mask(nn.Parameter(np.ones((0, 3))))(w),
}


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@every_operation
def test_an_empty_batch_has_zero_gradients(
    name: str, dtype: np.dtype, rng: np.random.Generator
) -> None:
    operation = OPERATIONS[name]
    shapes = [(0, *s[1:]) if s and s[0] == 6 else s for s in operation.shapes]
    leaves = [mh.Tensor(draw(s, dtype, rng), True) for s in shapes]
    f = OF_NOTHING.get(name, operation.f)
    if name in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[name]):
            f(*leaves)
        return
    y = f(*leaves)
    assert y.dtype == dtype
    y.backward(np.ones(y.shape, dtype))
    for leaf in leaves:
        assert leaf.grad.shape == leaf.shape
        if y.size == 0:
            np.testing.assert_array_equal(leaf.grad, np.zeros(leaf.shape))


def test_an_empty_batch_through_a_network(rng: np.random.Generator) -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, rng=rng),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1, rng=rng),  # by Winograd's way
        nn.MaxPool2d(2),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 10, rng=rng),
    )
    net(mh.Tensor(np.zeros((0, 8, 8, 3), np.float32))).sum().backward()
    for p in net.parameters():
        np.testing.assert_array_equal(p.grad, np.zeros(p.shape))


# -- PyTorch ---------------------------------------------------------------------------------------


def torch_functions() -> dict[str, Callable[..., Any]]:
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    return {
        "+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv,
        "@": operator.matmul, "neg": operator.neg, "**0": lambda x: x**0, "**2": lambda x: x**2,
        "**-1": lambda x: x**-1, "**0.5": lambda x: x**0.5, "getitem": lambda x: x[[0, 2, 2]],
        "exp": torch.exp, "log": torch.log, "sum": lambda x: x.sum(0), "mean": lambda x: x.mean(1),
        "max": lambda x: x.amax(1), "relu": functional.relu, "tanh": torch.tanh,
        "sigmoid": torch.sigmoid, "softmax": lambda x: functional.softmax(x, -1),
        "log_softmax": lambda x: functional.log_softmax(x, -1),
        "linear": functional.linear, "linear, bias": functional.linear,
        "concatenate": lambda *a: torch.cat(a),
        "cross_entropy": lambda x: functional.cross_entropy(
            x, torch.from_numpy(LABELS), label_smoothing=0.1
        ),
    }  # fmt: skip


def test_pytorch_agrees(rng: np.random.Generator) -> None:
    """On the dtypes of results and gradients, and on their values, of real and whole numbers with
    a float among them. (Where PyTorch refuses to mix, there is nothing to compare.)"""
    torch = pytest.importorskip("torch")
    compared = 0
    for name, theirs in torch_functions().items():
        operation = OPERATIONS[name]
        for dtypes in combinations(len(operation.shapes), [*WHOLE, HALF, SINGLE, DOUBLE]):
            if not any(d.kind == "f" for d in dtypes):
                continue
            arrays = [draw(s, d, rng) for s, d in zip(operation.shapes, dtypes, strict=True)]
            tensors = [torch.tensor(a, requires_grad=a.dtype.kind == "f") for a in arrays]
            try:
                expected = theirs(*tensors)
            except RuntimeError:
                continue
            leaves = [mh.Tensor(a, a.dtype.kind == "f") for a in arrays]
            y = operation.f(*leaves)
            c = rng.standard_normal(y.shape).astype(y.dtype)
            y.backward(c)
            expected.backward(torch.tensor(c))
            pairs = [(y.data, expected.detach())]
            pairs += [(a.grad, b.grad) for a, b in zip(leaves, tensors, strict=True)]
            for mine, other in pairs:
                assert (mine is None) == (other is None)
                if mine is not None:
                    assert str(other.dtype) == f"torch.{mine.dtype}", (name, dtypes)
                    scale = max(1.0, float(abs(other).max()))
                    limit = 16 * np.finfo(mine.dtype).eps * scale
                    assert abs(mine.astype(float) - other.numpy()).max() <= limit, (name, dtypes)
            compared += 1
    assert compared > 150
