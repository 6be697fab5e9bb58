"""What a setting of a study is: its fields are options, columns and identity at once."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

from minihyperflows.errors import UserError

DIGITS = 6  # of a fraction; tables keep as many or more
MOST = 1_000_000  # things; more is a slip

# -- types of options ----------------------------------------------------------------------------


def parse_seed(text: str) -> int:
    """The type of an option that is a seed: a whole number from 0 on.

    Raises:
        UserError: it is none.
    """
    if not text.isdecimal():
        raise UserError(f"{text!r} is not a seed: write a whole number from 0 on")
    return int(text)


def parse_count(text: str) -> int:
    """The type of an option that is a number of things: a whole number from 1 to a million.

    Raises:
        UserError: it is none.
    """
    if not (text.isdecimal() and len(text) <= len(str(MOST)) and 1 <= int(text) <= MOST):
        raise UserError(f"{text!r} is not a count: write a whole number from 1 to {MOST:,}")
    return int(text)


def parse_fraction(text: str, whole: bool = False) -> float:
    """The type of an option that is a fraction: above 0 and below 1, with ``whole`` also 1.

    Rounded to the digits that tables keep, or a run would not be recognised by its row.

    Raises:
        UserError: it is none.
    """
    try:
        value = float(f"{float(text):.{DIGITS}g}")
    except ValueError:
        value = math.nan
    if not (0 < value < 1 or (whole and value == 1)):
        most = "at most 1" if whole else "below 1"
        raise UserError(f"{text!r} is not a fraction: write a number above 0 and {most}")
    return value


def parse_scale(text: str) -> float:
    """The type of an option that is a factor: a number above 0, at most a thousand.

    Raises:
        UserError: it is none.
    """
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= 1000:
        raise UserError(f"{text!r} is not a factor: write a number above 0, at most 1000")
    return value


# -- fields --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Option:
    """What the command line says about a field of a setting.

    Attributes:
        parse: text to value.
        defaults: the values if none is given.
        several: "+" where runs go through several values (or "*", as many as none), "" where all
            runs of a command have the same.
        choices: the values that there are; None: whatever can be parsed.
        others: further names of the option, those it had in the past for example.
        identity: whether it tells runs apart; else it is only a column.
    """

    parse: Callable[[str], Any]
    defaults: tuple[Any, ...]
    several: str = "+"
    choices: tuple[Any, ...] | None = None
    others: tuple[str, ...] = ()
    identity: bool = True
    help: str | None = None


def choice(*names: str, default: Sequence[str] | None = None, **more: Any) -> Any:
    """A field that is one of ``names``; all of them are done unless ``default`` says which."""
    return _field(Option(str, tuple(names if default is None else default), choices=names, **more))


def values(parse: Callable[[str], Any], *defaults: Any, **more: Any) -> Any:
    """A field whose values are all done."""
    return _field(Option(parse, defaults, **more))


def one(parse: Callable[[str], Any], default: Any = None, **more: Any) -> Any:
    """A field that has the same value in all runs of a command."""
    return _field(Option(parse, (default,), several="", **more))


def seeds(count: int) -> Any:
    """The field "seed": ``--seeds K`` for 0 to K - 1, ``--seed N ...`` for certain ones."""
    return values(parse_seed, *range(count), help=f"certain seeds; default 0 to {count - 1}")


def _field(option: Option) -> Any:
    return dataclasses.field(metadata={"option": option})


def options_of(setting: type[Any]) -> dict[str, Option]:
    """By name of the field."""
    return {field.name: field.metadata["option"] for field in dataclasses.fields(setting)}


def flag(name: str) -> str:
    """The option of a field."""
    return f"--{name.replace('_', '-')}"


def text_of(value: Any) -> str:
    """A value as the command line has it."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
