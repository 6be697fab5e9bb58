"""Borrowing a network: what is set meanwhile is put back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager


@contextmanager
def restored(attributes: Iterable[tuple[object, str]]) -> Iterator[None]:
    """Afterwards, and after an error too, these attributes (object, name) hold what they held.

    The values themselves are not copied: assign new ones, do not write into them.
    """
    saved = [(owner, name, getattr(owner, name)) for owner, name in attributes]
    try:
        yield
    finally:
        for owner, name, value in saved:
            setattr(owner, name, value)
