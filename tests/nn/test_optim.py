"""Optimisers: the fast classes against the formulas, and against closed forms."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from minihyperflows import ShapeError, Tensor, nn, optim, testing
from minihyperflows.engine.threads import BLOCK
from minihyperflows.nn.optim import adam_rule, sgd_rule

SGD = [
    {"momentum": 0.0},
    {"momentum": 0.9},
    {"momentum": 0.9, "weight_decay": 5e-4},
    {"momentum": 0.9, "weight_decay": 5e-4, "nesterov": True},
    {"weight_decay": 0.1},
]
ADAM: list[dict[str, Any]] = [
    {},
    {"betas": (0.5, 0.9)},
    {"betas": (0.0, 0.0), "eps": 1e-3},
    {"weight_decay": 0.01},
    {"eps": 1e-3, "weight_decay": 0.1},
]


@pytest.mark.slow
@pytest.mark.parametrize("options", SGD, ids=str)
def test_sgd_follows_its_rule(options: dict[str, Any]) -> None:
    def rule(theta: np.ndarray, gradient: np.ndarray, velocity: Any, step: int) -> Any:
        return sgd_rule(theta, gradient, velocity, lr=0.1, **options)

    testing.check_optimizer(lambda params: optim.SGD(params, lr=0.1, **options), rule)


@pytest.mark.slow
@pytest.mark.parametrize("options", ADAM, ids=str)
def test_adam_follows_its_rule(options: dict[str, Any]) -> None:
    def rule(theta: np.ndarray, gradient: np.ndarray, memory: Any, step: int) -> Any:
        m, v = memory or (np.zeros_like(theta), np.zeros_like(theta))
        theta, m, v = adam_rule(theta, gradient, m, v, step, lr=0.01, **options)
        return theta, (m, v)

    testing.check_optimizer(lambda params: optim.Adam(params, lr=0.01, **options), rule, steps=20)


@pytest.mark.parametrize("size", [BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 5])
def test_blocks_cover_everything(size: int) -> None:
    p = nn.Parameter(np.zeros(size))
    p.grad = np.arange(1.0, size + 1)
    optim.SGD([p], lr=1.0).step()
    np.testing.assert_array_equal(p.data, -np.arange(1.0, size + 1))


def test_a_thousand_steps_of_adam(rng: np.random.Generator) -> None:
    p = nn.Parameter(rng.standard_normal(100))
    theta, m, v = p.data.copy(), np.zeros(100), np.zeros(100)
    optimizer = optim.Adam([p], lr=1e-3)
    for step in range(1, 1001):
        p.grad = rng.standard_normal(100)
        theta, m, v = adam_rule(theta, p.grad, m, v, step, lr=1e-3)
        optimizer.step()
    np.testing.assert_allclose(p.data, theta, rtol=1e-10, atol=1e-12)


# -- closed forms ----------------------------------------------------------------------------------


def test_sgd_with_a_constant_gradient(rng: np.random.Generator) -> None:
    """theta_n = theta_0 - lr g / (1 - mu) (n - mu (1 - mu^n) / (1 - mu))."""
    p, g, lr, mu, n = nn.Parameter(np.ones(3)), np.array([1.0, -2.0, 0.5]), 0.01, 0.9, 200
    optimizer = optim.SGD([p], lr=lr, momentum=mu)
    for _ in range(n):
        p.grad = g.copy()
        optimizer.step()
    expected = 1 - lr * g / (1 - mu) * (n - mu * (1 - mu**n) / (1 - mu))
    np.testing.assert_allclose(p.data, expected, rtol=1e-12)


def test_sgd_on_a_parabola() -> None:
    """L = theta^2 / 2 without momentum: theta_n = (1 - lr)^n theta_0."""
    p = nn.Parameter(np.array([3.0]))
    optimizer = optim.SGD([p], lr=0.1)
    for _ in range(50):
        optimizer.zero_grad()
        ((p * p).sum() / 2).backward()
        optimizer.step()
    np.testing.assert_allclose(p.data, 3 * 0.9**50, rtol=1e-12)


@pytest.mark.parametrize("g", [1e3, 1.0, 1e-6, 1e-8, 1e-10])
def test_adam_with_a_constant_gradient(g: float) -> None:
    """Both bias-corrected moments are exact then: each step is lr g / (g + eps)."""
    p, lr, n = nn.Parameter(np.zeros(2)), 1e-3, 300
    optimizer = optim.Adam([p], lr=lr)
    for _ in range(n):
        p.grad = np.array([g, -g])
        optimizer.step()
    np.testing.assert_allclose(p.data, [-n * lr * g / (g + 1e-8), n * lr * g / (g + 1e-8)])


def test_the_first_step_of_adam_has_length_lr(rng: np.random.Generator) -> None:
    p = nn.Parameter(np.zeros(50))
    p.grad = rng.standard_normal(50) + 3
    optim.Adam([p], lr=0.01).step()
    np.testing.assert_allclose(abs(p.data), 0.01, rtol=1e-6)


# -- behaviour -------------------------------------------------------------------------------------


def test_lr_may_change_between_steps() -> None:
    for optimizer_class in (optim.SGD, optim.Adam):
        p = nn.Parameter(np.zeros(1))
        optimizer = optimizer_class([p], lr=1.0)
        p.grad = np.ones(1)
        optimizer.step()
        optimizer.lr = 0.0
        before = p.data.copy()
        optimizer.step()
        np.testing.assert_array_equal(p.data, before)


def test_numpy_numbers_are_numbers(rng: np.random.Generator) -> None:
    """And do not make a step of float32 one of float64."""
    results = []
    for kind in (float, np.float64, np.float32):
        p = nn.Parameter(np.ones(50, np.float32))
        optimizer = optim.Adam([p], lr=kind(0.125), weight_decay=kind(0.25))
        for g in np.random.default_rng(0).standard_normal((5, 50)).astype(np.float32):
            p.grad, optimizer.lr = g, kind(optimizer.lr / 2)
            optimizer.step()
        results.append(p.data)
        assert p.dtype == optimizer.state[0]["m"].dtype == np.float32
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])


def test_parameters_are_changed_in_place() -> None:
    array = np.ones(3)
    p = nn.Parameter(array)
    p.grad = np.ones(3)
    optim.SGD([p], lr=1.0).step()
    assert p.data is array
    assert not array.any()


@pytest.mark.parametrize("optimizer_class", [optim.SGD, optim.Adam])
def test_parameters_in_unusual_memory(optimizer_class: type, rng: np.random.Generator) -> None:
    start, gradient = rng.standard_normal((2, 4, 6))
    results, holes = [], np.zeros((4, 6, 2))
    holes[..., 0] = start
    for array in (start.copy(), np.asfortranarray(start), holes[..., 0]):
        p = nn.Parameter(array)
        p.grad = np.asfortranarray(gradient)
        optimizer = optimizer_class([p], lr=0.1)
        for _ in range(3):
            optimizer.step()
        results.append(p.data)
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])


def test_numbers_stay_numbers() -> None:
    p = nn.Parameter(np.array(2.0))
    p.grad = np.array(0.5)
    optim.Adam([p], lr=0.1).step()
    assert p.shape == ()


def test_a_parameter_that_starts_late_counts_its_own_steps() -> None:
    """The bias correction belongs to a parameter's own steps, as in PyTorch."""
    early, late = nn.Parameter(np.zeros(1)), nn.Parameter(np.zeros(1))
    optimizer = optim.Adam([early, late], lr=0.1)
    for step in range(10):
        early.grad = np.ones(1)
        late.grad = np.ones(1) if step == 9 else None
        optimizer.step()
    np.testing.assert_allclose(late.data, [-0.1], rtol=1e-6)
    np.testing.assert_allclose(early.data, [-1.0], rtol=1e-6)


