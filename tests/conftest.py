"""What all tests share."""

from __future__ import annotations

import support.one_thread  # noqa: F401 - before NumPy

# isort: split

import gc
import importlib
import os
import sys
from collections import Counter
from collections.abc import Iterator

import hypothesis
import numpy as np
import pytest
from support.gpu import gpu  # noqa: F401 - a fixture

from minihyperflows.engine.blas import blas_threads, set_blas_threads
from minihyperflows.engine.threads import set_threads

# The same cases every time, unless somebody goes looking: HYPOTHESIS_PROFILE=large pytest ...
# Nothing depends on how fast the machine is.
_QUIET = {"deadline": None, "database": None, "print_blob": True}
_QUIET["suppress_health_check"] = [hypothesis.HealthCheck.too_slow]
hypothesis.settings.register_profile("default", max_examples=150, derandomize=True, **_QUIET)
hypothesis.settings.register_profile("large", max_examples=20_000, derandomize=False, **_QUIET)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    """No test hands its number of threads on to the next: ``bench`` chooses one, among others."""
    before = blas_threads()
    yield
    set_threads(None)
    set_blas_threads(before)
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(before)


@pytest.fixture(scope="session", autouse=True)
def kernels_are_compiled_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """For all processes that share the tests (xdist) together."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "kernels"
    folder.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        compiler = importlib.import_module("minihyperflows.emulator.compilation")
        patch.setattr(compiler, "_folder", lambda: folder)
        yield


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


# -- the order, and what was skipped ---------------------------------------------------------------

SKIPPED = "minihyperflows/skipped"  # in pytest's cache
_skipped: set[str] = set()  # ids of tests and of whole files


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--last-skipped", action="store_true", help="only what the last run had to skip"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.option.loadscopereorder = False  # xdist's own order is by number of tests


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The longest files first if several processes share them: none is left alone with one."""
    if config.option.last_skipped:
        wanted = set(config.cache.get(SKIPPED, []))
        items[:] = [i for i in items if wanted & {i.nodeid, i.nodeid.partition("::")[0]}]
    if hasattr(config, "workerinput"):
        slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
        items.sort(key=lambda item: (item.path.suffix != ".ipynb", -slow[item.path]))


def pytest_collection_finish() -> None:
    """What is loaded stays: collecting garbage need not look at it again in every test."""
    gc.freeze()


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.skipped:
        _skipped.add(report.nodeid)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.skipped:
        _skipped.add(report.nodeid)


def pytest_sessionfinish(session: pytest.Session) -> None:
    cache = getattr(session.config, "cache", None)  # there is none with -p no:cacheprovider
    if cache is not None and not hasattr(session.config, "workerinput"):
        cache.set(SKIPPED, sorted(_skipped))
