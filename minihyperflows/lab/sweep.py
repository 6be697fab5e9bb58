"""A sweep: one recipe under many constant pressures, with several seeds each.

Every run has a folder of its own (``gamma-0.5-seed0``), beside ``sweep.json``, which says what the
sweep is, and the table of all finished runs. See :class:`SweepFolder`.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from minihyperflows.data.datasets import IMAGES
from minihyperflows.engine.backend import to_device
from minihyperflows.errors import UserError
from minihyperflows.lab.checkpoint import (
    is_temporary,
    named_path,
    read_json,
    remove_temporary,
    write_json,
)
from minihyperflows.lab.checks import require_names, require_usable
from minihyperflows.lab.cluster import Cluster
from minihyperflows.lab.folders import RunFolder, foreign, is_sweep, json_in, locked, remove
from minihyperflows.lab.locks import locked as lock_folder
from minihyperflows.lab.networks import load
from minihyperflows.lab.plugins import Paths, Plugin, load_plugins, require_same
from minihyperflows.lab.plugins import as_json as as_plugins
from minihyperflows.lab.recipes import Recipe, find
from minihyperflows.lab.records import read_records, table_of_runs, write_runs
from minihyperflows.lab.runs import as_json, first_difference
from minihyperflows.lab.workers import (
    ATTEMPTS,
    Attempt,
    Event,
    Kind,
    Pool,
    Processes,
    supervise,
)

SMALLEST = float(np.finfo(np.float32).tiny)  # a gamma above 0
MOST_RUNS = 100_000  # of a sweep: more is a slip, which would take hours to be noticed

# -- gammas --------------------------------------------------------------------------------------


def parse_gammas(text: str) -> tuple[float, ...]:
    """The pressures that ``text`` names, in ascending order.

    A list of values and ranges: ``0.5,1,2``, or ``2^-6:2^6`` in octaves, or ``2^-6:2^6:2`` in steps
    of two octaves. Each value is a number or a power.

    Raises:
        UserError: it names none, or not clearly.
    """
    gammas = {gamma for part in text.split(",") for gamma in _parse_part(part)}
    return tuple(sorted(gammas))


def _parse_part(part: str) -> list[float]:
    first, *others = part.split(":")
    start = _parse_value(first)
    if not others:
        return [start]
    if len(others) > 2:
        raise UserError(f"{part} is not a range of gammas: write START:END or START:END:OCTAVES")
    end = _parse_value(others[0])
    step = _parse_value(others[1]) if others[1:] else 1.0
    if start <= 0 or step <= 0 or end < start:
        raise UserError(f"the range {part} must go up from a gamma above 0, in steps above 0")
    steps = (math.log2(end) - math.log2(start)) / step
    if steps > MOST_RUNS:
        raise UserError(f"the range {part} has more than {MOST_RUNS:,} gammas")
    if abs(steps - round(steps)) > 1e-9:
        raise UserError(f"the range {part} does not end on a step of {step:g} octaves from {first}")
    return [start * 2 ** (k * step) for k in range(round(steps) + 1)]


def _parse_value(text: str) -> float:
    """``0.5``, ``2^-1`` or ``2**-1``."""
    try:
        base, *exponents = (float(number) for number in text.replace("**", "^").split("^"))
        value = base ** exponents[0] if exponents else base
    except (ValueError, ArithmeticError):
        value, exponents = math.nan, []
    if len(exponents) > 1 or isinstance(value, complex) or not 0 <= value < math.inf:
        raise UserError(f"{text.strip()!r} is not a gamma: write a number from 0 on, or 2^-6")
    if 0 < value < SMALLEST:
        raise UserError(f"{text.strip()!r} is too small a gamma: float32 begins at {SMALLEST:.3g}")
    return value


# -- the folder ----------------------------------------------------------------------------------


class SweepFolder:
    """The files of one sweep.

    Attributes:
        description: ``sweep.json``, the recipe and the device; gammas and seeds may be added later.
        table: ``sweep.csv``, a row for every finished run, unless it is written elsewhere.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.description = path / "sweep.json"
        self.table = path / "sweep.csv"

    def run_folder(self, gamma: float, seed: int) -> Path:
        """Where the run with this pressure and seed is."""
        return self.path / f"gamma-{np.format_float_positional(gamma, trim='-')}-seed{seed}"

    def require_ours(self) -> None:
        """Raise unless the folder is a sweep's, or has nothing in it, or is not there.

        Raises:
            UserError: it is somebody else's, or a run's, or it cannot be used.
        """
        others = foreign(self.path, lambda entry: is_temporary(entry.name, self._names))
        if not others or is_sweep(json_in(self.description)):
            return
        if RunFolder(self.path).is_run():
            raise UserError(
                f"{self.path} holds a run, not a sweep: choose another folder with --out"
            )
        raise UserError(
            f"{self.path} is not empty and not a sweep's folder (it has {others[0]}): "
            "choose another folder, or a new one"
        )

    @property
    def _names(self) -> list[str]:
        return [self.description.name, self.table.name]

    def open(
        self, recipe: Recipe, device: str, resume: bool, plugins: tuple[Plugin, ...] = ()
    ) -> None:
        """Begin in the folder, or check that it holds this very sweep; without ``resume`` empty it.

        For the holder of the folder's lock.

        Raises:
            UserError: it holds another sweep, or a run of it is at work.
        """
        remove_temporary(self.path, self._names)
        here = {"recipe": as_json(recipe.with_gamma(1.0)), "device": device}
        if resume and self.description.exists():
            self._require_same(here, plugins)
            return
        if not resume:
            self._forget_runs()
        write_json(self.description, here | as_plugins(plugins))

    def _forget_runs(self) -> None:
        folders = [RunFolder(path) for path in self._run_folders()]
        for folder in folders:  # before the first is emptied
            folder.require_ours()
        for folder in folders:
            with locked(folder):
                folder.forget()
                remove(folder.dense)

    def _require_same(self, here: dict[str, Any], plugins: tuple[Plugin, ...]) -> None:
        there = read_json(self.description)
        try:
            require_same(there, plugins, f"of the sweep in {self.path}")
            there = {name: value for name, value in there.items() if name != "plugins"}
            there["recipe"] = as_json(Recipe.from_json(there["recipe"]))
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"cannot understand {self.description} ({error}): start over with --no-resume"
            ) from error
        if difference := first_difference(there, here):
            raise UserError(
                f"{self.path} holds another sweep ({difference}): choose another folder with "
                "--out, or start over with --no-resume"
            )

    def finished(self) -> list[Path]:
        """The folders of the finished runs, by gamma and seed."""
        return [folder for folder in self._run_folders() if RunFolder(folder).is_finished]

    def _run_folders(self) -> list[Path]:
        found = []
        for folder in self.path.glob("gamma-*"):
            if name := re.fullmatch(r"gamma-(\d+(?:\.\d+)?)-seed(\d+)", folder.name):
                found.append((float(name[1]), int(name[2]), folder))
        return [folder for *_, folder in sorted(found)]


