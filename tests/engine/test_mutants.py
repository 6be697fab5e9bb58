"""Broken on purpose: a check that never objects checks nothing.

Each mutant breaks one thing that people get wrong. The public checker must object to the mutant,
with a message that points at the mistake, and be content with the original.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from support.lanes import large

import minihyperflows as mh
from minihyperflows import flows, nn, optim, testing
from minihyperflows import functional as F
from minihyperflows.engine import conv, norm, ops, pooling
from minihyperflows.engine.graph import Function
from minihyperflows.flows.gates import Gate
from minihyperflows.nn.optim import adam_rule, sgd_rule

Array = np.ndarray

# -- functions -------------------------------------------------------------------------------------


class SoftmaxOfZeros(ops.Softmax):
    """The sum of a softmax has gradient zero, so a check with a cotangent of ones likes this."""

    def backward(self, c: Array) -> Array:
        return np.zeros_like(c)


class SoftmaxWithoutSum(ops.Softmax):
    def backward(self, c: Array) -> Array:
        return self.p * c


class BatchNormOfConstants(norm.BatchNorm):
    """Mean and variance taken for constants."""

    def backward(self, c: Array) -> tuple[Array | None, ...]:
        _, scale, shift = super().backward(c)
        x = c * self.scale * self.inverse_std if self.needs[0] else None
        return x, scale, shift


class BatchNormWithoutMean(norm.BatchNorm):
    """Only the term of the mean is forgotten."""

    def backward(self, c: Array) -> tuple[Array | None, ...]:
        x, *others = super().backward(c)
        if x is not None:
            x = x + self.scale * self.inverse_std * c.mean(axis=tuple(range(c.ndim - 1)))
        return x, *others


class LinearWithSwappedFactors(ops.Linear):
    """dL/dW transposed: the right shape for a square weight only."""

    def backward(self, c: Array) -> tuple[Array | None, ...]:
        x, weight, *bias = super().backward(c)
        return x, None if weight is None else weight.T, *bias


class AddWithoutUnbroadcast(ops.Add):
    def backward(self, c: Array) -> tuple[Array | None, ...]:
        return tuple(c if needed else None for needed in self.needs)


class AddWithMean(ops.Add):
    """Unbroadcasts with a mean in place of a sum."""

    def backward(self, c: Array) -> tuple[Array | None, ...]:
        a, b = super().backward(c)
        return a, None if b is None else b / (c.size / b.size)


class DivideWithWrongSign(ops.Divide):
    def gradient_b(self, c: Array) -> Array:
        return -super().gradient_b(c)


class MultiplyWithSwappedFactors(ops.Multiply):
    def gradient_a(self, c: Array) -> Array:
        return self.a * c


class ExpWithoutCotangent(ops.Exp):
    def backward(self, c: Array) -> Array:
        return self.y


class MeanWithoutDivision(ops.Mean):
    def backward(self, c: Array) -> Array:
        return super().backward(c) * int(np.prod(self.shape))


class TanhOfInput(ops.Tanh):
    """1 - x^2 in place of 1 - y^2."""

    def forward(self, x: Array) -> Array:
        self.x = x
        return super().forward(x)

    def backward(self, c: Array) -> Array:
        return (1 - self.x * self.x) * c


class GetItemThatOverwrites(ops.GetItem):
    """An element chosen twice gets one of its two cotangents, not their sum."""

    def backward(self, c: Array) -> Array:
        gradient = np.zeros(self.shape, dtype=c.dtype)
        gradient[self.index] = c
        return gradient


class PoolThatOverwrites(pooling.MaxPool2d):
    """Like it, where windows overlap."""

    def backward(self, c: Array) -> Array:
        gradient = np.zeros(self.shape, dtype=c.dtype)
        for k, pixels in enumerate(self.shifted(gradient)):
            pixels[...] = np.where(self.place == k, c, pixels)
        return gradient


class ConvWithFlippedKernel(conv.Conv2d):
    """dL/dx with the kernel turned around."""

    def backward(self, c: Array) -> tuple[Array | None, ...]:
        self.weight = self.weight[:, ::-1, ::-1].copy()
        return super().backward(c)


class CrossEntropyWithoutMean(ops.CrossEntropy):
    def backward(self, c: Array) -> Array:
        return super().backward(c) * len(self.log_p)


class CrossEntropyWithoutSmoothing(ops.CrossEntropy):
    """Smooths in forward, forgets it in backward."""

    def backward(self, c: Array) -> Array:
        self.label_smoothing = 0.0
        return super().backward(c)


class ExpThatWrites(ops.Exp):
    """Right, but it destroys a cotangent that another function may hold."""

    def backward(self, c: Array) -> Array:
        c *= self.y
        return c


class ReLUInPlace(ops.ReLU):
    def forward(self, x: Array) -> Array:
        self.positive = x > 0
        x *= self.positive
        return x


class ExpThatShares(ops.Exp):
    """Keeps its output on the class, where the next instance overwrites it."""

    def forward(self, x: Array) -> Array:
        type(self).y = np.exp(x)
        return self.y


class TanhInDouble(ops.Tanh):
    """A NumPy scalar lifts float32 to float64."""

    def backward(self, c: Array) -> Array:
        return (np.float64(1) - self.y * self.y) * c


class MatMulThatIgnoresNeeds(ops.MatMul):
    def backward(self, c: Array) -> tuple[Array | None, ...]:
        return c @ self.b.T, self.a.T @ c


class SubtractWithOneGradient(ops.Subtract):
    def backward(self, c: Array) -> Array:
        return c


@dataclass
class Mutant:
    broken: Callable[[], Function]
    original: Callable[[], Function]
    inputs: tuple[Any, ...]
    message: str


LABELS = np.array([1, 0, 2])
MUTANTS = [
    Mutant(SoftmaxOfZeros, ops.Softmax, ((3, 4),), "backward returns zero"),
    Mutant(SoftmaxWithoutSum, ops.Softmax, ((3, 4),), "is wrong"),
    Mutant(BatchNormOfConstants, norm.BatchNorm, ((6, 3), (3,), (3,)), "input 0"),
    Mutant(BatchNormWithoutMean, norm.BatchNorm, ((6, 3), (3,), (3,)), "input 0"),
    Mutant(LinearWithSwappedFactors, ops.Linear, ((5, 4), (3, 4), (3,)), r"shape \(4, 3\)"),
    Mutant(LinearWithSwappedFactors, ops.Linear, ((5, 4), (4, 4), (4,)), "input 1"),
    Mutant(AddWithoutUnbroadcast, ops.Add, ((2, 3), (3,)), "sum over the axes"),
    Mutant(AddWithMean, ops.Add, ((2, 3), (3,)), "0.5 times"),
    Mutant(DivideWithWrongSign, ops.Divide, ((5,), np.linspace(1, 2, 5)), "the sign is wrong"),
    Mutant(MultiplyWithSwappedFactors, ops.Multiply, ((2, 3), (2, 3)), "the worst element"),
    Mutant(ExpWithoutCotangent, ops.Exp, ((2, 3),), "cotangent of ones"),
    Mutant(MeanWithoutDivision, ops.Mean, ((2, 3),), "6 times"),
    Mutant(TanhOfInput, ops.Tanh, ((2, 3),), "is wrong"),
    Mutant(
        lambda: GetItemThatOverwrites(np.array([0, 1, 1])),
        lambda: ops.GetItem(np.array([0, 1, 1])),
        ((3, 2),),
        "is wrong",
    ),
    Mutant(
        lambda: PoolThatOverwrites(3, stride=1),
        lambda: pooling.MaxPool2d(3, stride=1),
        ((2, 5, 5, 2),),
        "is wrong",
    ),
    Mutant(ConvWithFlippedKernel, conv.Conv2d, ((2, 5, 5, 2), (3, 3, 3, 2)), "is wrong"),
    Mutant(
        lambda: CrossEntropyWithoutMean(LABELS),
        lambda: ops.CrossEntropy(LABELS),
        ((3, 4),),
        "3 times",
    ),
    Mutant(
        lambda: CrossEntropyWithoutSmoothing(LABELS, 0.1),
        lambda: ops.CrossEntropy(LABELS, 0.1),
        ((3, 4),),
        "is wrong",
    ),
    Mutant(ExpThatWrites, ops.Exp, ((2, 3),), "writes into its cotangent"),
    Mutant(ReLUInPlace, ops.ReLU, ((2, 3),), "forward writes into its inputs"),
    Mutant(ExpThatShares, ops.Exp, ((2, 3),), "changes the first one's"),
    Mutant(TanhInDouble, ops.Tanh, ((2, 3),), "turns float32 into float64"),
    Mutant(MatMulThatIgnoresNeeds, ops.MatMul, ((2, 3), (3, 4)), "nobody needs"),
    Mutant(SubtractWithOneGradient, ops.Subtract, ((2,), (2,)), "1 gradients for 2 inputs"),
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.broken().name)
def test_function_mutants(mutant: Mutant) -> None:
    testing.check_function(mutant.original, *mutant.inputs)
    with pytest.raises(AssertionError, match=mutant.message):
        testing.check_function(mutant.broken, *mutant.inputs)


def test_zeroed_softmax_passes_with_a_cotangent_of_ones(rng: np.random.Generator) -> None:
    """Why the cotangent is random: the classic check is blind here."""
    x = mh.Tensor(rng.standard_normal((3, 4)), requires_grad=True)
    mh.apply(SoftmaxOfZeros(), x).sum().backward()
    numerical = testing.numerical_gradient(ops.Softmax, x)
    np.testing.assert_allclose(x.grad, numerical, atol=1e-9)
    with pytest.raises(AssertionError):
        testing.check_grad(SoftmaxOfZeros, x)


# -- complex numbers -------------------------------------------------------------------------------


class ExpConjugated(ops.Exp):
    def backward(self, c: Array) -> Array:
        return self.y.conj() * c


class SigmoidOfRealPart(ops.Sigmoid):
    def forward(self, x: Array) -> Array:
        return super().forward(x.real)


class ReLUByModulus(ops.ReLU):
    """Compares |x| with 0 in complex arithmetic: then nothing is ever cut off."""

    def forward(self, x: Array) -> Array:
        self.y = x * (abs(x) > 0 if x.dtype.kind == "c" else x > 0)
        return self.y


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (ExpConjugated, "symmetric|change of the gradient"),
        (SigmoidOfRealPart, "imaginary part is lost"),
        (ReLUByModulus, "forward pass"),
    ],
)
def test_complex_mutants(broken: type[Function], message: str, rng: np.random.Generator) -> None:
    x = rng.standard_normal((3, 4))
    testing.check_grad(broken, x)  # nothing is wrong with real numbers
    testing.check_complex_step(broken.__bases__[0], x)
    with pytest.raises(AssertionError, match=message):
        testing.check_complex_step(broken, x)


# -- the engine ------------------------------------------------------------------------------------


def test_gradients_that_replace_each_other_are_found(
    monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    """An engine that keeps the last contribution to a leaf instead of the sum."""
    x = rng.standard_normal(4)
    testing.check_grad(lambda x: x * x.exp(), x)

    def replace(leaf: mh.Tensor, gradient: list[Array]) -> None:
        leaf.grad = np.array(gradient[0])

    monkeypatch.setattr("minihyperflows.engine.graph.add_to_leaf", replace)
    with pytest.raises(AssertionError, match="is wrong"):
        testing.check_grad(lambda x: x * x.exp(), x)


def test_a_cut_graph_is_found(rng: np.random.Generator) -> None:
    x, y = rng.standard_normal((2, 3))
    with pytest.raises(AssertionError, match="graph is cut"):
        testing.check_grad(lambda x: mh.Tensor(np.exp(x.data)), x)
    with pytest.raises(AssertionError, match=r"input 0 .* gets no gradient"):
        testing.check_grad(lambda x, y: x.detach() * y, x, y)


def test_a_kink_is_named(rng: np.random.Generator) -> None:
    x = np.array([-1.0, 0.0, 1.0])
    with pytest.raises(AssertionError, match="kink"):
        testing.check_grad(F.relu, x)
    testing.check_grad(F.relu, x, away_from=0.0)


# -- gates -----------------------------------------------------------------------------------------


class GateWithoutZero(Gate):
    def forward(self, t: Array) -> Array:
        return (t > 0).astype(t.dtype)


class GateWithKappaOne(Gate):
    def backward(self, c: Array) -> Array:
        return c


class GateOfSigmoid(Gate):
    """The logistic function's own derivative: a quarter at t = 0 only."""

    def forward(self, t: Array) -> Array:
        self.t = np.clip(t, -50, 50)
        return super().forward(t)

    def backward(self, c: Array) -> Array:
        y = 1 / (1 + np.exp(-self.t))
        return y * (1 - y) * c


