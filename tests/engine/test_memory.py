"""Large arrays in memory that was used before: never one that somebody still sees."""

import gc

import numpy as np
import pytest

from minihyperflows import Tensor, models
from minihyperflows import functional as F
from minihyperflows.engine import memory
from minihyperflows.engine.memory import LEAST, LIFETIME, Pool, empty

SHAPE = (LEAST // 8, 2)  # float32


@pytest.fixture(autouse=True)
def _fresh_pool(monkeypatch):
    monkeypatch.setattr(memory, "_pool", Pool())


def address(array):
    return array.__array_interface__["data"][0]


def test_memory_is_used_again_once_nobody_refers_to_it():
    first = empty(np, SHAPE, np.float32)
    assert first.shape == SHAPE
    assert first.dtype == np.float32
    place = address(first)
    assert address(empty(np, SHAPE, np.float32)) != place  # in use
    del first
    assert address(empty(np, SHAPE, np.float32)) == place
    assert address(empty(np, SHAPE[::-1], np.int32)) == place  # as many bytes


@pytest.mark.slow
@pytest.mark.parametrize(
    "look",
    [
        lambda a: a[3:5],
        lambda a: a.reshape(2, -1).T,
        lambda a: a.view(np.uint8)[::2],
        memoryview,
        lambda a: np.asarray(memoryview(a)),
        lambda a: [a],
        lambda a: Tensor(a).detach(),
    ],
)
def test_whatever_looks_at_an_array_keeps_it(look):
    array = empty(np, SHAPE, np.float32)
    array[...] = 1
    view = look(array)
    del array
    gc.collect()
    other = empty(np, SHAPE, np.float32)
    other[...] = 2
    seen = view[0] if isinstance(view, list) else view.data if isinstance(view, Tensor) else view
    assert not np.shares_memory(np.asarray(seen), other)


def test_small_arrays_are_ordinary():
    assert empty(np, (3, 2), np.float64).base is None


def test_what_lies_idle_is_given_back():
    pool = Pool()
    pool.buffer(LEAST)
    for _ in range(2 * LIFETIME):
        pool.buffer(2 * LEAST)
    assert list(pool._buffers) == [2 * LEAST]
    pool.clear()
    assert not pool._buffers


def test_a_second_step_makes_no_new_large_arrays():
    rng = np.random.default_rng(0)
    net = models.vgg19(width=0.25, rng=rng)
    x, y = rng.standard_normal((16, 32, 32, 3)).astype(np.float32), rng.integers(0, 10, 16)

    def step():
        F.cross_entropy(net(Tensor(x)), y).backward()
        net.zero_grad()

    step()
    before = sum(map(len, memory._pool._buffers.values()))
    step()
    assert before > 10
    assert sum(map(len, memory._pool._buffers.values())) == before


def test_results_and_gradients_keep_their_values_through_later_steps():
    rng = np.random.default_rng(0)
    x = Tensor(rng.standard_normal((8, 32, 32, 16)).astype(np.float32), requires_grad=True)
    w = Tensor(rng.standard_normal((16, 3, 3, 16)).astype(np.float32), requires_grad=True)
    y = F.conv2d(x, w, padding=1)
    y.backward(np.ones_like(y.data))
    kept = [(a, a.copy()) for a in (y.data, x.grad, w.grad)]
    for _ in range(3):
        F.relu(F.conv2d(x.detach(), w.detach(), padding=1))
        z = F.conv2d(x, w, padding=1)
        x.grad = w.grad = None
        z.backward(np.zeros_like(z.data))
    for array, copy in kept:
        np.testing.assert_array_equal(array, copy)


def test_an_array_is_held_once_unless_somebody_else_could_see_its_memory():
    box = [empty(np, SHAPE, np.float32)]
    assert memory.held_once(box)
    view = box[0][:2]
    assert not memory.held_once(box)
    assert not memory.held_once([view])
    box.clear()
    assert not memory.held_once([view])  # the name still holds it
    box.append(view)
    del view
    assert memory.held_once(box)  # alone, the only view of its buffer
    assert memory.held_once([np.empty(3)])
    assert not memory.held_once([np.empty(3)[:2]])
    assert not memory.held_once([np.frombuffer(b"12345678")])
    assert not memory.held_once([np.broadcast_to(np.empty(1), 3)])
    array = np.empty(3)
    assert not memory.held_once([array])
    box = [array]
    del array
    assert memory.held_once(box)
    for look in (memoryview, lambda a: a.reshape(1, 3), lambda a: a.T, lambda a: {"kept": a}):
        other = look(box[0])
        assert not memory.held_once(box)
        del other
    box[0].flags.writeable = False
    assert not memory.held_once(box)
