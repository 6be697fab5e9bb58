"""What the commands of studies share: options, and how they end (``studies.command``)."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path

import pytest
from support import RESULTS

from minihyperflows import studies
from minihyperflows.errors import UserError
from minihyperflows.lab.records import read_records, write_records
from minihyperflows.studies import frame
from minihyperflows.studies.command import reporting
from minihyperflows.studies.options import DIGITS, parse_fraction, parse_seed

MODULES = {
    name: importlib.import_module(f"{studies.__name__}.{name}")
    for _, name, _ in pkgutil.iter_modules(studies.__path__)
}
FRAMED = [name for name, module in MODULES.items() if hasattr(module, "STUDY")]
NOT_STUDIES = ("command", "frame")
OTHERS = [n for n, m in MODULES.items() if hasattr(m, "reporting") and n not in NOT_STUDIES]
COMMANDS = [*FRAMED, *OTHERS]
DIGITS_ONLY = {  # the words with which a study needs no other data set
    "alternatives": ["--recipe", "lenet300-digits"],
    "equilibrium": ["--recipe", "lenet300-digits-gamma"],
    "regrowth": ["--dataset", "digits"],
    "removal": ["--recipe", "lenet300-digits"],
}
CONTINUED = [name for name in COMMANDS if name not in ("convergence", "inside")]


def main_of(study: str):
    """What ``python -m minihyperflows.studies.NAME`` does with its words."""
    module = MODULES[study]
    if study in FRAMED:
        return lambda words: frame.main(module.STUDY, words, listed=True)
    return module.main


@pytest.mark.parametrize(
    ("problem", "status", "message"),
    [
        (UserError("there is no file x"), 2, "error: there is no file x\n"),
        (KeyboardInterrupt(), 130, "interrupted: finished runs are recorded"),
    ],
)
def test_one_line_and_a_status(problem, status, message, capsys) -> None:
    @reporting()
    def main() -> None:
        raise problem

    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == status
    error = capsys.readouterr().err
    assert error.startswith(message)
    assert error.count("\n") == 1


def test_other_errors_are_not_hidden() -> None:
    @reporting()
    def main() -> int:
        return 1 // 0

    with pytest.raises(ZeroDivisionError):
        main()


def test_a_fraction_is_what_a_table_keeps_of_it(tmp_path: Path) -> None:
    for text in ("0.3333333333333333", "1e-9", "0.1", "0.9999994"):
        value = parse_fraction(text)
        assert value == pytest.approx(float(text), rel=1e-5)
        write_records(tmp_path / "a.csv", [{"target": value}], digits=DIGITS)
        assert read_records(tmp_path / "a.csv") == [{"target": value}]
    assert parse_fraction("1", whole=True) == 1


@pytest.mark.parametrize("text", ["0", "1", "0.9999999", "-0.5", "nan", "inf", "10%"])
def test_what_is_no_fraction(text: str) -> None:
    with pytest.raises(UserError, match="is not a fraction: write a number above 0 and below 1"):
        parse_fraction(text)


@pytest.mark.parametrize("text", ["-1", "1.5", "one", ""])
def test_what_is_no_seed(text: str) -> None:
    assert parse_seed("12") == 12
    with pytest.raises(UserError, match="is not a seed: write a whole number from 0 on"):
        parse_seed(text)


SEEDED = ("alternatives", "dhp_claims", "equilibrium", "gradient_flow_claims", "neighbours")


@pytest.mark.parametrize("name", [*SEEDED, "pruning_law", "regrowth"])
def test_every_study_checks_its_seeds(name: str, tmp_path: Path, capsys) -> None:
    with pytest.raises(SystemExit) as end:
        main_of(name)([*DIGITS_ONLY.get(name, ()), "--seeds", "-1", "--out", str(tmp_path / "a")])
    assert end.value.code == 2
    assert "error: '-1' is not a seed" in capsys.readouterr().err


@pytest.mark.parametrize("name", OTHERS)
def test_every_study_reports_so(name: str) -> None:
    assert main_of(name).__code__ is reporting()(lambda: None).__code__


@pytest.mark.parametrize("name", CONTINUED)
def test_no_run_is_done_if_it_cannot_be_recorded(name: str, tmp_path: Path, capsys) -> None:
    """Neither without a folder, nor into a table of something else, which stays as it is."""
    other = tmp_path / "other.csv"
    other.write_text("walk,score\n1,0.5\n")
    for out, message in (
        (tmp_path / "nowhere" / "a.csv", f"there is no folder {tmp_path / 'nowhere'}\n"),
        (other, f"error: {other} is not a record of this study: it has no column"),
    ):
        with pytest.raises(SystemExit) as end:
            main_of(name)([*DIGITS_ONLY.get(name, ()), "--out", str(out)])
        assert end.value.code == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert other.read_text() == "walk,score\n1,0.5\n"


@pytest.mark.parametrize("name", ["alternatives", "dhp_claims", "gradient_flow_claims"])
def test_joining_loses_nothing(name: str, tmp_path: Path, capsys) -> None:
    """What is in FILE stays; what cannot be read is told, before anything is written."""
    record = {
        "alternatives": "alternatives",
        "dhp_claims": "dhp",
        "gradient_flow_claims": "gradient-flow-weights",
    }[name]
    lines = (RESULTS / f"{record}.csv").read_text().splitlines(keepends=True)
    for file, rows in (("out", lines[1:4]), ("a", lines[3:6])):
        (tmp_path / f"{file}.csv").write_text("".join([lines[0], *rows]))
    words = ["--out", str(tmp_path / "out.csv"), "--join"]
    main_of(name)([*words, str(tmp_path / "a.csv")])
    before = (tmp_path / "out.csv").read_text()
    assert len(before.splitlines()) == 6
    (tmp_path / "b.csv").write_text("".join(lines[:8])[:-20])
    with pytest.raises(SystemExit):
        main_of(name)([*words, str(tmp_path / "b.csv")])
    assert "remove that line" in capsys.readouterr().err
    assert (tmp_path / "out.csv").read_text() == before
