"""Records of many runs in one tidy table: what ``chapters/results`` is made of."""

from __future__ import annotations

import csv
import functools
import inspect
import io
import os
import stat
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias, TypeVar, cast

from minihyperflows.errors import UserError, reason_of
from minihyperflows.lab.checkpoint import remove_temporary, write_atomically
from minihyperflows.lab.folders import RunFolder, run_folder_of
from minihyperflows.lab.locks import locked_file
from minihyperflows.lab.recipes import Recipe

RESULTS = (
    "target_sparsity",
    "sparsity",
    "sparsity_before_regrowth",
    "dense_accuracy",
    "accuracy_before_regrowth",
    "test_accuracy",
    "weights",
    "remaining",
    "flops_dense",
    "flops_sparse",
    "landed_by",
    "seconds",
)
PROVENANCE = ("device", "dtype", "date", "commit", "command")

Row: TypeAlias = dict[str, Any]

# -- the runs of folders -------------------------------------------------------------------------


RUN_COLUMNS = ("recipe", "dataset", "seed")  # by which a table of runs is recognised


def collect(folders: Sequence[Path], out: Path) -> int:
    """Write a row for every finished run in ``folders`` to the CSV file ``out``.

    A row has the results and where they come from: recipe, data set, seed, what sweeps vary
    (``gamma`` is empty unless the pressure was constant), device, dtype, date, commit, versions,
    and the command that repeats the run. Returns the number of rows.

    Raises:
        UserError: a folder holds no finished run; or ``out`` is a file of something else, which is
            left alone, or somebody else is writing it.
    """
    with table_of_runs(out):
        return write_runs(folders, out)


@contextmanager
def table_of_runs(out: Path) -> Iterator[None]:
    """Keep the table ``out`` for this process, if it is one of runs, or not there yet.

    Raises:
        UserError: as :func:`collect`.
    """
    with writing(out):
        records_so_far(out, RUN_COLUMNS)
        yield


def write_runs(folders: Sequence[Path], out: Path) -> int:
    """:func:`collect`, for who keeps the table."""
    rows = [_row(folder) for folder in folders]
    write_records(out, rows)
    return len(rows)


def _row(folder: Path) -> Row:
    files = RunFolder(folder)
    if not files.is_finished:
        raise UserError(f"{folder} holds no finished run (it has no summary.json)")
    summary = files.read_summary()
    recipe = Recipe.from_json(summary["recipe"])
    head = {"recipe": recipe.name, "dataset": recipe.dataset, "seed": summary["seed"]}
    density = {"density": summary["remaining"] / summary["weights"]}
    body = {name: summary[name] for name in (*RESULTS, *PROVENANCE)}
    return head | settings(recipe) | density | body | summary["versions"]


def settings(recipe: Recipe) -> Row:
    """What tells the runs of a sweep and of its variants apart, beside the seed."""
    return {
        "gamma": recipe.pressure.gamma,
        "floor": recipe.pressure.floor,
        "presence_optimizer": recipe.presence.optimizer,
        "presence_lr": recipe.presence.lr,
        "epochs": recipe.timeline.epochs,
    }


# -- tables --------------------------------------------------------------------------------------


def write_records(path: Path, rows: Sequence[Row], digits: int | None = None) -> None:
    """Replace the CSV file ``path`` by one with these rows.

    It has the columns of all rows, in the order in which they come up. ``digits``: how many of a
    float's to write; None: all.
    """
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: _rounded(v, digits) for k, v in row.items()} for row in rows)
    # Names of files may hold bytes that are not text; they come out as they came in.
    write_atomically(path, text.getvalue().encode("utf-8", "surrogateescape"))


def _rounded(value: Any, digits: int | None) -> Any:
    return f"{value:.{digits}g}" if digits and isinstance(value, float) else value


def read_records(path: Path | str, columns: Sequence[str] = ()) -> list[Row]:
    """The rows of a table written by :func:`write_records`, numbers as numbers.

    Args:
        path: the CSV file.
        columns: what tells that it is a record of the study that reads it.

    Raises:
        UserError: there is no such file, it is no table, its end is missing, or it lacks a column.
    """
    names, lines = _parsed(path, _text(path))
    for name in columns:
        if name not in names:
            raise UserError(f"{path} is not a record of this study: it has no column {name!r}")
    return [dict(zip(names, map(value_of, line), strict=True)) for line in lines]


def _text(path: Path | str) -> str:
    try:
        with open(path, encoding="utf-8", newline="") as file:
            return file.read()
    except FileNotFoundError:
        raise UserError(f"there is no file {path}") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {reason_of(error)}") from error
    except UnicodeDecodeError:
        raise UserError(f"{path} is not a table: it is not text") from None


def _parsed(path: Path | str, text: str) -> tuple[list[str], list[list[str]]]:
    """The names of the columns, and the lines below them."""
    advice = "copy it again, or remove that line"
    if text and not text.endswith("\n"):  # a number may have lost digits
        raise UserError(f"{path} is cut off in its last line: {advice}")
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    lines = []
    try:
        names = next(reader, [])
        for line in filter(None, reader):
            if len(line) != len(names):
                wrong = f"it has {len(line)} values for {len(names)} columns"
                raise UserError(f"{path} is broken in line {reader.line_num}, {wrong}: {advice}")
            lines.append(line)
    except csv.Error as error:
        place = f"in line {reader.line_num} ({error})"
        raise UserError(f"{path} is broken {place}: {advice}") from None
    return names, lines


