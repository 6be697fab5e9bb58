"""One frame for the long experiments behind the chapters: ``minihyperflows study NAME``.

A study says what a setting is, a frozen dataclass, and what one comes to, a row or several. The
fields of the dataclass are the options of the command, the columns of the table and what tells a
run from all others::

    @dataclass(frozen=True)
    class Setting:
        network: str = choice("lenet300", "convnet")
        target: float = values(parse_fraction, 0.9, 0.95)
        seed: int = seeds(4)

    class Targets(Study[Setting]):
        \"\"\"Does the scheduler reach its target?\"\"\"

        def run(self, s, bench):
            dense = bench.shared(("dense", s.network, s.seed), lambda: train(...))
            return {"score": ...}

The table is the state: what has its rows is not done again, whichever command it came from.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import itertools
import json
import pkgutil
import shlex
import sys
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeAlias, TypeVar

from tqdm import tqdm

from minihyperflows.analysis.summaries import means
from minihyperflows.data.datasets import Dataset
from minihyperflows.engine import DeviceError, NonFiniteLossError
from minihyperflows.engine.blas import one_blas_thread
from minihyperflows.engine.threads import set_threads
from minihyperflows.errors import UserError
from minihyperflows.lab.checkpoint import named_path
from minihyperflows.lab.cluster import Cluster
from minihyperflows.lab.console import Parser
from minihyperflows.lab.grammar import add_plugins
from minihyperflows.lab.networks import load
from minihyperflows.lab.plugins import Plugin, load_plugins
from minihyperflows.lab.ranges import plain
from minihyperflows.lab.records import Record, Row, read_records, value_of, writing
from minihyperflows.lab.runs import gpu_versions, provenance
from minihyperflows.lab.workers import Kind, Processes, describe, new_token, supervise
from minihyperflows.studies.command import reporting
from minihyperflows.studies.options import flag, options_of, parse_count, text_of

WITH_THE_PACKAGE = ("digits", "shapes32")  # data sets that need no files
Tables: TypeAlias = list[list[Row]]  # new rows of each part, and of the table itself
S = TypeVar("S")

# -- studies -------------------------------------------------------------------------------------


class Bench:
    """What a run is given beside its setting: the data, and what other runs have made.

    Attributes:
        data_dir, device: as on the command line.
        out: the table, for what is to be beside it.
        rows: of the runs that are done, for a run that builds on another.
        tick: to be called after each epoch.
        plugins: what was imported for it.
    """

    def __init__(
        self,
        data_dir: Path | None = None,
        device: str = "cpu",
        out: Path = Path("study.csv"),
        rows: Sequence[Row] = (),
        tick: Callable[[], Any] = lambda: None,
        plugins: tuple[Plugin, ...] = (),
    ) -> None:
        self.plugins = plugins
        self.data_dir, self.device, self.out, self.tick = data_dir, device, out, tick
        self.rows = list(rows)
        self._shared: dict[Hashable, tuple[Hashable, Any]] = {}

    def data(self, name: str) -> Dataset:
        """A data set, read once."""
        return self.shared(("data set", name), lambda: load(name, self.data_dir))

    def shared(self, key: tuple[Hashable, ...], make: Callable[[], Any]) -> Any:
        """What ``make`` made for this key. Of each kind, ``key[0]``, only the last one is kept."""
        kind = key[0]
        if kind not in self._shared or self._shared[kind][0] != key:
            self._shared.pop(kind, None)  # its memory is free for the next one
            self._shared[kind] = key, make()
        return self._shared[kind][1]


class Study(Generic[S]):
    """A table of runs, and how each of its rows is made.

    Attributes:
        name: of the module; what ``minihyperflows study`` calls it.
        Setting: a frozen dataclass whose fields are made by :func:`choice` and the like.
        parts: the names of further tables, FILE-PART.csv, with details of the runs.
        digits: of floats in the tables; None: all.
        shown: the columns of the results that ``--table`` shows.
        later: columns of the identity that records of the past do not have.
        devices: on which it can run.
        unit: what is over when a run calls ``bench.tick``.
    """

    name: ClassVar[str]
    Setting: type[S]
    parts: ClassVar[tuple[str, ...]] = ()
    digits: ClassVar[int | None] = None
    shown: ClassVar[tuple[str, ...]] = ()
    later: ClassVar[tuple[str, ...]] = ()
    devices: ClassVar[tuple[str, ...]] = ("cpu",)
    unit: ClassVar[str] = "epoch"

    # What a study may define.

    def run(self, s: S, bench: Bench) -> Row | Tables:
        """Do it: its row, or the rows of all tables, those of ``parts`` first."""
        raise NotImplementedError

    def plan(self, chosen: dict[str, tuple[Any, ...]]) -> Iterable[S]:
        """The settings for what was chosen of each field: all combinations, seed by seed."""
        names = sorted(chosen, key=lambda name: name != "seed")
        for combination in itertools.product(*(chosen[name] for name in names)):
            yield self.Setting(**dict(zip(names, combination, strict=True)))

    def check(self, s: S, bench: Bench) -> None:
        """Raise UserError if it cannot be done. Called for all settings before any is done."""

    def recorded(self, s: S, out: Path) -> None:
        """Its rows are in the table ``out`` now."""

    def shares(self, s: S) -> Hashable:
        """Settings with an equal value have things in common, and are done by one process."""
        return s

    def dataset(self, s: S) -> str:
        """The data set that it needs."""
        return "digits"

    def dtype(self, s: S) -> str:
        """In which it is computed."""
        return "float32"

    def added(self, row: Row, column: str) -> Any:
        """Of the columns ``later``, the value in a row that does not have them."""
        raise NotImplementedError

    def order(self, row: Row) -> Any:
        """By what joined tables are sorted; the same for all rows: they stay as they come."""
        return 0

    def report(self, rows: Sequence[Row]) -> str:
        """What ``--table`` prints."""
        return means(rows, [n for n in self.identity if n != "seed"], self.shown)

    # What the frame does with it.

    @property
    def identity(self) -> tuple[str, ...]:
        """The columns that tell runs apart."""
        return tuple(name for name, o in options_of(self.Setting).items() if o.identity)

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns by which a record of this study is recognised."""
        return tuple(name for name in self.identity if name not in self.later)

    def key(self, s: S) -> tuple[Any, ...]:
        """What tells the setting from all others, as it stands in a table."""
        return tuple(self._cell(getattr(s, name)) for name in self.identity)

    def keys(self, s: S) -> list[tuple[Any, ...]]:
        """Those of all rows of a run, if they are not the same."""
        return [self.key(s)]

    def key_of(self, row: Row) -> tuple[Any, ...]:
        """:meth:`key` of the setting that a row belongs to."""
        cells = (row[name] if name in row else self.added(row, name) for name in self.identity)
        return tuple(map(self._cell, cells))

    def _cell(self, value: Any) -> Any:
        """As it comes back from a table."""
        if isinstance(value, tuple):
            value = value_of(text_of(value))
        if isinstance(value, float) and self.digits:
            value = float(f"{value:.{self.digits}g}")
        return "" if value is None else value

    def command(self, s: S, device: str = "cpu") -> str:
        """What repeats a run: the inverse of :func:`parser_of`."""
        words = ["minihyperflows", "study", self.name]
        for name, option in options_of(self.Setting).items():
            value = getattr(s, name)
            if option.several and isinstance(value, tuple):
                words += [flag(name), *map(str, value)]
            elif value not in (None, ""):
                words += [flag(name), text_of(value)]
        words += ["--data-dir", "DIR"] if self.dataset(s) not in WITH_THE_PACKAGE else []
        words += ["--device", device] if device != "cpu" else []
        return shlex.join([*words, "--out", "FILE"])

    def tables(self, s: S, bench: Bench) -> Tables:
        """Do a run: new rows of all tables, complete."""
        found = self.run(s, bench)
        *details, rows = found if isinstance(found, list) else [[found]]
        head = dict(zip(self.identity, self.key(s), strict=True))
        source = provenance(self.dtype(s), self.command(s, bench.device))
        source["command"] += "".join(f" --plugin {shlex.quote(p.path)}" for p in bench.plugins)
        versions = [source["minihyperflows"], *map(_version, bench.plugins)]
        source["minihyperflows"] = ", ".join(versions)
        if bench.device == "cuda":
            source |= {"device": bench.device} | gpu_versions()
        tables = [*([head | row for row in part] for part in details)]
        tables.append([head | row | source for row in rows])
        bench.rows += tables[-1]
        return plain(tables)


