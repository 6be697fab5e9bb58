"""What a recipe can name: one lookup for what is built in and what somebody adds.

::

    @lab.register("pressure", "squares")
    def squares(net, scale=1.0):
        return sum((t * t).mean() for t in flows.presences(net).values()) * scale

    lab.RECIPES["lenet300-digits"].with_fields(
        {"pressure.kind": "squares", "pressure.kind_options": {"scale": 0.5}}
    )

A recipe's options go to the function by name; so do the settings beside them (``momentum``,
``step``, ``floor``, ...) if it has an argument of that name. What each kind is:

=========  =======================================================================================
model      ``f(*, num_classes, rng, dtype, **options) -> nn.Module``; with an argument
           ``in_features`` it is told H W C of the images
dataset    ``f(root=None) -> lab.Dataset``; root: ``--data-dir``
recipe     ``f() -> lab.Recipe``, which gets the name that it is registered under
optimizer  ``f(params, lr, **options) -> optim.Optimizer``
scheduler  ``f(target_sparsity, epochs, **options) ->`` :class:`Scheduler`
pressure   ``f(net, **options) -> Tensor``, a scalar, which gamma multiplies in the loss
score      ``f(net, x, labels) -> dict``, an array for each weight's name
pruner     ``f(sparsity) -> related.pruners.Pruner``
=========  =======================================================================================

A file that registers something is a plugin (:mod:`minihyperflows.lab.plugins`). There is an example
of each kind in ``tests/lab/plugins``.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol, TypeVar, runtime_checkable

from minihyperflows import flows, related
from minihyperflows.data.datasets import NAMES, Dataset
from minihyperflows.data.datasets import load as load_dataset
from minihyperflows.engine import Tensor
from minihyperflows.errors import UserError
from minihyperflows.lab import ranges
from minihyperflows.nn import Module, models, optim
from minihyperflows.related import pruners

F = TypeVar("F", bound=Callable[..., Any])


@runtime_checkable
class Scheduler(Protocol):
    """Steers the pressure of the pruning stage, in periods counted from 1."""

    @property
    def gamma(self) -> float:
        """The pressure now, in units of the mean of t."""

    def expected(self, epoch: int) -> float:
        """The density that the network should have after ``epoch``."""

    def update(self, epoch: int, density: float) -> float:
        """Take the density measured after ``epoch``; returns gamma for the next one."""

    def state_dict(self) -> dict[str, Any]:
        """What it remembers, in JSON's types."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where the scheduler that wrote ``state`` stopped."""


# What a function of each kind must return; its arguments that come from elsewhere than options; and
# those of them that are settings beside the name in a recipe.
RESULTS: dict[str, Any] = {
    **{"model": Module, "dataset": Dataset, "recipe": object, "optimizer": optim.Optimizer},
    **{"scheduler": Scheduler, "pressure": Tensor, "score": dict, "pruner": pruners.Pruner},
}
SETTINGS = {
    "optimizer": ("momentum", "nesterov", "weight_decay"),
    "scheduler": ("step", "exponent", "aggressivity"),
    "pressure": ("floor",),
}
DECIDED = {
    "model": ("num_classes", "in_features", "rng", "dtype"),
    "optimizer": ("params", "lr", *SETTINGS["optimizer"]),
    "scheduler": ("target_sparsity", "epochs", *SETTINGS["scheduler"]),
    "pressure": ("net", *SETTINGS["pressure"]),
}

_functions: dict[str, dict[str, Callable[..., Any]]] = {kind: {} for kind in RESULTS}
_sources: dict[tuple[str, str], str] = {}  # the plugin that registered a kind and name
_source: list[str] = []  # the plugins that are being imported


def register(kind: str, name: str) -> Callable[[F], F]:
    """A decorator: recipes, and the command line, find the function or class under ``name``.

    The same function can be registered again, as when its file or its cell is run once more.

    Raises:
        UserError: there is no such kind, or another function has the name.
    """
    if kind not in _functions:
        raise UserError(f"nothing is registered as {kind!r}: {_choose(kind, tuple(_functions))}")
    if not ranges.text().holds(name):
        raise UserError(f"a {kind}'s name is {ranges.text().words}, not {ranges.shown(name)}")

    def add(function: F) -> F:
        there = _functions[kind].get(name)
        if there is not None and not _same(there, function, (kind, name) in _sources):
            raise UserError(
                f"there is a {kind} {name!r} already, {_origin(there)}: choose another name"
            )
        _functions[kind][name] = function
        if _source:
            _sources[kind, name] = _source[-1]
        return function

    return add


@contextmanager
def registering(source: str) -> Iterator[None]:
    """What is registered inside is the plugin's ``source``, and nothing else is. Nothing is if it
    fails."""
    forget(source)
    _source.append(source)
    try:
        yield
    except BaseException:
        forget(source)
        raise
    finally:
        _source.pop()


def forget(source: str) -> None:
    """Take out what this plugin has registered."""
    for kind, name in [key for key, value in _sources.items() if value == source]:
        remove(kind, name)


def remove(kind: str, name: str) -> None:
    """Take out one name."""
    del _functions[kind][name]
    _sources.pop((kind, name), None)


