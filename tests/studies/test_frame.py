"""The frame of the studies: options, identity, going on, joining, many at a time."""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import RESULTS, TESTS
from support.toy_study import STUDY, Toy

import minihyperflows as mh
from minihyperflows.cli import main
from minihyperflows.errors import UserError
from minihyperflows.lab import registry
from minihyperflows.lab.records import read_records, write_records
from minihyperflows.studies import frame
from minihyperflows.studies.options import options_of, parse_count

SOURCE = {"date", "command"}  # what differs if a run is done again


def rows_of(out: Path, *words: str) -> list[dict[str, Any]]:
    """All rows of the table after the command."""
    return frame.carry_out(STUDY, *frame.parse(STUDY, [*words, "--out", str(out)]))


def without(rows: list[dict[str, Any]], columns: set[str] = SOURCE) -> list[str]:
    return sorted(str({k: v for k, v in row.items() if k not in columns}) for row in rows)


def lines(file: Path) -> list[str]:
    return file.read_text().splitlines() if file.exists() else []


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "toys.csv"


# -- options, columns, identity ------------------------------------------------------------------


def test_all_combinations_seed_by_seed(out: Path) -> None:
    rows = rows_of(out)
    found = [(r["seed"], r["letter"], r["share"]) for r in rows]
    assert found == [(s, x, v) for s in (0, 1) for x in "ab" for v in (0.5, 0.25)]
    assert rows[0]["gammas"] == ""
    assert {"commit", "date", "device", "dtype", "numpy"} <= rows[0].keys()
    assert rows[-1]["command"] == (
        "minihyperflows study toys --letter b --share 0.25 --length 3 --seed 1 --out FILE"
    )
    steps = read_records(out.with_name("toys-steps.csv"), STUDY.columns)
    assert len(steps) == 3 * len(rows)


@given(
    st.builds(
        Toy,
        letter=st.sampled_from("ab"),
        share=st.floats(1e-6, 0.99).map(lambda v: float(f"{v:.6g}")),
        length=st.integers(1, 1_000_000),
        gammas=st.none()
        | st.lists(st.floats(0.001, 9), min_size=1, unique=True).map(lambda v: tuple(sorted(v))),
        seed=st.integers(0, 2**40),
    )
)
def test_a_command_is_the_inverse_of_the_options(setting: Toy) -> None:
    words = shlex.split(STUDY.command(setting))
    assert words[:3] == ["minihyperflows", "study", "toys"]
    assert frame.parse(STUDY, words[3:])[1] == [setting]


@given(share=st.floats(1e-6, 0.99), gammas=st.sampled_from([None, (0.1,), (0.25, 1e-7, 3.0)]))
def test_a_setting_is_recognised_by_its_row(tmp_path_factory, share: float, gammas) -> None:
    share = float(f"{share:.6g}")
    setting, file = Toy("a", share, 3, gammas, 7), tmp_path_factory.mktemp("t") / "a.csv"
    row = dict(zip(STUDY.identity, STUDY.key(setting), strict=True))
    write_records(file, [row], digits=6)
    assert STUDY.key_of(read_records(file)[0]) == STUDY.key(setting)


@pytest.mark.parametrize(
    ("words", "seeds"),
    [(["--seeds", "3"], {0, 1, 2}), (["--seed", "3"], {3}), (["--seed", "4", "0"], {0, 4})],
)
def test_a_number_of_seeds_and_certain_ones(words: list[str], seeds: set[int]) -> None:
    _, settings = frame.parse(STUDY, [*words, "--out", "x.csv"])
    assert {s.seed for s in settings} == seeds


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--seeds 0", "'0' is not a count"),
        ("--seeds -1", "'-1' is not a count"),
        ("--seeds 1000000000", "'1000000000' is not a count"),
        ("--length 0", "'0' is not a count"),
        ("--seed -1", "'-1' is not a seed"),
        ("--seed 1 --seeds 2", "give one"),
        ("--share 1.5", "'1.5' is not a fraction"),
        ("--shares 1.5", "'1.5' is not a fraction"),
        ("--share 0.95", "0.95 is too much"),
        ("--letter c", "argument --letter: invalid choice: 'c'"),
        ("--workers 0", "'0' is not a count"),
    ],
)
def test_a_mistake_is_one_line(words: str, message: str, out: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(frame, "studies", lambda: {"toys": STUDY})
    assert main(["study", "toys", *words.split(), "--out", str(out)]) == 2
    error = capsys.readouterr().err.rpartition("\r")[2]
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert not out.exists()


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "many", "", "1000001", "9" * 5000])
def test_what_is_not_a_count(text: str) -> None:
    assert parse_count("12") == 12
    with pytest.raises(UserError, match="is not a count: write a whole number from 1 to 1,000,000"):
        parse_count(text)


