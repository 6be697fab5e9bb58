"""Every differentiable operation of the package, in one table.

Adding a Function without a row here fails ``test_every_function_has_a_row``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from support.functions import functions_of_the_package

import minihyperflows as mh
from minihyperflows import flows, testing
from minihyperflows import functional as F
from minihyperflows.engine import conv, norm, ops, pooling
from minihyperflows.engine.graph import Function
from minihyperflows.flows.gates import Gate, GatedWeight
from minihyperflows.flows.pressures import MeanPresence
from minihyperflows.nn import Parameter
from minihyperflows.related.pruners import Mask, MaskedWeight
from minihyperflows.testing.problem import keep_away


@dataclass
class Row:
    """One operation with inputs to check it at.

    Attributes:
        factory: makes the Function.
        inputs: for each input a shape, drawn from a standard normal, or an array.
        away_from: where it has a kink.
    """

    factory: Callable[[], Function]
    inputs: tuple[Any, ...]
    away_from: float | None = None

    @property
    def name(self) -> str:
        return self.factory().name

    def arrays(self) -> list[np.ndarray]:
        rng = np.random.default_rng(1)
        drawn = [rng.standard_normal(s) if isinstance(s, tuple) else s for s in self.inputs]
        return drawn if self.away_from is None else [keep_away(a, self.away_from) for a in drawn]


POSITIVE = np.linspace(0.5, 2.0, 6).reshape(2, 3)
AWAY_FROM_ZERO = np.array([[-1.5, 0.7, 2.0], [1.1, -0.6, 0.9]])
LABELS = np.array([2, 0, 1, 2])


def masked_weight() -> MaskedWeight:
    """With some weights removed."""
    mask = Mask(Parameter(np.ones((2, 3))))
    mask.present = np.array([[True, False, True], [False, False, True]])
    return MaskedWeight(mask)


ROWS = [
    Row(ops.Add, ((2, 3), (2, 3))),
    Row(ops.Add, ((2, 3), (3,))),
    Row(ops.Add, ((2, 1, 3), (4, 1))),
    Row(ops.Subtract, ((2, 3), (2, 3))),
    Row(ops.Subtract, ((1,), (2, 3))),
    Row(ops.Multiply, ((2, 3), (2, 3))),
    Row(ops.Multiply, ((2, 3), ())),
    Row(ops.Divide, ((2, 3), AWAY_FROM_ZERO)),
    Row(ops.Divide, ((3,), AWAY_FROM_ZERO)),
    Row(ops.Divide, ((4, 2, 3), AWAY_FROM_ZERO)),
    Row(ops.Negate, ((2, 3),)),
    Row(lambda: ops.Power(2), ((2, 3),)),
    Row(lambda: ops.Power(3), ((2, 3),)),
    Row(lambda: ops.Power(0), ((2, 3),)),
    Row(lambda: ops.Power(-1), (AWAY_FROM_ZERO,)),
    Row(lambda: ops.Power(0.5), (POSITIVE,)),
    Row(lambda: ops.Power(-1.7), (POSITIVE,)),
    Row(ops.Exp, ((2, 3),)),
    Row(ops.Log, (POSITIVE,)),
    Row(ops.Tanh, ((2, 3),)),
    Row(ops.Sigmoid, ((2, 3),)),
    Row(ops.ReLU, ((4, 5),), away_from=0.0),
    Row(ops.Sum, ((2, 3),)),
    Row(lambda: ops.Sum(axis=1), ((2, 3, 4),)),
    Row(lambda: ops.Sum(axis=(0, -1), keepdims=True), ((2, 3, 4),)),
    Row(ops.Mean, ((2, 3),)),
    Row(lambda: ops.Mean(axis=-2), ((2, 3, 4),)),
    Row(lambda: ops.Mean(axis=(0, 2), keepdims=True), ((2, 3, 4),)),
    Row(ops.Max, ((2, 3),)),
    Row(lambda: ops.Max(axis=1), ((2, 3, 4),)),
    Row(lambda: ops.Max(axis=(0, 2), keepdims=True), ((2, 3, 4),)),
    Row(lambda: ops.Reshape((4, -1)), ((2, 3, 2),)),
    Row(ops.Transpose, ((2, 3, 4),)),
    Row(lambda: ops.Transpose((1, -1, 0)), ((2, 3, 4),)),
    Row(lambda: ops.GetItem((slice(None, None, 2), 1)), ((4, 3),)),
    Row(lambda: ops.GetItem(np.array([0, 2, 2, 2])), ((4, 3),)),
    Row(lambda: ops.GetItem((np.arange(4), LABELS)), ((4, 3),)),
    Row(lambda: ops.GetItem((..., None, -1)), ((4, 3),)),
    Row(lambda: ops.GetItem(np.arange(12).reshape(4, 3) % 2 == 0), ((4, 3),)),
    Row(ops.Concatenate, ((2, 3), (1, 3), (4, 3))),
    Row(lambda: ops.Concatenate(axis=-1), ((2, 3), (2, 1))),
    Row(ops.MatMul, ((2, 3), (3, 4))),
    Row(ops.MatMul, ((5, 1, 2, 3), (4, 3, 2))),
    Row(ops.Linear, ((5, 4), (3, 4))),
    Row(ops.Linear, ((5, 4), (3, 4), (3,))),
    Row(ops.Linear, ((2, 5, 4), (3, 4), (3,))),
    Row(ops.Linear, ((4,), (3, 4), (3,))),
    Row(ops.Softmax, ((4, 3),)),
    Row(lambda: ops.Softmax(axis=0), ((4, 3),)),
    Row(ops.LogSoftmax, ((4, 3),)),
    Row(lambda: ops.LogSoftmax(axis=1), ((2, 3, 2),)),
    Row(lambda: ops.CrossEntropy(LABELS), ((4, 3),)),
    Row(lambda: ops.CrossEntropy(LABELS, 0.1), ((4, 3),)),
    Row(lambda: ops.CrossEntropy(LABELS, 1.0), ((4, 3),)),
    Row(conv.Conv2d, ((2, 5, 4, 3), (4, 3, 2, 3))),
    Row(lambda: conv.Conv2d(padding=1), ((2, 5, 4, 3), (4, 3, 3, 3), (4,))),
    Row(lambda: conv.Conv2d(stride=2, padding=(1, 0)), ((2, 6, 5, 2), (3, 3, 2, 2), (3,))),
    Row(lambda: conv.Conv2d(stride=(1, 3), groups=2), ((2, 4, 7, 4), (6, 2, 2, 2), (6,))),
    Row(lambda: conv.Conv2d(padding=1, groups=3), ((2, 4, 4, 3), (3, 3, 3, 1))),  # depthwise
    Row(conv.Conv2d, ((2, 3, 3, 4), (5, 1, 1, 4), (5,))),  # pointwise
    Row(lambda: conv.Conv2d(stride=2), ((2, 4, 4, 3), (5, 1, 1, 3))),
    Row(lambda: pooling.MaxPool2d(2), ((2, 4, 6, 3),)),
    Row(lambda: pooling.MaxPool2d((2, 3), stride=(2, 1)), ((2, 5, 5, 2),)),  # overlapping windows
    Row(lambda: pooling.MaxPool2d(3, stride=2), ((2, 6, 7, 2),)),  # with pixels left over
    Row(lambda: pooling.AvgPool2d(2), ((2, 4, 6, 3),)),
    Row(lambda: pooling.AvgPool2d(3, stride=2), ((2, 6, 7, 2),)),
    Row(norm.BatchNorm, ((6, 3), (3,), (3,))),
    Row(norm.BatchNorm, ((2, 3, 4, 2), (2,), (2,))),
    Row(lambda: norm.BatchNorm(relu=True), ((2, 3, 4, 2), (2,), (2,))),
    Row(norm.BatchNorm, ((2, 3, 4, 2), (2,), (2,), (2, 3, 4, 2))),  # with a residual
    Row(lambda: norm.BatchNorm(relu=True), ((8, 3), (3,), (3,), (8, 3))),
    Row(lambda: norm.Normalise(POSITIVE[0], POSITIVE[1]), ((2, 4, 3), (3,), (3,))),
    Row(lambda: norm.Normalise(POSITIVE[0], POSITIVE[1]), ((4, 3), (3,), (3,), (4, 3))),
    Row(lambda: norm.Normalise(POSITIVE[0], POSITIVE[1], relu=True), ((8, 3), (3,), (3,), (8, 3))),
    Row(MeanPresence, ((2, 3), (4,))),
    Row(lambda: MeanPresence(floor=0.0), ((5, 6), (4,)), away_from=0.0),
    Row(masked_weight, ((2, 3),)),
]

# Steps have no derivative to compare with: these declare one, and are tested against it.
DECLARED = {Gate, GatedWeight}
ABSTRACT = {ops.Elementwise, ops.Reduction, pooling.Pool2d}

ids = [f"{i}-{row.name}" for i, row in enumerate(ROWS)]
every_row = pytest.mark.parametrize("row", ROWS, ids=ids)


def test_every_function_has_a_row() -> None:
    tested = {type(row.factory()) for row in ROWS}
    functions = functions_of_the_package()
    missing = functions - tested - DECLARED - ABSTRACT
    assert not missing, f"add rows to ROWS for {sorted(f.__name__ for f in missing)}"
    assert tested <= functions
    assert functions >= DECLARED | ABSTRACT


def test_abstract_functions_cannot_be_used() -> None:
    for function in [ops.Elementwise, Function]:
        with pytest.raises(NotImplementedError):
            mh.apply(function(), np.ones(2), np.ones(2))


@every_row
def test_contract_and_gradient(row: Row) -> None:
    """Shapes, needs, float32 and float64, no writing, no sharing, central differences."""
    testing.check_function(row.factory, *row.arrays())


@every_row
def test_every_element(row: Row) -> None:
    testing.check_grad(row.factory, *row.arrays(), per_element=True, rng=2)


@every_row
def test_complex_step(row: Row) -> None:
    testing.check_complex_step(row.factory, *row.arrays())


DTYPES = [np.float16, np.float32, np.float64, np.longdouble, np.complex64, np.complex128]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.__name__)
@every_row
def test_dtype_is_kept(row: Row, dtype: type) -> None:
    leaves = [mh.Tensor(a.astype(dtype), requires_grad=True) for a in row.arrays()]
    output = mh.apply(row.factory(), *leaves)
    assert output.dtype == dtype
    output.backward(np.ones(output.shape, dtype))
    assert [leaf.grad.dtype for leaf in leaves] == [np.dtype(dtype)] * len(leaves)


@every_row
def test_one_complex_input_among_real_ones(row: Row) -> None:
    """With only one input complex, the others real, nothing fails and nothing is lost."""
    arrays = row.arrays()
    for i in range(len(arrays)):
        mixed = [a + 1e-3j * (k == i) if k == i else a for k, a in enumerate(arrays)]
        everything = [a.astype(complex) for a in mixed]
        outputs, gradients = [], []
        for version in (mixed, everything):
            leaves = [mh.Tensor(a, requires_grad=True) for a in version]
            output = mh.apply(row.factory(), *leaves)
            output.backward(np.full(output.shape, 1 + 1e-3j))
            outputs.append(output.data)
            gradients.append([leaf.grad for leaf in leaves])
        np.testing.assert_allclose(outputs[0], outputs[1], rtol=1e-13, atol=1e-14)
        for mine, reference in zip(*gradients, strict=True):
            np.testing.assert_allclose(mine, reference, rtol=1e-12, atol=1e-13)


def unusual(array: np.ndarray) -> list[np.ndarray]:
    """``array`` in other memory orders, another byte order, and not writable."""
    holes = np.zeros((*array.shape, 2))
    holes[..., 0] = array
    read_only = array.copy()
    read_only.flags.writeable = False
    swapped = array.astype(array.dtype.newbyteorder())
    return [np.asfortranarray(array).reshape(array.shape), holes[..., 0], read_only, swapped]


@every_row
def test_unusual_memory(row: Row) -> None:
    def run(arrays: list[np.ndarray]) -> list[np.ndarray]:
        leaves = [mh.Tensor(a, requires_grad=True) for a in arrays]
        output = mh.apply(row.factory(), *leaves)
        output.backward(np.linspace(-1, 1, output.size).reshape(output.shape))
        return [output.data, *(leaf.grad for leaf in leaves)]

    arrays = row.arrays()
    usual = run(arrays)
    for versions in zip(*(unusual(a) for a in arrays), strict=True):
        for found, expected in zip(run(list(versions)), usual, strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-13, atol=1e-14)


# -- operations with a declared derivative ---------------------------------------------------------


def test_gate_has_its_declared_derivative() -> None:
    testing.check_surrogate(Gate, kappa=0.25)
    testing.check_surrogate(flows.gate, kappa=flows.KAPPA)


def test_gated_weight_is_differentiable_in_the_weight(rng: np.random.Generator) -> None:
    t = rng.standard_normal((4, 3))
    testing.check_grad(lambda w: mh.apply(GatedWeight(), w, t), rng.standard_normal((4, 3)))
    testing.check_complex_step(lambda w: mh.apply(GatedWeight(), w, t), rng.standard_normal((4, 3)))


def test_gated_weight_has_its_declared_derivative(rng: np.random.Generator) -> None:
    weight, c = rng.standard_normal((2, 36)).astype(np.float32)

    def with_unit_weight(t: mh.Tensor) -> mh.Tensor:
        return mh.apply(GatedWeight(), np.ones(t.shape, t.dtype), t)

    testing.check_surrogate(with_unit_weight)
    t = mh.Tensor(rng.standard_normal(36).astype(np.float32), requires_grad=True)
    mh.apply(GatedWeight(), weight, t).backward(c)
    np.testing.assert_array_equal(t.grad, c * weight * np.float32(0.25))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.__name__)
def test_gates_keep_the_dtype(dtype: type, rng: np.random.Generator) -> None:
    weight, t = (mh.Tensor(rng.standard_normal(5).astype(dtype), True) for _ in range(2))
    output = flows.gate(t) * weight + mh.apply(GatedWeight(), weight, t)
    output.backward(np.ones(5, dtype))
    assert output.dtype == weight.grad.dtype == t.grad.dtype == dtype


def test_gates_are_never_exact_for_finite_differences() -> None:
    """The checker itself sees that a gate is not differentiable."""
    with pytest.raises(AssertionError, match="does not depend"):
        testing.check_grad(flows.gate, np.linspace(-1, 1, 8))


# -- functions made of several operations ----------------------------------------------------------


def test_functional_compositions(rng: np.random.Generator) -> None:
    x, scale, shift = rng.standard_normal((6, 3)), rng.standard_normal(3), rng.standard_normal(3)
    mean, var = rng.standard_normal(3), rng.uniform(0.5, 2, 3)
    for f in [
        lambda x, s, b: F.batch_norm(x, s, b, training=True),
        lambda x, s, b: F.batch_norm(x, s, b, mean, var),
        lambda x, s, b: norm.batch_norm_simple(x, s, b),
    ]:
        testing.check_grad(f, x, scale, shift, per_element=True)
        testing.check_complex_step(f, x, scale, shift)


def test_ties_share_the_gradient_of_a_maximum() -> None:
    x = mh.Tensor(np.array([[1.0, 3.0, 3.0], [2.0, 2.0, 2.0]]), requires_grad=True)
    x.max(axis=1).backward(np.array([6.0, 6.0]))
    np.testing.assert_array_equal(x.grad, [[0, 3, 3], [2, 2, 2]])


def test_complex_ties_are_found_by_the_real_part() -> None:
    x = mh.Tensor(np.array([1.0 + 2j, 1.0 + 4j, 0.5 + 9j]), requires_grad=True)
    y = x.max()
    assert y.item() == 1 + 3j
    y.backward()
    np.testing.assert_array_equal(x.grad, [0.5, 0.5, 0])


def test_relu_at_its_kink_and_at_extremes() -> None:
    x = mh.Tensor(np.array([0.0, -0.0, -np.inf, np.inf, np.nan]), requires_grad=True)
    y = F.relu(x)
    np.testing.assert_array_equal(y.data, [0, 0, 0, np.inf, np.nan])  # a NaN is not hidden
    y.backward(np.ones(5))
    np.testing.assert_array_equal(x.grad, [0, 0, 0, 1, 0])


def test_power_zero_at_zero() -> None:
    x = mh.Tensor(np.array([0.0, 2.0]), requires_grad=True)
    (x**0).sum().backward()
    np.testing.assert_array_equal(x.grad, [0, 0])


def test_softmax_does_not_overflow() -> None:
    logits = mh.Tensor(np.array([[1e4, 0.0, -1e4]], np.float32), requires_grad=True)
    loss = F.cross_entropy(logits, [0])
    loss.backward()
    assert loss.item() == 0
    assert np.isfinite(logits.grad).all()
    assert np.isfinite(F.softmax(logits.detach()).data).all()
    with np.errstate(over="raise"):
        F.sigmoid(mh.Tensor(np.array([-1e4, 1e4], np.float32)))


def test_a_factory_may_bind_the_variable_of_a_loop():
    for axis in (0, 1):
        testing.check_function(lambda axis=axis: ops.Softmax(axis), (3, 4))
