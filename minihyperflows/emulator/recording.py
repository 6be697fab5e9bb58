"""What the emulated GPU has been told to do: at once, or, while a graph is recorded, later."""

from __future__ import annotations

from collections.abc import Callable

blocks_backwards = False  # start a grid with its last block

_recorded: list[Callable[[], None]] | None = None


class CaptureError(RuntimeError):
    """Something that cannot be part of a graph was asked for while one is recorded."""


def perform(work: Callable[[], None]) -> None:
    """Do ``work`` now, or record it."""
    if _recorded is None:
        work()
    else:
        _recorded.append(work)


def forbid(what: str) -> None:
    """Raise if a graph is being recorded."""
    if _recorded is not None:
        raise CaptureError(f"{what} while a graph is recorded: use a kernel of engine/gpu/kernels")


def begin() -> None:
    """Record what is performed from now on."""
    global _recorded
    forbid("another recording")
    _recorded = []


def end() -> list[Callable[[], None]]:
    """What has been recorded since :func:`begin`."""
    global _recorded
    if _recorded is None:
        raise CaptureError("no graph is being recorded")
    recorded, _recorded = _recorded, None
    return recorded


def abandon() -> None:
    """Forget a recording that nobody has ended, if there is one."""
    global _recorded
    _recorded = None
