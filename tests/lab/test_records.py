"""Tables of runs: read, refused with a reason, continued, joined."""

from __future__ import annotations

import os
from operator import itemgetter
from pathlib import Path
from typing import Any

import pytest
from support import RESULTS

from minihyperflows.errors import UserError
from minihyperflows.lab.records import (
    Record,
    join_records,
    read_records,
    records_so_far,
    require_folder,
    write_records,
)

TABLE = 'run,text,score\n1,"a, b",0.25\n2,,nan\n'


def test_what_is_written_is_read(tmp_path: Path) -> None:
    rows = [{"run": 1, "text": 'a, "b"\nc', "score": 0.1}, {"run": 2, "text": "", "score": 1e-9}]
    write_records(tmp_path / "a.csv", rows)
    assert read_records(tmp_path / "a.csv", ("score", "run")) == rows
    write_records(tmp_path / "a.csv", [])
    assert read_records(str(tmp_path / "a.csv")) == []


@pytest.mark.parametrize("file", sorted(RESULTS.glob("*.csv")), ids=lambda file: file.stem)
def test_the_records_of_the_chapters_are_readable(file: Path) -> None:
    assert read_records(file)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PK\x03\x04\xff\xfe", "is not a table: it is not text"),
        (b"", "is not a record of this study: it has no column 'run'"),
        (b"walk,score\n1,0.5\n", "is not a record of this study: it has no column 'run'"),
        (TABLE.replace(",,", ",").encode(), "line 3, it has 2 values for 3 columns"),
        (TABLE.replace(",,", ",,,").encode(), "line 3, it has 4 values for 3 columns"),
        (TABLE[:-2].encode(), "is cut off in its last line"),
        (TABLE[:22].encode() + b"\n", "line 2 (unexpected end of data)"),
    ],
)
def test_other_files_are_refused(content: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_bytes(content)
    with pytest.raises(UserError) as error:
        read_records(file, ("run",))
    assert message in str(error.value)
    assert str(file) in str(error.value)
    with pytest.raises(UserError):
        records_so_far(file, ("run",))
    assert file.read_bytes() == content


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^there is no file .*a\.csv$"):
        read_records(tmp_path / "a.csv")
    with pytest.raises(UserError, match="cannot read"):
        read_records(tmp_path)
    with pytest.raises(UserError, match="it is a folder"):
        records_so_far(tmp_path)
    with pytest.raises(UserError, match=r"cannot write .*x: "):
        records_so_far(tmp_path / ("x" * 300))


@pytest.mark.skipif(not os.path.exists("/dev/null"), reason="there is no /dev/null")
def test_a_device_is_not_a_record() -> None:
    with pytest.raises(UserError, match=r"^cannot write /dev/null: it is not a file$"):
        records_so_far(Path("/dev/null"))


def test_the_first_run_needs_no_file_but_a_folder(tmp_path: Path) -> None:
    assert records_so_far(tmp_path / "a.csv", ("run",)) == []
    require_folder(Path("a.csv"))
    for path in (tmp_path / "nowhere" / "a.csv", Path(__file__) / "a.csv"):
        with pytest.raises(UserError, match=r"cannot write .*: there is no folder"):
            records_so_far(path)


def test_the_first_file_with_a_run_wins(tmp_path: Path) -> None:
    """All rows of the run come from it."""
    files = [tmp_path / name for name in ("out.csv", "a.csv", "b.csv")]
    for file, runs in zip(files, ((1, 1), (1, 2, 2), (3, 2)), strict=True):
        write_records(file, [{"run": run, "file": file.stem} for run in runs])
    rows = join_records(files[0], files[1:], itemgetter("run"), ("run",))
    found = [(row["run"], row["file"]) for row in rows]
    assert found == [(1, "out"), (1, "out"), (2, "a"), (2, "a"), (3, "b")]
    files[0].unlink()
    assert len(join_records(files[0], files[1:], itemgetter("run"))) == 4
    with pytest.raises(UserError, match="there is no file"):
        join_records(files[1], [files[0]], itemgetter("run"))
    with pytest.raises(UserError, match="no column 'score'"):
        join_records(files[0], files[1:], itemgetter("run"), ("score",))


# -- several tables ------------------------------------------------------------------------------


def record(out: Path, order: Any = None) -> Record:
    return Record(out, ("looks",), itemgetter("run"), ("run",), digits=2, order=order)


def test_what_is_in_the_table_of_runs_is_in_all(tmp_path: Path) -> None:
    """A run whose details were written before the power went out is not there."""
    one = record(tmp_path / "a.csv")
    one.add([], [{"run": 2}])
    assert not (tmp_path / "a-looks.csv").exists()
    one.add([{"run": 1, "look": 0.123}, {"run": 1, "look": 0.5}], [{"run": 1}])
    assert read_records(tmp_path / "a-looks.csv")[0] == {"run": 1, "look": 0.12}
    write_records(tmp_path / "a-looks.csv", [*one.tables[0], {"run": 3, "look": 0.6}], digits=2)
    again = record(tmp_path / "a.csv")
    assert [file.name for file in again.files] == ["a-looks.csv", "a.csv"]
    assert again.done == one.done == {1, 2}
    assert again.tables == [[{"run": 1, "look": 0.12}, {"run": 1, "look": 0.5}], one.tables[1]]


def test_records_are_joined_with_their_details(tmp_path: Path) -> None:
    """A run that is here stays as it is."""
    both = record(tmp_path / "a.csv", order=itemgetter("run"))
    both.add([{"run": 2, "look": "a"}], [{"run": 2}])
    other = record(tmp_path / "b.csv")
    other.add([{"run": 2, "look": "b"}, {"run": 1, "look": "b"}], [{"run": 2}, {"run": 1}])
    both.join(tmp_path / "b.csv")
    assert both.tables[0] == [{"run": 1, "look": "b"}, {"run": 2, "look": "a"}]
    assert both.tables[1] == [{"run": 1}, {"run": 2}]
    assert record(tmp_path / "a.csv").tables == both.tables
    with pytest.raises(UserError, match="there is no file"):
        both.join(tmp_path / "c.csv")
    write_records(tmp_path / "c.csv", [{"walk": 1}])
    with pytest.raises(UserError, match="no column 'run'"):
        both.join(tmp_path / "c.csv")
