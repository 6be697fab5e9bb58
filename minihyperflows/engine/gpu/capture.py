"""Work that is recorded once as a CUDA graph and then repeated without Python (chapter 14)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import Any

from minihyperflows.engine.backend import cupy


class Replay:
    """A recorded sequence of kernels; call it to run them all again.

    ``work`` is called once, on a stream that records what it is told instead of doing it. So
    whatever changes between repetitions must be read from GPU memory, by kernels; a value that
    Python knows is recorded as it is. The memory that ``work`` asks for belongs to the recording,
    and is used again by each repetition. Recordings share what is
    not theirs (cuBLAS's workspace), so only one may run at a time.

    Run the same work once before it is recorded: that compiles the kernels.

    Args:
        work: launches kernels on the current stream.
    """

    def __init__(self, work: Callable[[], None]) -> None:
        cuda = cupy().cuda
        self._pool = cuda.MemoryPool()
        stream = _recording_stream(cupy(), cuda.Device().id)
        with stream, cuda.using_allocator(self._pool.malloc):
            stream.begin_capture()
            try:
                work()
            finally:
                self._graph = stream.end_capture()

    def __call__(self) -> None:
        self._graph.launch(cupy().cuda.get_current_stream())


@cache
def _recording_stream(xp: ModuleType, device: int) -> Any:
    """The stream that records, one for all: cuBLAS has a workspace for each stream it has seen."""
    return xp.cuda.Stream(non_blocking=True)


@contextmanager
def on_stream(stream: Any) -> Iterator[None]:
    """Context in which kernels run on ``stream``: after what was started before, and done at the
    end.

    Use one stream again and again: CuPy keeps the memory that was used on a stream for that stream.
    """
    cupy().cuda.get_current_stream().synchronize()
    with stream:
        yield
        stream.synchronize()


def new_stream() -> Any:
    """A stream that waits for no other."""
    return cupy().cuda.Stream(non_blocking=True)
