"""How pytest checks the chapters: ``pytest --nbval chapters`` runs every cell and compares outputs.

Plain nbval compares outputs letter by letter. Here numbers may differ by a relative ``TOLERANCE``,
because the last digits of a floating-point result depend on the machine. A number with a point or
an exponent is compared so; whole numbers and words must agree exactly. nbval has no public hook
for this, so this file uses three of its attributes; tests/book/test_notebooks.py fails if they go.

The tolerance is a second net. Every claim of a chapter is an ``assert`` with a tolerance of its
own, and what is nothing but round-off is asserted to be small, not printed.
"""

from __future__ import annotations

import math
import os
import re

# Two numbers closer than half a unit in the fourth significant digit (of 1.000) are the same.
TOLERANCE = 5e-4
# Numbers below this are round-off: any two of them are the same.
ROUND_OFF = 1e-12

NUMBER = re.compile(r"[-+]?(?:\d+\.\d*|\.\d+|\d+(?=[eE]))(?:[eE][-+]?\d+)?")
NOT_COMPARED = ("stderr", "image/svg+xml")  # progress bars and warnings; files with a time stamp
MARKED_TAGS = ("slow", "gpu")

THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")


def set_kernel_environment() -> None:
    """What every kernel inherits: one thread unless told otherwise, sets that print in order."""
    for name in THREADS:
        os.environ.setdefault(name, "1")
    os.environ["PYTHONHASHSEED"] = "0"
    os.environ.pop("MPLBACKEND", None)  # the kernel chooses the one that shows figures


set_kernel_environment()


class Output(str):
    """The text of an output, equal to another if the words agree and the numbers nearly do."""

    __hash__ = None  # near is not transitive, so no hash can fit

    def __eq__(self, other: object) -> bool:
        return isinstance(other, str) and same_text(self, other)

    def __ne__(self, other: object) -> bool:
        return not self == other


def same_text(a: str, b: str) -> bool:
    """True if ``a`` and ``b`` differ at most in their numbers, and those by little."""
    if NUMBER.split(a) != NUMBER.split(b):
        return False
    pairs = zip(NUMBER.findall(a), NUMBER.findall(b), strict=True)
    return all(same_number(float(x), float(y)) for x, y in pairs)


def same_number(x: float, y: float) -> bool:
    return math.isclose(x, y, rel_tol=TOLERANCE, abs_tol=ROUND_OFF)


def pytest_collectstart(collector) -> None:
    """For each notebook: the outputs not to compare."""
    if hasattr(collector, "skip_compare"):
        collector.skip_compare += NOT_COMPARED


def pytest_itemcollected(item) -> None:
    """For each cell: compare with a tolerance, and turn its tags into pytest's markers."""
    if not hasattr(item, "sanitize"):
        return
    sanitize = item.sanitize
    item.sanitize = lambda s: Output(sanitize(s)) if isinstance(s, str) else s
    for tag in item.cell.metadata.get("tags", []):
        if tag in MARKED_TAGS:
            item.add_marker(tag)