# -- saving and loading ----------------------------------------------------------------------------


def trained(rng: np.random.Generator) -> tuple[optim.Adam, list[nn.Parameter]]:
    params = [nn.Parameter(rng.standard_normal((3, 2))), nn.Parameter(rng.standard_normal(4))]
    params.append(nn.Parameter(np.ones(2)))  # never gets a gradient
    optimizer = optim.Adam(params, lr=0.1)
    for _ in range(3):
        for p in params[:2]:
            p.grad = rng.standard_normal(p.shape)
        optimizer.step()
    return optimizer, params


def test_state_is_a_copy(rng: np.random.Generator) -> None:
    optimizer, params = trained(rng)
    state = optimizer.state_dict()
    assert list(state) == ["0.step", "0.m", "0.v", "1.step", "1.m", "1.v", "2.step"]
    before = {k: v.copy() for k, v in state.items()}
    fresh = optim.Adam(params, lr=0.1)
    fresh.load_state_dict(state)
    for steps in (optimizer, fresh):
        params[0].grad = np.ones((3, 2))
        steps.step()
    for name in state:
        np.testing.assert_array_equal(state[name], before[name])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"0.m": None}, KeyError, r"0\.m missing or unknown"),
        ({"0.step": None}, KeyError, r"0\.step"),
        ({"3.m": np.ones(2)}, KeyError, r"3\.m"),
        ({"0.m": np.ones((2, 3))}, ShapeError, r"0\.m has shape \(2, 3\) where \(3, 2\) is needed"),
        ({"0.velocity": np.ones((3, 2))}, KeyError, r"0\.velocity"),
    ],
)
def test_a_wrong_state_is_refused_and_changes_nothing(
    change: dict[str, Any], error: type[Exception], message: str, rng: np.random.Generator
) -> None:
    optimizer, _ = trained(rng)
    before = optimizer.state_dict()
    wrong = {k: v for k, v in (optimizer.state_dict() | change).items() if v is not None}
    with pytest.raises(error, match=message):
        optimizer.load_state_dict(wrong)
    for name, value in optimizer.state_dict().items():
        np.testing.assert_array_equal(value, before[name])


