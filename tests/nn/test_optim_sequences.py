"""Random trainings by the optimisers, against their formulas, PyTorch, and themselves unflushed.

``HYPOTHESIS_PROFILE=large`` tries many more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minihyperflows import nn, optim
from minihyperflows.nn.optim import FLUSH_EVERY, adam_rule, flush_decayed, sgd_rule

FEWER = settings(max_examples=settings().max_examples // 5)  # a case has hundreds of steps
SHAPE = (5, 3)
DECAYS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 0.99, 0.999)
DTYPES = (np.float16, np.float32, np.float64)


def decays() -> st.SearchStrategy[float]:
    return st.sampled_from(DECAYS) | st.floats(0.0, 0.999)


@dataclass
class Training:
    """An optimiser with its options; gradients and learning rates of every step come of a seed."""

    name: str
    options: dict[str, Any]
    dtype: type
    steps: int
    scale: float  # of the gradients
    largest: float  # of the learning rates
    at_zero: bool  # where the parameter starts
    seed: int

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        self.start = (rng.standard_normal(SHAPE) * (not self.at_zero)).astype(self.dtype)
        self.gradients: list[np.ndarray | None] = []
        kind = "normal"
        for _ in range(self.steps):
            if rng.random() < 0.05:  # gradients come and go
                kind = str(rng.choice(["normal", "constant", "zero", "none"]))
            constant = {"constant": np.ones(SHAPE), "zero": np.zeros(SHAPE)}
            g = constant[kind] if kind in constant else rng.standard_normal(SHAPE)
            self.gradients.append(None if kind == "none" else (g * self.scale).astype(self.dtype))
        self.lrs = [self.largest * float(f) for f in rng.choice([1, 1, 0.1, 0], self.steps)]

    def optimizer(self, p: nn.Parameter) -> optim.Optimizer:
        return getattr(optim, self.name)([p], lr=1.0, **self.options)


@st.composite
def trainings(draw: st.DrawFn, dtypes: tuple[type, ...] = DTYPES) -> Training:
    name, dtype = draw(st.sampled_from(["SGD", "Adam"])), draw(st.sampled_from(dtypes))
    options: dict[str, Any] = {}
    if name == "SGD":
        options["momentum"] = draw(decays())
        options["nesterov"] = options["momentum"] > 0 and draw(st.booleans())
        options["weight_decay"] = draw(st.sampled_from([0.0, 1e-3, 0.1]))
    else:
        b1, b2 = draw(decays()), draw(decays())
        if dtype is np.float16:  # with zero gradients m / sqrt(v) would grow beyond its numbers
            b1 = min(b1, b2)
        options["betas"] = b1, b2
        options["eps"] = draw(st.sampled_from([1e-8, 1e-3, 1e-12]))
        # Where the parameter itself is the gradient, Adam with a small eps steps along its sign.
        options["weight_decay"] = draw(st.sampled_from([0.0, 1e-3])) * (options["eps"] == 1e-3)
    return Training(
        name,
        options,
        dtype,
        steps=draw(st.integers(3 * FLUSH_EVERY + 1, 4 * FLUSH_EVERY)),
        scale=10.0 ** draw(st.integers(*((-3, 0) if dtype is np.float16 else (-9, 2)))),
        largest=10.0 ** draw(st.integers(-4, -1)),
        at_zero=draw(st.booleans()),
        seed=draw(st.integers(0, 2**32)),
    )


def run(training: Training) -> np.ndarray:
    """The parameter after every step, (steps, ...)."""
    p = nn.Parameter(training.start.copy())
    optimizer, path = training.optimizer(p), []
    for p.grad, optimizer.lr in zip(training.gradients, training.lrs, strict=True):
        optimizer.step()
        path.append(p.data.copy())
    return np.stack(path)


def by_rule(training: Training) -> np.ndarray:
    """The same by the plain functions, in float64."""
    theta, options = training.start.astype(np.float64), training.options
    velocity, m, v, step, path = None, np.zeros(SHAPE), np.zeros(SHAPE), 0, []
    for gradient, lr in zip(training.gradients, training.lrs, strict=True):
        if gradient is not None:
            step, g = step + 1, gradient.astype(np.float64)
            if training.name == "SGD":
                theta, velocity = sgd_rule(theta, g, velocity, lr, **options)
            else:
                theta, m, v = adam_rule(theta, g, m, v, step, lr, **options)
            theta = theta.astype(training.dtype).astype(np.float64)  # rounded once a step
        path.append(theta)
    return np.stack(path)


def scale_of(training: Training, path: np.ndarray) -> float:
    """How large the numbers are that are added up: parameters, and steps without cancellation."""
    sgd = training.name == "SGD"
    inertia = training.options["momentum"] if sgd else training.options["betas"][0]
    step = training.scale if sgd else 1.0
    return float(abs(path).max() + sum(training.lrs) * step / (1 - inertia))


@FEWER
@given(trainings())
def test_they_follow_their_formulas(training: Training) -> None:
    mine, reference = run(training), by_rule(training)
    assert mine.dtype == training.dtype
    assert np.isfinite(mine).all()
    round_off = {2: 2e-2, 4: 1e-5, 8: 1e-12}[mine.dtype.itemsize]
    np.testing.assert_allclose(mine, reference, rtol=0, atol=round_off * scale_of(training, mine))


@pytest.mark.slow
@FEWER
@given(trainings())
def test_flushing_changes_nothing_above_round_off(training: Training) -> None:
    flushed = run(training)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("minihyperflows.nn.optim.flush_decayed", lambda *_: None)
        never = run(training)
    path = flushed.astype(np.float64)
    atol = np.finfo(flushed.dtype).eps / 2 * scale_of(training, path)
    np.testing.assert_allclose(path, never.astype(np.float64), rtol=0, atol=atol)


@pytest.mark.slow
@FEWER
@given(trainings(dtypes=(np.float32, np.float64)))
def test_pytorch_agrees(training: Training) -> None:
    torch = pytest.importorskip("torch")
    p = torch.nn.Parameter(torch.tensor(training.start))
    theirs = getattr(torch.optim, training.name)([p], lr=1.0, **training.options)
    path = []
    for gradient, lr in zip(training.gradients, training.lrs, strict=True):
        p.grad = None if gradient is None else torch.tensor(gradient)
        theirs.param_groups[0]["lr"] = lr
        theirs.step()
        path.append(p.detach().numpy().copy())
    mine = run(training)
    round_off = {4: 2e-5, 8: 1e-12}[mine.dtype.itemsize]
    np.testing.assert_allclose(
        mine, np.stack(path), rtol=0, atol=round_off * scale_of(training, mine)
    )


@pytest.mark.slow
@FEWER
@given(trainings(), st.integers(1, 3 * FLUSH_EVERY))
def test_a_training_goes_on_where_it_was_saved(training: Training, at: int) -> None:
    whole = run(training)
    first, second = (nn.Parameter(training.start.copy()) for _ in range(2))
    before, after = training.optimizer(first), training.optimizer(second)
    steps = list(zip(training.gradients, training.lrs, strict=True))
    for first.grad, before.lr in steps[:at]:
        before.step()
    second.data = first.data.copy()
    after.load_state_dict(before.state_dict())
    for second.grad, after.lr in steps[at:]:
        after.step()
    np.testing.assert_array_equal(second.data, whole[-1])


# -- the flush, by itself --------------------------------------------------------------------------


def test_momentum_that_is_alive_is_not_erased() -> None:
    """g = 1 and lr = 1 for n steps: theta = -(n - mu (1 - mu^n) / (1 - mu)) / (1 - mu)."""
    for mu in DECAYS:
        p = nn.Parameter(np.zeros(1, np.float32))
        optimizer = optim.SGD([p], lr=1, momentum=mu)
        for n in range(1, 2 * FLUSH_EVERY + 2):
            p.grad = np.ones(1, np.float32)
            optimizer.step()
            exact = -(n - mu * (1 - mu**n) / (1 - mu)) / (1 - mu)
            np.testing.assert_allclose(p.data, exact, rtol=2e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("decay", DECAYS[1:])
def test_no_number_stays_subnormal(decay: float, dtype: Any) -> None:
    kept = np.float32 if dtype is np.float16 else dtype
    tiny = float(np.finfo(kept).tiny)
    for optimizer_class, options in (
        (optim.SGD, {"momentum": decay}),
        (optim.Adam, {"betas": (decay, decay)}),
    ):
        p = nn.Parameter(np.ones(400, dtype))
        optimizer = optimizer_class([p], lr=1e-3, **options)
        p.grad = np.zeros(400, dtype)
        optimizer.step()
        for array in optimizer.state[0].values():
            array[...] = tiny * np.logspace(-6, 4, 400)  # subnormal at first
        for step in range(2, 4 * FLUSH_EVERY + 1):
            optimizer.step()
            for name, array in optimizer.state[0].items():
                subnormal = (array != 0) & (abs(array) < tiny)
                if step % FLUSH_EVERY == 0 or (decay >= 0.9 and step > FLUSH_EVERY):
                    assert not subnormal.any(), f"{name} after {step} steps"


@pytest.mark.parametrize("decay", [1e-300, 1e-9, 0.05, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_only_what_is_next_to_nothing_is_erased(decay: float, dtype: Any) -> None:
    tiny = np.finfo(dtype).tiny
    array = np.array([0.5 * tiny, 1e5 * tiny, -1e5 * tiny, 1, np.inf, np.nan], dtype)
    expected = array.copy()
    expected[0] = 0
    flush_decayed(array, decay)
    np.testing.assert_array_equal(array, expected)


def test_without_an_eps_nothing_is_erased_that_a_step_is_divided_by() -> None:
    """g = 1e-20: in float32 v is about 1e-40, subnormal, and each step has length lr."""
    p = nn.Parameter(np.zeros(1, np.float32))
    optimizer = optim.Adam([p], lr=0.1, betas=(0.9, 0.9), eps=0.0)
    for _ in range(3 * FLUSH_EVERY):
        p.grad = np.full(1, 1e-20, np.float32)
        optimizer.step()
    np.testing.assert_allclose(p.data, -0.1 * 3 * FLUSH_EVERY, rtol=1e-2)


def test_half_precision_without_a_gradient_stays_where_it_is() -> None:
    p = nn.Parameter(np.array([1.0, 0.0], np.float16))
    optimizer = optim.Adam([p], lr=0.1)
    for gradient in ([0.0, 0.0], [1e-4, 0.0]):  # 1e-4 squared is 0 in half precision
        p.grad = np.array(gradient, np.float16)
        optimizer.step()
    assert optimizer.state[0]["v"].dtype == np.float32
    assert p.dtype == np.float16
    assert p.data[1] == 0
    assert p.data[0] == np.float16(1 - 0.1 * 0.1 / 0.19 / (0.001 / 0.001999) ** 0.5)
