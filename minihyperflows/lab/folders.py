"""The folder of a run: its files, whether it may be written to, and its summary.

Only a folder that is empty or a run's own is written to, so that nothing of a user's is replaced or
removed. A folder is a run's if one of the files that say what the run is can be recognised: its
recipe, its summary or a checkpoint. All files of their names are the run's then, damaged ones too.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from minihyperflows.errors import UserError, reason_of
from minihyperflows.lab import locks
from minihyperflows.lab.checkpoint import (
    is_checkpoint,
    is_temporary,
    read_json,
    remove_temporary,
    safetensors_metadata,
    to_json,
    write_json,
)

PLOTS = ("accuracy_density", "pressure", "flips", "layers")
LITTER = ("Thumbs.db", "desktop.ini")  # of file managers; others begin with a dot

# What summary.json had in versions that wrote no checksums.
BEFORE_CHECKSUMS = (
    *("recipe", "seed", "device", "dtype", "dense_from", "dense_accuracy", "test_accuracy"),
    *("sparsity", "target_sparsity", "sparsity_before_regrowth", "accuracy_before_regrowth"),
    *("landed_by", "weights", "remaining", "flops_dense", "flops_sparse", "seconds", "date"),
    *("command", "versions", "commit", "warnings"),
)
CHECKSUMS = "checksums"


class RunFolder:
    """The files of one run.

    Attributes:
        recipe: ``recipe.json``, everything that defines the experiment.
        metrics: ``metrics.csv``, a row per epoch.
        layers: ``layers.csv``, a row per epoch and gated layer.
        checkpoint: ``checkpoint.safetensors``, the state that an interrupted run continues from.
        dense: ``dense.safetensors``, the checkpoint at the end of the dense stage, which other runs
            can begin with (``dense_from``).
        summary: ``summary.json``, the results; it is there once the run is finished.
        plots: ``plots``, a folder of figures.
        attempt: ``attempt``, which says whose the folder is while a sweep works in it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.recipe = path / "recipe.json"
        self.metrics = path / "metrics.csv"
        self.layers = path / "layers.csv"
        self.checkpoint = path / "checkpoint.safetensors"
        self.dense = path / "dense.safetensors"
        self.summary = path / "summary.json"
        self.plots = path / "plots"
        self.attempt = path / "attempt"

    @property
    def _tables(self) -> tuple[Path, ...]:
        return self.recipe, self.metrics, self.layers

    @property
    def files(self) -> tuple[Path, ...]:
        """What a run writes, without its plots."""
        return *self._tables, self.checkpoint, self.dense, self.summary

    @property
    def pictures(self) -> tuple[Path, ...]:
        """The plots."""
        return tuple(self.plots / f"{name}.png" for name in PLOTS)

    def is_run(self) -> bool:
        """Whether there is a run in the folder, finished or not."""
        return (
            _is_recipe(json_in(self.recipe))
            or _is_summary(json_in(self.summary))
            or is_checkpoint(self.checkpoint)
            or is_checkpoint(self.dense)
        )

    @property
    def is_finished(self) -> bool:
        """Whether there is a summary; a folder that cannot be read has none."""
        try:
            return self.summary.exists()
        except OSError:
            return False

    # -- writing to it ---------------------------------------------------------------------------

    def require_ours(self) -> None:
        """Raise unless the folder is a run's, or has nothing in it, or is not there.

        Raises:
            UserError: it is somebody else's, or a file, or it cannot be read.
        """
        others = foreign(self.path, self._is_neutral)
        if not others or self.is_run():
            self._require_files()
            return
        if "sweep.json" in others:
            raise UserError(f"{self.path} holds a sweep, not a run: choose another folder")
        raise UserError(
            f"{self.path} is not empty and not a run's folder (it has {others[0]}): "
            "choose another folder, or a new one"
        )

    def _is_neutral(self, entry: Path) -> bool:
        """What a run that was killed at its start can leave, or one that was started over."""
        if entry == self.plots:
            names = {picture.name for picture in self.pictures}
            return entry.is_dir() and all(
                p.name in names or is_temporary(p.name, names) for p in entry.iterdir()
            )
        if entry == self.attempt:
            return entry.is_file() and bool(re.fullmatch(rb"[0-9a-f]{0,32}", entry.read_bytes()))
        return is_temporary(entry.name, [file.name for file in self.files])

    def _require_files(self) -> None:
        for file in (*self.files, *self.pictures):
            if file.exists() and not file.is_file():
                raise UserError(f"{file} is not a file: move it, or choose another folder")

    def create(self) -> None:
        """Make the folder.

        Raises:
            UserError: it cannot be made.
        """
        try:
            self.plots.mkdir(parents=True, exist_ok=True)
        except (OSError, ValueError) as error:
            raise UserError(f"cannot make the folder {self.path}: {reason_of(error)}") from error

    def tidy(self) -> None:
        """Remove what killed processes left half-written; for who holds the folder's lock."""
        remove_temporary(self.path, [file.name for file in self.files])
        remove_temporary(self.plots, [picture.name for picture in self.pictures])

    def forget(self) -> None:
        """Remove what an earlier run left, the checkpoint last.

        Its recipe and its dense network stay: the next run replaces them, and may begin with the
        latter.
        """
        for file in (self.summary, *self.pictures, self.metrics, self.layers, self.checkpoint):
            remove(file)

    # -- the summary -----------------------------------------------------------------------------

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write ``summary.json``, with checksums of itself and of the tables that are there."""
        sums = {file.name: _file_checksum(file) for file in self._tables if file.exists()}
        write_json(self.summary, {**summary, CHECKSUMS: sums | {"summary": _checksum(summary)}})

    def read_summary(self) -> dict[str, Any]:
        """What :meth:`write_summary` was given.

        Raises:
            UserError: it cannot be read, or it or a table is damaged or was changed.
        """
        advice = "put the file back as it was, or start over with --no-resume"
        found = read_json(self.summary)
        if not _is_summary(found):
            raise UserError(f"{self.summary} is not the summary of a run: {advice}")
        sums = found.pop(CHECKSUMS, None)
        if sums is not None:
            self._check(found, sums if isinstance(sums, dict) else {}, advice)
        elif unknown := sorted(set(found) - set(BEFORE_CHECKSUMS)):
            raise UserError(f"{self.summary} is damaged, it has {unknown[0]!r}: {advice}")
        return found

    def _check(self, summary: Mapping[str, Any], sums: Mapping[str, Any], advice: str) -> None:
        if sums.get("summary") != _checksum(summary):
            raise UserError(f"{self.summary} is damaged or was changed: {advice}")
        for file in self._tables:
            if file.name in sums and not file.exists():
                raise UserError(f"{file} is missing, which the run had written: {advice}")
            if file.exists() and sums.get(file.name) != _file_checksum(file):
                raise UserError(f"{file} is damaged or was changed since the run ended: {advice}")


@contextlib.contextmanager
def locked(folder: RunFolder, **options: Any) -> Iterator[locks.Lock]:
    """The lock on a run's folder (:func:`minihyperflows.lab.locks.locked`), if it is ours.

    Raises:
        UserError: it is not, or another process or thread works in it.
    """
    folder.require_ours()
    with locks.locked(folder.path, **options) as lock:
        folder.require_ours()  # another process may have written to it in between
        folder.tidy()
        yield lock


def foreign(folder: Path, is_neutral: Callable[[Path], Any] = lambda entry: False) -> list[str]:
    """The names of the entries of ``folder`` that are not litter, nor a lock, nor neutral.

    Raises:
        UserError: it is not a folder, or it cannot be read.
    """
    try:
        entries = sorted(folder.iterdir())
        return [e.name for e in entries if not _is_litter(e) and not is_neutral(e)]
    except FileNotFoundError:
        return []
    except NotADirectoryError:
        raise UserError(f"cannot make the folder {folder}: a file is in the way") from None
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        raise UserError(f"cannot use the folder {folder}: {reason_of(error)}") from error


def _is_litter(entry: Path) -> bool:
    return entry.name.startswith(".") or entry.name in (locks.NAME, *LITTER)


def remove(file: Path) -> None:
    """Remove a file if it is there.

    Raises:
        UserError: it cannot be removed.
    """
    try:
        file.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot remove {file}: {error.strerror}") from error


def run_folder_of(file: Path) -> RunFolder | None:
    """The run that ``file`` is a file of (of that name in its folder); None if of none."""
    folder = RunFolder(file.parent.parent if file.parent.name == "plots" else file.parent)
    if file in (*folder.files, *folder.pictures) and folder.is_run():
        return folder
    return None


def require_exportable(out: Path, source: Path) -> None:
    """Raise unless the weights of the checkpoint ``source`` may be written to the file ``out``.

    ``out`` is new, or a file of exported weights, which is replaced.

    Raises:
        UserError: ``out`` is a file of a run (by whatever name), or something else.
    """
    target = Path(os.path.realpath(out))
    run = RunFolder(Path(os.path.realpath(source)).parent)
    reads = [source, *run.files, *run.pictures] if run.is_run() else [source]
    if any(_is_same(out, file) for file in reads) or run_folder_of(target):
        raise UserError(f"{out} is a file of a run, which export only reads: choose another name")
    if not os.path.lexists(target):
        return
    metadata = safetensors_metadata(target) or {}
    if set(metadata) != {"recipe", "epoch"}:
        raise UserError(
            f"{out} is there and does not hold exported weights: remove it, or choose another name"
        )


def _is_same(a: Path, b: Path) -> bool:
    """Whether two paths lead to one file, links of both kinds included."""
    try:
        return os.path.samefile(a, b)
    except (OSError, ValueError):  # one of them is not there
        return False


# -- recognising -----------------------------------------------------------------------------------


def json_in(path: Path) -> Any:
    """The content of a JSON file, None if it is none."""
    try:
        return read_json(path) if path.is_file() else None
    except UserError:
        return None


def _has(values: Any, names: Collection[str]) -> bool:
    return isinstance(values, dict) and all(name in values for name in names)


def _is_recipe(values: Any) -> bool:
    return _has(values, ("name", "model", "dataset", "dense", "pruning", "regrowth"))


def _is_summary(values: Any) -> bool:
    return _has(values, ("seed", "device", "recipe")) and _is_recipe(values["recipe"])


def require_own_record(path: Path) -> None:
    """Raise UserError if ``path`` is a file that ``bench`` cannot have written.

    An empty file is nobody's.
    """
    if path.exists() and path.stat().st_size and not _has(json_in(path), ("versions", "command")):
        raise UserError(f"{path} is not a record of bench: choose another file")


def is_sweep(values: Any) -> bool:
    """Whether the content of a JSON file describes a sweep."""
    return _has(values, ("recipe", "device")) and _is_recipe(values["recipe"])


def _checksum(values: Mapping[str, Any]) -> str:
    text = to_json(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def _file_checksum(file: Path) -> str:
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {file}: {reason_of(error)}") from error
