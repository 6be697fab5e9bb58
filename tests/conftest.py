"""What all tests share."""

from __future__ import annotations

import numpy as np
import pytest
from gpu import gpu  # noqa: F401 - a fixture


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
