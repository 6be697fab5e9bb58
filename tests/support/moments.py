"""Programs that stop, or die, at a certain moment.

A test that does something to a program *while* it is at a certain place must not wait for it and
hope. Here the program itself dies there (:class:`Die`, :func:`die_before_writing`), or says that it
is there and stays until the test lets it go on (:class:`Hold` and :class:`Moments`).

A moment of a sweep's worker is a run's folder and either the number of the epoch that is over, of
which nothing is saved yet, or the name of the :class:`minihyperflows.lab.workers.Kind` it ends as.

As a program (in ``tests``): ``python -m support.moments WHAT COMMAND ...`` is ``minihyperflows
COMMAND ...`` with such workers if WHAT is ``'{"hold": [HOST, PORT, FOLDER, EPOCH]}'``, and with
``'{"die": [NAME, N]}'`` one that is killed before it puts a file of this name in its place for the
N-th time.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import socket
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from minihyperflows import cli
from minihyperflows.lab import cluster, workers
from minihyperflows.lab.workers import Attempt, Kind

SECONDS = 300.0  # until a test gives up; nothing depends on it unless a program hangs
KILL = getattr(signal, "SIGKILL", signal.SIGTERM)  # on Windows SIGTERM is as sudden

Moment = Callable[[Attempt, "int | str"], None]


def die() -> None:
    """The end of this process, as sudden as can be."""
    os.kill(os.getpid(), KILL)


# -- in the test -----------------------------------------------------------------------------------


class Stopped:
    """A program that has stopped at a moment; it goes on when this is closed."""

    def __init__(self, line: socket.socket) -> None:
        line.settimeout(SECONDS)
        self.line, self.file = line, line.makefile("r", encoding="utf-8")
        self.folder, self.at, self.pid = json.loads(self.file.readline())

    def __enter__(self) -> Stopped:
        return self

    def __exit__(self, *exception: object) -> None:
        self.file.close()
        self.line.close()

    def wait_for_its_end(self) -> None:
        """Until the program, which is not let go on, has ended."""
        assert self.file.read() == ""


class Moments:
    """Where programs say that they have stopped."""

    def __init__(self) -> None:
        self.server = socket.create_server(("127.0.0.1", 0))
        self.server.settimeout(SECONDS)
        self.address = self.server.getsockname()

    def __enter__(self) -> Moments:
        return self

    def __exit__(self, *exception: object) -> None:
        self.server.close()

    def next(self) -> Stopped:
        """The next program that stops."""
        return Stopped(self.server.accept()[0])


# -- in a worker -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Hold:
    """Stop the run in ``folder`` at each of the moments ``at`` until :class:`Moments` lets it."""

    address: tuple[str, int]
    folder: str
    at: tuple[int | str, ...]

    def __call__(self, attempt: Attempt, moment: int | str) -> None:
        if attempt.folder.name == self.folder and moment in self.at:
            with socket.create_connection(self.address) as line:
                line.sendall(json.dumps([self.folder, moment, os.getpid()]).encode() + b"\n")
                line.recv(1)  # comes back when the other end is closed


@dataclasses.dataclass(frozen=True)
class Die:
    """Kill the first ``times`` workers of the run in ``folder`` after ``epoch``.

    Its metrics as they were then are kept as ``keep/NUMBER.csv``.
    """

    folder: str
    epoch: int
    keep: Path
    times: int = 1

    def __call__(self, attempt: Attempt, moment: int | str) -> None:
        here = (attempt.folder.name, moment) == (self.folder, self.epoch)
        if here and attempt.deaths < self.times:
            self.keep.mkdir(exist_ok=True)
            shutil.copy(attempt.folder / "metrics.csv", self.keep / f"{attempt.deaths}.csv")
            die()


def work(moment: Moment, attempt: Attempt, connection: Any) -> None:
    """``workers._work`` with a moment; ``partial(work, moment)`` takes its place."""
    with mock.patch.object(workers, "carry_out", partial(_carry_out, moment)):
        workers._work(attempt, connection)


def work_on_cluster(moment: Moment, attempt: Attempt, topic: str) -> tuple[Kind, str]:
    """``cluster._carry_out_on_cluster`` likewise."""
    with mock.patch.object(cluster, "carry_out", partial(_carry_out, moment)):
        return cluster._carry_out_on_cluster(attempt, topic)


_real_carry_out = workers.carry_out


def _carry_out(moment: Moment, attempt: Attempt, report: Callable[[int], None]) -> tuple[Kind, str]:
    def reported(epoch: int) -> None:
        moment(attempt, epoch)
        report(epoch)

    kind, reason = _real_carry_out(attempt, reported)
    moment(attempt, kind.name)
    return kind, reason


# -- as a program ----------------------------------------------------------------------------------


def die_before_writing(name: str, n: int) -> None:
    """Kill this process just before a file gets the name ``name`` for the ``n``-th time."""
    left = n

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        if event == "os.rename" and Path(arguments[1]).name == name:  # os.replace says so too
            left -= 1
            if not left:
                die()

    sys.addaudithook(hook)


def main(what: str, *command: str) -> int:
    # what a shell starts in the background may ignore Ctrl-C, and its children with it
    signal.signal(signal.SIGINT, signal.default_int_handler)
    ((kind, arguments),) = json.loads(what).items()
    if kind == "die":
        die_before_writing(*arguments)
    else:
        host, port, folder, epoch = arguments
        workers._work = partial(work, Hold((host, port), folder, (epoch,)))
    return cli.main(command)


if __name__ == "__main__":
    from support import moments  # under the name that workers find it by

    sys.exit(moments.main(*sys.argv[1:]))
