"""Who is measured against whom, and the clock.

Contenders take turns in one process, so that what else happens on the machine meets all of them.
What counts is the median over rounds, of times and of the ratio within a round.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import time
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import TypeAlias

import numpy as np

from minihyperflows.engine.threads import set_threads

OURS = "ours"
FORMATS = ("contiguous", "channels_last")  # PyTorch's two layouts of images

SAMPLE_SECONDS = 0.1  # a sample repeats its work until it is at least this long
# Before a sample. The threads of OpenBLAS and of OpenMP spin for a while after their last work: a
# step of LeNet in PyTorch took twice as long within 0.05 s of ours.
PAUSE_SECONDS = 0.5

# Runs its work once and returns the seconds that each part of it took.
Timed: TypeAlias = Callable[[], tuple[float, ...]]
# Is told what is being measured.
Progress: TypeAlias = Callable[[str], None]

# -- PyTorch -------------------------------------------------------------------------------------


def torch_available() -> bool:
    """True if PyTorch is installed."""
    return importlib.util.find_spec("torch") is not None


def torch_peers() -> ModuleType:
    """The module with PyTorch's side; imported here because PyTorch is optional, and large."""
    return importlib.import_module("minihyperflows.bench.torch_peers")


def torch_gpu_peers() -> ModuleType:
    """The module with PyTorch's side on a GPU."""
    return importlib.import_module("minihyperflows.bench.torch_gpu_peers")


def torch_version() -> str:
    """PyTorch's version."""
    return str(torch_peers().torch.__version__)


def torch_name(memory_format: str) -> str:
    """What PyTorch with ``memory_format`` is called in the records."""
    return f"torch_{memory_format}"


def format_of(contender: str) -> str:
    """The memory format of PyTorch's contender."""
    return contender.removeprefix(torch_name(""))


def use_threads(number: int, with_torch: bool) -> None:
    """Let our operations and BLAS use ``number`` threads, and PyTorch if it takes part."""
    set_threads(number)
    if with_torch:
        torch_peers().torch.set_num_threads(number)


# -- the clock -----------------------------------------------------------------------------------


def take_turns(
    contenders: Mapping[str, Timed], rounds: int, progress: Progress
) -> dict[str, np.ndarray]:
    """Milliseconds that each contender took, (rounds, parts), round by round in turn.

    Each has run twice before the first round. Short work is repeated: a sample is its mean.
    """
    progress("warming up")
    repeats = {name: _repeats(run) for name, run in contenders.items()}
    samples: dict[str, list[np.ndarray]] = {name: [] for name in contenders}
    for number in range(1, rounds + 1):
        progress(f"round {number} of {rounds}")
        for name, run in contenders.items():
            time.sleep(PAUSE_SECONDS)
            samples[name].append(np.mean([run() for _ in range(repeats[name])], axis=0))
    return {name: 1000 * np.array(times) for name, times in samples.items()}


def _repeats(run: Timed) -> int:
    """How often to repeat ``run`` in a sample."""
    run()  # allocates and fills caches
    return math.ceil(SAMPLE_SECONDS / sum(run()))


def faster_format(milliseconds: Mapping[str, float]) -> str | None:
    """PyTorch's faster memory format; None where it did not take part."""
    present = [name for name in map(torch_name, FORMATS) if name in milliseconds]
    return format_of(min(present, key=milliseconds.__getitem__)) if present else None


def ratio(samples: Mapping[str, np.ndarray], rival: str | None) -> float | None:
    """The median over rounds of PyTorch's time over ours: above 1 where ours is less.

    Args:
        samples: of whole work, (rounds, parts), from :func:`take_turns`.
        rival: PyTorch's memory format; None without it.
    """
    if rival is None:
        return None
    theirs, ours = (samples[name].sum(axis=1) for name in (torch_name(rival), OURS))
    return float(np.median(theirs / ours))
