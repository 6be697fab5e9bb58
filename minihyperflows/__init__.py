"""minihyperflows: Hyperflows pruning from scratch, in NumPy. A package to read, a book to run.

The floors, in reading order; each imports only from those before it:

    engine       arrays and gradients: Tensor, Function, backward
    functional   the differentiable functions: F.linear, F.conv2d, F.cross_entropy, ...
    nn           modules, layers, initial values, optimisers, models
    flows        the subject: gates, pressure, the scheduler, stages, the power law
    related      the neighbours: importance scores, gradient flow, DHP
    testing      public checks, which the tests and the book's exercises use
    data         data sets, their files and their augmentation
    analysis     measures and statistics that chapters and studies share
    lab          running experiments: recipes, training, runs, sweeps, plots
    studies      the long experiments behind the chapters
    bench        how fast, beside PyTorch and on a GPU
    cli          the command line

``emulator`` is a GPU for those who have none.
"""

import importlib
from typing import Any

from minihyperflows import flows, functional, nn, related, testing
from minihyperflows.engine import (
    DeviceError,
    DoubtfulResultWarning,
    Function,
    GraphError,
    NonFiniteLossError,
    ShapeError,
    Tensor,
    apply,
    cuda_available,
    no_grad,
)
from minihyperflows.nn import models, optim

__version__ = "0.1.0"

# Rooms that take longer to import (matplotlib, tqdm) and are there when they are asked for.
LATER = ("analysis", "bench", "data", "lab", "studies")


def __getattr__(name: str) -> Any:
    """``mh.lab`` after ``import minihyperflows as mh``."""
    if name in LATER:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *LATER})


__all__ = [
    "DeviceError",
    "DoubtfulResultWarning",
    "Function",
    "GraphError",
    "NonFiniteLossError",
    "ShapeError",
    "Tensor",
    "__version__",
    "apply",
    "cuda_available",
    "flows",
    "functional",
    "models",
    "nn",
    "no_grad",
    "optim",
    "related",
    "testing",
]
