"""How the command of a study ends: ``lab.studies.command``."""

from __future__ import annotations

import importlib
import pkgutil

import pytest

from minihyperflows.lab import studies
from minihyperflows.lab.errors import UserError
from minihyperflows.lab.studies.command import reporting

COMMANDS = [
    name
    for _, name, _ in pkgutil.iter_modules(studies.__path__)
    if hasattr(importlib.import_module(f"{studies.__name__}.{name}"), "main")
]


@pytest.mark.parametrize(
    ("problem", "status", "message"),
    [
        (UserError("there is no file x"), 2, "error: there is no file x\n"),
        (KeyboardInterrupt(), 130, "interrupted: finished runs are recorded"),
    ],
)
def test_one_line_and_a_status(problem, status, message, capsys) -> None:
    @reporting()
    def main() -> None:
        raise problem

    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == status
    error = capsys.readouterr().err
    assert error.startswith(message)
    assert error.count("\n") == 1


def test_other_errors_are_not_hidden() -> None:
    @reporting()
    def main() -> int:
        return 1 // 0

    with pytest.raises(ZeroDivisionError):
        main()


@pytest.mark.parametrize("name", COMMANDS)
def test_every_study_reports_so(name: str) -> None:
    main = importlib.import_module(f"{studies.__name__}.{name}").main
    assert main.__code__ is reporting()(lambda: None).__code__
