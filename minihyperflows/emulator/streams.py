"""CuPy's streams, graphs, events, devices and memory pools (``cupy.cuda``)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from types import SimpleNamespace
from typing import Any

from minihyperflows.emulator import recording

_addresses = count(1)
_current: list[Stream] = []  # the streams of the `with` statements around, the innermost last


class Stream:
    """A queue of work. All of it runs at once, in order, so a stream has only to record graphs."""

    def __init__(self, null: bool = False, non_blocking: bool = False) -> None:
        self.null, self.ptr = null, 0 if null else next(_addresses)

    def __enter__(self) -> Stream:
        _current.append(self)
        return self

    def __exit__(self, *exception: object) -> None:
        _current.pop()

    def begin_capture(self) -> None:
        """Record the work that comes now instead of doing it."""
        if self.null:
            raise RuntimeError("cudaErrorStreamCaptureUnsupported: not on the null stream")
        if current_stream() is not self:
            raise RuntimeError("what comes now is not for this stream: capture in `with stream:`")
        recording.begin()

    def end_capture(self) -> Graph:
        """What has been recorded."""
        return Graph(recording.end())

    def wait_event(self, event: Event) -> None:
        """Nothing: what the event follows is done, or stands earlier in the recording."""

    def synchronize(self) -> None:
        """Wait for what has been started."""
        recording.forbid("synchronize")


NULL_STREAM = Stream(null=True)


def current_stream() -> Stream:
    """The stream of the innermost ``with`` statement."""
    return _current[-1] if _current else NULL_STREAM


class Graph:
    """A recorded sequence of kernels."""

    def __init__(self, recorded: list[Callable[[], None]]) -> None:
        self._recorded = recorded

    def launch(self, stream: Stream | None = None) -> None:
        """Do it all, in order."""
        recording.forbid("launching a graph")
        for work in self._recorded:
            work()

    def upload(self, stream: Stream | None = None) -> None:
        """Nothing: there is no device to prepare."""


class Event:
    """A moment; the emulated GPU has no clock."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def record(self, stream: Stream | None = None) -> None:
        """The moment is now."""

    def synchronize(self) -> None:
        """Wait for the moment."""
        recording.forbid("synchronize")


class Device:
    """The one device."""

    id = 0
    compute_capability = "90"
    mem_info = (1 << 30, 1 << 30)

    def synchronize(self) -> None:
        """Wait for what has been started."""
        recording.forbid("synchronize")


class MemoryPool:
    """NumPy's memory serves here, so a pool never holds any."""

    def malloc(self, size: int) -> None:
        """To be handed to :func:`using_allocator`, not to be called."""
        raise NotImplementedError

    def free_all_blocks(self) -> None:
        """Nothing."""

    def used_bytes(self) -> int:
        """None that it knows of."""
        return 0

    def total_bytes(self) -> int:
        """None that it knows of."""
        return 0


@contextmanager
def using_allocator(allocator: Any = None) -> Iterator[None]:
    """Context in which a real GPU would take memory from ``allocator``."""
    yield


def _device_properties(device: int) -> dict[str, Any]:
    return {"name": b"emulated GPU", "multiProcessorCount": 1, "major": 9, "minor": 0}


CUDA = SimpleNamespace(
    **{"Stream": Stream, "Graph": Graph, "Event": Event, "Device": Device},
    MemoryPool=MemoryPool,
    using_allocator=using_allocator,
    is_available=lambda: True,
    get_current_stream=current_stream,
    get_elapsed_time=lambda start, end: 0.0,
    runtime=SimpleNamespace(
        getDeviceCount=lambda: 1,
        getDeviceProperties=_device_properties,
        memGetInfo=lambda: Device.mem_info,
        runtimeGetVersion=lambda: 0,
        driverGetVersion=lambda: 0,
    ),
)
