"""A program in which two processes begin a run in one folder at the same moment, again and again.

``cd tests; python -m support.racing FOLDER ROUNDS``: of two runs with different seeds one ends
well, the other is refused in one line, and the folder is the first one's, to the bit. Of two equal
ones the second is refused or finds the result. Prints who won, for each round.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from minihyperflows import lab
from support.killing import DONE, FAILED, ONE_LINE, in_a_child
from support.tiny import RECIPE, results, tiny_runs


def together(functions: list[Callable[[], object]]) -> list[int]:
    """The exit statuses of children that call one function each, and begin when all are there."""
    read, write = os.pipe()
    children = []
    for function in functions:
        child = os.fork()
        if not child:
            status = FAILED
            try:
                os.close(write)
                os.read(read, 1)  # until the parent closes its end
                function()
                status = DONE
            except lab.UserError as error:
                status = FAILED if "\n" in str(error) else ONE_LINE
            finally:
                os._exit(status)
        children.append(child)
    os.close(write)
    os.close(read)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def run(folder: Path, seed: int) -> Callable[[], object]:
    return lambda: lab.run(RECIPE, folder, seed=seed, progress=False) and None


def race(base: Path, rounds: int) -> None:
    for seed in (0, 1):
        assert in_a_child(lambda s=seed: run(base / f"whole-{s}", s)()) == DONE  # type: ignore[misc]
    whole = [results(base / f"whole-{seed}") for seed in (0, 1)]
    for number in range(rounds):
        folder = base / str(number)
        seeds = (0, 1) if number % 2 else (0, 0)
        statuses = together([run(folder, seed) for seed in seeds])
        assert DONE in statuses, statuses
        assert set(statuses) <= {DONE, ONE_LINE}, statuses
        if seeds == (0, 1):
            assert sorted(statuses) == [DONE, ONE_LINE], statuses
        winner = seeds[statuses.index(DONE)]
        assert results(folder) == whole[winner]
        assert not [*folder.rglob("*.partial"), *folder.rglob("*.lock")]
        print(f"round {number}: {statuses}", flush=True)


def main(base: str, rounds: str) -> None:
    with pytest.MonkeyPatch.context() as patch, tiny_runs(patch):
        race(Path(base), int(rounds))


if __name__ == "__main__":
    main(*sys.argv[1:])
