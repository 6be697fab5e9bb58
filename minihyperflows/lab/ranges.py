"""Which values a setting may have: written once, beside the field, as part of its type.

``batch_size: Annotated[int, whole(1)]`` is a whole number from 1 on. The check, what it says and
the table of ``minihyperflows recipes --fields`` all come from that one :class:`Range`.
"""

from __future__ import annotations

import inspect
import json
import math
import reprlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, get_type_hints

import numpy as np

# Everything is computed in float32 or reaches it, so a number beyond this is infinite.
LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Range:
    """A set of values.

    Attributes:
        words: what they are, to follow "is": "a whole number from 1 on".
        holds: whether a plain value (see :func:`plain`) is one of them.
        settle: the form in which a value is kept, a list as a tuple for example.
    """

    words: str
    holds: Callable[[Any], bool]
    settle: Callable[[Any], Any] = lambda value: value


def whole(least: int, most: int | None = None) -> Range:
    """A whole number from ``least`` on, or up to ``most``."""
    words = f"from {least} on" if most is None else f"from {least} to {most:,}"
    limit = math.inf if most is None else most

    def holds(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and least <= value <= limit

    return Range(f"a whole number {words}", holds)


def number(
    least: float = -math.inf,
    most: float = math.inf,
    *,
    above: float = -math.inf,
    below: float = math.inf,
    words: str | None = None,
) -> Range:
    """A finite number, ``least <= x <= most`` and ``above < x < below``; kept as a float."""
    if words is None:
        ends = {
            "from {:g} to {:g}": (least, most),
            "from {:g} to below {:g}": (least, below),
            "between {:g} and {:g}": (above, below),
            "above {:g}, at most {:g}": (above, most),
            "from {:g} on": (least,),
            "above {:g}": (above,),
        }
        finite = (text.format(*e) for text, e in ends.items() if all(map(math.isfinite, e)))
        bounds = next(finite, "")
        words = f"a number {bounds}" if bounds else "a finite number"

    def holds(value: Any) -> bool:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return is_number and least <= value <= most and above < value < below and is_finite(value)

    return Range(words, holds, float)


def is_finite(value: float) -> bool:
    """Whether float32 has room for ``value``."""
    return -LARGEST <= value <= LARGEST


def one_of(*choices: str, note: str = "") -> Range:
    """One of these texts; ``note`` says why there are no others."""
    return Range(f"{either(choices)}{note}", lambda value: value in choices)


def either(names: tuple[str, ...]) -> str:
    """``'a', 'b' or 'c'``."""
    *most, last = map(repr, names)
    return f"{', '.join(most)} or {last}" if most else last


def yes_or_no() -> Range:
    """true or false."""
    return Range("true or false", lambda value: isinstance(value, bool))


def text() -> Range:
    """A text that is not empty and can be part of a file's name."""

    def holds(value: Any) -> bool:
        return isinstance(value, str) and value != "" and not set(value) & set("/\\\0\n\r")

    return Range("a text without slashes and line breaks", holds)


def texts() -> Range:
    """Any number of texts."""

    def holds(value: Any) -> bool:
        return isinstance(value, list) and all(isinstance(item, str) for item in value)

    return Range("a list of texts", holds, tuple)


def low_and_high() -> Range:
    """Two finite numbers, the smaller one first; kept as a tuple."""
    each = number()

    def holds(value: Any) -> bool:
        pair = isinstance(value, list) and len(value) == 2 and all(map(each.holds, value))
        return pair and value[0] <= value[1]

    def settle(value: list[float]) -> tuple[float, ...]:
        return tuple(map(float, value))

    return Range("a list [low, high] of two finite numbers, low at most high", holds, settle)


def options() -> Range:
    """Names with values that a JSON file can hold."""

    def holds(value: Any) -> bool:
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError):
            return False
        return isinstance(value, dict) and all(isinstance(name, str) for name in value)

    return Range("names with JSON's values", holds)


