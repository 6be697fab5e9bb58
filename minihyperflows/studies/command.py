"""What the commands of studies share: types of options, and how they end if they cannot go on."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeAlias

from minihyperflows.engine.blas import one_blas_thread
from minihyperflows.errors import UserError
from minihyperflows.lab.console import run_command

CONTINUES = "finished runs are recorded, and the same command continues"
DIGITS = 6  # of a fraction; tables keep as many or more


def parse_seed(text: str) -> int:
    """The type of an option that is a seed: a whole number from 0 on.

    Raises:
        UserError: it is none.
    """
    if not text.isdecimal():
        raise UserError(f"{text!r} is not a seed: write a whole number from 0 on")
    return int(text)


def parse_fraction(text: str, whole: bool = False) -> float:
    """The type of an option that is a fraction: above 0 and below 1, with ``whole`` also 1.

    Rounded to the digits that tables keep, or a run would not be recognised by its row.

    Raises:
        UserError: it is none.
    """
    try:
        value = float(f"{float(text):.{DIGITS}g}")
    except ValueError:
        value = math.nan
    if not (0 < value < 1 or (whole and value == 1)):
        most = "at most 1" if whole else "below 1"
        raise UserError(f"{text!r} is not a fraction: write a number above 0 and {most}")
    return value


Main: TypeAlias = Callable[..., None]


def reporting() -> Callable[[Main], Main]:
    """Says in one line what was wrong (exit status 2), or that the work was interrupted (130).

    For the ``main`` of a study, as a decorator: ``@reporting()``. A study records run by run, so
    after an interruption only the run in progress has to be repeated. BLAS computes on one thread,
    also in what a study computes with NumPy itself. See
    :func:`minihyperflows.lab.console.run_command`.
    """

    def decorate(main: Main) -> Main:
        @wraps(main)
        def reported(*arguments: Any, **options: Any) -> None:
            work = one_blas_thread(main)
            if status := run_command(lambda: work(*arguments, **options), lambda: CONTINUES):
                raise SystemExit(status)

        return reported

    return decorate