def holding(p: nn.Parameter) -> nn.Module:
    net = nn.Sequential(nn.ReLU())  # which can be indexed, as a list can
    net.p = p
    return net


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda p: optim.SGD([], lr=0.1), ValueError, "at least one parameter"),
        (lambda p: optim.SGD([p, p], lr=0.1), ValueError, "listed twice"),
        (lambda p: optim.SGD({"p": p}, lr=0.1), TypeError, r"named_parameters\(\)\.values\(\)"),
        (lambda p: optim.SGD([Tensor(np.ones(2))], lr=0.1), TypeError, "nn.Parameter objects only"),
        (lambda p: optim.SGD([p], lr=-0.1), ValueError, r"lr \(-0\.1\)"),
        (lambda p: optim.Adam([p], lr=float("nan")), ValueError, r"lr \(nan\)"),
        (lambda p: optim.SGD([p], lr=0.1, weight_decay=-1), ValueError, r"weight_decay \(-1\)"),
        (lambda p: optim.SGD([p], lr=0.1, nesterov=True), ValueError, "nesterov needs a momentum"),
        (lambda p: optim.Adam([p], lr=0.1, betas=(1.0, 0.9)), ValueError, r"in \[0, 1\), not"),
        (lambda p: optim.Adam([p], lr=0.1, betas=(0.9,)), ValueError, "betas are two numbers"),
        (lambda p: optim.Adam([p], lr=0.1, betas=0.9), ValueError, "betas are two numbers"),
        (lambda p: optim.Adam([p], lr=0.1, eps=-1e-8), ValueError, "eps must not be negative"),
        (
            lambda p: optim.SGD([p], lr=0.1, momentum=1.0),
            ValueError,
            r"momentum must lie in \[0, 1",
        ),
        (lambda p: optim.SGD([p], lr=0.1, momentum=float("nan")), ValueError, "must be finite"),
        (lambda p: optim.SGD([p], lr=float("inf")), ValueError, r"lr \(inf\) must be finite"),
        (lambda p: optim.Adam([p], lr="1e-3"), TypeError, "lr must be a number, not '1e-3'"),
        (lambda p: optim.Adam(p, lr=0.1), TypeError, "a list of parameters, not one Parameter"),
        (lambda p: optim.Adam(None, lr=0.1), TypeError, "a list of parameters"),
        (lambda p: optim.Adam(holding(p), lr=0.1), TypeError, r"net\.parameters\(\), not the net"),
    ],
)
def test_misuse(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make(nn.Parameter(np.ones(2)))


# -- against PyTorch -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options"),
    [*(("SGD", options) for options in SGD), *(("Adam", options) for options in ADAM)],
    ids=str,
)
def test_pytorch_agrees(name: str, options: dict[str, Any], rng: np.random.Generator) -> None:
    torch = pytest.importorskip("torch")
    starts = [rng.standard_normal(5), rng.standard_normal((3, 2))]
    mine = [nn.Parameter(a.copy()) for a in starts]
    theirs = [torch.nn.Parameter(torch.tensor(a)) for a in starts]
    optimizers = [
        getattr(optim, name)(mine, lr=0.05, **options),
        getattr(torch.optim, name)(theirs, lr=0.05, **options),
    ]
    for step in range(30):
        for i, (p, q) in enumerate(zip(mine, theirs, strict=True)):
            gradient = rng.standard_normal(p.shape)
            absent = i == 1 and step % 3 == 0  # now and then no gradient
            p.grad, q.grad = (None, None) if absent else (gradient, torch.tensor(gradient))
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip(mine, theirs, strict=True):
        np.testing.assert_allclose(p.data, q.detach().numpy(), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("optimizer", [optim.Adam, lambda p, lr: optim.SGD(p, lr, momentum=0.9)])
def test_moments_without_gradients_do_not_become_subnormal(optimizer):
    """Arithmetic on subnormal numbers is many times slower, and pruned weights make thousands."""
    p = nn.Parameter(np.ones(1000, np.float32))
    one = optimizer([p], lr=1e-3)
    p.grad = np.linspace(-1, 1, 1000, dtype=np.float32)
    one.step()
    p.grad = np.zeros(1000, np.float32)
    tiny = np.finfo(np.float32).tiny
    for _ in range(1500):
        one.step()
        for name, array in one.state_dict().items():
            small = np.abs(array[(array != 0) & (np.abs(array) < tiny)]) if array.ndim else ()
            assert len(small) == 0, f"{name} has {len(small)} subnormal entries"


HALF_RULES = {"sgd": SGD[3], "adam": {}, "adam, weight decay": {"weight_decay": 0.01}}


@pytest.mark.parametrize("name", HALF_RULES)
def test_half_precision_is_stepped_in_float32(name: str, rng: np.random.Generator) -> None:
    """As in float64, and then rounded, also where squares of gradients are zero in float16."""
    step = optim.SGD if name == "sgd" else optim.Adam
    start, lr = rng.standard_normal(300).astype(np.float16), 0.01
    p, exact = nn.Parameter(start.copy()), nn.Parameter(start.astype(float))
    mine, reference = (step([q], lr=lr, **HALF_RULES[name]) for q in (p, exact))
    for _ in range(5):
        exact.data[...] = p.data  # so that one rounding is all that differs
        p.grad = (10.0 ** rng.uniform(-7, 1, 300) * rng.choice([-1, 1], 300)).astype(np.float16)
        exact.grad = p.grad.astype(float)
        mine.step()
        reference.step()
        assert p.dtype == np.float16
        moved = lr * (1 + abs(exact.grad))
        limit = 0.51 * np.finfo(np.float16).eps * abs(exact.data) + 1e-4 * moved + 6e-8
        assert (abs(p.data - exact.data) <= limit).all()


def test_adam_in_half_precision_stands_still_without_a_gradient() -> None:
    """Its eps of 1e-8 is zero in float16: 0 / 0 gave NaN."""
    p = nn.Parameter(np.ones(4, np.float16))
    one = optim.Adam([p], lr=1e-3)
    p.grad = np.zeros(4, np.float16)
    one.step()
    np.testing.assert_array_equal(p.data, np.ones(4, np.float16))


def test_half_precision_continues_from_its_state(rng: np.random.Generator) -> None:
    p = nn.Parameter(np.ones(9, np.float16))
    one = optim.Adam([p], lr=1e-2)
    p.grad = (1e-4 * rng.standard_normal(9)).astype(np.float16)
    one.step()
    q = nn.Parameter(p.data.copy())
    two = optim.Adam([q], lr=1e-2)
    two.load_state_dict(one.state_dict())
    q.grad = p.grad
    one.step()
    two.step()
    np.testing.assert_array_equal(p.data, q.data)
    assert {a.dtype for a in one.state[0].values()} == {np.dtype(np.float32)}
