"""The pool of threads that shares large operations.

NumPy computes on one core and releases Python's lock while it computes. So an operation on a large
array goes through it block by block (:func:`for_blocks`), and a small pool of threads shares the
blocks. Blocks help a single core too: what several passes over a block read and write stays in its
cache.

How the work is cut into blocks never depends on the number of threads, and sums over blocks are
added up in order. So the results do not depend on it either.

The number of threads is the one that the user has given the BLAS library (``OPENBLAS_NUM_THREADS``,
``OMP_NUM_THREADS``, threadpoolctl), unless :func:`set_threads` says otherwise. BLAS itself computes
each of the engine's products on the thread that asks for it (``engine.blas``).

On a machine that is busy with other programs a thread may have to wait for a core. The one that
asked for the work goes on by itself then: it waits for blocks that others have begun, not for
threads that have not come.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar, copy_context
from functools import cache
from typing import Any, TypeVar

import numpy as np

from minihyperflows.engine.backend import Array, device_of
from minihyperflows.engine.blas import blas_threads, one_blas_thread, set_blas_threads
from minihyperflows.engine.memory import empty
from minihyperflows.engine.twins import by_device

T = TypeVar("T")

# Elements of a block of an element-wise pass, 2 MiB in float32: large enough that the turns that
# threads take at Python's lock cost little, small enough for the caches. Of 2^16 ... 2^20, 2^19
# was fastest for batch norm, forward and backward, with two threads (by half against 2^17) and with
# one.
BLOCK = 1 << 19

# Elements of a block of a matrix product, whose few calls take longer: 2^17 ... 2^19 are equally
# fast, and the smaller they are, the smaller a layer the threads can share.
PRODUCT_BLOCK = 1 << 17

# Elements of the largest scratch array of an operation, 16 MiB in float32. From 32 MiB on the C
# library asks the system for every array anew, which hands it out page by page: on some machines
# that takes longer than what is then computed.
LARGEST_SCRATCH = 1 << 22

_chosen: int | None = None  # by set_threads
_working: ContextVar[bool] = ContextVar("working", default=False)  # inside a block already


def threads() -> int:
    """How many threads share the blocks of an operation."""
    return blas_threads() if _chosen is None else _chosen


def set_threads(number: int | None) -> None:
    """Use ``number`` threads from now on; None: as many as the user has given to BLAS.

    BLAS gets the same number for what is not computed by the engine.

    Raises:
        ValueError: less than one.
    """
    global _chosen
    if number is not None and number < 1:
        raise ValueError(f"at least one thread must compute, not {number}")
    _chosen = number
    if number is not None:
        set_blas_threads(number)


def for_blocks(
    work: Callable[[slice], T], length: int, block: int, array: Array | None = None
) -> list[T]:
    """``work(slice)`` for each block of ``block`` items out of ``length``: the results, in order.

    The blocks run side by side, so ``work`` must write to its own block only. An exception in one
    of them is raised here, after those that were begun have ended. ``array`` is one of those that
    ``work`` deals with: on a device with threads of its own all items are one block.
    """
    elsewhere = device_of(array) != "cpu"
    block = max(1, length) if elsewhere else block
    slices = [slice(start, min(start + block, length)) for start in range(0, length, block)]
    alone = elsewhere or len(slices) < 2 or _working.get()
    others = 0 if alone else threads() - 1
    return _share(work, slices, others) if others else _by_one(work, slices)


@one_blas_thread
def _by_one(work: Callable[[slice], T], slices: list[slice]) -> list[T]:
    return [work(s) for s in slices]


@one_blas_thread
def _share(work: Callable[[slice], T], slices: list[slice], others: int) -> list[T]:
    """The results of ``work`` for all slices, by this thread and as many as ``others``."""
    results: list[Any] = [None] * len(slices)
    waiting = enumerate(slices)  # an iterator's next() is atomic: whoever is free takes a block

    def take_turns() -> None:
        _working.set(True)
        for i, block_slice in waiting:
            results[i] = work(block_slice)

    tasks = [take_turns]  # emptied below: a helper that comes too late keeps no arrays alive

    @one_blas_thread
    def help_out() -> None:
        tasks[0]()

    pool, number = _pool(others), min(others, len(slices) - 1)
    helpers = [pool.submit(copy_context().run, help_out) for _ in range(number)]
    try:
        copy_context().run(take_turns)
    finally:
        for _ in waiting:  # after an error there may be some left, which nobody needs any more
            pass
        errors = [helper.exception() for helper in helpers if not helper.cancel()]
        tasks.clear()
    for error in errors:
        if error is not None:
            raise error
    return results


def sum_over_parts(work: Callable[[slice], Array], length: int, step: int) -> Array:
    """The sum of ``work(slice)`` over parts of ``step`` items, one after another.

    For what needs a large scratch array for each item and uses all threads inside. Of no items the
    sum is that of one empty part.
    """
    total = None
    for start in range(0, max(1, length), step):
        part = work(slice(start, min(start + step, length)))
        total = part if total is None else add(total, part, out=total)
    return total


def rows_per_block(row_size: int, block: int = BLOCK, least: int = 1) -> int:
    """How many rows of ``row_size`` elements make about ``block`` elements; ``least`` or more."""
    return max(least, block // max(1, row_size))


def elementwise(work: Callable[..., None], *arrays: Array) -> None:
    """Call ``work`` on blocks of C-contiguous arrays of one shape: the same block of each array.

    ``work`` takes as many arrays as there are ``arrays`` and writes into some of them.
    """
    if arrays[0].size <= BLOCK:
        work(*arrays)
        return
    flat = [a.reshape(-1) for a in arrays]
    for_blocks(lambda block: work(*(a[block] for a in flat)), flat[0].size, BLOCK, flat[0])


@by_device
def add(a: Array, b: Array, out: Array | None = None) -> Array:
    """a + b for arrays of one shape, into ``out`` if given."""
    if a.size <= BLOCK:
        return np.add(a, b, out=out)
    out = empty(np, a.shape, np.result_type(a, b)) if out is None else out
    rows = rows_per_block(a.size // len(a))
    for_blocks(lambda block: np.add(a[block], b[block], out=out[block]), len(a), rows, a)
    return out


@by_device
def copy(a: Array, out: Array) -> None:
    """out = a, rounded to the dtype of ``out``."""
    out[...] = a


@cache
def _pool(workers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers, thread_name_prefix="minihyperflows")


if hasattr(os, "register_at_fork"):  # the threads of a pool do not survive a fork
    os.register_at_fork(after_in_child=_pool.cache_clear)
