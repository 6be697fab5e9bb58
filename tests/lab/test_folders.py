"""Folders: one run at a time, nothing of a user's touched, every damage noticed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support import python
from support.tiny import NAME, RECIPE, results, rows, tiny_runs

from minihyperflows import lab
from minihyperflows.bench import gpu_runs
from minihyperflows.cli import main
from minihyperflows.lab import checkpoint, folders, locks, records, runs, sweep
from minihyperflows.lab.records import write_records

pytestmark = pytest.mark.filterwarnings("ignore:landing removed")  # runs are short
posix = pytest.mark.skipif(os.name == "nt", reason="there is no fork and no SIGKILL on Windows")


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> Any:
    with tiny_runs(monkeypatch):
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an undisturbed run."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch, tiny_runs(patch):
        lab.run(RECIPE, folder, progress=False)
    return folder


@pytest.fixture
def finished(whole: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(whole, tmp_path / "finished"))


class Stop(BaseException):
    """As if the process ended."""


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    """A run that ended in its second epoch."""
    folder = tmp_path / "begun"

    def stop(record: Any) -> None:
        if record.epoch == 2:
            raise Stop

    with pytest.raises(Stop):
        lab.run(RECIPE, folder, progress=False, observe=stop)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line with which a command is refused."""
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


# -- one at a time -------------------------------------------------------------------------------


def test_a_second_run_is_refused_before_it_reads_or_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    with locks.locked(out):
        before = contents(out)
        monkeypatch.setattr(runs, "load", None)  # would be called
        for more in ([], ["--seed", "1"], ["--no-resume"]):
            line = refused(["prune", NAME, "--out", str(out), *more], capsys)
            assert f"{out} is in use by another thread of this process" in line
        assert contents(out) == before
    assert not out.exists()


