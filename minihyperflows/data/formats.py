"""The bytes of published image sets: idx files (MNIST) and Python pickles (CIFAR).

Everything here distrusts its input. A damaged or hostile file ends in a `FormatError`; nothing in
it is executed, and no length it announces is believed before it has been checked.
"""

from __future__ import annotations

import gzip
import hashlib
import math
import struct
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from minihyperflows.data.pickles import as_bytes, as_text, read_pickle
from minihyperflows.errors import FormatError

MAX_IMAGES = 100_000  # in one file; the largest published one holds 60,000
MAX_PICKLE_BYTES = 2**28  # the largest published one (CIFAR-100's training set) is 155 MB


# --- idx ----------------------------------------------------------------------------------------


@contextmanager
def open_plain_or_gzipped(path: Path) -> Iterator[BinaryIO]:
    """The file's content, unpacked if it begins as gzip files do, whatever its name says."""
    with path.open("rb") as file:
        is_gzip = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        try:
            yield cast(BinaryIO, gzip.GzipFile(fileobj=file)) if is_gzip else file
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise FormatError("is cut short or damaged: gzip cannot unpack it") from error


def read_idx(path: Path, item_shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """The array in an idx file of unsigned bytes, plain or gzipped: (N, *item_shape).

    An idx file is the bytes 0, 0, 8 (for unsigned bytes) and the number of dimensions, then the
    length of each dimension as four bytes, the highest first, then the data. At most one byte
    more than the header announces is read, so a small file cannot unpack to a huge one.
    """
    dimensions = 1 + len(item_shape)
    with open_plain_or_gzipped(path) as stream:
        header = stream.read(4 + 4 * dimensions)
        shape = idx_shape(header, dimensions)
        check_idx_shape(shape, item_shape)
        size = math.prod(shape)
        content = stream.read(size + 1)
    if len(content) < size:
        raise FormatError(f"is cut short: {size} bytes announced, {len(content)} there")
    if len(content) > size:
        raise FormatError(f"has bytes after the {size} that its header announces")
    return np.frombuffer(content, np.uint8).reshape(shape).copy()


def idx_shape(header: bytes, dimensions: int) -> tuple[int, ...]:
    if len(header) < 4 + 4 * dimensions:
        raise FormatError(f"is cut short: {len(header)} bytes are less than an idx header")
    magic = bytes([0, 0, 8, dimensions])
    if header[:4] != magic:
        raise FormatError(f"begins with {header[:4].hex()}, where its idx kind has {magic.hex()}")
    return struct.unpack(f">{dimensions}I", header[4:])


def check_idx_shape(shape: tuple[int, ...], item_shape: tuple[int, ...]) -> None:
    if shape[1:] != item_shape:
        raise FormatError(f"holds items of shape {shape[1:]}, where {item_shape} is expected")
    if not 1 <= shape[0] <= MAX_IMAGES:
        raise FormatError(f"announces {shape[0]} items, where 1 to {MAX_IMAGES} are expected")


# --- CIFAR --------------------------------------------------------------------------------------

CIFAR_SHAPE = (3, 32, 32)  # the channel planes of one image, one after another
CIFAR_BYTES = math.prod(CIFAR_SHAPE)


def read_bytes(path: Path) -> bytes:
    """The whole of a pickle's file, unless it is too large to be one."""
    if not path.is_file():
        raise FileNotFoundError(path)
    if path.stat().st_size > MAX_PICKLE_BYTES:
        raise FormatError(f"is larger than the {MAX_PICKLE_BYTES} bytes such a file may have")
    return path.read_bytes()


def read_archive(path: Path, sha256: str, files: tuple[str, ...]) -> dict[str, bytes]:
    """Some files of a published .tar.gz, which is opened only if its checksum is the right one."""
    with path.open("rb") as archive:
        if hashlib.file_digest(archive, "sha256").hexdigest() != sha256:
            raise FormatError("is not the published archive: its SHA-256 is another")
    contents = {}
    with tarfile.open(path, "r:gz") as members:
        for member in members:
            name = PurePosixPath(member.name).name
            if name in files and (stream := members.extractfile(member)):
                contents[name] = stream.read()
    return contents


def pickled_rows(array: Any) -> NDArray[np.uint8]:
    """The array of unsigned bytes that a `Record` describes, an image a row: (N, 3072)."""
    try:
        _, shape, kind, is_fortran, content = array.state
        content = as_bytes(content)
        is_unsigned_byte = kind.name == "dtype" and as_text(kind.arguments[0]) == "u1"
    except (AttributeError, TypeError, ValueError, LookupError) as error:
        raise FormatError("holds no NumPy array as its data") from error
    if not is_unsigned_byte or is_fortran != 0:
        raise FormatError("holds data that are not unsigned bytes, image after image")
    images = len(content) // CIFAR_BYTES
    if shape != (images, CIFAR_BYTES) or len(content) != images * CIFAR_BYTES:
        raise FormatError(f"holds data that are not rows of {CIFAR_BYTES} bytes")
    return np.frombuffer(content, np.uint8).reshape(images, CIFAR_BYTES)


def pickled_labels(labels: Any) -> NDArray[np.int64]:
    if not isinstance(labels, list) or not all(type(label) is int for label in labels):
        raise FormatError("holds no list of whole numbers as its labels")
    return np.array(labels, np.int64)


def read_cifar_batch(
    data: bytes, label_key: str, classes: int
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images (N, 32, 32, 3) uint8 and labels (N,) int64 of one pickled batch."""
    batch = read_pickle(data)
    rows = pickled_rows(batch.get("data"))
    labels = pickled_labels(batch.get(label_key))
    check_labels(labels, len(rows), classes)
    images = rows.reshape(-1, *CIFAR_SHAPE).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images), labels


def read_cifar_names(data: bytes, key: str, classes: int) -> tuple[str, ...]:
    """The names of the classes, from the file that CIFAR calls `meta`."""
    names = read_pickle(data).get(key)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise FormatError("holds no list of class names")
    if len(names) != classes or not all(name.isprintable() and name for name in names):
        raise FormatError(f"does not name {classes} classes")
    return tuple(names)


def check_labels(labels: NDArray[np.integer[Any]], images: int, classes: int) -> None:
    """One label an image, each from 0 to classes - 1."""
    if len(labels) != images or not images:
        raise FormatError(f"holds {len(labels)} labels for {images} images")
    if labels.min() < 0 or labels.max() >= classes:
        wrong = labels.min() if labels.min() < 0 else labels.max()
        raise FormatError(f"holds the label {wrong}, where 0 to {classes - 1} are expected")