class GateOfThePresent(Gate):
    """No flux for removed weights: they could never come back."""

    def forward(self, t: Array) -> Array:
        self.mask = super().forward(t)
        return self.mask

    def backward(self, c: Array) -> Array:
        return super().backward(c) * self.mask


class GateOfSigns(Gate):
    """-0.0 taken for negative."""

    def forward(self, t: Array) -> Array:
        return (~np.signbit(t)).astype(t.dtype)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (GateWithoutZero, r"gate at t = 0\.0 is 0\.0 where 1\.0"),
        (GateWithKappaOne, "gradient .* at t"),
        (GateOfSigmoid, "gradient .* at t"),
        (GateOfThePresent, "gradient .* at t = -"),
        (GateOfSigns, r"gate at t = -0\.0 is 0\.0 where 1\.0"),
    ],
)
def test_gate_mutants(broken: type[Function], message: str) -> None:
    testing.check_surrogate(Gate)
    with pytest.raises(AssertionError, match=message):
        testing.check_surrogate(broken)
    with pytest.raises(AssertionError, match=r"kappa = 0\.3"):
        testing.check_surrogate(Gate, kappa=0.3)


# -- optimisers ------------------------------------------------------------------------------------


def adam(theta: Array, gradient: Array, memory: Any, step: int) -> tuple[Array, Any]:
    m, v = memory or (np.zeros_like(theta), np.zeros_like(theta))
    theta, m, v = adam_rule(theta, gradient, m, v, step, lr=0.01)
    return theta, (m, v)