def test_a_second_export_or_sweep_or_series_on_a_gpu_is_refused(
    tmp_path: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights, out = tmp_path / "w.safetensors", tmp_path / "many"
    with locks.locked_file(weights):
        line = refused(["export", str(finished), str(weights)], capsys)
        assert f"{weights} is in use by another thread of this process" in line
    assert not weights.exists()
    with locks.locked(out):
        sweep = ["sweep", NAME, "--gammas", "1", "--out", str(out)]
        assert f"{out} is in use" in refused(sweep, capsys)
        assert gpu_runs.main(["--out", str(out)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: {out} is in use")
    assert not out.exists()


def test_two_threads(tmp_path: Path, whole: Path) -> None:
    """The second comes in the middle of the first; nothing is lost."""
    errors: list[Any] = []

    def second() -> None:
        try:
            lab.run(RECIPE, tmp_path, seed=1, progress=False)
        except Exception as error:
            errors.append(error)

    def in_the_middle(record: Any) -> None:
        other = threading.Thread(target=second)
        other.start()
        other.join()

    lab.run(RECIPE, tmp_path, progress=False, observe=in_the_middle)
    assert [type(error) for error in errors] == [locks.InUseError] * 3
    assert results(tmp_path) == results(whole)


@pytest.mark.slow
@posix
def test_two_processes_at_the_same_moment(tmp_path: Path) -> None:
    command = python("racing", str(tmp_path), "10")
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("round") == 10


HOLD = """
import sys, pathlib
from minihyperflows.lab.locks import locked
with locked(pathlib.Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.read()
"""


@pytest.mark.slow
def test_the_lock_of_a_process_ends_with_it(tmp_path: Path) -> None:
    """However it ends; the message names the process."""
    folder = tmp_path / "run"
    for end in (subprocess.Popen.kill, lambda process: process.stdin.close()):
        with subprocess.Popen(
            [sys.executable, "-c", HOLD, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stdout
            assert process.stdout.readline() == "locked\n"
            with pytest.raises(locks.InUseError, match=f"is in use by process {process.pid}: "):
                lab.run(RECIPE, folder, progress=False)
            end(process)
            process.wait()
        with locks.locked(folder):
            pass
    assert not list(folder.iterdir())


@posix
def test_a_fork_does_not_keep_the_lock(tmp_path: Path) -> None:
    """The holder is killed, its child lives on: the lock is free."""
    is_there, here = os.pipe()
    until, go_on = os.pipe()
    holder = os.fork()
    if not holder:
        locks.Lock(tmp_path / locks.NAME, tmp_path)
        if not os.fork():
            os.close(go_on)
            os.write(here, b".")
            os.read(until, 1)  # the test's end
        os._exit(0)
    try:
        assert os.read(is_there, 1) == b"."
        os.waitpid(holder, 0)
        with locks.locked(tmp_path):
            pass
    finally:
        for end in (is_there, here, until, go_on):
            os.close(end)


def test_a_lock_that_is_removed_while_another_waits_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between opening the file and locking it its holder may have removed it."""
    real = locks._open
    first = locks.Lock(tmp_path / "a.lock", tmp_path)
    opened = []

    def open_and_lose(path: Path) -> int:
        opened.append(real(path))
        first.release()
        return opened[-1]

    monkeypatch.setattr(locks, "_open", open_and_lose)
    second = locks.Lock(tmp_path / "a.lock", tmp_path)
    assert len(opened) == 2 or os.name == "nt"
    monkeypatch.setattr(locks, "_open", real)
    with pytest.raises(locks.InUseError):
        locks.Lock(tmp_path / "a.lock", tmp_path)
    second.release()
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_another_one_by_now(tmp_path: Path, whole: Path) -> None:
    """The run that was there first notices before it writes into the other's folder."""
    if os.name == "nt":
        pytest.skip("Windows does not rename a folder with an open file")

    def move(record: Any) -> None:
        if record.epoch == 2:
            (tmp_path / "run").rename(tmp_path / "moved")
            lab.run(RECIPE, tmp_path / "run", seed=1, progress=False)

    with pytest.raises(lab.UserError, match=r"run was moved or removed .* nothing more is written"):
        lab.run(RECIPE, tmp_path / "run", progress=False, observe=move)
    assert folders.RunFolder(tmp_path / "run").read_summary()["seed"] == 1
    lab.run(RECIPE, tmp_path / "moved", progress=False)
    assert results(tmp_path / "moved") == results(whole)


def test_a_drive_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(descriptor: int) -> bool:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(locks, "_try_lock", none)
    with pytest.raises(lab.UserError, match=r"No locks available; .*drive that has locks"):
        lab.run(RECIPE, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_a_file_that_is_no_lock_of_ours(tmp_path: Path) -> None:
    (tmp_path / locks.NAME).write_text("poems", encoding="utf-8")
    with pytest.raises(lab.UserError, match="is not a lock of minihyperflows"):
        lab.run(RECIPE, tmp_path, progress=False)
    assert (tmp_path / locks.NAME).read_text(encoding="utf-8") == "poems"


def test_sweeps_exclude_each_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "s"
    command = ["sweep", NAME, "--gammas", "1", "--out", str(out)]
    with locks.locked(out):
        assert "in use by" in refused(command, capsys)
    table = tmp_path / "table.csv"
    with records.writing(table):
        assert f"{table} is in use" in refused([*command, "--record", str(table)], capsys)
        assert f"{table} is in use" in refused(["collect", "x", "--out", str(table)], capsys)
    assert not list(tmp_path.iterdir())


def test_a_run_of_a_sweep_excludes_others(tmp_path: Path) -> None:
    """An attempt waits for the one that it replaces, and for nothing else."""
    from minihyperflows.lab.workers import Attempt, Kind, carry_out

    recipe = RECIPE.with_gamma(1.0)
    attempt = Attempt(recipe=recipe, folder=tmp_path / "run", seed=0)
    told = []

    def report(epoch: int) -> None:
        told.append(epoch)
        with pytest.raises(locks.InUseError):
            lab.run(recipe, attempt.folder, progress=False)

    with locks.locked(attempt.folder):  # `prune` is at work there
        kind, reason = carry_out(attempt, report)
        assert (kind, "in use by" in reason) == (Kind.FAILED, True)
    assert carry_out(attempt, report) == (Kind.FINISHED, "")
    assert told == [1, 2]
    assert not list(attempt.folder.glob("attempt"))


def test_an_attempt_waits_for_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from minihyperflows.lab.workers import Attempt, Kind, carry_out

    first = Attempt(recipe=RECIPE.with_gamma(1.0), folder=tmp_path / "run", seed=0)
    waiting, result = threading.Event(), []
    monkeypatch.setattr(locks.time, "sleep", lambda seconds: waiting.set())

    def replaced(epoch: int) -> None:
        other = threading.Thread(
            target=lambda: result.append(carry_out(first.next(), lambda epoch: None))
        )
        other.start()
        assert waiting.wait(60)
        threads.append(other)

    threads: list[threading.Thread] = []
    assert carry_out(first, replaced)[0] == Kind.SUPERSEDED
    threads[0].join()
    assert result == [(Kind.FINISHED, "")]
    assert len(rows(first.folder)) == 2


def test_studies_exclude_each_other(tmp_path: Path) -> None:
    from minihyperflows.studies import frame

    for name in ("targets", "pruning_law"):
        main_of = partial(frame.main, frame.find(name))
        with records.writing(tmp_path / "a.csv"), pytest.raises(SystemExit) as stop:
            main_of(["--out", str(tmp_path / "a.csv")])
        assert stop.value.code == 2


# -- whose a folder is ---------------------------------------------------------------------------

FOREIGN = {
    "metrics.csv": b"mine\n",
    "layers.csv": b"epoch,mine\n1,2\n",
    "summary.json": b"{}",
    "recipe.json": b'{"name": "soup", "minutes": 30}',
    "checkpoint.safetensors": b"mine",
    "dense.safetensors": b"",
    "notes.txt": b"mine",
    "plots": None,
    "attempt": b"the third one",
}


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("command", [["prune", NAME], ["sweep", NAME, "--gammas", "1"]])
def test_a_foreign_file_stays(
    name: str, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = FOREIGN[name]
    if content is None:
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.png").write_bytes(b"mine")
    else:
        (tmp_path / name).write_bytes(content)
    before = contents(tmp_path)
    for more in ([], ["--no-resume"]):
        line = refused([*command, "--out", str(tmp_path), *more], capsys)
        assert f"{tmp_path} is not empty and not a" in line
        assert f"(it has {name})" in line
    assert contents(tmp_path) == before


def test_foreign_weights_stay(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("checkpoint.safetensors", "dense.safetensors"):
        file = tmp_path / name
        save_file({"w": np.ones(3)}, file, {"format": "pt"})
        before = file.read_bytes()
        assert "not a run's folder" in refused(
            ["prune", NAME, "--out", str(tmp_path), "--no-resume"], capsys
        )
        assert file.read_bytes() == before
        file.unlink()


def test_a_sweep_leaves_foreign_folders_among_its_runs_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = sweep.SweepFolder(tmp_path)
    folder.open(RECIPE, "cpu", resume=True)
    mine = folder.run_folder(1.0, 0) / "metrics.csv"
    mine.parent.mkdir()
    mine.write_text("mine", encoding="utf-8")
    (tmp_path / "gamma-1.2.3-seed0").mkdir()
    command = ["sweep", NAME, "--gammas", "1", "--workers", "1", "--out", str(tmp_path)]
    assert "is not empty and not a run's folder" in refused([*command, "--no-resume"], capsys)
    from minihyperflows.lab.workers import Attempt, Kind, carry_out

    attempt = Attempt(recipe=RECIPE.with_gamma(1.0), folder=mine.parent, seed=0)
    assert carry_out(attempt, print)[0] == Kind.FAILED
    assert contents(mine.parent) == {"metrics.csv": b"mine"}


def test_what_counts_as_nothing(tmp_path: Path, whole: Path) -> None:
    """Litter, and what a run that was killed at its start leaves."""
    for name in (".DS_Store", ".gitkeep", "desktop.ini", "summary.json.17-0123abcd.partial"):
        (tmp_path / name).touch()
    (tmp_path / locks.NAME).write_text("minihyperflows run 1 nowhere\n", encoding="utf-8")
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "flips.png").touch()
    lab.run(RECIPE, tmp_path, progress=False)
    assert results(tmp_path) == results(whole)
    assert not list(tmp_path.rglob("*.partial"))
    assert (tmp_path / ".gitkeep").exists()


def test_a_users_file_in_a_runs_folder_stays(finished: Path) -> None:
    for name in ("notes.txt", "notes.txt.1-0123abcd.partial", "plots/mine.png"):
        (finished / name).write_text("mine", encoding="utf-8")
    lab.run(RECIPE, finished, resume=False, progress=False)
    for name in ("notes.txt", "notes.txt.1-0123abcd.partial", "plots/mine.png"):
        assert (finished / name).read_text(encoding="utf-8") == "mine"


def test_a_sweep_is_not_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "sweep.json").write_text("{}", encoding="utf-8")
    assert "holds a sweep, not a run" in refused(["prune", NAME, "--out", str(tmp_path)], capsys)


@pytest.mark.parametrize(
    "arguments",
    [
        ["prune", NAME, "--out", ""],
        ["sweep", NAME, "--gammas", "1", "--out", ""],
        ["sweep", NAME, "--gammas", "1", "--out", "s", "--record", ""],
        ["collect", "run", "--out", ""],
        ["export", "run", ""],
    ],
)
def test_an_empty_name(
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "an empty name is not a place" in refused(arguments, capsys)
    assert not list(tmp_path.iterdir())
    with pytest.raises(lab.UserError, match="empty name"):
        lab.run(RECIPE, "", progress=False)


def test_places_that_are_no_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    for command in (["prune", NAME], ["sweep", NAME, "--gammas", "1"]):
        for name in ("file", "file/run", "n" * 300, "a/" + "n" * 300):
            line = refused([*command, "--out", f"{tmp_path}/{name}"], capsys)
            assert "cannot " in line
    with pytest.raises(lab.UserError, match=r"cannot .* null"):
        lab.run(RECIPE, tmp_path / "null\0character", progress=False)
    with pytest.raises(lab.UserError, match=r"cannot .* null"):
        sweep.run_sweep(RECIPE, (1,), tmp_path / "null\0character", progress=False)
    assert contents(tmp_path) == {"file": b"mine"}
    assert len(list(tmp_path.iterdir())) == 1


# -- export --------------------------------------------------------------------------------------


def test_export_never_writes_onto_a_run(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(finished)
    (tmp_path / "symbolic").symlink_to(finished / "checkpoint.safetensors")
    os.link(finished / "checkpoint.safetensors", tmp_path / "hard")
    (tmp_path / "link").symlink_to(finished)
    outs = ["checkpoint.safetensors", "dense.safetensors", "summary.json", "plots/flips.png"]
    places = [finished / name for name in outs]
    places += [tmp_path / "symbolic", tmp_path / "hard", tmp_path / "link" / outs[0]]
    places += [tmp_path / "link" / "plots" / ".." / outs[1]]
    for source in (finished, finished / "checkpoint.safetensors", tmp_path / "symbolic"):
        for out in places:
            line = refused(["export", str(source), str(out)], capsys)
            assert "which export only reads" in line
    (finished / "dense.safetensors").unlink()  # a run's name that is free
    refused(["export", str(finished), str(finished / "dense.safetensors")], capsys)
    del before["dense.safetensors"]
    assert contents(finished) == before


def test_export_replaces_what_it_wrote_and_nothing_else(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "weights.safetensors"
    stale = tmp_path / "weights.safetensors.17-0123abcd.partial"
    stale.touch()  # of a process that was killed
    for _ in range(2):
        assert main(["export", str(finished), str(out)]) == 0
    assert not stale.exists()
    assert "fc1.weight" in load_file(out)
    capsys.readouterr()
    for content in (b"mine", b"", (finished / "dense.safetensors").read_bytes()):
        out.write_bytes(content)
        assert "does not hold exported weights" in refused(
            ["export", str(finished), str(out)], capsys
        )
        assert out.read_bytes() == content
    refused(["export", str(finished), str(tmp_path)], capsys)
    refused(["export", str(finished), str(tmp_path / "nowhere" / "w.safetensors")], capsys)
    if os.name != "nt":
        refused(["export", str(finished), "/dev/full"], capsys)
        assert not Path("/dev/full").is_file()


def test_collect_replaces_tables_of_runs_and_nothing_else(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "table.csv"
    for _ in range(2):
        assert main(["collect", str(finished), "--out", str(out)]) == 0
    capsys.readouterr()
    write_records(out, [{"mine": 1}])
    before = out.read_bytes()
    assert "has no column 'recipe'" in refused(
        ["collect", str(finished), "--out", str(out)], capsys
    )
    assert out.read_bytes() == before
    for name in ("metrics.csv", "summary.json", "checkpoint.safetensors"):
        line = refused(["collect", str(finished), "--out", str(finished / name)], capsys)
        assert "is a file of the run in" in line
    assert results(finished)


# -- damage --------------------------------------------------------------------------------------


@pytest.mark.slow
@posix
@pytest.mark.parametrize(
    ("kind", "trouble"),
    [
        *(("new", "killed"), ("over", "killed"), ("own", "killed"), ("new", "full")),
        *(("over", "full"), ("own", "full"), ("new", "gone"), ("over", "gone"), ("own", "gone")),
    ],
)
def test_trouble_at_every_write(kind: str, trouble: str, tmp_path: Path) -> None:
    command = python("killing", str(tmp_path), kind, trouble)
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-200:] + done.stderr
    assert done.stdout.endswith("through\n")
    assert done.stdout.count("survived") > 40


@pytest.mark.parametrize("name", ["recipe.json", "metrics.csv", "layers.csv", "summary.json"])
def test_another_digit_in_a_finished_runs_table(
    name: str, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is still a table, or JSON, so the checksum alone can tell."""
    file = finished / name
    text = file.read_text(encoding="utf-8")
    places = [n for n, character in enumerate(text) if character in "12345678"]
    if name == "summary.json":  # the digits of the checksums themselves are tried below
        places = [n for n in places if n < text.index('"checksums"')]
    words = "damaged or was changed"
    for place in places[:: len(places) // 4]:
        digit = str(int(text[place]) + 1)
        other = text[:place] + digit + text[place + 1 :]
        if name == "summary.json" and json.loads(other) == json.loads(text):
            continue  # the seventeenth digit of a float may make no other number
        file.write_text(other, encoding="utf-8")
        assert words in refused(["prune", NAME, "--out", str(finished)], capsys)
        out = str(tmp_path / "t.csv")
        assert words in refused(["collect", str(finished), "--out", out], capsys)
    file.write_text(text, encoding="utf-8")
    summary = json.loads((finished / "summary.json").read_text(encoding="utf-8"))
    summary["checksums"]["summary"] = "0" * 64
    checkpoint.write_json(finished / "summary.json", summary)
    assert words in refused(["prune", NAME, "--out", str(finished)], capsys)


@pytest.mark.parametrize("name", ["recipe.json", "metrics.csv", "layers.csv"])
def test_a_finished_run_without_one_of_its_tables(
    name: str, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (finished / name).unlink()
    assert f"{name} is missing" in refused(["prune", NAME, "--out", str(finished)], capsys)
    out = str(tmp_path / "t.csv")
    assert f"{name} is missing" in refused(["collect", str(finished), "--out", out], capsys)


@pytest.mark.parametrize("content", ["mine", "{}", '{"command": "cp"}', "[1]"])
def test_bench_replaces_its_own_record_only(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "bench.json"
    file.write_text(content, encoding="utf-8")
    assert "is not a record of bench" in refused(["bench", "--json", str(file)], capsys)
    assert file.read_text(encoding="utf-8") == content


def damaged(content: bytes, rng: np.random.Generator) -> bytes:
    """A few bytes changed, lost, or too many, anywhere."""
    kind = rng.integers(6)
    if kind == 0:
        return content[: rng.integers(len(content))]
    if kind == 1:
        return content + rng.bytes(rng.integers(1, 9))
    if kind == 2:
        start = rng.integers(len(content))
        return content[:start] + content[start + rng.integers(1, 9) :]
    changed = bytearray(content)
    head = min(len(content), 4000)  # of safetensors, where most of the meaning is
    for _ in range(rng.integers(1, 5)):
        place = rng.integers(head if rng.integers(2) else len(content))
        changed[place] = rng.integers(256) if kind < 5 else changed[place] ^ 1 << rng.integers(8)
    return bytes(changed)


CASES = int(os.environ.get("DAMAGES", "6"))  # of each file in each kind of folder


@pytest.mark.slow
@pytest.mark.parametrize("state", ["finished", "begun"])
def test_damage_is_noticed_or_does_not_matter(
    state: str,
    whole: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Either the right results or one line: of the run, and of who reads what it left."""
    source: Path = request.getfixturevalue(state)
    right, rng = results(whole), np.random.default_rng(7)
    whole_weights = exported(whole, tmp_path)
    refusals = 0
    for file in sorted(p for p in source.rglob("*") if p.is_file()):
        for _ in range(CASES):
            folder = tmp_path / "run"
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(source, folder)
            there = folder / file.relative_to(source)
            there.write_bytes(damaged(there.read_bytes(), rng))
            capsys.readouterr()
            if state == "finished":  # two more readers
                weights = exported(folder, tmp_path)
                assert weights is None or weights == whole_weights
                refusals += weights is None
                dense = tmp_path / "taken"
                shutil.rmtree(dense, ignore_errors=True)
                command = ["prune", NAME, "--out", str(dense), "--dense-from", str(folder)]
                if one_line_or_done(command, capsys):
                    assert rows(dense) == right[0]
            if one_line_or_done(["prune", NAME, "--out", str(folder)], capsys):
                found = results_of_a_finished(folder, file.name)
                assert [f for f in found if f is not None] == [
                    r for f, r in zip(found, right, strict=True) if f is not None
                ]
            else:
                refusals += 1
    assert refusals >= CASES / 2


def one_line_or_done(command: list[str], capsys: pytest.CaptureFixture[str]) -> bool:
    capsys.readouterr()
    status = main(command)
    lines = [line for line in capsys.readouterr().err.splitlines() if "epoch" not in line]
    if status == 2:
        assert len(lines) == 1, lines
        assert lines[0].startswith("error: ")
        return False
    assert status == 0
    return True


def exported(folder: Path, tmp_path: Path) -> Any:
    out = tmp_path / "weights.safetensors"
    out.unlink(missing_ok=True)
    if main(["export", str(folder), str(out)]):
        return None
    return {name: array.tobytes() for name, array in load_file(out).items()}


def results_of_a_finished(folder: Path, damaged: str) -> Any:
    """The results; without the tensors where they are damaged and nobody asked for them."""
    try:
        return results(folder)
    except lab.UserError:
        assert damaged == "checkpoint.safetensors"
        return (
            rows(folder),
            rows(folder, "layers.csv"),
            None,
            None,
            None,
        )


def test_other_things_in_place_of_a_file(
    begun: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for source in (begun, finished):
        for name in ("recipe.json", "metrics.csv", "checkpoint.safetensors", "dense.safetensors"):
            folder = tmp_path / "run"
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(source, folder)
            (folder / name).unlink()
            (folder / name).mkdir()
            for more in ([], ["--no-resume"]):
                line = refused(["prune", NAME, "--out", str(folder), *more], capsys)
                assert f"{folder / name} is not a file" in line


def test_a_checkpoint_without_a_checksum_still_counts(begun: Path, whole: Path) -> None:
    """As the version before wrote them."""
    file = begun / "checkpoint.safetensors"
    arrays, values = checkpoint.load_checkpoint(file)
    del values["structure"], values["packages"]
    metadata = {"format": "minihyperflows checkpoint 1", "values": json.dumps(values)}
    save_file(arrays, file, metadata)
    lab.run(RECIPE, begun, progress=False)
    assert results(begun) == results(whole)


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"format": "minihyperflows checkpoint 1", "checksum": "x"}, "it is damaged, its header"),
        ({"format": "minihyperflows checkpoint 2", "checksum": "x"}, "have its checksum"),
        ({"format": "minihyperflows checkpoint 2"}, "it is damaged, its header"),
        ({"format": "minihyperflows checkpoint 3"}, "by a newer version"),
        ({"format": "pt"}, "is not a checkpoint"),
    ],
)
def test_headers(metadata: dict[str, str], words: str, tmp_path: Path) -> None:
    save_file({"w": np.ones(3)}, tmp_path / "a", metadata | {"values": "{}"})
    with pytest.raises(lab.UserError, match=words):
        checkpoint.load_checkpoint(tmp_path / "a")


def test_the_checksum_sees_everything() -> None:
    def with_array(array: np.ndarray, name: str = "a", text: str = "{}") -> str:
        return checkpoint.checksum({name: array, "b": np.zeros((), np.int64)}, text)

    zeros = np.zeros((2, 3), np.float32)
    found = [
        with_array(zeros),
        with_array(zeros.reshape(3, 2)),
        with_array(zeros.view(np.int32)),
        with_array(-zeros),
        with_array(zeros, name="c"),
        with_array(zeros, text="{ }"),
        with_array(np.zeros((0, 3), np.float32)),
    ]
    assert len(set(found)) == len(found)


def test_another_network_of_the_same_name(begun: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from minihyperflows import nn

    real = runs.build_network

    def changed(change: Any) -> Any:
        def build(*arguments: Any) -> Any:
            net = real(*arguments)
            change(net)
            return net

        return build

    class Linear(nn.Linear):
        """Another layer with parameters of the same names and shapes."""

    def another_layer(net: Any) -> None:
        net.fc1.__class__ = type("Another", (Linear,), {})

    def another_setting(net: Any) -> None:
        net.fc2.slope = 0.1

    for change, words in ((another_layer, r"fc1 Linear.*Another"), (another_setting, "slope=0.1")):
        monkeypatch.setattr(runs, "build_network", changed(change))
        with pytest.raises(lab.UserError, match=rf"another network of the name lenet300.*{words}"):
            lab.run(RECIPE, begun, progress=False)
    monkeypatch.setattr(runs, "build_network", real)
    lab.run(RECIPE, begun, progress=False)


def test_another_version_says_so(begun: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "__version__", "9.0")
    with pytest.warns(UserWarning, match=r"was written by version .*, this is 9\.0"):
        summary = lab.run(RECIPE, begun, progress=False)
    assert summary["versions"]["minihyperflows"].endswith(", 9.0")


# -- numbers, names, disks -----------------------------------------------------------------------


def test_numpy_scalars_are_numbers(tmp_path: Path) -> None:
    recipe = RECIPE.with_target(np.float32(0.5)).scaled(np.float64(1))
    for seed in np.arange(2):
        summary = lab.run(recipe, tmp_path / f"r{seed}", seed=seed, progress=False)
        assert type(summary["seed"]) is int
        assert summary == lab.run(recipe, tmp_path / f"r{seed}", seed=int(seed), progress=False)
    constant = RECIPE.with_gamma(np.float64(2))
    assert lab.run(constant, tmp_path / "g", progress=False)["recipe"]["pressure"]["gamma"] == 2
    values = {"a": np.int8(3), "b": [np.float32(0.5), np.bool_(True)], "c": (np.uint64(2**63),)}
    assert json.loads(checkpoint.to_json(values)) == {"a": 3, "b": [0.5, True], "c": [2**63]}
    with pytest.raises(TypeError, match="object"):
        checkpoint.to_json(object())


@pytest.mark.parametrize("seed", [-1, 1.0, "1", None, True, np.float32(1), np.int8(-1)])
def test_what_is_no_seed(seed: Any, tmp_path: Path) -> None:
    with pytest.raises(lab.UserError, match="a seed is a whole number from 0 on"):
        lab.run(RECIPE, tmp_path / "run", seed=seed, progress=False)
    assert not (tmp_path / "run").exists()


def test_a_long_name_of_a_file_that_fits(finished: Path, tmp_path: Path) -> None:
    """The temporary file has a shorter one."""
    for name in ("w" * 242 + ".safetensors", "ü" * 121 + ".safetensors"):
        assert main(["export", str(finished), str(tmp_path / name)]) == 0
        assert (tmp_path / name).exists()


@pytest.mark.slow
@posix
@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_a_name_that_the_terminal_cannot_show(encoding: str, tmp_path: Path, whole: Path) -> None:
    for name in ("ümläut ☃", os.fsdecode(b"not-utf8-\xff")):
        try:
            shutil.copytree(whole, tmp_path / name)
        except OSError:
            continue  # macOS takes no other names than UTF-8
        environment = os.environ | {"PYTHONIOENCODING": encoding}
        environment |= {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
        command = [sys.executable, "-m", "minihyperflows", "export", str(tmp_path / name)]
        out = tmp_path / f"{name}.safetensors"
        done = subprocess.run([*command, str(out)], capture_output=True, env=environment)
        assert done.returncode == 0, done.stderr
        assert out.exists()
        done = subprocess.run(
            [*command[:-1], str(out), str(out)], capture_output=True, env=environment
        )
        assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr


def test_a_folder_that_cannot_be_written_to(
    begun: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(*arguments: Any) -> int:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(locks.os, "open", read_only)
    assert lab.run(RECIPE, finished, progress=False)["seed"] == 0  # which nothing is written to
    before = contents(begun)
    with pytest.raises(lab.UserError, match=r"cannot lock .*Read-only file system"):
        lab.run(RECIPE, begun, progress=False)
    assert contents(begun) == before


def test_writers_never_meet_in_a_temporary_file(tmp_path: Path) -> None:
    names = {checkpoint._temporary_name("a.csv") for _ in range(100)}
    assert len(names) == 100
    assert all(checkpoint.is_temporary(name, ["a.csv"]) for name in names)
    assert not any(checkpoint.is_temporary(name, ["b.csv"]) for name in names)


def test_an_interrupted_writer_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").write_bytes(b"before")

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.write_atomically(tmp_path / "a", b"after")
    assert contents(tmp_path) == {"a": b"before"}


def test_a_link_is_followed(tmp_path: Path) -> None:
    if os.name == "nt":
        pytest.skip("links need rights there")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    checkpoint.write_atomically(tmp_path / "link", b"content")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_bytes() == b"content"
