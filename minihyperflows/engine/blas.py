"""How many threads BLAS uses: one while the engine computes.

BLAS is the library that NumPy multiplies matrices with. OpenBLAS shares each product among threads
of its own, which spin: while they wait for each other, or for the next product, they do not give up
their cores. Where other programs want these cores too, a thread that spins keeps off the one that
it waits for, and training takes many times as long. So inside :data:`one_blas_thread` BLAS
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
from functools import cache
from types import TracebackType
from typing import Any, NamedTuple

from threadpoolctl import ThreadpoolController


class Number(NamedTuple):
    """The number of threads of a BLAS library: how to ask for it and how to set it."""

    get: Callable[[], int]
    set: Callable[[int], object]


class Limit:
    """Holds the numbers of some libraries at one while any context is open.

    The numbers are those of the whole process. So threads that compute at the same time count
    themselves in and out: the first one in keeps what it finds, the last one out puts it back. If
    somebody else has set a number meanwhile, theirs stays.
    """

    def __init__(self, numbers: tuple[Number, ...]) -> None:
        self.numbers = numbers
        self.lock = threading.Lock()
        self.open = 0  # contexts, of all threads
        self.given = [1 for _ in numbers]  # by the user, kept while a context is open

    def enter(self) -> None:
        with self.lock:
            if self.open == 0:
                self.given = [number.get() for number in self.numbers]
                for number, given in zip(self.numbers, self.given, strict=True):
                    if given != 1:
                        number.set(1)
            self.open += 1

    def leave(self) -> None:
        with self.lock:
            if self.open == 1:
                self._restore()
            self.open = max(0, self.open - 1)  # 0 already in a process forked inside the context

    def users(self) -> list[int]:
        """The numbers as they are while no context is open."""
        with self.lock:
            return self.given if self.open else [number.get() for number in self.numbers]

    def set_users(self, threads: int) -> None:
        """Change them."""
        with self.lock:
            self.given = [threads for _ in self.numbers]
            if self.open == 0:
                for number in self.numbers:
                    number.set(threads)

    def close_all(self) -> None:
        """For a forked process, in which those who opened contexts do not exist."""
        self.lock = threading.Lock()  # the old one may be held by one of them
        if self.open:
            self._restore()
            self.open = 0

    def _restore(self) -> None:
        for number, given in zip(self.numbers, self.given, strict=True):
            if given != 1 and number.get() == 1:
                number.set(given)


class ThreadsOwnLimit(threading.local, Limit):
    """The same for libraries built on OpenMP, where each thread of the process has a number."""


class OneBlasThread:
    """The context in which BLAS computes each product on one thread; may be nested."""

    def __enter__(self) -> None:
        for limit in _limits():
            limit.enter()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for limit in _limits():
            limit.leave()


one_blas_thread = OneBlasThread()


def blas_threads() -> int:
    """How many threads the user has given to BLAS; 1 if no library is found that can tell."""
    return max((n for limit in _limits() for n in limit.users()), default=1)


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
    numbers: dict[bool, list[Number]] = {False: [], True: []}
    for library in _libraries():
        numbers[_has_openmp(library)].append(_number(library))
    limits = Limit(tuple(numbers[False])), ThreadsOwnLimit(tuple(numbers[True]))
    return tuple(limit for limit in limits if limit.numbers)


def _has_openmp(library: Any) -> bool:
    return library.internal_api == "openblas" and library.threading_layer == "openmp"


def _number(library: Any) -> Number:
    """threadpoolctl's functions, but for OpenBLAS its own: threadpoolctl's take several times as
    long and, from version 3.8 on, do nothing in any thread but the first that calls them."""
    if library.internal_api == "openblas" and not _has_openmp(library):
        for prefix, suffix in itertools.product(("", "scipy_"), ("", "64_", "_64")):
            get = getattr(library.dynlib, f"{prefix}openblas_get_num_threads{suffix}", None)
            set_ = getattr(library.dynlib, f"{prefix}openblas_set_num_threads{suffix}", None)
            if get is not None and set_ is not None:
                return Number(get, set_)
    return Number(library.get_num_threads, library.set_num_threads)


def _after_fork() -> None:
    for limit in _limits() if _limits.cache_info().currsize else ():
        limit.close_all()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
