"""Runs on workers that may die at any moment; processes of this machine are such workers.

A worker that dies costs its run an attempt: the next one continues from the last checkpoint. Each
attempt marks the run's folder as its own and looks at the mark again after every epoch, before it
saves anything. So an attempt that has been replaced stops at the end of its epoch and leaves the
folder alone: one on a machine that only seemed dead, or of a command that was killed and repeated.
Until then the folder is locked, and its successor waits.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import signal
import threading
import traceback
import uuid
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from enum import Enum
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from minihyperflows.engine import DeviceError, DoubtfulResultWarning
from minihyperflows.engine.threads import set_threads
from minihyperflows.errors import UserError, reason_of
from minihyperflows.lab.folders import RunFolder, locked
from minihyperflows.lab.locks import WORKER, Holder
from minihyperflows.lab.plugins import Plugin, blame
from minihyperflows.lab.recipes import Recipe
from minihyperflows.lab.runs import run
from minihyperflows.lab.training import EpochRecord

ATTEMPTS = 3  # a run is given up when as many workers have died of it
SECONDS_TO_WAIT = 1.0  # for news, at a time: on Windows Ctrl-C waits as long

# How many threads the BLAS libraries start, read when they are loaded.
THREAD_VARIABLES = (
    *("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS"),
    "VECLIB_MAXIMUM_THREADS",
)


def new_token() -> str:
    """A name that nothing else has."""
    return uuid.uuid4().hex


class Kind(Enum):
    """What can happen to a piece of work."""

    EPOCH = "an epoch is over"
    ROWS = "rows of a table are there"
    FINISHED = "the run is finished"
    DIED = "its worker died"
    FAILED = "the run cannot be finished"
    SUPERSEDED = "another command has taken the folder over"


NEWS = Kind.EPOCH, Kind.ROWS  # from work that goes on


class _SupersededError(Exception):
    """The folder is another attempt's now."""


class Work(Protocol):
    """What a worker can be given: an attempt at a run, or some settings of a study.

    Attributes:
        token: a name that nothing else has.
        threads: how many it uses.
        deaths: how many workers have died of it.
    """

    @property
    def token(self) -> str: ...
    @property
    def threads(self) -> int: ...
    @property
    def deaths(self) -> int: ...

    def next(self) -> Work:
        """The same for another worker, after one has died of it."""

    def withdraw(self) -> None:
        """Let it stop when it can, wherever it runs."""

    def carry_out(self, report: Callable[[Any], None]) -> tuple[Kind, str]:
        """Do it in this process. Returns what came of it, and why or with which rows.

        ``report`` is called with the number of every epoch that is over, or with rows in JSON.
        """


@dataclasses.dataclass(frozen=True)
class Attempt:
    """One attempt at a run: what :func:`minihyperflows.lab.run` needs, and how often it was lost.

    ``siblings``: other runs' folders, whose dense network serves this run as well if it is there.
    """

    recipe: Recipe
    folder: Path
    seed: int
    device: str = "cpu"
    data_dir: Path | None = None
    threads: int = 1
    siblings: tuple[Path, ...] = ()
    plugins: tuple[Plugin, ...] = ()
    deaths: int = 0
    token: str = dataclasses.field(default_factory=new_token)

    @property
    def mark(self) -> Path:
        """The file that says whose the folder is."""
        return RunFolder(self.folder).attempt

    def next(self) -> Attempt:
        """The attempt after this one, whose worker died."""
        return dataclasses.replace(self, deaths=self.deaths + 1, token=new_token())

    def is_current(self) -> bool:
        """Whether the folder is this attempt's."""
        try:
            return self.mark.read_text(encoding="utf-8") == self.token
        except OSError:
            return False

    def take(self) -> None:
        """Make the folder this attempt's.

        Raises:
            UserError: it is not a run's, or cannot be written to.
        """
        folder = RunFolder(self.folder)
        folder.require_ours()
        folder.create()
        try:  # half a token is nobody's, so this needs no temporary file
            self.mark.write_text(self.token, encoding="utf-8")
        except OSError as error:
            raise UserError(f"cannot write {self.mark}: {reason_of(error)}") from error

    def withdraw(self) -> None:
        """Let the attempt stop after its epoch, wherever it runs."""
        if self.is_current():
            with suppress(OSError):  # the folder is gone, or read-only by now
                self.mark.unlink(missing_ok=True)

    def carry_out(self, report: Callable[[int], None]) -> tuple[Kind, str]:
        """Do the run, in this process. Returns what came of it, and why.

        ``report`` is called with the number of every epoch that is over.
        """
        if self.is_current():  # Dask has started it again by itself, since its worker died
            return Kind.DIED, "the cluster lost it"

        def after_epoch(record: EpochRecord) -> None:
            if not self.is_current():
                raise _SupersededError
            report(record.epoch)

        def may_wait(holder: Holder) -> bool:
            """For an attempt before this one, which stops at the end of its epoch."""
            if not self.is_current():
                raise _SupersededError
            return holder.kind == WORKER

        try:
            self.take()
            set_threads(self.threads)
            with locked(RunFolder(self.folder), kind=WORKER, may_wait=may_wait) as lock:
                run(
                    self.recipe,
                    self.folder,
                    data_dir=self.data_dir,
                    device=self.device,
                    seed=self.seed,
                    progress=False,
                    dense_from=self._dense_network(),
                    observe=after_epoch,
                    lock=lock,
                    plugins=self.plugins,
                )
        except _SupersededError:
            return Kind.SUPERSEDED, str(self.folder)
        except (UserError, DeviceError) as error:
            return Kind.FAILED, str(error)
        except MemoryError:
            return Kind.DIED, "out of memory"
        except Exception as error:  # one run must not end the others, whatever it is
            return Kind.FAILED, describe(error)
        finally:
            self.withdraw()
        return Kind.FINISHED, ""

    def _dense_network(self) -> Path | None:
        """The folder of a run that has trained the dense network that this one begins with."""
        if not self.recipe.dense.epochs or RunFolder(self.folder).checkpoint.exists():
            return None
        folders = (folder for folder in self.siblings if RunFolder(folder).dense.exists())
        return next(folders, None)