def _version(plugin: Plugin) -> str:
    """As the column "minihyperflows" has it, after the package's own version."""
    return f"{Path(plugin.path).name} {plugin.sha256[:12]}"


def _require_same_plugins(rows: Sequence[Row], plugins: Sequence[Plugin], out: Path) -> None:
    """Raise UserError if rows of the table were made with another version of a plugin."""
    made_with = {part for row in rows for part in str(row.get("minihyperflows")).split(", ")[1:]}
    for plugin in plugins:
        name = Path(plugin.path).name
        others = {part for part in made_with if part.rpartition(" ")[0] == name}
        if others - {_version(plugin)}:
            raise UserError(
                f"the plugin {plugin.path} has changed since runs in {out} were made, with "
                f"{', '.join(sorted(others))}: bring that back, or choose another FILE"
            )


# -- the command ---------------------------------------------------------------------------------


def find(name: str) -> Study[Any]:
    """The study of a name.

    Raises:
        UserError: there is none.
    """
    known = studies()
    if name not in known:
        raise UserError(f"there is no study {name!r}; the studies are {', '.join(known)}")
    return known[name]


def studies() -> dict[str, Study[Any]]:
    """All studies by name: what their modules call STUDY."""
    package = importlib.import_module("minihyperflows.studies")
    names = (name for _, name, _ in pkgutil.iter_modules(package.__path__))
    modules = (importlib.import_module(f"{package.__name__}.{name}") for name in names)
    return {m.STUDY.name: m.STUDY for m in modules if hasattr(m, "STUDY")}