def test_an_unknown_study_and_the_list(capsys) -> None:
    assert main(["study", "walks", "--out", "x.csv"]) == 2
    assert "there is no study 'walks'; the studies are" in capsys.readouterr().err
    assert main(["study"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed] == list(frame.studies())


# -- the table is the state ----------------------------------------------------------------------


def test_what_is_in_the_table_is_not_done_again(out: Path) -> None:
    first = rows_of(out, "--letter", "a")
    done = lines(out.with_name("done.txt"))
    assert len(done) == len(first) == 4
    assert rows_of(out, "--letter", "a", "--length", "5") == first  # length is not its identity
    both = rows_of(out)
    assert both[:4] == first
    assert len(both) == len(lines(out.with_name("done.txt"))) == 8


def test_what_is_shared_is_made_once(out: Path) -> None:
    rows_of(out)
    assert len(lines(out.with_name("made.txt"))) == 4  # letters x seeds
    bench, made = frame.Bench(), []
    for key in (("dense", 0), ("dense", 0), ("dense", 1), ("other", 1), ("dense", 1), ("dense", 0)):
        bench.shared(key, lambda key=key: made.append(key))
    assert made == [("dense", 0), ("dense", 1), ("other", 1), ("dense", 0)]  # one of a kind


def test_a_run_that_failed_is_done_by_the_same_command(out: Path) -> None:
    out.with_name("fail-a0.25").touch()
    with pytest.raises(UserError, match="it is broken"):
        rows_of(out)
    assert len(read_records(out)) == 1
    assert len(rows_of(out)) == 8


def test_joining_adds_rows_and_does_no_run(out: Path) -> None:
    other, third = out.with_name("other.csv"), out.with_name("third.csv")
    rows_of(other, "--letter", "b", "--seed", "0")
    rows_of(third, "--seed", "0")
    mine = rows_of(out, "--letter", "a", "--share", "0.5", "--seed", "0")
    done = lines(out.with_name("done.txt"))
    joined = rows_of(out, "--join", str(other), str(third))
    assert lines(out.with_name("done.txt")) == done
    assert joined[:1] == mine
    assert len(joined) == 4
    assert len(read_records(out.with_name("toys-steps.csv"))) == 12
    before = out.read_bytes()
    third.write_text(third.read_text()[:-5])
    other.unlink()
    rows_of(other, "--letter", "b", "--seed", "8")
    with pytest.raises(UserError, match="cut off"):
        rows_of(out, "--join", str(other), str(third))
    assert out.read_bytes() == before


def test_the_table_is_printed(out: Path, capsys) -> None:
    rows_of(out)
    frame.command(STUDY, ["--out", str(out), "--table"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| letter | share | gammas | rows | worth |"
    assert lines[2].startswith("| a | 0.5 |  | 2 | 0.75 ± 3.2 |")  # t = 12.7, s = 0.354
    assert len(lines) == 6


# -- many at a time ------------------------------------------------------------------------------


@pytest.mark.slow
def test_processes_make_the_same_rows(out: Path) -> None:
    alone = rows_of(out.with_name("alone.csv"))
    made = len(lines(out.with_name("made.txt")))
    found = rows_of(out, "--workers", "2")
    assert without(found) == without(alone)
    assert len(lines(out.with_name("made.txt"))) == 2 * made  # each in one process
    details = [read_records(out.with_name(f"{n}-steps.csv")) for n in ("alone", "toys")]
    assert without(details[0]) == without(details[1])
    assert rows_of(out, "--workers", "2") == found


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(__import__("signal"), "SIGKILL"), reason="needs signals")
def test_a_worker_that_dies_is_replaced_and_repeats_only_what_is_missing(out: Path) -> None:
    out.with_name("die-b0.25").touch()
    rows = rows_of(out, "--seed", "0", "--workers", "2")
    assert len(rows) == 4
    done = lines(out.with_name("done.txt"))
    assert sorted(done) == ["a 0.25 0", "a 0.5 0", "b 0.25 0", "b 0.25 0", "b 0.5 0"]


@pytest.mark.slow
def test_a_job_that_fails_leaves_the_others_alone(out: Path) -> None:
    out.with_name("fail-a0.5").touch()
    with pytest.raises(UserError, match=r"1 of 2 jobs failed, the first: a 0.5 0: it is broken"):
        rows_of(out, "--seed", "0", "--workers", "2")
    assert {r["letter"] for r in read_records(out)} == {"b"}
    assert len(rows_of(out, "--seed", "0", "--workers", "2")) == 4


@pytest.mark.slow
def test_a_cluster_makes_the_same_rows(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    distributed = pytest.importorskip("distributed", reason="dask.distributed is not installed")
    with distributed.LocalCluster(
        n_workers=1, threads_per_worker=1, dashboard_address=None, silence_logs="CRITICAL"
    ) as local:
        found = rows_of(out, "--dask", local.scheduler_address)
    assert without(found) == without(rows_of(out.with_name("alone.csv")))


# -- every study ---------------------------------------------------------------------------------

STUDIES = frame.studies()
RECORDS = {
    "alternatives": ["alternatives"],
    "dhp_claims": ["dhp"],
    "equilibrium": ["equilibrium"],
    "gradient_flow_claims": ["gradient-flow-weights", "gradient-flow-filters"],
    "neighbours": ["neighbours"],
    "pruning_law": ["pruning-law", "staircase-vgg"],
    "regrowth": ["regrowth"],
    "removal": ["removal-lenet"],
    "targets": ["targets"],
}  # by study, the committed tables


@pytest.mark.parametrize("name", STUDIES)
def test_every_command_of_a_row_asks_for_that_run(name: str) -> None:
    study = STUDIES[name]
    needed = ["--recipe", "lenet300-digits-gamma"] if name == "equilibrium" else []
    _, settings = frame.parse(study, [*needed, "--out", "x.csv"])
    for setting in settings:
        words = shlex.split(study.command(setting))[3:]
        *needed, found = frame.parse(study, words)[1]
        assert found == setting
        assert not needed or (name, [s.variant for s in needed]) == ("dhp_claims", ["dhp"])
        assert study.Setting.__dataclass_params__.frozen
    assert options_of(study.Setting).keys() | {"control"} >= set(study.identity)


@pytest.mark.slow
@pytest.mark.parametrize("name", STUDIES)
def test_committed_records_are_continued(name: str, tmp_path: Path, monkeypatch) -> None:
    """Each of their rows is a run that is done: nothing is repeated, joined or lost."""
    study = STUDIES[name]
    for record in RECORDS[name]:
        rows = read_records(RESULTS / f"{record}.csv", study.columns)
        settings = settings_of(study, rows)
        keys = {key for s in settings for key in study.keys(s)}
        assert keys == {study.key_of(row) for row in rows}
        for part in ("", *(f"-{part}" for part in study.parts)):
            original = RESULTS / f"{record}{part}.csv"
            (tmp_path / f"{record}{part}.csv").write_bytes(original.read_bytes())
        out = tmp_path / f"{record}.csv"
        options = frame.parser_of(study).parse_args(["--out", str(out)])
        monkeypatch.setattr(study, "run", None)  # to be done again would fail
        assert without(frame.carry_out(study, options, settings)) == without(rows)
        options = argparse.Namespace(**vars(options) | {"out": tmp_path / f"{record}-too.csv"})
        options.join = [out]
        assert without(frame.carry_out(study, options, settings)) == without(rows)
        for part in study.parts:
            details = [tmp_path / f"{name}-{part}.csv" for name in (record, f"{record}-too")]
            assert without(read_records(details[0])) == without(read_records(details[1]))


def settings_of(study: frame.Study[Any], rows: list[dict[str, Any]]) -> list[Any]:
    """The settings that the command line makes of what the rows' identities say."""
    found: dict[Any, Any] = {}
    for row in rows:
        if study.key_of(row) in found:
            continue
        key = dict(zip(study.identity, study.key_of(row), strict=True))
        words = [
            word
            for name, value in key.items()
            if value != "" and name in options_of(study.Setting)
            for word in (f"--{name.replace('_', '-')}", str(value))
        ]
        if "controls" in options_of(study.Setting):  # those that the run has rows of
            same = [r for r in rows if study.key_of(r)[:-1] == study.key_of(row)[:-1]]
            words += ["--controls", *(r["control"] for r in same if r["control"])]
        for setting in frame.parse(study, [*words, "--out", "x.csv"])[1]:
            if tuple(key.values()) in study.keys(setting):
                found |= dict.fromkeys(study.keys(setting), setting)
    return list(dict.fromkeys(found.values()))


@pytest.mark.parametrize("name", STUDIES)
def test_the_command_of_a_committed_row_asks_for_it(name: str) -> None:
    """In the forms of the past: ``--seeds`` was a list, and a recipe had no option."""
    study, asked = STUDIES[name], {}
    for record in RECORDS[name]:
        for row in read_records(RESULTS / f"{record}.csv"):
            command = str(row["command"])
            if "; " in command:  # two commands, the first of which makes a run
                continue
            if command not in asked:
                words = shlex.split(command.partition(f".studies.{name} ")[2])
                if name not in ("targets", "removal"):
                    words = ["--seed" if word == "--seeds" else word for word in words]
                words = words if words[0].startswith("-") else ["--recipe", *words]
                settings = frame.parse(study, words)[1]
                asked[command] = {key for s in settings for key in study.keys(s)}
            assert study.key_of(row) in asked[command], command


# -- plugins -------------------------------------------------------------------------------------


@pytest.fixture
def stripes(tmp_path: Path) -> Iterator[Path]:
    """A plugin with a data set, which is forgotten afterwards."""
    file = tmp_path / "my stripes.py"
    file.write_bytes((TESTS / "lab" / "plugins" / "dataset.py").read_bytes())
    yield file
    registry.forget(os.path.realpath(file))


@pytest.mark.parametrize("words", [[], pytest.param(["--workers", "2"], marks=pytest.mark.slow)])
def test_a_plugin_is_imported_first_and_remembered(
    words: list[str], out: Path, stripes: Path
) -> None:
    rows = rows_of(out, "--seed", "0", "--plugin", str(stripes), *words)
    assert [row["images"] for row in rows] == [240] * 4
    assert {row["command"].endswith(f" --plugin '{stripes}'") for row in rows} == {True}
    version = rows[0]["minihyperflows"]
    assert version.startswith(f"{mh.__version__}, my stripes.py ")
    assert len(rows_of(out, "--seeds", "2", "--plugin", str(stripes), *words)) == 8
    stripes.write_bytes(stripes.read_bytes() + b"# another one\n")
    before = out.read_bytes()
    with pytest.raises(UserError, match=r"my stripes\.py has changed since runs in .* were made"):
        rows_of(out, "--seeds", "3", "--plugin", str(stripes), *words)
    assert out.read_bytes() == before


def test_a_plugin_that_is_not_there(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", "targets", "--plugin", "nowhere.py", "--out", str(out)]) == 2
    assert "cannot read the plugin" in capsys.readouterr().err
