"""How commands end: streams that cannot be written to, warnings, interrupts, mistakes of ours."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import warnings

import pytest

from minihyperflows import DoubtfulResultWarning, NonFiniteLossError
from minihyperflows.cli import main
from minihyperflows.errors import UserError
from minihyperflows.lab import console
from minihyperflows.lab.console import run_command

posix = pytest.mark.skipif(os.name == "nt", reason="streams are closed by a POSIX shell")
full = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
SHORT = "lenet300-digits-gamma --epochs-scale 0.001"
C_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def ended(work) -> int:
    return run_command(work, lambda: "nothing was written")


@pytest.mark.parametrize(
    ("problem", "status", "line"),
    [
        (UserError("no such thing"), 2, "error: no such thing"),
        (NonFiniteLossError("epoch 3"), 2, "error: epoch 3"),
        (MemoryError("8 GiB"), 2, "error: out of memory (8 GiB): a smaller network or batch"),
        (PermissionError(13, "Permission denied", "x"), 2, "error: cannot use x: Permission den"),
        (FileNotFoundError(2, "No such file", "a\nb"), 2, "error: cannot use a b: No such file"),
        (KeyboardInterrupt(), 130, "interrupted: nothing was written"),
    ],
)
def test_one_line_and_a_status(problem, status, line, capsys):
    def work():
        raise problem

    assert ended(work) == status
    captured = capsys.readouterr()
    assert captured.err.startswith(line)
    assert captured.err.count("\n") == 1
    assert captured.out == ""


@pytest.mark.parametrize(
    "mistake", [ZeroDivisionError(), ValueError("ours"), OSError("about no file"), KeyError("x")]
)
def test_a_mistake_of_ours_shows_its_traceback(mistake):
    before = sys.stdout, sys.stderr

    def work():
        raise mistake

    with pytest.raises(type(mistake)):
        ended(work)
    assert (sys.stdout, sys.stderr) == before


def test_warnings_are_lines_and_never_errors(capsys):
    def work():
        for _ in range(2):
            warnings.warn("a\nb", DoubtfulResultWarning, stacklevel=1)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ended(work) == 0
    assert capsys.readouterr().err == "warning: a b\nwarning: a b\n"

    def other():
        warnings.warn("not ours", RuntimeWarning, stacklevel=1)

    with pytest.warns(RuntimeWarning, match="not ours"):
        ended(other)


class Full(io.StringIO):
    """A stream on a full device: it takes a few characters."""

    def __init__(self, problem: OSError, room: int = 0) -> None:
        super().__init__()
        self.problem, self.room, self.tries = problem, room, 0

    def write(self, text: str) -> int:
        if self.tell() + len(text) > self.room:
            self.tries += 1
            raise self.problem
        return super().write(text)


@pytest.mark.parametrize(
    ("problem", "status"),
    [(OSError(28, "No space left on device"), 2), (BrokenPipeError(32, "Broken pipe"), 0)],
)
def test_work_goes_on_when_nothing_can_be_printed(problem, status, monkeypatch, capsys):
    stream, done = Full(problem, room=6), []
    monkeypatch.setattr(sys, "stdout", stream)

    def work():
        for line in ("first", "second", "third"):
            print(line)
            done.append(line)

    assert ended(work) == status
    assert done == ["first", "second", "third"]
    assert stream.getvalue() == "first\n"
    assert stream.tries == 1  # and nothing after a gap
    said = "error: cannot write to standard output: No space left on device\n" if status else ""
    assert capsys.readouterr().err == said


def test_no_streams_at_all(monkeypatch):
    """As under pythonw; print(file=None) would print to standard output."""
    monkeypatch.setattr(console, "_occupy_closed_descriptors", lambda: None)
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert ended(lambda: print("a", file=sys.stderr)) == 0
    assert main(["prune", "nonsense"]) == 2
    assert (sys.stdout, sys.stderr) == (None, None)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
@pytest.mark.parametrize("text", ["Grün", "数", "a\udcfcb", "γ ≤ 1"])
def test_any_text_is_printed_somehow(encoding, text, monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
    assert ended(lambda: print(text)) == 0
    printed = raw.getvalue().decode(encoding).rstrip("\r\n")
    assert printed in (text, text.encode(encoding, "backslashreplace").decode(encoding))


# -- real processes, real streams ----------------------------------------------------------------


def shell(command, cwd, **environment):
    """``command`` of a POSIX shell, with MHF for the command line; status, output, errors."""
    program = f"'{sys.executable}' -m minihyperflows"
    script = "set -o pipefail; " + command.replace("MHF", program)
    done = subprocess.run(
        ["bash", "-c", script], cwd=cwd, capture_output=True, env=os.environ | environment
    )
    errors = done.stderr.decode("utf-8", "backslashreplace")
    for sign in ("Traceback", "Exception ignored", "During handling"):
        assert sign not in errors, errors
    return done.returncode, done.stdout.decode("utf-8", "backslashreplace"), errors


def last_line(errors):
    return errors.replace("\r", "\n").rstrip("\n").split("\n")[-1]


@pytest.mark.slow
@posix
@pytest.mark.parametrize("streams", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-", "| head -1"])
def test_a_run_is_done_whoever_listens(streams, tmp_path):
    status, _, _ = shell(f"MHF prune {SHORT} --out run {streams}", tmp_path)
    assert status == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))
    assert summary["remaining"] == 1335 or summary["remaining"] > 0
    for file in tmp_path.rglob(
        "*"
    ):  # nothing printed went into a file that got the stream's number
        if file.suffix in (".json", ".csv"):
            assert b"lenet300-digits-gamma:" not in file.read_bytes()


@pytest.mark.slow
@posix
@full
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_device_is_told_after_the_run(unbuffered, tmp_path):
    command = f"MHF prune {SHORT} --out run > /dev/full"
    status, _, errors = shell(command, tmp_path, PYTHONUNBUFFERED=unbuffered)
    assert status == 2
    assert last_line(errors) == "error: cannot write to standard output: No space left on device"
    assert (tmp_path / "run" / "summary.json").exists()


@pytest.mark.slow
@posix
@full
@pytest.mark.parametrize("command", ["recipes", "info", "--help", "prune --help", "--version"])
def test_lists_on_a_full_device(command, tmp_path):
    status, _, errors = shell(f"MHF {command} > /dev/full", tmp_path)
    assert status == 2
    assert errors == "error: cannot write to standard output: No space left on device\n"
    assert shell(f"MHF {command} > /dev/full 2>&1", tmp_path)[0] == 2


@pytest.mark.slow
@posix
def test_a_study_ends_like_a_command(tmp_path):
    study = f"'{sys.executable}' -m minihyperflows.studies.targets"
    status, _, errors = shell(f"{study} --out x.csv --settings nonsense", tmp_path)
    assert status == 2
    assert errors.startswith("error: argument --settings: invalid choice: 'nonsense'")
    assert errors.count("\n") == 1
    assert shell(f"{study} --help | head -1", tmp_path)[0] == 0
    assert shell(f"{study} --out x.csv --settings nonsense 2>&-", tmp_path)[0] == 2


@pytest.mark.slow
@posix
@pytest.mark.parametrize("name", ["Grün 数据", "\udcff"])
def test_any_name_under_an_ascii_locale(name, tmp_path):
    folder = os.fsencode(tmp_path) + b"/" + os.fsencode(name)
    command = [sys.executable, "-m", "minihyperflows", "prune", *SHORT.split(), "--out", folder]
    done = subprocess.run(command, capture_output=True, env=os.environ | C_LOCALE, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert b"Traceback" not in done.stderr
    assert os.path.exists(folder + b"/summary.json")
    again = subprocess.run(command, capture_output=True, env=os.environ | C_LOCALE, cwd=tmp_path)
    assert (again.returncode, again.stderr) == (0, b"")
    assert b"finished already" in again.stdout


def test_names_that_no_folder_can_have(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("x" * 300, "a/" * 3000 + "a", "a\0b", ""):
        for command in (
            ["prune", "--out", name],
            ["prune", "--dense-from", name],
            ["prune", "lenet300-mnist", "--data-dir", name],
            ["sweep", "lenet300-digits", "--gammas", "1", "--out", name],
            ["sweep", "lenet300-digits", "--gammas", "1", "--out", "s", "--record", name],
            ["export", name, "out.safetensors"],
            ["collect", name, "--out", "x.csv"],
            ["collect", "x", "--out", name],
            ["bench", "--json", name],
        ):
            try:
                status = main(command)
            except SystemExit as end:
                status = end.code
            errors = capsys.readouterr().err
            assert status == 2, (command, errors)
            assert errors.count("\n") == 1, errors
            assert len(errors) < 7000
    assert not list(tmp_path.iterdir())