class SimpleAdam:
    """Adam as a student may write it; the mutants below break it."""

    betas, eps, lr = (0.9, 0.999), 1e-8, 0.01

    def __init__(self, params: list[nn.Parameter]) -> None:
        self.params, self.step_number = params, 0
        self.moments = [(np.zeros_like(p.data), np.zeros_like(p.data)) for p in params]

    def zero_grad(self) -> None:
        for p in self.params:
            p.grad = None

    def correction(self, beta: float) -> float:
        return 1 - beta**self.step_number

    def move(self, p: nn.Parameter, m: Array, v: Array) -> None:
        m_hat, v_hat = m / self.correction(self.betas[0]), v / self.correction(self.betas[1])
        p.data = p.data - self.lr * m_hat / (v_hat**0.5 + self.eps)

    def step(self) -> None:
        self.step_number += 1
        for i, p in enumerate(self.params):
            if p.grad is not None:
                (b1, b2), (m, v) = self.betas, self.moments[i]
                m, v = b1 * m + (1 - b1) * p.grad, b2 * v + (1 - b2) * p.grad * p.grad
                self.moments[i] = m, v
                self.move(p, m, v)


class AdamWithoutCorrection(SimpleAdam):
    def correction(self, beta: float) -> float:
        return 1.0


class AdamWithEpsilonInside(SimpleAdam):
    eps = 0.0

    def move(self, p: nn.Parameter, m: Array, v: Array) -> None:
        super().move(p, m, v + 1e-4)


