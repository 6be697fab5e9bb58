"""The recorded graph: order, sums, memory, and the ways to break it."""

from __future__ import annotations

import gc
import threading
import tracemalloc
import weakref
from typing import Any

import numpy as np
import pytest

import minihyperflows as mh
from minihyperflows import functional as F
from minihyperflows.engine import ops
from minihyperflows.engine.graph import is_recording, reverse_topological_order


def leaf(*shape: int, dtype: Any = np.float64) -> mh.Tensor:
    values = np.random.default_rng(1).standard_normal(shape).astype(dtype)
    return mh.Tensor(values, requires_grad=True)


def chain(x: mh.Tensor, length: int) -> mh.Tensor:
    for i in range(length):
        x = x + 1.0 if i % 2 else -x
    return x


# -- order and sums --------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_chain_of_20000_operations() -> None:
    x = leaf(2)
    chain(x, 20_000).backward(np.array([1.0, 2.0]))
    np.testing.assert_array_equal(x.grad, [1.0, 2.0])  # 10,000 negations


@pytest.mark.slow
def test_a_long_chain_is_deallocated_without_backward() -> None:
    x = leaf(2)
    y = chain(x, 100_000)
    first = weakref.ref(y.creator.inputs[0].creator)
    del y
    gc.collect()
    assert first() is None
    assert x.grad is None


def test_diamonds_sum_over_all_paths() -> None:
    x = mh.Tensor(3.0, requires_grad=True)
    y = x
    for _ in range(60):  # 2^60 paths: visited one by one they would take for ever
        y = y + y
    y.backward()
    assert x.grad == 2.0**60


def test_every_function_runs_once_and_after_its_consumers() -> None:
    x = leaf(2)
    a = x.exp()
    b, c = a * 2, a + x
    d = b * c + a
    order = reverse_topological_order(d.creator)
    assert len(order) == len(set(order)) == 5
    position = {function: i for i, function in enumerate(order)}
    for function in order:
        assert all(position[parent] > position[function] for parent in function.parents())


def test_shared_subexpressions() -> None:
    x = mh.Tensor(2.0, requires_grad=True)
    s = x * x
    (s * s + s).backward()  # x^4 + x^2
    assert x.grad == 4 * 2**3 + 2 * 2


def test_the_same_tensor_twice_in_one_operation() -> None:
    x = leaf(3, 3)
    (x @ x + x * x).sum().backward()
    ones = np.ones((3, 3))
    np.testing.assert_allclose(x.grad, ones @ x.data.T + x.data.T @ ones + 2 * x.data)


def test_broadcasting_sums_over_the_uses() -> None:
    row, column, number = leaf(1, 3), leaf(2, 1), leaf()
    (row * column * number).sum().backward()
    np.testing.assert_allclose(row.grad, np.full((1, 3), column.data.sum() * number.item()))
    np.testing.assert_allclose(column.grad, np.full((2, 1), row.data.sum() * number.item()))
    np.testing.assert_allclose(number.grad, row.data.sum() * column.data.sum())


def test_two_backwards_add_up() -> None:
    x = leaf(3)
    (x * 2).sum().backward()
    (x * 3).sum().backward()
    np.testing.assert_array_equal(x.grad, [5, 5, 5])
    x.grad = None
    (x * 4).sum().backward()
    np.testing.assert_array_equal(x.grad, [4, 4, 4])


def test_backward_of_a_leaf() -> None:
    x = leaf(3, dtype=np.float32)
    cotangent = np.ones(3)
    x.backward(cotangent)
    x.backward(mh.Tensor(cotangent))
    np.testing.assert_array_equal(x.grad, [2, 2, 2])
    assert x.grad.dtype == np.float32
    assert not np.shares_memory(x.grad, cotangent)


def test_inputs_that_need_no_gradient_get_none() -> None:
    x, constant = leaf(3), mh.Tensor(np.ones(3))
    (x * constant).sum().backward()
    assert constant.grad is None
    assert not (constant * 2).requires_grad
    assert (constant * 2).creator is None


# -- memory ----------------------------------------------------------------------------------------


def test_gradients_own_their_memory() -> None:
    """No two leaves, and no leaf and the cotangent, share memory: in-place changes stay local."""
    a, b, c, d = leaf(3), leaf(3), leaf(3), leaf(1, 3)
    cotangent = np.ones(3)
    (a + b + (c + d.reshape(3))).backward(cotangent)
    gradients = [x.grad for x in (a, b, c, d)]
    for i, g in enumerate(gradients):
        assert g.flags.owndata
        assert g.flags.writeable
        assert not np.shares_memory(g, cotangent)
        assert not any(np.shares_memory(g, other) for other in gradients[i + 1 :])
    gradients[0] *= 100
    np.testing.assert_array_equal(gradients[1], [1, 1, 1])


def test_gradients_of_views_are_whole_arrays() -> None:
    x = leaf(4, 3)
    x.T.sum().backward()  # the gradient of a sum is a read-only view of one number
    assert x.grad.flags.owndata
    x.grad += 1
    np.testing.assert_array_equal(x.grad, np.full((4, 3), 2.0))