def value_of(text: str) -> Any:
    """What a cell of a table holds: a number if it can be one."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


# -- the file of a study, which is its state -------------------------------------------------------

Identity: TypeAlias = Callable[[Row], Hashable]


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Keep the file ``out`` for this process while a study adds to it, run by run.

    Raises:
        UserError: there is no folder for it, it is a file of a run, or another process or thread
            is writing it.
    """
    require_folder(out)
    if run := run_folder_of(Path(os.path.realpath(out))):
        raise UserError(f"{out} is a file of the run in {run.path}: choose another name")
    with locked_file(out):
        remove_temporary(out.parent, [out.name])
        yield


Function = TypeVar("Function", bound=Callable[..., Any])


def adds_to_table(function: Function) -> Function:
    """Decorates a function that reads a table, then adds to it run by run.

    Its argument ``out``, or ``options.out``, names the table, which is kept for the while
    (:func:`writing`): of two studies at once each would write its rows over the other's.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def keeping(*arguments: Any, **more: Any) -> Any:
        given = signature.bind(*arguments, **more).arguments
        with writing(given["out"] if "out" in given else given["options"].out):
            return function(*arguments, **more)

    return cast(Function, keeping)


def require_folder(path: Path) -> None:
    """Raise UserError unless there is a folder to write ``path`` into, and ``path`` can be a file.

    To be called before the work whose results go there.
    """
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        mode = None
    except OSError as error:  # a name that is too long, for example
        raise UserError(f"cannot write {path}: {reason_of(error)}") from error
    if not path.parent.is_dir():
        raise UserError(f"cannot write {path}: there is no folder {path.parent}")
    if mode is not None and not stat.S_ISREG(mode):  # a device may never come to an end
        kind = "a folder" if stat.S_ISDIR(mode) else "not a file"
        raise UserError(f"cannot write {path}: it is {kind}")


def records_so_far(path: Path, columns: Sequence[str] = ()) -> list[Row]:
    """The rows that a study goes on with: those of the file, none if it is not there yet.

    To be called before the first run, so that no run is lost because its row cannot be written.

    Raises:
        UserError: as :func:`read_records`, or there is no folder for the file.
    """
    require_folder(path)
    return read_records(path, columns) if path.exists() else []


def join_records(
    out: Path, files: Sequence[Path], identity: Identity, columns: Sequence[str] = ()
) -> list[Row]:
    """The rows of ``out``, if it is there, and those of ``files``, each run once.

    Where several files have a run, the rows of the first stay.

    Args:
        out: where they will be written; it comes before ``files``.
        files: of the same study.
        identity: of the run that a row belongs to; a run may have many rows in a file.
        columns: as for :func:`read_records`.

    Raises:
        UserError: as :func:`records_so_far`; of ``files`` all must be there.
    """
    rows = records_so_far(out, columns)
    for file in files:
        there = {identity(row) for row in rows}
        rows += [row for row in read_records(file, columns) if identity(row) not in there]
    return rows


class Record:
    """Several tables that belong together: runs, and details of each.

    FILE has the runs, FILE-PART the details, for each part. What is in FILE is in all tables
    completely: it is written last, and details of runs that it does not have are left out.

    Args:
        out: FILE.
        parts: the names of the other tables.
        identity: of the run that a row of any table belongs to.
        columns: that all tables have; as for :func:`read_records`.
        digits: as for :func:`write_records`.
        order: by which all tables are sorted; None: rows stay in the order in which they come.

    Attributes:
        files: those of the parts, and FILE.
        tables: their rows.
        done: the identities of the runs.

    Raises:
        UserError: as :func:`records_so_far`.
    """

    def __init__(
        self,
        out: Path,
        parts: Sequence[str],
        identity: Identity,
        columns: Sequence[str],
        digits: int | None = None,
        order: Callable[[Row], Any] | None = None,
    ) -> None:
        self.parts, self.identity, self.columns = parts, identity, columns
        self.digits, self.order = digits, order
        self.files = [*self._details(out), out]
        self.tables = self._complete(out, records_so_far(out, columns))
        self.done = set(map(identity, self.tables[-1]))

    def add(self, *new: Sequence[Row]) -> None:
        """Write the tables with more rows, given for each of ``files``."""
        for file, table, rows in zip(self.files, self.tables, new, strict=True):
            if rows:
                table += rows
                if self.order:
                    table.sort(key=self.order)
                write_records(file, table, self.digits)
        self.done |= set(map(self.identity, new[-1]))

    def join(self, *others: Path) -> None:
        """Take over the runs of other records that are not here; nothing if one cannot be read.

        Raises:
            UserError: as :func:`read_records`.
        """
        found = [self._complete(other, read_records(other, self.columns)) for other in others]
        for tables in found:
            self.add(*([r for r in table if self.identity(r) not in self.done] for table in tables))

    def _details(self, out: Path) -> list[Path]:
        return [out.with_name(f"{out.stem}-{part}.csv") for part in self.parts]

    def _complete(self, out: Path, runs: list[Row]) -> list[list[Row]]:
        """The tables beside ``out``, which has these ``runs``, and ``runs``."""
        there = set(map(self.identity, runs))
        details = (records_so_far(file, self.columns) for file in self._details(out))
        return [*([r for r in table if self.identity(r) in there] for table in details), runs]