# -- the sweep -----------------------------------------------------------------------------------


def run_sweep(
    recipe: Recipe | str,
    gammas: Sequence[float],
    out: str | os.PathLike[str],
    seeds: int = 1,
    workers: int = 1,
    scheduler: str | None = None,
    threads: int = 1,
    data_dir: str | os.PathLike[str] | None = None,
    device: str = "cpu",
    resume: bool = True,
    record: str | os.PathLike[str] | None = None,
    progress: bool = True,
    plugins: Paths = (),
) -> list[dict[str, Any]]:
    """Run ``recipe`` under each constant pressure in ``gammas`` with the seeds 0 ... ``seeds`` - 1.

    Runs are independent. A sweep that was interrupted continues: finished runs are not repeated,
    the others go on from their checkpoints. Gammas and seeds can be added to a sweep later. If the
    recipe has a dense stage, it is run once for each seed, as far as one is finished when the next
    begins. (In a script, call this under ``if __name__ == "__main__":``, as processes are spawned.)

    Args:
        recipe: a :class:`Recipe`, or the name of one; see :meth:`Recipe.with_gamma`.
        gammas: the pressures.
        out: the sweep's folder, with a folder for each run; made if needed.
        seeds: how many seeds.
        workers: how many processes of this machine work at a time.
        scheduler: the address of a Dask scheduler, whose workers do it instead. They must see the
            folders ``out`` and ``data_dir`` under the same names.
        threads: how many threads each run uses.
        data_dir: where MNIST or CIFAR lie.
        device: "cpu" or "cuda".
        resume: False starts all runs of the folder over.
        record: the CSV file with a row for every finished run; None for ``sweep.csv`` in ``out``.
        progress: print a line for each finished run and show a progress bar.
        plugins: files that register what the recipe names; every worker imports them first.

    Returns:
        The table's rows (:func:`minihyperflows.lab.records.collect`), by gamma and seed.

    Raises:
        UserError: something cannot be used (one line that says what to do), or a run failed; the
            others are finished then.
    """
    known = load_plugins(plugins)
    recipe = recipe if isinstance(recipe, Recipe) else find(recipe)
    folder = SweepFolder(named_path(os.fspath(out)).absolute())
    data_dir = None if data_dir is None else Path(data_dir).absolute()
    if min(seeds, workers, threads) < 1 or not gammas:
        raise UserError("a sweep needs at least one gamma, one seed, one worker and one thread")
    if len(gammas) * seeds > MOST_RUNS:
        raise UserError(f"a sweep has at most {MOST_RUNS:,} runs, not {len(gammas) * seeds:,}")
    attempts = [
        Attempt(
            recipe=recipe.with_gamma(gamma),
            folder=folder.run_folder(gamma, seed),
            seed=seed,
            device=device,
            data_dir=data_dir,
            threads=threads,
            siblings=tuple(folder.run_folder(other, seed) for other in gammas if other != gamma),
            plugins=known,
        )
        for gamma in gammas
        for seed in range(seeds)
    ]
    table = folder.table if record is None else named_path(os.fspath(record))
    if os.path.abspath(table) == os.path.abspath(folder.description):
        raise UserError(f"{table} says what the sweep is: choose another name for the record")
    folder.require_ours()
    with ExitStack() as stack:
        stack.enter_context(lock_folder(folder.path))
        folder.require_ours()  # another process may have written to it in between
        if record is not None:
            stack.enter_context(table_of_runs(table))
        require_names(attempts[0].recipe, device)
        if recipe.dataset in IMAGES:
            require_usable(attempts[0].recipe, device)
        if scheduler is None:
            _try_here(attempts[0].recipe, data_dir, device)
        pool: Pool = Processes(workers) if scheduler is None else Cluster(scheduler)
        stack.enter_context(closing(pool))
        folder.open(recipe, device, resume, known)
        failures = _Progress(folder, table, attempts, progress).follow(pool)
    if failures:
        raise UserError(
            f"{len(failures)} of {len(attempts)} runs failed ({failures[0]}); "
            "the same command tries them again"
        )
    return read_records(table)


