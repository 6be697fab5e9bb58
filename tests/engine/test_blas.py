"""BLAS computes on one thread inside the engine, and has its user's number outside."""

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from support import CHAPTERS
from threadpoolctl import threadpool_limits

from minihyperflows import Function, Tensor, apply, nn
from minihyperflows import functional as F
from minihyperflows.engine import blas, ops, products, threads
from minihyperflows.engine.blas import (
    blas_libraries,
    blas_threads,
    one_blas_thread,
    set_blas_threads,
)
from minihyperflows.engine.threads import for_blocks, set_threads
from minihyperflows.lab.workers import THREAD_VARIABLES
from minihyperflows.studies.command import reporting

needs_blas = pytest.mark.skipif(not blas_libraries(), reason="no BLAS library tells its number")
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")


AT_FIRST = blas_threads()


@pytest.fixture(autouse=True)
def _two_threads():
    before = blas_threads()
    set_blas_threads(2)
    yield
    set_threads(None)
    set_blas_threads(before)


def numbers():
    """What the libraries themselves say."""
    return {library["num_threads"] for library in blas_libraries()}


class Watched(np.ndarray):
    """An array that notes the numbers while NumPy computes with it."""

    seen: list = []  # noqa: RUF012 - emptied by the test

    def __array_ufunc__(self, ufunc, method, *inputs, out=None, **settings):
        if ufunc is np.matmul:
            self.seen.append(numbers())
        plain = [np.asarray(x) for x in inputs]
        if out is not None:
            settings["out"] = tuple(np.asarray(x) for x in out)
        return getattr(ufunc, method)(*plain, **settings)


class Product(Function):
    """A student's operation: it notes the numbers, too."""

    def forward(self, a, b):
        self.a, self.b, self.seen = a, b, [numbers()]
        return a @ b

    def backward(self, c):
        seen.append((*self.seen, numbers()))
        return c @ self.b.T, self.a.T @ c


seen = []


class Elsewhere:
    """A thread that enters the engine and leaves it when it is told to."""

    def __init__(self):
        self.pool = ThreadPoolExecutor(1)
        self.inside, self.leave = threading.Event(), threading.Event()

    def begin(self):
        self.work = self.pool.submit(one_blas_thread(self._stay))
        assert self.inside.wait(30)

    def _stay(self):
        self.inside.set()
        assert self.leave.wait(30)

    def end(self):
        self.leave.set()
        self.work.result()


@pytest.fixture
def elsewhere():
    other = Elsewhere()
    yield other
    other.leave.set()
    other.pool.shutdown()


def computing(work):
    """Call ``work`` as if the engine did."""
    return one_blas_thread(work)()


# -- one inside ------------------------------------------------------------------------------------


@needs_blas
@pytest.mark.parametrize("size", [3, 700])  # one product, and one that is cut into blocks
def test_a_product_of_the_engine(size):
    Watched.seen.clear()
    a = np.ones((size, size)).view(Watched)
    products.matmul(a, a)
    assert Watched.seen, "NumPy has not multiplied"
    assert all(found == {1} for found in Watched.seen)
    assert numbers() == {2}


@needs_blas
def test_forward_and_backward_of_anybodys_operation():
    seen.clear()
    a, b = Tensor(np.ones((3, 4)), True), Tensor(np.ones((4, 2)), True)
    y = apply(Product(), a, b)
    assert numbers() == {2}
    y.backward(np.ones((3, 2)))
    assert seen == [({1}, {1})]
    assert numbers() == {2}


@needs_blas
def test_every_product_of_a_network(monkeypatch, rng):
    found = []
    for module in (ops, np):
        matmul = module.matmul

        def watched(*arrays, matmul=matmul, **settings):
            found.append(numbers())
            return matmul(*arrays, **settings)

        monkeypatch.setattr(module, "matmul", watched)
    net = nn.Sequential(
        *(nn.Conv2d(3, 16, 3, rng=rng), nn.ReLU(), nn.Conv2d(16, 16, 3, rng=rng)),
        *(nn.Conv2d(16, 4, 1, rng=rng), nn.Flatten(), nn.Linear(64, 5, rng=rng)),
    )
    loss = F.cross_entropy(net(Tensor(np.ones((2, 8, 8, 3), np.float32))), np.array([0, 1]))
    assert numbers() == {2}
    loss.backward()
    assert len(found) > 10
    assert all(one == {1} for one in found)
    assert numbers() == {2}


# -- the user's number outside ---------------------------------------------------------------------


@needs_blas
def test_several_threads_compute_at_once(elsewhere):
    """The one that began first ends first; whoever is the last puts the number back."""

    def begin():
        elsewhere.begin()
        return numbers()

    assert computing(begin) == {1}
    assert numbers() == {1}
    assert blas_threads() == 2
    elsewhere.end()
    assert numbers() == {2}


@needs_blas
def test_a_number_that_somebody_sets_meanwhile_stays():
    def change():
        for limit in blas._limits():
            limit.set(3)

    computing(lambda: computing(change))
    assert numbers() == {3}


@needs_blas
def test_setting_the_number_inside_waits_for_the_end():
    def change():
        set_threads(3)
        assert numbers() == {1}
        assert threads.threads() == 3
        set_threads(None)
        assert threads.threads() == 3  # as many as BLAS has, which kept that number

    computing(change)
    assert numbers() == {3}


