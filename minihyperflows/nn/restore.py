"""Borrowing a network: what is set meanwhile is put back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from minihyperflows.nn.module import Module


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


@contextmanager
def in_mode(net: Module, training: bool) -> Iterator[None]:
    """All modules of ``net`` in training or evaluation mode; afterwards each in its own again.

    A module that its user has put into evaluation mode, such as a frozen batch norm, stays so.
    """
    with restored([(module, "training") for _, module in net.named_modules()]):
        net.train(training)
        yield
