"""How the command of a study ends if it cannot go on."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeAlias

from minihyperflows.engine.blas import one_blas_thread
from minihyperflows.lab.console import run_command

CONTINUES = "finished runs are recorded, and the same command continues"
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
