"""Blocks and threads: everything is computed once, in order, whatever the number of threads."""

import os
import threading
import weakref

import numpy as np
import pytest

from minihyperflows import Tensor, models, optim
from minihyperflows import functional as F
from minihyperflows.engine import threads
from minihyperflows.engine.blas import blas_threads
from minihyperflows.engine.threads import BLOCK, add, elementwise, for_blocks, set_threads


@pytest.mark.parametrize("number", [1, 2, 5])
@pytest.mark.parametrize("length", [0, 1, 10, 11])
def test_blocks_cover_everything_once_and_in_order(number, length):
    set_threads(number)
    parts = for_blocks(lambda block: list(range(length))[block], length, 3)
    assert sum(parts, []) == list(range(length))  # noqa: RUF017 - short lists


def test_several_threads_take_part():
    set_threads(2)
    meeting = threading.Barrier(2, timeout=60)  # nobody passes alone
    assert for_blocks(lambda block: meeting.wait() >= 0, 2, 1) == [True, True]


def test_blocks_inside_blocks_stay_on_their_thread():
    set_threads(2)

    def work(block):
        inner = for_blocks(lambda _: threading.get_ident(), 4, 1)
        return set(inner) == {threading.get_ident()}

    assert for_blocks(work, 4, 1) == [True] * 4


@pytest.mark.parametrize("bad", [0, 3])
def test_an_exception_arrives(bad):
    set_threads(2)

    def work(block):
        if block.start == bad:
            raise RuntimeError(f"block {bad}")

    with pytest.raises(RuntimeError, match=f"block {bad}"):
        for_blocks(work, 4, 1)
    assert for_blocks(lambda block: block.start, 2, 1) == [0, 1]  # the pool goes on


def test_settings_of_numpy_hold_in_every_thread():
    set_threads(2)
    with np.errstate(divide="raise"), pytest.raises(FloatingPointError):
        for_blocks(lambda block: np.ones(1) / np.zeros(1), 2, 1)


@pytest.fixture
def late_helper():
    """The pool's only thread, busy with something else until the event."""
    set_threads(2)
    event = threading.Event()
    other = threads._pool(1).submit(event.wait, 30)
    yield event
    event.set()
    assert other.result()


def test_nobody_waits_for_a_helper_that_has_not_come(late_helper):
    assert for_blocks(lambda block: block.start, 4, 1) == [0, 1, 2, 3]
    assert not late_helper.is_set()


def test_a_helper_that_comes_too_late_keeps_no_arrays_alive(late_helper):
    array = np.ones(4)
    here = weakref.ref(array)
    assert for_blocks(lambda block, a=array: a[block].sum(), 4, 1) == [1, 1, 1, 1]
    del array
    assert here() is None


def test_without_a_choice_it_is_the_users_number_for_blas():
    set_threads(2)
    set_threads(None)
    assert threads.threads() == blas_threads()
    with pytest.raises(ValueError, match="at least one"):
        set_threads(0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_has_its_own_pool():
    set_threads(2)
    for_blocks(lambda block: None, 2, 1)
    child = os.fork()
    if child == 0:
        os._exit(0 if for_blocks(lambda block: block.start, 4, 1) == [0, 1, 2, 3] else 1)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.slow
def test_elementwise_and_add():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 3, BLOCK))
    out = np.empty_like(a)
    set_threads(2)
    elementwise(lambda a, b, out: np.multiply(a, b, out=out), a, b, out)
    np.testing.assert_array_equal(out, a * b)
    np.testing.assert_array_equal(add(a, b), a + b)
    np.testing.assert_array_equal(add(a.T, b.T), (a + b).T)
    np.testing.assert_array_equal(add(a, np.broadcast_to(b[0], a.shape)), a + b[0])
    total = a.copy()
    assert add(total, b, out=total) is total
    np.testing.assert_array_equal(total, a + b)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vgg19", "resnet50"])
def test_a_step_of_a_network_does_not_depend_on_the_threads(name):
    """Bit for bit."""
    results = []
    for number in (1, 2, 3):
        set_threads(number)
        rng = np.random.default_rng(0)
        net = getattr(models, name)(width=0.25, rng=rng)
        x = rng.standard_normal((8, 32, 32, 3)).astype(np.float32)
        F.cross_entropy(net(Tensor(x)), rng.integers(0, 10, 8)).backward()
        optim.SGD(net.parameters(), lr=0.1).step()
        results.append(net.state_dict())
    for other in results[1:]:
        for key, value in results[0].items():
            np.testing.assert_array_equal(other[key], value, err_msg=key)