def _try_here(recipe: Recipe, data_dir: Path | None, device: str) -> None:
    """Raise at once what would otherwise end every single run."""
    to_device(np.zeros(1), device)
    data = load(recipe.dataset, data_dir)
    if recipe.dataset not in IMAGES:
        require_usable(recipe, device, data)


class _Progress:
    """What a user sees of a sweep: a line for each finished run, a bar, and the table."""

    def __init__(
        self, folder: SweepFolder, table: Path, attempts: Sequence[Attempt], visible: bool
    ) -> None:
        self.folder, self.table, self.attempts, self.visible = folder, table, attempts, visible
        self.epochs_per_run = attempts[0].recipe.timeline.epochs
        self.failures: list[str] = []
        there = (a.folder for a in attempts if RunFolder(a.folder).is_finished)
        self.epochs = dict.fromkeys(there, self.epochs_per_run)  # that are over, by run

    def follow(self, pool: Pool) -> list[str]:
        """Carry out what is not finished; returns a line for each run that failed."""
        waiting = [a for a in self.attempts if a.folder not in self.epochs]
        self._say(
            f"{len(self.attempts)} runs of {self.epochs_per_run} epochs, "
            f"{len(self.epochs)} of them finished already; on {pool}"
        )
        if self.folder.finished():
            write_runs(self.folder.finished(), self.table)
        bar = tqdm(
            total=len(self.attempts) * self.epochs_per_run,
            initial=sum(self.epochs.values()),
            disable=not self.visible,
            unit="epoch",
            dynamic_ncols=True,
        )
        with bar, closing(supervise(pool, waiting)) as events:
            for event in events:
                self._take(event)
                bar.n = sum(self.epochs.values())
                bar.set_postfix_str(f"{len(self.folder.finished())} runs finished", refresh=False)
                bar.update(0)
        return self.failures

    def _take(self, event: Event) -> None:
        attempt = event.attempt
        name = f"gamma {attempt.recipe.pressure.gamma:<10g} seed {attempt.seed}"
        if event.kind is Kind.EPOCH:
            self.epochs[attempt.folder] = event.epoch
        elif event.kind is Kind.FINISHED:
            self.epochs[attempt.folder] = self.epochs_per_run
            self._say(f"{name}  {_results(attempt)}")
            for text in RunFolder(attempt.folder).read_summary().get("warnings", ()):
                self._say(f"{name}  warning: {text}")
            write_runs(self.folder.finished(), self.table)
        elif event.kind is Kind.DIED:
            lost = f"{attempt.deaths + 1} of {ATTEMPTS}"
            self._say(f"{name}  lost its worker ({event.reason}), {lost}; the next one continues")
        else:
            self._say(f"{name}  failed: {event.reason}")
            self.failures.append(f"{' '.join(name.split())}: {event.reason}")

    def _say(self, line: str) -> None:
        if self.visible:
            tqdm.write(line)


def _results(attempt: Attempt) -> str:
    """What a finished run came to."""
    folder = RunFolder(attempt.folder)
    if not folder.is_finished:
        raise UserError(
            f"a worker has finished {attempt.folder}, but it is not there: give a folder as --out "
            "that the cluster and this machine share"
        )
    summary = folder.read_summary()
    density = summary["remaining"] / summary["weights"]
    return (
        f"density {density:9.4%}  accuracy {summary['test_accuracy']:7.2%}  "
        f"{summary['seconds']:.0f} s"
    )
