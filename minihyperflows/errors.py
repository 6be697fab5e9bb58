"""The error that a user of the laboratory sees: a file, folder or option that cannot be used."""

from __future__ import annotations


class UserError(Exception):
    """What was wrong and what to do, in one line; the command line prints it and exits with 2.

    Line breaks are folded into spaces, since a message may quote a path or a file's contents.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.splitlines()))


def reason_of(error: Exception) -> str:
    """What went wrong, as the system words it, without the number and the file's name."""
    return str(getattr(error, "strerror", None) or error)


class FormatError(ValueError):
    """What is wrong inside a file, worded so that the file's name can stand before it."""


class OutOfTimeError(Exception):
    """A run stopped at the end of an epoch because its time was over; its checkpoint is written."""