def test_an_accumulated_gradient_does_not_change_the_first_one() -> None:
    x = leaf(3)
    (x * 2).sum().backward()
    first = x.grad
    (x * 3).sum().backward()
    np.testing.assert_array_equal(first, [2, 2, 2])


def test_the_cotangent_is_not_changed() -> None:
    x, cotangent = leaf(3), np.arange(3.0)
    (x * x + x).backward(cotangent)
    np.testing.assert_array_equal(cotangent, [0, 1, 2])


def test_the_graph_is_freed_by_backward() -> None:
    x = leaf(100)
    hidden = x.exp()
    alive = weakref.ref(hidden.data)
    loss = (hidden * 2).sum()
    del hidden
    assert alive() is not None
    loss.backward()
    assert alive() is None
    assert loss.creator.inputs == ()


def test_memory_returns_to_where_it_was() -> None:
    x = leaf(1000, 100)  # 0.8 MB each
    (x * 2).exp().sum().backward()
    x.grad = None
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        loss = x
        for _ in range(20):
            loss = F.tanh(loss * 0.5)
        loss = loss.sum()
        loss.backward()
        after = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert after - before < 1.1 * x.data.nbytes  # the gradient and nothing else


def test_no_reference_cycles() -> None:
    """What is dropped is gone at once, without waiting for the garbage collector."""
    gc.disable()
    try:
        x = leaf(10)
        y = (x.exp() * x).sum()
        alive = weakref.ref(y.creator)
        del y
        assert alive() is None
    finally:
        gc.enable()


# -- what is recorded ------------------------------------------------------------------------------


def test_no_grad_records_nothing() -> None:
    x = leaf(3)
    with mh.no_grad():
        y = x * 2
        with mh.no_grad():
            pass
        assert not is_recording()
        z = x * 3
    assert is_recording()
    assert not any(t.requires_grad or t.creator for t in (y, z))
    assert (x * 2).requires_grad


def test_no_grad_ends_with_an_exception_and_decorates() -> None:
    with pytest.raises(KeyError), mh.no_grad():
        raise KeyError
    assert is_recording()

    @mh.no_grad()
    def evaluate(depth: int) -> bool:
        return is_recording() or (depth > 0 and evaluate(depth - 1))

    assert not evaluate(3)
    assert is_recording()


def test_no_grad_holds_for_its_own_thread() -> None:
    seen = {}

    def work() -> None:
        seen["before"] = is_recording()
        with mh.no_grad():
            barrier.wait()
            seen["inside"] = is_recording()
            barrier.wait()

    barrier = threading.Barrier(2, timeout=60)
    with mh.no_grad():
        thread = threading.Thread(target=work)
        thread.start()
        barrier.wait()
        assert not is_recording()
    assert is_recording()
    barrier.wait()
    thread.join()
    assert seen == {"before": True, "inside": False}


def test_threads_build_their_own_graphs() -> None:
    leaves = [leaf(50) for _ in range(4)]

    def work(x: mh.Tensor) -> None:
        for _ in range(50):
            (x.exp() * x).sum().backward()

    threads = [threading.Thread(target=work, args=(x,)) for x in leaves]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for x in leaves:
        np.testing.assert_allclose(x.grad, 50 * (1 + x.data) * np.exp(x.data))


def test_detach_cuts() -> None:
    x = leaf(3)
    y = (x * 2).detach()
    assert not y.requires_grad
    (x * y).sum().backward()
    np.testing.assert_array_equal(x.grad, y.data)


def test_changing_the_data_afterwards_starts_a_new_leaf_value() -> None:
    x = leaf(3)
    x.data = np.ones(3)
    (x * x).sum().backward()
    np.testing.assert_array_equal(x.grad, [2, 2, 2])


# -- misuse ----------------------------------------------------------------------------------------


def test_backward_needs_something_to_differentiate() -> None:
    with pytest.raises(mh.GraphError, match="depends on nothing with requires_grad=True"):
        mh.Tensor(np.ones(())).backward()
    x = leaf()
    with mh.no_grad():
        y = x * 2
    with pytest.raises(mh.GraphError, match="computed under no_grad"):
        y.backward()


def test_backward_of_a_non_scalar_needs_a_cotangent() -> None:
    with pytest.raises(mh.GraphError, match=r"shape \(2, 3\) needs a cotangent of that shape"):
        (leaf(2, 3) * 2).backward()
    with pytest.raises(mh.ShapeError, match=r"cotangent of shape \(3,\) for .* of shape \(2, 3\)"):
        (leaf(2, 3) * 2).backward(np.ones(3))
    with pytest.raises(mh.ShapeError, match=r"cotangent of shape \(\)"):
        (leaf(2, 3) * 2).backward(1.0)
    x = leaf(1, 1)
    (x * 2).backward()  # one element is a scalar, whatever its shape
    np.testing.assert_array_equal(x.grad, [[2]])


