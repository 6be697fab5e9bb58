"""How studies run a trainer: to a certain epoch, and on from a state that others begin with too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np

from minihyperflows.lab.training import EpochRecord, Trainer

State: TypeAlias = tuple[dict[str, np.ndarray], dict[str, Any]]


def state_of(trainer: Trainer) -> State:
    """A copy of everything that the next epoch depends on."""
    arrays, values = trainer.state_dict()
    return {name: array.copy() for name, array in arrays.items()}, values


def run_until(
    trainer: Trainer, epoch: int | None = None, tick: Callable[[], Any] = lambda: None
) -> list[EpochRecord]:
    """Train until this many epochs are finished, or all; ``tick`` is called after each."""
    records = []
    while not trainer.finished and (epoch is None or trainer.epoch < epoch):
        records.append(trainer.run_epoch())
        tick()
    return records
