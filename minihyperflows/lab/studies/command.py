"""How the command of a study ends when it cannot go on."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from minihyperflows.engine import DeviceError
from minihyperflows.lab.errors import UserError


@contextmanager
def reporting() -> Iterator[None]:
    """Says in one line what was wrong (exit status 2), or that the work was interrupted (130).

    For the ``main`` of a study, as a decorator: ``@reporting()``. A study records run by run, so
    after an interruption only the run in progress has to be repeated.
    """
    try:
        yield
    except (UserError, DeviceError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print(
            "interrupted: finished runs are recorded, and the same command continues",
            file=sys.stderr,
        )
        raise SystemExit(130) from None
