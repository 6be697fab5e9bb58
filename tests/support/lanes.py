"""Two lanes of tests: ``pytest -m "not slow"`` is through in about a minute.

Slow is what takes a processor more than half a second. Of a test with many cases the small ones
stay in the fast lane: ``@pytest.mark.parametrize("name", ["lenet300", *large("resnet50")])``.
"""

from __future__ import annotations

from typing import Any

import pytest


def large(*values: Any) -> list[Any]:
    """Cases for ``parametrize`` that are slow; a tuple has the values of several arguments."""
    cases = (value if isinstance(value, tuple) else (value,) for value in values)
    return [pytest.param(*case, marks=pytest.mark.slow) for case in cases]