def parser_of(study: Study[Any]) -> Parser:
    """The command line of a study."""
    parser = Parser(prog=f"minihyperflows study {study.name}", description=title(study))
    for name, option in options_of(study.Setting).items():
        as_it_is: dict[str, Any] = {
            "dest": name,
            "type": _type(option.parse),
            "nargs": option.several or None,
            "choices": option.choices,
        }
        metavar = name.upper() if option.choices is None else None
        parser.add_argument(flag(name), help=option.help, metavar=metavar, **as_it_is)
        for other in option.others:
            parser.add_argument(
                other, help=argparse.SUPPRESS, default=argparse.SUPPRESS, **as_it_is
            )
    if "seed" in options_of(study.Setting):
        parser.add_argument("--seeds", type=parse_count, metavar="K", help="seeds 0 to K - 1")
    add = parser.add_argument
    add("--out", type=named_path, required=True, metavar="FILE", help="continued if it is there")
    add("--data-dir", type=Path, metavar="DIR", help="where MNIST and CIFAR lie")
    add("--device", choices=study.devices, default="cpu")
    add("--workers", type=parse_count, default=1, metavar="N", help="processes; default 1")
    add("--dask", metavar="ADDRESS", help="of a Dask cluster's scheduler, to work instead")
    add("--join", nargs="+", type=Path, default=(), metavar="FILE", help="only add their runs")
    add("--quiet", action="store_true", help="no progress bar")
    add_plugins(parser)
    add("--table", action="store_true", help="only print what FILE holds")
    return parser


