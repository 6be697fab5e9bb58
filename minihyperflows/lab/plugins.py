"""Plugins: files of a user's that register something (``--plugin FILE.py``).

A run remembers the path and the SHA-256 of each, and does not go on with another version. What a
plugin imports itself is not followed.
"""

from __future__ import annotations

import hashlib
import os
import sys
import traceback
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias

from minihyperflows.errors import UserError, reason_of
from minihyperflows.lab import registry


@dataclass(frozen=True)
class Plugin:
    """A plugin as it was when it was imported."""

    path: str  # absolute
    sha256: str


Paths: TypeAlias = Iterable["str | os.PathLike[str] | Plugin"]

_imported: dict[str, Plugin] = {}  # by path


def load_plugins(paths: Paths) -> tuple[Plugin, ...]:
    """Import these files, unless they have been, as they are now.

    Raises:
        UserError: one cannot be read or imported; or it was given as a :class:`Plugin` and is not
            the same any more.
    """
    return tuple(dict.fromkeys(_load(path) for path in paths))


def _load(path: str | os.PathLike[str] | Plugin) -> Plugin:
    wanted = path if isinstance(path, Plugin) else None
    file = os.fspath(path.path if isinstance(path, Plugin) else path)
    try:
        file = os.path.realpath(file)
        text = Path(file).read_bytes()
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the plugin {file}: {reason_of(error)}") from error
    plugin = Plugin(file, hashlib.sha256(text).hexdigest())
    if wanted and wanted.sha256 != plugin.sha256:
        raise UserError(f"the plugin {file} has changed since this command began: start it again")
    if _imported.get(file) != plugin:
        _import(plugin, text)
        _imported[file] = plugin
    return plugin


def _import(plugin: Plugin, text: bytes) -> None:
    """Run a plugin, in a module of its own; what it registers counts only if all of it runs."""
    name = f"minihyperflows_plugin_{hashlib.sha256(os.fsencode(plugin.path)).hexdigest()[:16]}"
    module = ModuleType(name)
    module.__file__ = plugin.path
    sys.modules[name] = module  # dataclasses and pickle look for it there
    try:
        with registry.registering(plugin.path):
            exec(compile(text, plugin.path, "exec"), vars(module))
    except (Exception, SystemExit) as error:
        _imported.pop(plugin.path, None)
        del sys.modules[name]
        if isinstance(error, SyntaxError) and error.filename == plugin.path:
            reason = f"{type(error).__name__}: {error.msg} (line {error.lineno})"
        else:
            reason = f"{type(error).__name__}: {error} ({_line(error, {plugin.path})})"
        raise UserError(f"cannot import the plugin {plugin.path}: {reason}") from error


# -- errors in a plugin ----------------------------------------------------------------------------


def blame(error: BaseException) -> str | None:
    """An exception that passed through a plugin, in one line: what, and where in the plugin; None
    if it did not, so that it is our mistake."""
    place = _line(error, set(_imported))
    text = f"{type(error).__name__}: {error}"
    return f"{' '.join(text.splitlines())} ({place})" if place else None


def _line(error: BaseException, files: set[str]) -> str | None:
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename in files]
    return f"{frames[-1].filename}, line {frames[-1].lineno}" if frames else None


# -- the plugins of a run --------------------------------------------------------------------------


def as_json(plugins: Sequence[Plugin]) -> dict[str, Any]:
    """What a run's files say of its plugins: nothing if there are none."""
    there = [{"path": p.path, "sha256": p.sha256} for p in plugins]
    return {"plugins": there} if there else {}


def require_same(found: Mapping[str, Any], here: Sequence[Plugin], when: str) -> None:
    """Raise unless the plugins that a run's file tells of are here, unchanged; moved they may be.

    Args:
        found: the content of the file.
        here: the plugins of this command.
        when: "of RUN after epoch N".

    Raises:
        UserError: names the first that has changed or is missing.
    """
    for plugin in found.get("plugins", ()):
        path, version = plugin["path"], plugin["sha256"]
        if version in {p.sha256 for p in here}:
            continue
        known = f"the one {when} has SHA-256 {version[:12]}"
        if same := [p for p in here if Path(p.path).name == Path(path).name]:
            raise UserError(
                f"the plugin {same[0].path} has changed: {known}; bring that back, or start over "
                "with --no-resume"
            )
        raise UserError(f"the plugin {path} is missing: {known}; give it with --plugin")