@dataclasses.dataclass(frozen=True)
class Event:
    """Something that happened to ``attempt``; ``epoch`` is the last one that is over, ``reason``
    says why, or holds the rows of a study."""

    attempt: Any  # a Work
    kind: Kind
    reason: str = ""
    epoch: int = 0


def news_of(attempt: Work, report: int | str) -> Event:
    """What work has reported: an epoch that is over, or rows in JSON."""
    if isinstance(report, int):
        return Event(attempt, Kind.EPOCH, epoch=report)
    return Event(attempt, Kind.ROWS, report)


def carry_out(work: Work, report: Callable[[Any], None]) -> tuple[Kind, str]:
    """:meth:`Work.carry_out`, in the process that this is called in."""
    return work.carry_out(report)


def describe(error: BaseException) -> str:
    """An unexpected exception in one line: what and where, in a plugin if it came through one."""
    if blamed := blame(error):
        return blamed
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({Path(place.filename).name}, line {place.lineno})"


class Pool(Protocol):
    """What carries out attempts."""

    def has_room(self) -> bool:
        """Whether another attempt can be started."""

    def start(self, attempt: Work) -> None:
        """Begin an attempt."""

    def wait(self) -> Sequence[Event]:
        """What has happened since; comes back after a while even if nothing has."""

    def close(self) -> None:
        """Stop what still runs."""


def supervise(pool: Pool, attempts: Sequence[Work]) -> Generator[Event]:
    """Carry out ``attempts`` and tell what happens, starting again what died.

    An attempt ends with an event FINISHED or FAILED. (DIED is followed by another attempt.)

    Raises:
        UserError: another command works in the same folders.
    """
    waiting, running = deque(attempts), 0
    while waiting or running:
        while waiting and pool.has_room():
            pool.start(waiting.popleft())
            running += 1
        for event in pool.wait():
            running -= event.kind not in NEWS
            if event.kind is Kind.DIED:
                again = event.attempt.next()
                if again.deaths < ATTEMPTS:
                    waiting.appendleft(again)
                else:
                    reason = f"{ATTEMPTS} workers died of it, the last: {event.reason}"
                    event = dataclasses.replace(event, kind=Kind.FAILED, reason=reason)
            if event.kind is Kind.SUPERSEDED:
                raise UserError(f"{event.reason} was taken over by another command: this one ends")
            yield event


# -- processes of this machine -------------------------------------------------------------------


class Processes:
    """A :class:`Pool` of up to ``workers`` processes, a new one for each attempt.

    They are spawned, not forked, so that they start in the same state on every system. They end
    when this process ends, however it does.
    """

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._context = multiprocessing.get_context("spawn")
        self._running: dict[Any, tuple[Any, Work]] = {}  # by the end of the pipe from it

    def __str__(self) -> str:
        return f"{self.workers} local worker{'s' * (self.workers > 1)}"

    def has_room(self) -> bool:
        return len(self._running) < self.workers

    def start(self, attempt: Work) -> None:
        ours, theirs = self._context.Pipe(duplex=False)
        process = self._context.Process(target=_work, args=(attempt, theirs), daemon=True)
        with _interrupts_held_back(), _environment(attempt.threads):
            process.start()
        theirs.close()  # the worker's copy is then the only one: its end is the pipe's end
        self._running[ours] = process, attempt

    def wait(self) -> Sequence[Event]:
        return [self._receive(end) for end in wait(list(self._running), SECONDS_TO_WAIT)]

    def _receive(self, connection: Any) -> Event:
        process, attempt = self._running[connection]
        try:
            message = connection.recv()
        except (EOFError, OSError):
            message = None
        if isinstance(message, int | str):
            return news_of(attempt, message)
        del self._running[connection]
        connection.close()
        process.join()
        kind, reason = message or (Kind.DIED, _cause_of_death(process.exitcode))
        return Event(attempt, kind, reason)

    def close(self) -> None:
        for process, _ in self._running.values():
            process.terminate()
        for connection, (process, attempt) in self._running.items():
            process.join()
            connection.close()
            attempt.withdraw()
        self._running.clear()


def _work(attempt: Work, connection: Any) -> None:
    """What a worker process does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that supervises
    warnings.simplefilter("ignore", DoubtfulResultWarning)  # the summary has them
    tqdm.set_lock(threading.RLock())  # else a system-wide one, which a death would leave behind
    threading.Thread(target=_end_with_parent, daemon=True).start()
    connection.send(carry_out(attempt, connection.send))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _cause_of_death(exit_code: int | None) -> str:
    if exit_code is not None and exit_code < 0:
        return f"signal {-exit_code}"
    return f"exit status {exit_code}"


@contextmanager
def _environment(threads: int) -> Iterator[None]:
    """Processes that are started inside load a BLAS library with ``threads`` threads."""
    before = {name: os.environ.get(name) for name in THREAD_VARIABLES}
    os.environ.update(dict.fromkeys(THREAD_VARIABLES, str(threads)))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Processes that are started inside never see Ctrl-C; this one sees it afterwards.

    (Windows has no such mask; there a worker ignores Ctrl-C from its first line on.)
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # it comes with the first process, and lifts the mask
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
