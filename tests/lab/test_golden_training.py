"""A training ends as it did before the package was rebuilt (tests/golden/make_training.py)."""

from __future__ import annotations

import importlib.util
from types import ModuleType

import numpy as np
import pytest
from support import GOLDEN


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    path = GOLDEN.with_name("make_training.py")
    spec = importlib.util.spec_from_file_location("make_training", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:landing removed")
@pytest.mark.parametrize("name", ["perceptron", "convolutional"])
def test_a_training_ends_as_it_did(maker: ModuleType, name: str) -> None:
    """To rounding, which depends on the BLAS kernel; on one machine it is so to the bit."""
    found = maker.training(name)
    with np.load(maker.FILE) as file:
        golden = {key: file[key] for key in file.files if key.startswith(f"{name}.")}
    assert sorted(found) == sorted(golden)
    density = golden[f"{name}.density"]
    assert density[0] == 1 > density[-1]
    assert len(set(density)) > 4  # the pressure moved them
    for key, expected in golden.items():
        np.testing.assert_allclose(maker.sample(found[key]), expected, rtol=1e-7, atol=1e-9)
