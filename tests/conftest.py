"""What all tests share."""

from __future__ import annotations

import one_thread  # noqa: F401 - before NumPy

# isort: split

import os

import hypothesis
import numpy as np
import pytest
from gpu import gpu  # noqa: F401 - a fixture

# The same cases every time, unless somebody goes looking: HYPOTHESIS_PROFILE=large pytest ...
_QUIET = {"deadline": None, "database": None, "print_blob": True}
hypothesis.settings.register_profile("default", max_examples=150, derandomize=True, **_QUIET)
hypothesis.settings.register_profile("large", max_examples=20_000, derandomize=False, **_QUIET)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
