"""Locks: who writes into a folder, or a table, at a time.

A lock is a small file on which the system's own lock is held (``flock`` on Linux and macOS,
``LockFile`` on Windows). It excludes other processes and other threads alike, since each of them
opens the file anew. The system releases it when the process ends, however it ends, so a lock can be
left behind as a file but never as a lock. That is all of the library ``filelock`` that is needed
here; what it lacks is the name of the holder, which says whether waiting makes sense.

The file is removed on release. So whoever locks it checks that it is still in its place. Whoever
holds it can notice that its folder is another one by now (:meth:`Lock.check`).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from minihyperflows.errors import UserError, reason_of

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

NAME = "minihyperflows.lock"  # of the lock of a folder
RUN, WORKER = "run", "worker"  # kinds of holders
SECONDS_BETWEEN_TRIES = 0.1
TRIES = 1000  # while others make and remove the folder or the file at the same moment

_TEXT = re.compile(rb"minihyperflows (\w+) (\d+) ([^\n]*)\n")
_MOST_BYTES = 240  # of a name; systems take 255
_FAR = 2**30  # Windows locks bytes, which nobody else can read then: one behind the text


@dataclass(frozen=True)
class Holder:
    """Who holds a lock, as far as the file tells."""

    kind: str | None = None
    process: int | None = None
    host: str | None = None

    def __str__(self) -> str:
        if self.process is None:
            return "another process"
        if (self.process, self.host) == (os.getpid(), platform.node()):
            return "another thread of this process"
        where = "" if self.host == platform.node() else f" on {self.host}"
        return f"process {self.process}{where}"


class InUseError(UserError):
    """Somebody else holds the lock: ``holder``."""

    def __init__(self, what: Path, holder: Holder) -> None:
        self.holder = holder
        super().__init__(
            f"{what} is in use by {holder}: wait until it has ended, or write elsewhere with --out"
        )


class Lock:
    """The lock on ``path``, from its making to :meth:`release`.

    Args:
        path: the lock file.
        what: the folder or file that it protects, for messages.
        kind: of this holder, told to those who are refused.

    Raises:
        InUseError: somebody else holds it.
        UserError: the file cannot be made or locked, or it is not a lock of this program.
    """

    def __init__(self, path: Path, what: Path, kind: str = RUN) -> None:
        self.path, self.what = path, what
        self._descriptor: int | None = None
        try:
            self._descriptor = self._acquire()
            self._sign(kind)
        except OSError as error:
            self.release()
            raise UserError(
                f"cannot lock {what}: {reason_of(error)}; it takes a folder that can be "
                "written to, on a drive that has locks (some network drives have none)"
            ) from error
        except BaseException:
            self.release()
            raise
        _held.add(self)

    def _acquire(self) -> int:
        for _ in range(TRIES):
            descriptor = _open(self.path)
            try:
                if not _try_lock(descriptor):
                    raise InUseError(self.what, _holder(descriptor))
                if _is_at(self.path, descriptor):
                    self._require_ours(descriptor)
                    return descriptor
            except BaseException as error:
                os.close(descriptor)
                if isinstance(error, OSError):  # there are no locks, so it is nobody's
                    self._remove_if_empty()
                raise
            os.close(descriptor)  # its holder has removed it between the two calls
        raise InUseError(self.what, Holder())

    def _remove_if_empty(self) -> None:
        with contextlib.suppress(OSError):
            if not self.path.stat().st_size:
                self.path.unlink()

    def _require_ours(self, descriptor: int) -> None:
        text = _read(descriptor).strip(b"\0")  # of a file that lost its contents with the power
        if text and not text.startswith(b"minihyperflows"):
            raise UserError(f"{self.path} is not a lock of minihyperflows: choose another place")

    def _sign(self, kind: str) -> None:
        assert self._descriptor is not None
        text = f"minihyperflows {kind} {os.getpid()} {platform.node()}\n"
        os.ftruncate(self._descriptor, 0)
        os.lseek(self._descriptor, 0, os.SEEK_SET)
        os.write(self._descriptor, text.encode("utf-8", "replace"))

    def check(self) -> None:
        """Raise UserError if the file is gone: others may be writing here then."""
        if self._descriptor is None or not _is_at(self.path, self._descriptor):
            raise UserError(
                f"{self.what} was moved or removed while this was writing to it, or its lock was: "
                "nothing more is written; what was saved before is where it was moved to"
            )

    def release(self) -> None:
        """Let others have it; the file is removed."""
        _held.discard(self)
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is None:
            return
        with contextlib.suppress(OSError):  # the folder may be gone; Windows removes no open file
            if _is_at(self.path, descriptor):
                self.path.unlink()
        os.close(descriptor)
        if os.name == "nt":
            with contextlib.suppress(OSError):  # the next one may have opened it already
                self.path.unlink()

    def forget(self) -> None:
        """Close the file without releasing the lock: for the child of a fork."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)