def names(kind: str) -> tuple[str, ...]:
    """What is registered as ``kind``."""
    return tuple(_functions[kind])


def find(kind: str, name: str) -> Callable[..., Any]:
    """The function that is registered under this name.

    Raises:
        UserError: there is none; says which there are.
    """
    if not isinstance(name, str) or name not in _functions[kind]:
        raise UserError(f"unknown {kind} {ranges.shown(name)}: {_choose(name, names(kind))}")
    return _functions[kind][name]


def _choose(name: Any, known: tuple[str, ...]) -> str:
    return f"choose one of {', '.join(known)}{_hint(name, known)}"


def _hint(name: Any, known: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(str(name), known, n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _same(there: Any, here: Any, of_a_plugin: bool) -> bool:
    """Whether a function is one that was there before: itself, or that of a cell or module which is
    run again. (What a plugin registered has been forgotten before it is imported again.)"""
    if there is here or of_a_plugin or _source:
        return there is here
    names = [getattr(f, "__qualname__", "<none>") for f in (there, here)]
    return names[0] == names[1] and "<" not in names[0] and there.__module__ == here.__module__


def _origin(function: Any) -> str:
    code = getattr(function, "__code__", None)
    if code:
        return f"{code.co_filename}, line {code.co_firstlineno}"
    return "built in" if isinstance(function, partial) else f"of {function.__module__}"


# -- calling what is registered ------------------------------------------------------------------


def make(kind: str, name: str, *arguments: Any, **options: Any) -> Any:
    """Call the function registered under ``name``, and look at what it returns.

    Raises:
        UserError: there is none; it does not take these arguments, refuses them with a ValueError,
            or returns something else than its kind does.
    """
    function = bound(kind, name, *arguments, **options)
    try:
        result = function()
    except (ValueError, OverflowError, MemoryError) as error:
        chosen = ", ".join(f"{n}={v!r}" for n, v in options.items() if n not in DECIDED[kind])
        raise UserError(f"cannot build {name} with ({chosen}): {error}") from error
    return checked(kind, name, result)


def bound(kind: str, name: str, *arguments: Any, **options: Any) -> Callable[[], Any]:
    """The function with its arguments.

    Raises:
        UserError: it does not take them.
    """
    function = find(kind, name)
    try:
        inspect.signature(function).bind(*arguments, **options)
    except TypeError as error:
        raise UserError(
            f"the {kind} {name!r} ({_origin(function)}) cannot be called: {error}"
        ) from error
    return partial(function, *arguments, **options)


def checked(kind: str, name: str, result: Any) -> Any:
    """What the function returned, if it is what its kind returns.

    Raises:
        UserError: it is something else.
    """
    if not isinstance(result, RESULTS[kind]):
        raise UserError(
            f"the {kind} {name!r} ({_origin(find(kind, name))}) returned {ranges.shown(result)}: "
            f"it must be a {RESULTS[kind].__name__}"
        )
    return result


def settings_for(kind: str, name: str, settings: Any) -> dict[str, Any]:
    """Those of a recipe's settings that the function has an argument for."""
    takes = inspect.signature(find(kind, name)).parameters
    fields = [field for field in SETTINGS[kind] if field in takes and hasattr(settings, field)]
    return {field: getattr(settings, field) for field in fields}


def options_of(kind: str, name: str) -> dict[str, ranges.Range]:
    """The options of what is registered and what they may be."""
    return ranges.options_of(find(kind, name), without=DECIDED[kind])


def mistakes(kind: str, field: str, name: Any, options: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with the name in a recipe's ``field``, and with the options for it."""
    if name not in names(kind):
        known_names = names(kind)
        wrong_name = f"{ranges.shown(name)}{_hint(name, known_names)}"
        yield f"{field} is {ranges.either(known_names)}, not {wrong_name}"
        return
    if kind not in DECIDED:  # without options
        return
    function, group = find(kind, name), f"{field}_options"
    known = options_of(kind, name)
    takes_any = ranges.takes_any(function)
    for option, value in options.items():
        if option in DECIDED[kind]:
            yield f"{group}.{option} cannot be set: the rest of the recipe decides it"
        elif option not in known:
            if not takes_any:
                yield f"{name} has no option {option!r}, but {', '.join(known) or 'none'}"
        elif wrong := ranges.mistake(f"{group}.{option}", known[option], value):
            yield wrong
    for option in ranges.needed_by(function):
        if option not in DECIDED[kind] and option not in options:
            yield f"{name} needs {group}.{option}, {known[option].words}"


# -- what is built in ----------------------------------------------------------------------------

for _name in models.__all__:
    if inspect.isfunction(getattr(models, _name)):
        register("model", _name)(getattr(models, _name))
for _name in NAMES:
    register("dataset", _name)(partial(load_dataset, _name))
register("optimizer", "adam")(optim.Adam)
register("optimizer", "sgd")(optim.SGD)
register("scheduler", "trajectory")(flows.PressureScheduler)
register("pressure", "mean")(flows.pressure)
for _name in related.SCORES:
    register("score", _name)(partial(related.importance, score=_name))
for _kind in ("Random", "Magnitude", "Iterative", "Gradual", "Movement", "RigL"):
    register("pruner", _kind.lower())(getattr(pruners, _kind))
