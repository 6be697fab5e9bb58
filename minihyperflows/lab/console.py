"""How a command of ours ends: never with a traceback for something that its user did.

One place for ``minihyperflows`` and for ``python -m minihyperflows.studies.NAME``. Exit status:
0 done, 2 a user's error in one line on standard error, 130 interrupted. An exception from a plugin
is told with its place there. What is none of these is our mistake, and shows its traceback.

Standard output may be closed, a full device, or a pipe whose reader has left. The work goes on all
the same, since its results are in files, and nothing more is printed. A reader that leaves
(``| head -1``) has what it wanted, and so has somebody who closes the stream: status 0. What a full
device lost is said at the end, with status 2.
"""

from __future__ import annotations

import argparse
import errno
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from typing import Any, NoReturn, TextIO, cast

from tqdm import tqdm

from minihyperflows.engine import DeviceError, DoubtfulResultWarning, NonFiniteLossError
from minihyperflows.errors import UserError, reason_of
from minihyperflows.lab.plugins import blame

DONE, WRONG, INTERRUPTED = 0, 2, 130


def run_command(work: Callable[[], int | None], after_interrupt: Callable[[], str]) -> int:
    """Do ``work`` and return the exit status; an error is told in one line.

    Args:
        work: what the command does; it returns a status other than 0 if it has one, and may raise
            SystemExit, as argparse does.
        after_interrupt: what to say, after "interrupted:", to somebody who pressed Ctrl-C.
    """
    with _standard_streams() as output:
        try:
            status = _status_of(work, after_interrupt)
        except SystemExit as end:
            output.flush()
            if lost := _lost(output):
                raise SystemExit(_complain(lost)) from None
            raise end
        output.flush()
        if status == DONE and (lost := _lost(output)):
            return _complain(lost)
        return status


def _status_of(work: Callable[[], int | None], after_interrupt: Callable[[], str]) -> int:
    try:
        with _warnings_in_a_line():
            return work() or DONE
    except (UserError, DeviceError, NonFiniteLossError) as error:
        return _complain(error)
    except MemoryError as error:
        return _complain(f"out of memory ({error}): a smaller network or batch needs less")
    except OSError as error:
        if error.filename is None:  # not about a file that somebody named
            return _complain_of_plugin(error)
        return _complain(f"cannot use {error.filename}: {reason_of(error)}")
    except KeyboardInterrupt:
        _say(f"interrupted: {after_interrupt()}")
        return INTERRUPTED
    except Exception as error:
        return _complain_of_plugin(error)


def _complain_of_plugin(error: Exception) -> int:
    """A mistake in a user's plugin is the user's; any other is ours."""
    if blamed := blame(error):
        return _complain(blamed)
    raise error


def _complain(problem: object) -> int:
    _say(f"error: {problem}")
    return WRONG


def _say(text: str) -> None:
    """A line of its own, above a progress bar if there is one."""
    tqdm.write(" ".join(text.splitlines()), file=sys.stderr)


# -- warnings ------------------------------------------------------------------------------------


@contextmanager
def _warnings_in_a_line() -> Iterator[None]:
    """Our warnings are told in a line each, the others as always."""
    show = warnings.showwarning

    def show_ours(message: Any, category: Any, *place: Any, **more: Any) -> None:
        if issubclass(category, DoubtfulResultWarning):
            warn(str(message))
        else:
            show(message, category, *place, **more)

    with warnings.catch_warnings():
        warnings.simplefilter("always", DoubtfulResultWarning)
        warnings.showwarning = show_ours
        yield


def warn(text: str) -> None:
    """Tell a warning in a line."""
    _say(f"warning: {text}")


# -- standard streams ----------------------------------------------------------------------------


class Stream:
    """A standard stream that never fails: what cannot be written is lost, and the reason kept.

    Attributes:
        lost: why writing failed, the first time; None while all is well.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.lost: OSError | None = None

    def write(self, text: str) -> int:
        self._try(lambda: self._stream.write(self._writable(text)))
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _writable(self, text: str) -> str:
        """``text`` with backslashes for what the stream's encoding does not have."""
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        errors = getattr(self._stream, "errors", None) or "strict"
        try:
            text.encode(encoding, errors)
        except UnicodeEncodeError:
            return text.encode(encoding, "backslashreplace").decode(encoding)
        return text

    def _try(self, action: Callable[[], object]) -> None:
        if self.lost is not None:
            return
        try:
            action()
        except OSError as error:
            self.lost = error
            _discard_the_rest(self._stream)


def _discard_the_rest(stream: TextIO) -> None:
    """What is still in the stream's buffer would fail again when Python ends: send it nowhere."""
    try:
        descriptor = stream.fileno()
    except (AttributeError, OSError, ValueError):  # no file of the system's
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)


@contextmanager
def _standard_streams() -> Iterator[Stream]:
    """Both streams as :class:`Stream`; yields that of standard output."""
    with ExitStack() as stack:
        if sys.stdout is None or sys.stderr is None:
            _occupy_closed_descriptors()
            nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            output, errors = sys.stdout or nowhere, sys.stderr or nowhere
        else:
            output, errors = sys.stdout, sys.stderr
        streams = Stream(output), Stream(errors)
        stack.enter_context(redirect_stdout(cast(TextIO, streams[0])))
        stack.enter_context(redirect_stderr(cast(TextIO, streams[1])))
        yield streams[0]


def _occupy_closed_descriptors() -> None:
    """Else a file that is opened gets the number of the closed stream, and what a library prints
    goes into it."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)


def _lost(output: Stream) -> str | None:
    """What to say about output that could not be written; None if there is nothing to say."""
    if output.lost is None or output.lost.errno in _NO_READER:
        return None
    return f"cannot write to standard output: {output.lost.strerror or output.lost}"


# How a system says that nobody reads the pipe any more; Windows has its own way.
_NO_READER = {errno.EPIPE, errno.EINVAL} if os.name == "nt" else {errno.EPIPE}


# -- options -------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are a user's errors like all others."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        words = sys.argv[1:] if args is None else list(args)
        if any("\0" in word for word in words):  # no name of a file can have one
            self.error("there is a NUL character in the command line")
        return super().parse_known_args(words, namespace)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")
