"""A program that disturbs runs at every single write, and looks at what comes of it.

``cd tests; python -m support.killing FOLDER KIND TROUBLE``: for k = 1, 2, ... a process begins a
run and meets its trouble just before its k-th change of the file system: a file opened for writing,
renamed or removed, a folder made or removed. Then another process runs the same command to its end,
and must end as an undisturbed run does. Prints a line for each k that was survived, and "through".

KIND, what the folder holds at first: "new", nothing; "over", another run, which is started over;
"own", a run that is started over with its own dense network.

TROUBLE: "killed", the process dies. (Before a renaming the file that was to be renamed is cut in
half, as if the process had died while it wrote it.) "full": from now on nothing can be written.
"gone": the folder is removed. The last two are to end in one line that says so.

It forks, since a child needs no second to start, and never computes before, so that no thread is
lost in a fork.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minihyperflows import lab
from minihyperflows.lab.checkpoint import load_checkpoint
from support.tiny import RECIPE, results, tiny_runs

DONE, FAILED, ONE_LINE, KILLED = 0, 1, 2, 9
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class Disturbance:
    """Trouble before the ``number``-th change of anything in or at ``folder``, in this process."""

    def __init__(self, number: int, folder: Path, trouble: str) -> None:
        self.number, self.folder, self.trouble = number, folder, trouble
        self.changes = 0
        self.busy = False
        sys.addaudithook(self)  # there is no way to take it away, but the process ends soon

    @property
    def happened(self) -> bool:
        return self.changes >= self.number

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        writing = event == "open" and bool(arguments[2] & WRITING)
        if self.busy or not (writing or event in CHANGES):
            return
        if not str(arguments[0]).startswith(str(self.folder)):
            return
        self.changes += 1
        if self.trouble == "full" and self.happened and writing:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if self.changes == self.number and self.trouble != "full":
            self.busy = True
            if self.trouble == "killed":
                if event == "os.rename":
                    os.truncate(arguments[0], os.path.getsize(arguments[0]) // 2)
                os._exit(KILLED)
            shutil.rmtree(self.folder, ignore_errors=True)
            self.busy = False


def in_a_child(function: Callable[[], int | None]) -> int:
    """The exit status of a child of this process: what ``function`` returns."""
    child = os.fork()
    if not child:
        status = FAILED
        try:
            status = function() or DONE
        except lab.UserError as error:
            status = ONE_LINE if "\n" not in str(error) else FAILED
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def epochs(folder: Path) -> int:
    """How many of a run are saved."""
    file = folder / "checkpoint.safetensors"
    return load_checkpoint(file)[1]["trainer"]["epoch"] if file.exists() else 0


def disturb_every_write(base: Path, kind: str, trouble: str) -> None:
    folder, before = base / "run", base / "before"
    options: dict[str, Any] = {} if kind == "new" else {"resume": False}
    if kind == "own":
        options["dense_from"] = folder

    def prepare() -> None:
        lab.run(RECIPE, base / "whole", progress=False)
        if kind != "new":
            lab.run(RECIPE, before, seed=int(kind == "over"), progress=False)

    def run() -> None:
        lab.run(RECIPE, folder, progress=False, **options)

    def check() -> None:
        finished = (folder / "summary.json").exists()
        with contextlib.suppress(lab.UserError) if trouble == "gone" else contextlib.nullcontext():
            run()  # where the folder is gone, so is the dense network that it had
        if not (folder / "summary.json").exists():
            lab.run(RECIPE, folder, progress=False)
        assert results(folder) == results(base / "whole")
        assert not list(folder.rglob("*.partial")), "half-written files stay"
        assert finished or not list(folder.rglob("*.lock")), "a lock stays"

    def disturbed(number: int) -> int:
        disturbance = Disturbance(number, folder, trouble)
        run()
        return ONE_LINE if disturbance.happened else DONE

    assert in_a_child(prepare) == DONE
    kept = 0
    for number in range(1, 1000):
        shutil.rmtree(folder, ignore_errors=True)
        if before.exists():
            shutil.copytree(before, folder)
        status = in_a_child(lambda n=number: disturbed(n))  # type: ignore[misc]
        if status == DONE:
            break
        assert status == (KILLED if trouble == "killed" else ONE_LINE), (number, status)
        if kind == "new" and trouble != "gone":
            assert epochs(folder) >= kept, f"change {number} loses what was saved before"
            kept = epochs(folder)
        assert in_a_child(check) == DONE, f"after change {number}"
        print(f"survived {number}", flush=True)
    print("through")


def main(folder: str, kind: str, trouble: str) -> None:
    with pytest.MonkeyPatch.context() as patch, tiny_runs(patch):
        disturb_every_write(Path(folder), kind, trouble)


if __name__ == "__main__":
    main(*sys.argv[1:])
