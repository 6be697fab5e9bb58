"""Preparing the next items in a second thread while the first works on the present one."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Generator, Iterable, Iterator
from queue import SimpleQueue
from typing import TypeVar

Item = TypeVar("Item")


def prefetch(iterable: Iterable[Item], depth: int = 2) -> Generator[Item]:
    """The items of ``iterable`` in their order, computed ahead in a background thread.

    NumPy lets go of the interpreter's lock while it computes, so the two threads really work at the
    same time. What ``iterable`` computes with must not be used elsewhere meanwhile: a random
    generator, for one, would be drawn from in a different order.

    The thread starts with the first item and has ended when the generator has: after the last
    item, after an error, and when the generator is closed early, which ``contextlib.closing`` does
    for certain. It sees the context variables of the caller (``no_grad``, ``np.errstate``).

    Args:
        iterable: what to iterate over; its errors reach the consumer after the items before them.
        depth: at most this many items are ready, or in the making, ahead of the consumer's.

    Raises:
        ValueError: depth is below 1.
    """
    if depth < 1:
        raise ValueError(f"prefetch needs a depth of 1 or more, not {depth}")
    return _prefetched(iterable, depth)


def _prefetched(iterable: Iterable[Item], depth: int) -> Generator[Item]:
    producer = _Producer(iterable, depth)
    thread = threading.Thread(
        target=contextvars.copy_context().run,
        args=(producer.run,),
        name="prefetch",
        daemon=True,  # a consumer that forgets to close must not keep the program from ending
    )
    thread.start()
    try:
        yield from producer.take()
    finally:
        producer.stop()
        thread.join()


class _End:
    """What the producer puts after its last item: the error that ended it, or None."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


class _Producer:
    """The two ends of the line: :meth:`run` in the background thread, :meth:`take` outside."""

    def __init__(self, iterable: Iterable, depth: int) -> None:
        self.iterable = iterable
        self.ready: SimpleQueue = SimpleQueue()
        self.room = threading.Semaphore(depth)  # one permit for each item that may still be made
        self.stopped = False

    def run(self) -> None:
        """Make items while there is room, until the iterable or the consumer ends."""
        try:
            iterator = iter(self.iterable)
            while self._wait_for_room():
                self.ready.put(next(iterator))
        except StopIteration:
            self.ready.put(_End(None))
        except BaseException as error:  # the consumer decides what to do about it
            self.ready.put(_End(error))

    def _wait_for_room(self) -> bool:
        self.room.acquire()
        return not self.stopped

    def take(self) -> Iterator:
        """The items as they become ready; the thread's error, if one ended it."""
        while not isinstance(item := self.ready.get(), _End):
            self.room.release()
            yield item
        if item.error is not None:
            raise item.error

    def stop(self) -> None:
        """Let the thread end before its next item."""
        self.stopped = True
        self.room.release()
