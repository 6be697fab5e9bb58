"""What tests share: networks, oracles, programs that stop or die at a certain moment."""

from __future__ import annotations

import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
REPOSITORY = TESTS.parent
CHAPTERS = REPOSITORY / "chapters"
RESULTS = CHAPTERS / "results"
SCRIPTS = REPOSITORY / "data_scripts"
GOLDEN = TESTS / "golden" / "golden.npz"


def program(name: str) -> tuple[str, ...]:
    """The options of Python that run ``main`` of ``support/<name>.py``, wherever one is.

    What starts more processes there, as a sweep does, finds the module in them by its name.
    """
    code = (
        f"import sys; sys.path.insert(0, {str(TESTS)!r}); "
        f"from support.{name} import main; sys.exit(main(*sys.argv[1:]))"
    )
    return "-c", code


def python(name: str, *arguments: str) -> list[str]:
    """The command of such a program."""
    return [sys.executable, *program(name), *arguments]