@needs_blas
def test_ctrl_c_at_every_moment():
    """Whatever it interrupts, the next operation leaves everything as the user had it.

    Python looks for signals when a function begins and when one written in C has returned.
    """

    def interrupt(frame, event, _):
        nonlocal moments
        if frame.f_code.co_filename == blas.__file__ and event in ("call", "c_return"):
            moments += 1
            if moments == last:
                raise KeyboardInterrupt

    last, interrupted = 0, True
    before = sys.getprofile()
    while interrupted:
        last, moments = last + 1, 0
        sys.setprofile(interrupt)
        try:
            assert computing(numbers) == {1}
            interrupted = False
        except KeyboardInterrupt:
            interrupted = True
        finally:
            sys.setprofile(before)
        assert threads.threads() == 2, last
        assert not blas._inside, last
        assert computing(numbers) == {1}, last
        assert numbers() == {2}, last
    assert last > 10


@needs_blas
def test_an_error_puts_the_number_back():
    with pytest.raises(ValueError, match="matmul"):
        products.matmul(np.ones((2, 3)), np.ones((2, 3)))
    with pytest.raises(ZeroDivisionError):
        for_blocks(lambda _: 1 / 0, 4, 1)
    assert numbers() == {2}


@needs_blas
def test_numpys_own_products_beside_the_engines(rng):
    """A user's thread multiplies while ours compute: right numbers, and the setting survives."""
    a = rng.integers(-9, 9, (200, 200)).astype(float)  # whole numbers: any order gives one sum
    right, net, done = a @ a, nn.Linear(200, 200, rng=rng), threading.Event()

    def multiply():
        wrong = 0
        while not done.is_set():
            wrong += not np.array_equal(a @ a, right)
        return wrong

    def train():
        for _ in range(50):
            net(Tensor(a)).sum().backward()

    with ThreadPoolExecutor(3) as pool:
        user = pool.submit(multiply)
        for ours in [pool.submit(train) for _ in range(2)]:
            ours.result()
        done.set()
        assert user.result() == 0
    assert numbers() == {2}


@needs_blas
@needs_fork
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_process_forked_while_another_thread_computes(elsewhere):
    elsewhere.begin()
    child = os.fork()
    if child == 0:
        right = numbers() == {2} and computing(numbers) == {1} and numbers() == {2}
        os._exit(0 if right else 1)
    elsewhere.end()
    assert os.waitpid(child, 0)[1] == 0
    assert numbers() == {2}


@needs_blas
@needs_fork
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_process_forked_inside():
    child, inside = computing(lambda: (os.fork(), numbers()))
    if child == 0:
        right = inside == {1} and computing(numbers) == {1} and numbers() == {2}
        os._exit(0 if right else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert numbers() == {2}


# -- the pool's number -----------------------------------------------------------------------------


@needs_blas
def test_the_pool_has_as_many_threads_as_the_user_gives_blas():
    assert threads.threads() == 2
    assert computing(threads.threads) == 2
    with threadpool_limits(1, user_api="blas"):
        assert threads.threads() == 1
    assert threads.threads() == 2


@pytest.mark.slow
@needs_blas
@pytest.mark.parametrize("number", [1, 2])
def test_the_environment_says_how_many(number):
    if number > (os.cpu_count() or 1):
        pytest.skip("OpenBLAS starts no more threads than there are cores")
    program = "from minihyperflows.engine.threads import threads; print(threads())"
    environment = os.environ | dict.fromkeys(THREAD_VARIABLES, str(number))
    answer = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert answer.stdout.split() == [str(number)]


@needs_blas
def test_the_tests_compute_on_one_thread_unless_told_otherwise():
    """tests/support/one_thread.py comes before NumPy."""
    assert int(os.environ["OPENBLAS_NUM_THREADS"]) >= AT_FIRST


@pytest.mark.slow
@needs_blas
def test_the_kernels_of_the_chapters():
    """They all import ``figures``, after which NumPy multiplies on one thread."""
    program = """
from threadpoolctl import threadpool_info, threadpool_limits
import numpy
with threadpool_limits(2, user_api="blas"):
    import figures
    print({b["num_threads"] for b in threadpool_info() if b["user_api"] == "blas"})
    from minihyperflows.engine.threads import threads
    print(threads())
"""
    answer = subprocess.run(
        [sys.executable, "-c", program], cwd=CHAPTERS, capture_output=True, text=True, check=True
    )
    assert answer.stdout.split() == ["{1}", "2"]
    chapters = sorted(CHAPTERS.glob("*.ipynb"))
    assert chapters
    for chapter in chapters:
        assert "from figures import" in chapter.read_text(encoding="utf-8"), chapter.name


@needs_blas
def test_a_study_computes_on_one_thread():
    found = []

    @reporting()
    def main():
        found.append(numbers())

    main()
    assert found == [{1}]
    assert numbers() == {2}


def test_without_a_library_that_tells(monkeypatch):
    monkeypatch.setattr(blas, "_limits", lambda: ())
    assert threads.threads() == 1
    set_threads(2)
    meeting = threading.Barrier(2, timeout=30)
    assert for_blocks(lambda _: meeting.wait() >= 0, 2, 1) == [True, True]


class OpenMP:
    """A library in which every thread has a number of its own, at first 2."""

    def __init__(self):
        self.own = threading.local()

    def get(self):
        return getattr(self.own, "number", 2)

    def set(self, number):
        self.own.number = number


def test_a_library_with_a_number_for_every_thread(monkeypatch):
    library = OpenMP()
    limit = blas.ThreadsOwnLimit(library.get, library.set)
    monkeypatch.setattr(blas, "_limits", lambda: (limit,))
    meeting = threading.Barrier(2, timeout=30)

    def work(_):
        meeting.wait()  # two threads take part
        return library.get()

    assert for_blocks(work, 2, 1) == [1, 1]
    assert library.get() == 2
    with ThreadPoolExecutor(1) as pool:
        assert computing(lambda: pool.submit(library.get).result()) == 2  # that thread's own
    assert computing(threads.threads) == 2
    assert library.get() == 2