class AdamThatScalesTheGradient(SimpleAdam):
    def step(self) -> None:
        super().step()
        for p in self.params:
            if p.grad is not None:
                p.grad *= 0.5


class AdamThatDecaysTheUntouched(SimpleAdam):
    def step(self) -> None:
        for p in self.params:
            if p.grad is None:
                p.data = 0.99 * p.data
        super().step()


class AdamThatKeepsGradients(SimpleAdam):
    def zero_grad(self) -> None:
        pass


class AdamThatForgets(optim.Adam):
    """Saves everything but the second moment."""

    def load_state_dict(self, state: Any) -> None:
        super().load_state_dict(state)
        for slots in self.state:
            slots["v"][...] = 0


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (AdamWithoutCorrection, "after step 1"),
        (AdamWithEpsilonInside, "after step 1"),
        (AdamThatScalesTheGradient, "must not change"),
        *large((AdamThatDecaysTheUntouched, "has no gradient")),
        *large((AdamThatKeepsGradients, "zero_grad")),
        *large((lambda params: AdamThatForgets(params, lr=0.01), "after loading")),
    ],
)
def test_adam_mutants(broken: Any, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        testing.check_optimizer(broken, adam)


@pytest.mark.slow
def test_adam_originals() -> None:
    testing.check_optimizer(SimpleAdam, adam)
    testing.check_optimizer(lambda params: optim.Adam(params, lr=0.01), adam)


class DampedSGD(optim.SGD):
    """v <- momentum v + (1 - momentum) g from the second step on."""

    def step(self) -> None:
        for p, slots in zip(self.params, self.state, strict=True):
            if p.grad is not None and slots:
                p.grad = (1 - self.momentum) * p.grad
        super().step()


@pytest.mark.slow
def test_sgd_mutant() -> None:
    def rule(theta: Array, gradient: Array, velocity: Any, step: int) -> tuple[Array, Any]:
        return sgd_rule(theta, gradient, velocity, lr=0.1, momentum=0.9)

    testing.check_optimizer(lambda params: optim.SGD(params, 0.1, momentum=0.9), rule)
    with pytest.raises(AssertionError, match="after step 2"):
        testing.check_optimizer(lambda params: DampedSGD(params, 0.1, momentum=0.9), rule)


# -- modules ---------------------------------------------------------------------------------------


class Affine(nn.Module):
    def __init__(self) -> None:
        self.scale, self.shift = nn.Parameter(np.full(3, 2.0)), nn.Parameter(np.zeros(3))

    def forward(self, x: mh.Tensor) -> mh.Tensor:
        return x * self.scale + self.shift


class AffineWithoutShift(Affine):
    def forward(self, x: mh.Tensor) -> mh.Tensor:
        return x * self.scale


class AffineThatCuts(Affine):
    def forward(self, x: mh.Tensor) -> mh.Tensor:
        return x * self.scale.data + self.shift


class AffineWithMemory(Affine):
    """Counts its calls, also in evaluation."""

    calls = 0

    def forward(self, x: mh.Tensor) -> mh.Tensor:
        self.calls += 0 if self.training else 1
        return super().forward(x) + float(self.calls)


class AffineWithUnsavedState(Affine):
    def load_state_dict(self, state: Any) -> None:
        self.scale.data = np.array(state["scale"])


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (AffineWithoutShift, "parameter shift gets no gradient"),
        (AffineThatCuts, "parameter scale gets no gradient"),
        (AffineWithMemory, "second call in evaluation"),
        (AffineWithUnsavedState, "after saving and loading"),
    ],
)
def test_module_mutants(broken: type[Affine], message: str) -> None:
    testing.check_module(Affine(), (4, 3))
    with pytest.raises(AssertionError, match=message):
        testing.check_module(broken(), (4, 3))