# A child that is forked while a lock is held would keep it for as long as it lives.
_held: set[Lock] = set()


def _forget_all() -> None:
    for lock in list(_held):
        lock.forget()
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)


@contextlib.contextmanager
def locked(
    folder: Path, kind: str = RUN, may_wait: Callable[[Holder], bool] | None = None
) -> Iterator[Lock]:
    """The lock on ``folder``, which is made if needed, and removed again if it stays empty.

    Args:
        folder: the folder.
        kind: of the holder: ``RUN`` or ``WORKER``.
        may_wait: asked, while another has the lock, whether to wait on; None: never.

    Raises:
        InUseError: another has it.
        UserError: the folder cannot be made or locked.
    """
    made: list[Path] = []
    try:
        lock = _wait_for(folder, kind, may_wait, made)
        try:
            yield lock
        finally:
            lock.release()
    finally:
        _remove_empty(made)


def _wait_for(
    folder: Path, kind: str, may_wait: Callable[[Holder], bool] | None, made: list[Path]
) -> Lock:
    while True:
        try:
            made[:] = [*made, *(p for p in _make(folder) if p not in made)]
            return Lock(folder / NAME, folder, kind)
        except InUseError as error:
            if may_wait is None or not may_wait(error.holder):
                raise
        time.sleep(SECONDS_BETWEEN_TRIES)


@contextlib.contextmanager
def locked_file(path: Path) -> Iterator[None]:
    """The lock on a file that is written as a whole; its folder must be there.

    Raises:
        InUseError: another has it.
        UserError: it cannot be locked.
    """
    target = Path(os.path.realpath(path))  # one lock for a file and the links to it
    if not target.parent.is_dir():
        raise UserError(f"cannot write {path}: there is no folder {path.parent}")
    lock = Lock(target.with_name(_lock_name(target.name)), path)
    try:
        yield
    finally:
        lock.release()


def _lock_name(name: str) -> str:
    """``name.lock``; of a name that leaves no room for that, the beginning and a checksum."""
    if len(os.fsencode(name)) > _MOST_BYTES:
        name = f"{name[:50]}-{hashlib.sha256(os.fsencode(name)).hexdigest()[:16]}"
    return f"{name}.lock"


# -- the system ----------------------------------------------------------------------------------


def _make(folder: Path) -> list[Path]:
    """Make ``folder``; returns what was missing, the innermost first."""
    missing = [p for p in (folder, *folder.parents) if not os.path.lexists(p)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        _remove_empty(missing)
        raise UserError(f"cannot make the folder {folder}: {reason_of(error)}") from error
    return missing


def _remove_empty(made: list[Path]) -> None:
    for folder in made:
        with contextlib.suppress(OSError, ValueError):  # it has contents, as it should
            folder.rmdir()


def _open(path: Path) -> int:
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0) | getattr(os, "O_NOFOLLOW", 0)
    for _ in range(TRIES):
        with contextlib.suppress(FileNotFoundError):  # the one before has removed the folder
            return os.open(path, flags, 0o666)
        path.parent.mkdir(parents=True, exist_ok=True)
    return os.open(path, flags, 0o666)


def _try_lock(descriptor: int) -> bool:
    """Whether the lock was free, and is ours now."""
    try:
        if sys.platform == "win32":
            os.lseek(descriptor, _FAR, os.SEEK_SET)
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # Windows says EACCES
        return False
    return True


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether ``path`` still leads to the open file."""
    if os.name == "nt":  # where no open file can be removed
        return path.exists()
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except OSError:
        return False


def _read(descriptor: int) -> bytes:
    os.lseek(descriptor, 0, os.SEEK_SET)
    return os.read(descriptor, 1000)


def _holder(descriptor: int) -> Holder:
    try:
        found = _TEXT.fullmatch(_read(descriptor))
    except OSError:
        found = None
    if not found:  # it has not signed yet
        return Holder()
    kind, process, host = (part.decode("utf-8", "replace") for part in found.groups())
    return Holder(kind, int(process), host)
