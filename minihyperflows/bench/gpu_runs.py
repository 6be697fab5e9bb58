"""``python -m minihyperflows.bench.gpu_runs``: the paper's experiments on a GPU, bit by bit.

VGG-19 and ResNet-50 on CIFAR-10 in full, 160 dense and 160 pruning and regrowth epochs, to several
sparsities that share the dense stage. The command stops when its minutes are over, at the end of an
epoch, and goes on where it stopped when it is called again. With ``--pack`` it then writes what can
be brought back from a machine that is lent; see :mod:`minihyperflows.bench.packs`.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from minihyperflows.bench.packs import PART_BYTES, ROUNDED, pack, restore_dense, unpack
from minihyperflows.emulator import emulated_gpu
from minihyperflows.engine.backend import require_gpu
from minihyperflows.errors import OutOfTimeError
from minihyperflows.lab.console import Parser, run_command
from minihyperflows.lab.folders import RunFolder
from minihyperflows.lab.locks import locked
from minihyperflows.lab.recipes import Recipe, find
from minihyperflows.lab.records import collect
from minihyperflows.lab.runs import run

NAMES = ("vgg19-cifar10", "resnet50-cifar10")
TARGETS = (0.90, 0.95, 0.98, 0.99)
SECONDS_BETWEEN_CHECKPOINTS = 60.0  # they have 400 MB here, and take a second


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is not finished; the exit status: 0, also when the time is over, 2 or 130."""

    def work() -> None:
        options = _parser().parse_args(arguments)
        with locked(options.out), emulated_gpu() if options.emulate else nullcontext():
            _run_all(options)

    return run_command(work, lambda: "the same command goes on")


def _parser() -> Parser:
    parser = Parser(
        prog="python -m minihyperflows.bench.gpu_runs",
        description="The paper's CIFAR-10 experiments on a GPU, in pieces of some minutes.",
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="the runs' folders go here")
    add("--data-dir", type=Path, metavar="DIR", help="where CIFAR-10 lies")
    add("--minutes", type=float, default=float("inf"), metavar="N", help="stop after so many")
    add("--recipes", type=_words, default=NAMES, metavar="NAME,...", help=f"of {', '.join(NAMES)}")
    add("--targets", type=_numbers, default=TARGETS, metavar="S,...", help="sparsities")
    add("--seeds", type=_seeds, default=(0,), metavar="N,...")
    add("--epochs-scale", type=float, default=1.0, metavar="X", help="stages X times as long")
    add("--pack", type=Path, metavar="DIR", help="write records and networks, in small files")
    add("--pack-dense", action="store_true", help="the dense networks too, as far as they fit")
    add("--pack-parts", type=int, default=3, metavar="N", help="of 16 MB; default 3")
    add("--unpack", type=Path, metavar="DIR", help="begin with the dense networks of this pack")
    add("--emulate", action="store_true", help="on an emulated GPU, for tests")
    return parser


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(map(float, text.split(",")))


def _seeds(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


@dataclasses.dataclass(frozen=True)
class Job:
    """One run."""

    recipe: Recipe
    seed: int
    folder: RunFolder


def jobs(options: argparse.Namespace) -> list[Job]:
    """All runs, those that share a dense network one after another."""
    found = []
    for name in options.recipes:
        for seed in options.seeds:
            for target in options.targets:
                recipe = find(name).with_target(target)
                if options.epochs_scale != 1:
                    recipe = recipe.scaled(options.epochs_scale)
                folder = RunFolder(options.out / f"{name}-{target:g}-seed{seed}")
                found.append(Job(recipe, seed, folder))
    return found


def dense_source(job: Job, everything: Sequence[Job], out: Path) -> Path | None:
    """A folder with the dense network that ``job`` would train; None if there is none yet."""
    restored = sorted(out.glob(f"{job.recipe.name}-*-seed{job.seed}, dense, {ROUNDED}"))
    mates = [j for j in everything if (j.recipe.name, j.seed) == (job.recipe.name, job.seed)]
    trained = [j.folder.path for j in mates if j is not job and j.folder.dense.exists()]
    return next(iter((*restored, *trained)), None)


def _run_all(options: argparse.Namespace) -> None:
    stop_at = time.monotonic() + 60 * options.minutes
    everything = jobs(options)
    require_gpu()
    if options.unpack:
        for folder in restore_dense(unpack(options.unpack), options.out):
            print(f"unpacked: {folder}")
    try:
        for job in everything:
            _run(job, everything, options, stop_at)
        print("all runs are finished")
    except OutOfTimeError as stop:
        print(f"the time is over: {stop}; the same command goes on from there")
    finally:  # also what was finished before an error is worth having
        _conclude(options, everything)


def _run(job: Job, everything: Sequence[Job], options: argparse.Namespace, stop_at: float) -> None:
    finished = job.folder.is_finished
    if time.monotonic() >= stop_at and not finished:
        raise OutOfTimeError(f"{job.folder.path} is next")
    summary = run(
        job.recipe,
        job.folder.path,
        data_dir=options.data_dir,
        device="cuda",
        seed=job.seed,
        progress=False,
        dense_from=dense_source(job, everything, options.out),
        stop_at=stop_at,
        save_every=SECONDS_BETWEEN_CHECKPOINTS,
    )
    print(_line(job, summary), flush=True)


def _line(job: Job, summary: dict[str, Any]) -> str:
    dense = summary["dense_accuracy"]
    return (
        f"{job.folder.path.name}: dense {'' if dense is None else f'{dense:.2%}'}, "
        f"{summary['test_accuracy']:.2%} at sparsity {summary['sparsity']:.2%}, "
        f"{summary['seconds']:.0f} s"
    )


def _conclude(options: argparse.Namespace, everything: Sequence[Job]) -> None:
    """The table of finished runs, and the pack."""
    begun = [job.folder.path for job in everything if job.folder.recipe.exists()]
    finished = [job.folder.path for job in everything if job.folder.is_finished]
    if finished:
        table = options.out / "finished.csv"
        print(f"{table}: {collect(finished, table)} of {len(everything)} runs")
    if options.pack:
        dense = [f for f in begun if RunFolder(f).dense.exists()] if options.pack_dense else []
        first = {_without_target(f, everything): f for f in reversed(dense)}  # one of each
        limit = options.pack_parts * PART_BYTES
        for missing in pack(begun, options.pack, list(first.values()), limit):
            print(f"no room for {missing}")
        print(f"packed into {options.pack}")


def _without_target(folder: Path, everything: Sequence[Job]) -> tuple[str, int]:
    """What runs with the same dense network share."""
    return next((j.recipe.name, j.seed) for j in everything if j.folder.path == folder)


if __name__ == "__main__":
    sys.exit(main())
