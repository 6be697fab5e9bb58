"""data_scripts/fetch.py against a server on this computer, whose mirrors have every vice."""

from __future__ import annotations

import gzip
import hashlib
import http.server
import importlib.util
import io
import sys
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from support import SCRIPTS

from minihyperflows.data.datasets import CIFAR, load

pytest.importorskip("pooch")
pytest.importorskip("requests")

SCRIPT = SCRIPTS / "fetch.py"
CONTENT = np.random.default_rng(0).bytes(300_000)
HALF = len(CONTENT) // 2


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fetch", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fetch"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


fetch = load_script()


class Mirror(http.server.BaseHTTPRequestHandler):
    """Serves `Mirror.content`, in the way that the first part of the path names."""

    content = CONTENT
    requests: list[tuple[str, str | None]] = []  # noqa: RUF012  (emptied for each test)

    def log_message(self, *_: Any) -> None:
        """Keep the tests quiet."""

    def do_GET(self) -> None:
        behaviour = self.path.split("/")[1]
        asked = self.headers["Range"]
        self.requests.append((behaviour, asked))
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
        getattr(self, behaviour)(start)

    def send(
        self, content: bytes, start: int = 0, length: int | None = None, **headers: str
    ) -> None:
        """`content`, announced as `length` bytes; as a part of the file if start is not zero."""
        self.send_response(206 if start else 200)
        if start:
            end = len(self.content)
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{end}")
        self.send_header("Content-Length", str(len(content) if length is None else length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content)

    def good(self, start: int) -> None:
        self.send(self.content[start:], start)

    def without_ranges(self, _: int) -> None:
        self.send(self.content)

    def missing(self, _: int) -> None:
        self.send_error(404)

    def broken(self, _: int) -> None:
        self.send_error(500)

    def login_page(self, _: int) -> None:
        self.send(b"<html>please log in</html>")

    def wrong_bytes(self, start: int) -> None:
        self.send(bytes(len(self.content) - start), start)

    def breaking_off(self, start: int) -> None:
        """A third of the file at a time, then silence."""
        rest = self.content[start:]
        self.send(rest[: len(self.content) // 3], start, length=len(rest))

    def breaking_off_without_ranges(self, _: int) -> None:
        self.send(self.content[:HALF], length=len(self.content))

    def unpacked(self, _: int) -> None:
        self.send(gzip.compress(self.content), Content_Encoding="gzip")

    def endless(self, _: int) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.content + bytes(10 * len(self.content)))

    def another_range(self, _: int) -> None:
        self.send(self.content[7:], 7)


class Mirrors(http.server.ThreadingHTTPServer):
    def handle_error(self, *_: Any) -> None:
        """A client that hangs up on a bad mirror is what the tests are about."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of the mirrors."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(Mirror, "requests", [])
    with Mirrors(("127.0.0.1", 0), Mirror) as mirrors:
        thread = threading.Thread(target=mirrors.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{mirrors.server_port}"
        mirrors.shutdown()
        thread.join()


def published(server: str, *behaviours: str) -> dict[str, tuple[Any, ...]]:
    """One data set of one file, with a mirror of each behaviour."""
    return {
        "toy": (
            fetch.PublishedFile(
                path="toy/data.gz",
                size=len(CONTENT),
                sha256=hashlib.sha256(CONTENT).hexdigest(),
                mirrors=tuple(f"{server}/{behaviour}/data.gz" for behaviour in behaviours),
            ),
        )
    }


def run(folder: Path, table: dict[str, Any], *options: str) -> int:
    return fetch.main(["toy", str(folder), *options], table)


def leave_part(folder: Path, content: bytes) -> Path:
    """What an interrupted download leaves behind."""
    part = folder / "toy" / "data.gz.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(content)
    return part


def files_below(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder).as_posix()) for p in folder.rglob("*") if p.is_file())


# --- mirrors ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "behaviours",
    [
        ["good"],
        ["missing", "good"],
        ["broken", "missing", "good"],
        ["login_page", "good"],
        ["wrong_bytes", "good"],
        ["unpacked", "good"],
        ["endless", "good"],
        ["breaking_off"],
        ["breaking_off_without_ranges", "good"],
        ["breaking_off_without_ranges", "without_ranges"],
        ["breaking_off_without_ranges", "wrong_bytes", "good"],
        ["breaking_off_without_ranges", "another_range", "good"],
    ],
    ids=" ".join,
)
def test_the_file_arrives_whole(
    tmp_path: Path, server: str, behaviours: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, published(server, *behaviours)) == 0
    assert (tmp_path / "toy" / "data.gz").read_bytes() == CONTENT
    assert files_below(tmp_path) == ["toy/data.gz"]  # no part, no scratch file
    assert capsys.readouterr().err == ""


def test_a_server_that_does_not_answer_is_passed_over(tmp_path: Path, server: str) -> None:
    table = published(server, "good")
    (file,) = table["toy"]
    nobody = "http://127.0.0.1:9/data.gz"  # the discard port, where nothing listens
    table["toy"] = (
        fetch.PublishedFile(file.path, file.size, file.sha256, (nobody, *file.mirrors)),
    )
    assert run(tmp_path, table) == 0


def test_without_a_good_mirror_there_is_one_line_with_every_reason(
    tmp_path: Path, server: str, capsys: pytest.CaptureFixture[str]
) -> None:
    behaviours = ["missing", "broken", "login_page", "wrong_bytes", "endless"]
    assert run(tmp_path, published(server, *behaviours)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: data.gz could not be downloaded")
    assert error.count("\n") == 1
    reasons = ["HTTP 404", "HTTP 500", "offers 26 bytes", "another checksum", "sends more than"]
    assert [reason for reason in reasons if reason not in error] == []
    assert not (tmp_path / "toy" / "data.gz").exists()


# --- resume and skip ----------------------------------------------------------------------------


def test_a_broken_download_is_continued_by_the_next_run(tmp_path: Path, server: str) -> None:
    assert run(tmp_path, published(server, "breaking_off_without_ranges")) == 2
    assert files_below(tmp_path) == ["toy/data.gz.part"]
    received = (tmp_path / "toy" / "data.gz.part").stat().st_size
    assert 0 < received <= HALF  # whole blocks: the one in which the connection broke is lost
    assert run(tmp_path, published(server, "good")) == 0
    assert Mirror.requests[-1] == ("good", f"bytes={received}-")
    assert (tmp_path / "toy" / "data.gz").read_bytes() == CONTENT


def test_a_mirror_that_breaks_off_is_asked_for_the_rest(tmp_path: Path, server: str) -> None:
    assert run(tmp_path, published(server, "breaking_off")) == 0
    starts = [int(asked[6:-1]) for _, asked in Mirror.requests if asked]
    assert Mirror.requests[0] == ("breaking_off", None)
    assert len(starts) == len(Mirror.requests) - 1 >= 2
    assert starts == sorted(set(starts))


def test_the_next_mirror_continues_what_another_began(tmp_path: Path, server: str) -> None:
    assert run(tmp_path, published(server, "breaking_off_without_ranges", "good")) == 0
    behaviour, asked = Mirror.requests[-1]
    assert behaviour == "good"
    assert asked is not None


@pytest.mark.parametrize(
    "content", [CONTENT, bytes(len(CONTENT)), bytes(HALF), CONTENT + b"x", b""],
    ids=["complete", "complete but wrong", "wrong", "too long", "empty"],
)  # fmt: skip
def test_whatever_part_is_left_the_file_comes_out_right(
    tmp_path: Path, server: str, content: bytes
) -> None:
    leave_part(tmp_path, content)
    assert run(tmp_path, published(server, "good")) == 0
    assert (tmp_path / "toy" / "data.gz").read_bytes() == CONTENT
    assert files_below(tmp_path) == ["toy/data.gz"]
    if content == CONTENT:
        assert Mirror.requests == []


def test_a_refusal_costs_nothing_of_what_has_been_received(tmp_path: Path, server: str) -> None:
    part = leave_part(tmp_path, CONTENT[:HALF])
    behaviours = ["missing", "broken", "login_page", "another_range", "unpacked"]
    assert run(tmp_path, published(server, *behaviours)) == 2
    assert part.read_bytes() == CONTENT[:HALF]


def test_a_good_file_is_left_alone_and_a_bad_one_replaced(tmp_path: Path, server: str) -> None:
    target = tmp_path / "toy" / "data.gz"
    target.parent.mkdir()
    target.write_bytes(CONTENT)
    assert run(tmp_path, published(server, "good")) == 0
    assert Mirror.requests == []
    target.write_bytes(CONTENT[:-1])
    assert run(tmp_path, published(server, "missing")) == 2
    assert target.read_bytes() == CONTENT[:-1]  # nothing better has come
    assert run(tmp_path, published(server, "good")) == 0
    assert target.read_bytes() == CONTENT


# --- files from elsewhere -----------------------------------------------------------------------


def test_a_file_from_elsewhere_whatever_its_name(tmp_path: Path) -> None:
    source = tmp_path / "from a usb stick"
    source.write_bytes(CONTENT)
    folder = tmp_path / "data"
    assert run(folder, published("http://unused", "good"), "--from", str(source)) == 0
    assert (folder / "toy" / "data.gz").read_bytes() == CONTENT
    assert source.read_bytes() == CONTENT
    assert files_below(folder) == ["toy/data.gz"]


@pytest.mark.parametrize("content", [CONTENT[:-1], b"", None], ids=["cut", "empty", "missing"])
def test_a_wrong_file_from_elsewhere_is_refused(
    tmp_path: Path, content: bytes | None, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "data.gz"
    if content is not None:
        source.write_bytes(content)
    folder = tmp_path / "data"
    assert run(folder, published("http://unused", "good"), "--from", str(source)) == 2
    error = capsys.readouterr().err
    assert str(source) in error
    assert error.count("\n") == 1
    assert not folder.exists()


# --- archives -----------------------------------------------------------------------------------

MEMBERS = {"train": b"t" * 5000, "test": b"e" * 1000, "meta": b"m"}


def tar_gz(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


@pytest.fixture
def archive(server: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[Any, ...]]:
    """A data set in an archive that also tries to write where it should not."""
    inside = {f"inner/{name}": content for name, content in MEMBERS.items()}
    content = tar_gz({"../evil": b"x", "/tmp/evil": b"x", **inside, "inner/readme": b"x"})
    monkeypatch.setattr(Mirror, "content", content)
    sha256 = hashlib.sha256(content).hexdigest()
    sums = {name: hashlib.md5(content).hexdigest() for name, content in MEMBERS.items()}
    mirrors = (f"{server}/good/toy.tar.gz",)
    return {"toy": (fetch.Archive("toy.tar.gz", len(content), sha256, mirrors, "inner", sums),)}


def test_an_archive_is_unpacked_and_removed(
    tmp_path: Path, archive: dict[str, tuple[Any, ...]]
) -> None:
    folder = tmp_path / "data"
    assert run(folder, archive) == 0
    assert files_below(tmp_path) == ["data/inner/meta", "data/inner/test", "data/inner/train"]
    assert {p.name: p.read_bytes() for p in (folder / "inner").iterdir()} == MEMBERS
    assert run(folder, archive) == 0
    assert len(Mirror.requests) == 1  # the second run found everything there


def test_a_damaged_member_is_repaired(tmp_path: Path, archive: dict[str, tuple[Any, ...]]) -> None:
    assert run(tmp_path, archive) == 0
    (tmp_path / "inner" / "test").write_bytes(b"damaged")
    assert run(tmp_path, archive) == 0
    assert (tmp_path / "inner" / "test").read_bytes() == MEMBERS["test"]


def test_an_archive_from_elsewhere_stays(
    tmp_path: Path, archive: dict[str, tuple[Any, ...]]
) -> None:
    source = tmp_path / "toy.tar.gz"  # here, also where a download would put it
    source.write_bytes(Mirror.content)
    assert run(tmp_path, archive, "--from", str(source)) == 0
    assert Mirror.requests == []
    assert source.exists()
    (tmp_path / "inner" / "test").unlink()
    assert run(tmp_path, archive) == 0  # now by way of a download, which finds it there
    assert Mirror.requests == []
    assert source.exists()


# --- the command line, and the real table ---------------------------------------------------------


def test_a_folder_that_cannot_be_made_is_one_line(
    tmp_path: Path, server: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    assert run(tmp_path / "file", published(server, "good")) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_a_stop_from_the_keyboard_is_no_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(fetch, "install", stop)
    assert run(tmp_path, published("http://unused", "good")) == 2
    assert "the same command continues" in capsys.readouterr().err


def test_an_unknown_name_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        fetch.main(["imagenet"])
    assert caught.value.code == 2
    assert "mnist" in capsys.readouterr().err


def test_the_published_table_is_what_lab_loads() -> None:
    assert set(fetch.PUBLISHED) == {"mnist", *CIFAR}
    for name, files in fetch.PUBLISHED.items():
        for file in files:
            assert len(file.sha256) == 64
            assert len(file.mirrors) >= 3
            assert all(url.startswith("https://") and file.name in url for url in file.mirrors)
        if name in CIFAR:
            assert files[0].folder == CIFAR[name].folder
            assert set(files[0].members) == set(CIFAR[name].files)


def test_what_is_fetched_can_be_loaded(
    tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MNIST in the layout of fetch.py, from tiny files: the way from the server to the arrays."""
    header = {"images-idx3": b"\0\0\x08\x03\0\0\0\x02\0\0\0\x1c\0\0\0\x1c" + bytes(2 * 784)}
    header["labels-idx1"] = b"\0\0\x08\x01\0\0\0\x02\x03\x04"
    sources = []
    table = []
    for real in fetch.PUBLISHED["mnist"]:
        kind = real.name.split("-", 1)[1].removesuffix("-ubyte.gz")
        content = gzip.compress(header[kind] + b"", mtime=len(table))  # four different files
        sources.append(tmp_path / real.name)
        sources[-1].write_bytes(content)
        sha256 = hashlib.sha256(content).hexdigest()
        table.append(fetch.PublishedFile(real.path, len(content), sha256, ()))
    folder = tmp_path / "data"
    options = ["mnist", str(folder), "--from", *map(str, sources)]
    assert fetch.main(options, {"mnist": table}) == 0
    data = load("mnist", folder)
    assert data.train_y.tolist() == data.test_y.tolist() == [3, 4]