def optional(range_: Range) -> Range:
    """A value of ``range_``, or none (``null`` in JSON)."""
    return Range(
        f"{range_.words}, or null",
        lambda value: value is None or range_.holds(value),
        lambda value: None if value is None else range_.settle(value),
    )


# -- values --------------------------------------------------------------------------------------


def plain(value: Any) -> Any:
    """``value`` in JSON's types: NumPy's numbers as Python's, arrays and tuples as lists."""
    if isinstance(value, np.generic | np.ndarray):
        return plain(value.tolist())
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, Mapping):
        return {name: plain(item) for name, item in value.items()}
    return value


def mistake(name: str, range_: Range, value: Any) -> str | None:
    """What is wrong with ``value`` for the setting ``name``; None if nothing is."""
    if range_.holds(plain(value)):
        return None
    end = f" (float32 ends at {LARGEST:.3g})" if _is_too_large(plain(value)) else ""
    return f"{name} is {range_.words}, not {shown(value)}{end}"


def _is_too_large(value: Any) -> bool:
    """Whether ``value`` is a number that only float64 has room for."""
    return isinstance(value, float) and math.isfinite(value) and not is_finite(value)


def shown(value: Any) -> str:
    """A value as a message quotes it, which may be of any length."""
    if isinstance(value, float | np.floating):
        return f"{value:.12g}"
    if isinstance(value, int) and value.bit_length() > 200:
        return f"a whole number of some {round(value.bit_length() * math.log10(2))} digits"
    short = reprlib.Repr()
    short.maxstring = short.maxlong = short.maxother = 60
    return short.repr(plain(value))


# -- settings: frozen dataclasses whose fields have ranges ----------------------------------------


def ranges_of(settings: type[Any]) -> dict[str, Range]:
    """The ranges of a dataclass by field; fields without one are left out."""
    result = {}
    for name, hint in get_type_hints(settings, include_extras=True).items():
        found = [item for item in getattr(hint, "__metadata__", ()) if isinstance(item, Range)]
        if found:
            result[name] = found[0]
    return result


def mistakes(settings: type[Any], values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """A sentence for each value outside its field's range."""
    for name, range_ in ranges_of(settings).items():
        if name in values and (wrong := mistake(prefix + name, range_, values[name])):
            yield wrong


def settle(settings: Any) -> None:
    """Bring the values of a frozen dataclass, which are in their ranges, to the form they have."""
    for name, range_ in ranges_of(type(settings)).items():
        object.__setattr__(settings, name, range_.settle(plain(getattr(settings, name))))


def required(settings: type[Any]) -> list[str]:
    """The fields of a dataclass that have no default."""
    return [
        f.name for f in fields(settings) if f.default is MISSING and f.default_factory is MISSING
    ]


# -- the options of a function --------------------------------------------------------------------


_MANY = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def options_of(function: Callable[..., Any], without: tuple[str, ...]) -> dict[str, Range]:
    """What the arguments of a function may be, by its annotations; other types: anything."""
    by_type = {float: number(), int: whole(0), bool: yes_or_no(), str: text()}
    try:
        hints = get_type_hints(function.__init__ if inspect.isclass(function) else function)
    except (NameError, TypeError, AttributeError):  # annotations for readers alone
        hints = {}
    return {
        name: by_type.get(hints.get(name, object), Range("anything", lambda value: True))
        for name, parameter in inspect.signature(function).parameters.items()
        if name not in without and parameter.kind not in _MANY
    }


def takes_any(function: Callable[..., Any]) -> bool:
    """Whether a function has ``**options``."""
    return any(p.kind == p.VAR_KEYWORD for p in inspect.signature(function).parameters.values())


def needed_by(function: Callable[..., Any]) -> list[str]:
    """The arguments of a function that have no default."""
    arguments = inspect.signature(function).parameters.values()
    return [
        a.name for a in arguments if a.default is inspect.Parameter.empty and a.kind not in _MANY
    ]