def _plugins_in(words: Sequence[str]) -> tuple[Plugin, ...]:
    """The plugins that the words name, imported: before the words are read, since other options may
    name what the plugins register."""
    parser = Parser(add_help=False, allow_abbrev=False)
    add_plugins(parser)
    return load_plugins(parser.parse_known_args(words)[0].plugins)


def _type(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """For argparse, whose messages would else name the function."""

    def value(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            raise UserError(f"{text!r} is not possible here: {error}") from None

    return value


def title(study: Study[Any]) -> str:
    """What a study is about, in one line."""
    return (study.__doc__ or "").strip().splitlines()[0]


def parse(study: Study[Any], words: Sequence[str]) -> tuple[argparse.Namespace, list[Any]]:
    """The options, and the settings that they ask for, each once.

    Raises:
        UserError: something is wrong with them, or they ask for none.
    """
    plugins = _plugins_in(words)
    options = parser_of(study).parse_args(words)
    options.plugins = plugins
    chosen: dict[str, Any] = {}
    for name, option in options_of(study.Setting).items():
        given = getattr(options, name)
        chosen[name] = option.defaults if given is None else (given,)
        if given is not None and option.several:  # a word may be a range of values
            chosen[name] = [v for w in given for v in (w if isinstance(w, tuple) else (w,))]
    if getattr(options, "seeds", None):
        if options.seed is not None:
            raise UserError("--seeds K are seeds 0 to K - 1, --seed N are certain ones: give one")
        chosen["seed"] = range(options.seeds)
    settings = list(dict.fromkeys(study.plan({k: tuple(v) for k, v in chosen.items()})))
    if not settings:
        raise UserError("no run was asked for: nothing has all that was chosen")
    return options, settings


def main(study: Study[Any], words: Sequence[str] | None = None, listed: bool = False) -> None:
    """``python -m minihyperflows.studies.NAME``: the same command, and older forms of it.

    Args:
        study, words: which, and its options.
        listed: whether ``--seeds`` was a list of seeds in the past, which is ``--seed`` now.
    """
    words = list(sys.argv[1:] if words is None else words)
    if listed and "--seeds" in words:
        words = ["--seed" if word == "--seeds" else word for word in words]
        tqdm.write(
            f"this is now: minihyperflows study {study.name} {shlex.join(words)}", sys.stderr
        )
    study = find(study.name)  # not the one of __main__, which no worker knows
    reporting()(command)(study, words)


def command(study: Study[Any], words: Sequence[str]) -> None:
    """The work of ``minihyperflows study NAME``; BLAS computes on one thread."""
    options, settings = parse(study, words)
    if options.table:
        print(study.report(read_records(options.out, study.columns)))
    else:
        one_blas_thread(carry_out)(study, options, settings)


def carry_out(study: Study[S], options: argparse.Namespace, settings: Sequence[S]) -> list[Row]:
    """Do the runs that are not in the tables yet, or take over those of other files.

    Returns all rows of the main table.
    """
    with writing(options.out):
        order = study.order if options.join else None
        record = Record(options.out, study.parts, study.key_of, study.columns, study.digits, order)
        if options.join:
            record.join(*options.join)
            return record.tables[-1]
        waiting = [s for s in settings if not record.done.issuperset(study.keys(s))]
        _require_same_plugins(record.tables[-1], options.plugins, options.out)
        bench = Bench(
            *(options.data_dir, options.device, options.out, record.tables[-1]),
            plugins=options.plugins,
        )
        for s in waiting:  # what cannot be done is noticed before anything is
            study.check(s, bench)
        quiet = options.quiet
        with tqdm(total=len(waiting), unit="run", dynamic_ncols=True, disable=quiet) as bar:
            if options.workers > 1 or options.dask:
                pool = Cluster(options.dask) if options.dask else Processes(options.workers)
                jobs = jobs_of(study, options, waiting, list(record.tables[-1]))
                _in_parallel(study, pool, jobs, record, bar)
            else:
                _one_by_one(study, bench, waiting, record, bar)
        return record.tables[-1]


def _one_by_one(
    study: Study[S], bench: Bench, settings: Sequence[S], record: Record, bar: tqdm
) -> None:
    for s in settings:
        bar.set_description(_label(study, s))
        bench.tick = partial(_show, bar, study.unit, itertools.count(1))
        _add(study, record, study.tables(s, bench))
        study.recorded(s, bench.out)
        bar.update()


def _add(study: Study[Any], record: Record, tables: Tables) -> None:
    """Of a run with rows of several keys, some may be there already."""
    *details, rows = tables
    record.add(*details, [row for row in rows if study.key_of(row) not in record.done])


def _show(bar: tqdm, unit: str, numbers: Iterator[int]) -> None:
    bar.set_postfix_str(f"{unit} {next(numbers)}", refresh=False)
    bar.update(0)  # drawn if it is time


def _label(study: Study[S], s: S) -> str:
    return " ".join(str(value) for value in study.key(s) if value != "")


# -- many at a time ------------------------------------------------------------------------------


@dataclasses.dataclass
class Job:
    """Settings that a worker does one after another (a :class:`minihyperflows.lab.workers.Work`);
    those whose rows have come are taken from it."""

    study: Study[Any]
    settings: list[Any]
    data_dir: Path | None
    device: str
    out: Path
    rows: list[Row]
    plugins: tuple[Plugin, ...] = ()
    threads: int = 1
    deaths: int = 0
    token: str = dataclasses.field(default_factory=new_token)

    def next(self) -> Job:
        """The job of the next worker, if one has died of this."""
        return dataclasses.replace(self, deaths=self.deaths + 1, token=new_token())

    def withdraw(self) -> None:
        """Nothing is marked as its own."""

    def carry_out(self, report: Callable[[str], None]) -> tuple[Kind, str]:
        """Do them; ``report`` is told of each what came of it, as JSON."""
        found: list[Tables] = []
        try:
            set_threads(self.threads)
            plugins = load_plugins(self.plugins)
            bench = Bench(self.data_dir, self.device, self.out, self.rows, plugins=plugins)
            tables = self.study.tables
            for s in self.settings:
                found.append(one_blas_thread(tables)(s, bench))
                report(json.dumps(found[-1:]))
        except (UserError, DeviceError, NonFiniteLossError) as error:
            return Kind.FAILED, str(error)
        except MemoryError:
            return Kind.DIED, "out of memory"
        except Exception as error:  # one run must not end the others, whatever it is
            return Kind.FAILED, describe(error)
        return Kind.FINISHED, json.dumps(found)  # on a cluster a report may come too late


def jobs_of(
    study: Study[S], options: argparse.Namespace, settings: Sequence[S], rows: list[Row]
) -> list[Job]:
    """The settings in groups that share something, one job each; ``rows`` are there already."""
    groups: dict[Hashable, list[S]] = {}
    for s in settings:
        groups.setdefault(study.shares(s), []).append(s)
    folder = None if options.data_dir is None else options.data_dir.absolute()
    where = folder, options.device, options.out.absolute(), rows, options.plugins
    return [Job(study, group, *where) for group in groups.values()]


def _in_parallel(study: Study[S], pool: Any, jobs: list[Job], record: Record, bar: tqdm) -> None:
    failures = []
    with closing(pool), closing(supervise(pool, jobs)) as events:
        for event in events:
            job: Any = event.attempt
            if event.kind in (Kind.ROWS, Kind.FINISHED):
                for tables in json.loads(event.reason):
                    key = study.key_of(tables[-1][0])
                    for done in [s for s in job.settings if key in study.keys(s)]:
                        _add(study, record, tables)
                        job.settings.remove(done)
                        study.recorded(done, job.out)
                        bar.update()
            elif event.kind is Kind.FAILED:
                failures.append(f"{_label(study, job.settings[0])}: {event.reason}")
                bar.write(f"failed: {failures[-1]}", sys.stderr)
    if failures:
        raise UserError(f"{len(failures)} of {len(jobs)} jobs failed, the first: {failures[0]}")