@pytest.mark.parametrize(
    "cotangent", [[1, 2, 3], np.array([1, 2, 3]), np.array([1, 2, 3], np.float64), (1.0, 2.0, 3.0)]
)
def test_cotangents_of_any_kind(cotangent: Any) -> None:
    x = leaf(3, dtype=np.float32)
    (x * 2).backward(cotangent)
    np.testing.assert_array_equal(x.grad, [2, 4, 6])
    assert x.grad.dtype == np.float32


def test_a_second_backward_is_refused() -> None:
    x = leaf(3)
    loss = (x * 2).sum()
    loss.backward()
    with pytest.raises(mh.GraphError, match="freed by an earlier backward: run the forward pass"):
        loss.backward()
    np.testing.assert_array_equal(x.grad, [2, 2, 2])


def test_a_partly_freed_graph_is_refused_and_changes_nothing() -> None:
    x, y = leaf(3), leaf(3)
    shared = x * 2
    first, second = shared.sum(), (shared * y).sum()
    first.backward()
    with pytest.raises(mh.GraphError, match="freed"):
        second.backward()
    np.testing.assert_array_equal(x.grad, [2, 2, 2])
    assert y.grad is None
    with pytest.raises(mh.GraphError, match="freed"):
        (shared + y).sum().backward()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_loss_that_is_not_finite_is_refused(value: float) -> None:
    x = leaf()
    loss = x * value
    with pytest.raises(mh.NonFiniteLossError, match=f"the loss is {value}"):
        loss.backward()
    assert x.grad is None


def test_a_function_is_applied_once() -> None:
    function = ops.Exp()
    y = mh.apply(function, leaf(2))
    with pytest.raises(mh.GraphError, match="this Exp was applied already: make a new one"):
        mh.apply(function, leaf(2))
    y.sum().backward()
    with pytest.raises(mh.GraphError, match="this Exp was applied already"):
        mh.apply(function, leaf(2))


class Broken(mh.Function):
    """y = a + b with a backward that returns whatever it is told to."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def forward(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return a + b

    def backward(self, cotangent: np.ndarray) -> Any:
        return self.answer


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (np.ones(3), mh.GraphError, r"Broken.backward returned 1 gradients for 2 inputs"),
        ((np.ones(3),) * 3, mh.GraphError, "returned 3 gradients for 2 inputs"),
        ((np.ones(3), None), mh.GraphError, "returned no gradient where input 1 needs an array"),
        ((np.ones(3), 1.0), mh.GraphError, "returned a float where input 1 needs an array"),
        ((np.ones(3), np.ones(2)), mh.ShapeError, r"shape \(2,\) for input 1 of shape \(3,\)"),
        ([np.ones(3), np.ones(3)], mh.GraphError, "returned 1 gradients for 2 inputs"),
    ],
)
def test_a_wrong_backward_is_named(answer: Any, error: type[Exception], message: str) -> None:
    y = mh.apply(Broken(answer), leaf(3), leaf(3))
    with pytest.raises(error, match=message):
        y.sum().backward()


def test_a_function_without_forward_or_backward_says_so() -> None:
    class Half(mh.Function):
        def forward(self, x: np.ndarray) -> np.ndarray:
            return x / 2

    with pytest.raises(NotImplementedError, match="Half has no backward"):
        mh.apply(Half(), leaf(2)).sum().backward()
    with pytest.raises(NotImplementedError, match="Function has no forward"):
        mh.apply(mh.Function(), leaf(2))


def test_a_failed_forward_leaves_no_trace() -> None:
    x = leaf(2, 3)
    with pytest.raises(mh.ShapeError):
        F.linear(x, leaf(4, 5))
    x.sum().backward()
    np.testing.assert_array_equal(x.grad, np.ones((2, 3)))


# -- complex numbers -------------------------------------------------------------------------------


def test_the_complex_step_gives_second_derivatives() -> None:
    """H v = Im g(x + i h v) / h, to rounding, through a whole small network."""
    rng = np.random.default_rng(0)
    x, labels = rng.standard_normal((5, 4)), rng.integers(0, 3, 5)
    weight, v = rng.standard_normal((2, 3, 4))

    def gradient(array: np.ndarray) -> np.ndarray:
        w = mh.Tensor(array, requires_grad=True)
        F.cross_entropy(F.tanh(F.linear(mh.Tensor(x), w)), labels).backward()
        return w.grad

    exact = gradient(weight + 1e-20j * v).imag / 1e-20
    difference = (gradient(weight + 1e-5 * v) - gradient(weight - 1e-5 * v)) / 2e-5
    np.testing.assert_allclose(exact, difference, rtol=1e-7, atol=1e-9)


def test_a_real_leaf_in_a_complex_graph_has_a_complex_gradient() -> None:
    x, w = leaf(3), mh.Tensor(np.array([1j, 2j, 3j]), requires_grad=True)
    (x * w).sum().backward()
    np.testing.assert_array_equal(x.grad, w.data)


def test_real_and_complex_losses_add() -> None:
    logits, w = leaf(2, 3), mh.Tensor(np.array(1 + 1e-20j), requires_grad=True)
    (F.cross_entropy(logits, [0, 1]) + w * w).backward()
    assert w.grad == 2 * w.data
    assert logits.grad.shape == (2, 3)
