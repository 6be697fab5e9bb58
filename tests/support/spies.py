"""Watching a function at work."""

from __future__ import annotations

import inspect
from typing import Any

import pytest


def calls_of(monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> list[dict[str, Any]]:
    """The arguments, by name, of every call that ``module`` makes of a function from now on."""
    function = getattr(module, name)
    signature, calls = inspect.signature(function), []

    def spy(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        calls.append(dict(bound.arguments))
        return function(*args, **kwargs)

    monkeypatch.setattr(module, name, spy)
    return calls