# -- schedulers ------------------------------------------------------------------------------------


class SchedulerUpsideDown(flows.PressureScheduler):
    def update(self, epoch: int, density: float) -> float:
        return super().update(epoch, 1 - density)


class SchedulerWithoutFloor(flows.PressureScheduler):
    def update(self, epoch: int, density: float) -> float:
        return super().update(epoch, density) - 0.01


class SchedulerThatMisses(flows.PressureScheduler):
    def expected(self, epoch: int) -> float:
        return super().expected(epoch) * 0.9


class SchedulerThatClimbs(flows.PressureScheduler):
    def expected(self, epoch: int) -> float:
        return super().expected(epoch) + (0.5 if epoch == self.epochs // 2 else 0.0)


class SchedulerThatForgets(flows.PressureScheduler):
    def state_dict(self) -> dict[str, int]:
        return super().state_dict() | {"inertia_up": 0, "inertia_down": 0}


class SchedulerThatNeverRelents(flows.PressureScheduler):
    highest = 0.0

    def update(self, epoch: int, density: float) -> float:
        self.highest = max(self.highest, super().update(epoch, density))
        return self.highest


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (SchedulerUpsideDown, "still 0|falls"),
        (SchedulerWithoutFloor, "returns gamma = -"),
        (SchedulerThatMisses, "1 - target_sparsity is 0.02"),
        (SchedulerThatClimbs, "must not rise"),
        (SchedulerThatForgets, "leaves something out"),
        (SchedulerThatNeverRelents, "gamma stays"),
    ],
)
def test_scheduler_mutants(broken: type[flows.PressureScheduler], message: str) -> None:
    testing.check_scheduler(flows.PressureScheduler(0.98, 40))
    with pytest.raises(AssertionError, match=message):
        testing.check_scheduler(broken(0.98, 40))


# -- comparing -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mine", "package", "message"),
    [
        ([1.0, 2.0], [1.0, 2.1], r"at index \(1,\) expected 2.1, found 2"),
        ([1.0, np.nan], [1.0, 2.0], "found nan"),
        ([1.0], [np.inf], "expected inf"),
        ([[1.0]], [1.0], r"shape \(1, 1\) where \(1,\)"),
        (1 + 1j, 1.0, "relative error"),
        ({"a": 1}, {"a": 1, "b": 2}, r"\['a'\] where \['a', 'b'\]"),
        ({"a": 1}, {"a": 2}, "the result, a is wrong"),
        (3, {"a": 2}, "int"),
    ],
)
def test_assert_close_objects(mine: Any, package: Any, message: str) -> None:
    testing.assert_close(package, package)
    testing.assert_close(mine, mine)
    with pytest.raises(AssertionError, match=message):
        testing.assert_close(mine, package)


def test_numerical_gradient(rng: np.random.Generator) -> None:
    x, w = rng.standard_normal((3, 2)), rng.standard_normal((2, 2))
    gradient = testing.numerical_gradient(lambda x, w: x @ w, x, w, wrt=1, cotangent=np.eye(3, 2))
    np.testing.assert_allclose(gradient, x.T @ np.eye(3, 2), rtol=1e-8, atol=1e-9)
    with pytest.raises(TypeError, match="integers"):
        testing.numerical_gradient(lambda x: x.sum(), [1, 2])
