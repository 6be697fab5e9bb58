"""How many threads BLAS uses: one while the engine computes.

BLAS is the library that NumPy multiplies matrices with. OpenBLAS shares each product among threads
of its own, which spin: while they wait for each other, or for the next product, they do not give up
their cores. Where other programs want these cores too, a thread that spins keeps off the one that
it waits for, and training takes many times as long. So inside :func:`one_blas_thread` BLAS
multiplies on the thread that asks for the product. What is large enough to gain from several
threads is shared by the engine's own pool, whose threads sleep while they wait
(``engine.threads``).

Between the engine's operations BLAS has the threads that its user gave it: a library must not
change how fast the code around it multiplies.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable
from functools import cache, wraps
from typing import Any, ParamSpec, TypeVar

from threadpoolctl import ThreadpoolController

P = ParamSpec("P")
T = TypeVar("T")


class Limit:
    """Holds the number of threads of one library at one while any thread is inside the engine.

    The number is that of the whole process: the first thread in keeps what it finds, the last one
    out puts it back. If somebody else has set the number meanwhile, theirs stays.

    Ctrl-C may come between any two steps here. So who is inside is kept elsewhere, by means that
    it cannot break (:func:`one_blas_thread`), and what it leaves undone the next call makes up for.

    Args:
        get, set: ask for the number and change it.
    """

    def __init__(self, get: Callable[[], int], set: Callable[[int], object]) -> None:
        self.get, self.set = get, set
        self.lock = threading.Lock()
        self.held = False
        self.given = 1  # by the user, kept while held

    def is_wanted(self) -> bool:
        """Whether anybody is inside the engine."""
        return bool(_inside)

    def hold(self) -> None:
        with self.lock:
            found = self.get()
            if found != 1 or not self.held:
                self.given = found
            self.held = True
            if found != 1:
                self.set(1)

    def release(self) -> None:
        with self.lock:
            if self.held and not self.is_wanted():
                if self.given != 1 and self.get() == 1:
                    self.set(self.given)
                self.held = False

    def users(self) -> int:
        """The number as it is outside of the engine."""
        with self.lock:
            return self.given if self.held else self.get()

    def set_users(self, threads: int) -> None:
        """Change it."""
        with self.lock:
            self.given = threads
            if not self.is_wanted():
                self.held = False
                self.set(threads)


class ThreadsOwnLimit(threading.local, Limit):
    """The same for libraries built on OpenMP, where each thread of the process has a number."""

    def is_wanted(self) -> bool:
        return not _inside.keys().isdisjoint((threading.get_ident(), FOR_GOOD))


# The threads that are inside the engine now. A dictionary, since ``d[key] = ...`` and ``del`` are
# one step each.
_inside: dict[int, bool] = {}
FOR_GOOD = -1  # no thread's identifier


def one_blas_thread(function: Callable[P, T]) -> Callable[P, T]:
    """A decorator: inside ``function`` BLAS computes each product on one thread.

    It is not a context manager because Ctrl-C may come at the first step of ``__exit__``, before
    anything is put back. Between ``try`` and the first step of ``finally`` it cannot be missed.
    """

    @wraps(function)
    def inside(*arguments: P.args, **options: P.kwargs) -> T:
        thread = threading.get_ident()
        if thread in _inside:
            return function(*arguments, **options)
        try:
            _inside[thread] = True
            for limit in _limits():
                limit.hold()
            return function(*arguments, **options)
        finally:
            del _inside[thread]
            for limit in _limits():
                limit.release()

    return inside


def keep_one_blas_thread() -> None:
    """From now on BLAS computes on one thread in all that this process does."""
    _inside[FOR_GOOD] = True
    for limit in _limits():
        limit.hold()


def blas_threads() -> int:
    """How many threads the user has given to BLAS; 1 if no library is found that can tell."""
    return max((limit.users() for limit in _limits()), default=1)


def set_blas_threads(number: int) -> None:
    """Give each BLAS library ``number`` threads, for what is not computed by the engine."""
    for limit in _limits():
        limit.set_users(number)


def blas_libraries() -> list[dict[str, Any]]:
    """What threadpoolctl says of each BLAS library: its name, version, core type and threads."""
    return [library.info() for library in _libraries()]


@cache
def _libraries() -> tuple[Any, ...]:
    """threadpoolctl's controllers of the loaded libraries; NumPy has loaded its own by now."""
    return tuple(ThreadpoolController().select(user_api="blas").lib_controllers)


@cache
def _limits() -> tuple[Limit, ...]:
    return tuple(
        (ThreadsOwnLimit if _has_openmp(library) else Limit)(*_functions(library))
        for library in _libraries()
    )


def _has_openmp(library: Any) -> bool:
    return library.internal_api == "openblas" and library.threading_layer == "openmp"


def _functions(library: Any) -> tuple[Callable[[], int], Callable[[int], object]]:
    """How to get and set the number: OpenBLAS's own functions, else threadpoolctl's.

    For OpenBLAS threadpoolctl's take several times as long and, from version 3.8 on, do nothing in
    any thread but the first that calls them.
    """
    if library.internal_api == "openblas" and not _has_openmp(library):
        for prefix, suffix in itertools.product(("", "scipy_"), ("", "64_", "_64")):
            get = getattr(library.dynlib, f"{prefix}openblas_get_num_threads{suffix}", None)
            set_ = getattr(library.dynlib, f"{prefix}openblas_set_num_threads{suffix}", None)
            if get is not None and set_ is not None:
                return get, set_
    return library.get_num_threads, library.set_num_threads


def _after_fork() -> None:
    """In the new process there is one thread, the one that forked: no other is inside."""
    for thread in _inside.keys() - {threading.get_ident(), FOR_GOOD}:
        del _inside[thread]
    for limit in _limits() if _limits.cache_info().currsize else ():
        limit.lock = threading.Lock()  # another thread may have held the old one
        limit.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
