"""The bytes of published image sets: idx files (MNIST) and Python pickles (CIFAR).

Everything here distrusts its input. A damaged or hostile file ends in a `FormatError`; nothing in
it is executed, and no length it announces is believed before it has been checked.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import math
import pickletools
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, ClassVar, cast

import numpy as np
from numpy.typing import NDArray

MAX_IMAGES = 100_000  # in one file; the largest published one holds 60,000
MAX_PICKLE_BYTES = 2**28  # the largest published one (CIFAR-100's training set) is 155 MB
MAX_OPCODES = 1_000_000  # in one pickle; the largest published one holds about 300,000
MAX_KEY_LENGTH = 100  # of a dictionary's key; the longest published one has 19 letters


class FormatError(ValueError):
    """What is wrong with a file, said so that the file's name can stand before it."""


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


# --- pickle -------------------------------------------------------------------------------------


@dataclass(eq=False)
class Record:
    """What stands in for an object of NumPy's: the name called, its arguments and its state."""

    name: str
    arguments: Any = None
    state: Any = None


def as_text(value: Any) -> str:
    """Text, or bytes as Latin-1 text; anything else is a ValueError."""
    if isinstance(value, bytes):
        return value.decode("latin-1")
    if not isinstance(value, str):
        raise ValueError("neither text nor bytes")
    return value


def as_bytes(value: Any) -> bytes:
    """Bytes, or Latin-1 text as bytes; anything else is a ValueError."""
    return value if isinstance(value, bytes) else as_text(value).encode("latin-1")


def key_text(key: Any) -> str:
    if not isinstance(key, str | bytes) or len(key) > MAX_KEY_LENGTH:
        raise ValueError("no key that such a file has")
    return as_text(key)


class PickleMachine:
    """The stack machine that a pickle is a program for, with the opcodes of CIFAR's files alone.

    Where `pickle` would call a name, a `Record` remembers the call: nothing can be executed.
    """

    NAMES: ClassVar[set[str]] = {
        "numpy ndarray",
        "numpy dtype",
        "numpy.core.multiarray _reconstruct",  # as NumPy 1 writes it
        "numpy._core.multiarray _reconstruct",  # as NumPy 2 writes it
        "_codecs encode",  # around the bytes that Python 3 writes in protocol 2
    }

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.may_encode = len(data)  # bytes; a file cannot ask for more copies than it could hold

    def run(self) -> Any:
        """The object that the pickle builds."""
        stream = io.BytesIO(self.data)
        for _ in range(MAX_OPCODES):
            code = stream.read(1)
            if code == b".":
                return self.stop(stream.tell())
            if code not in OPCODES:
                raise FormatError("is cut short, damaged, or a pickle of another kind")
            read_argument, act = OPCODES[code]
            act(self, read_argument(stream))
        raise FormatError(f"holds more than {MAX_OPCODES} pickle opcodes")

    def stop(self, end: int) -> Any:
        if end != len(self.data):
            raise FormatError("has bytes after the end of its pickle")
        return self.pop()

    def top(self, kind: type) -> Any:
        if not isinstance(self.stack[-1], kind):
            raise ValueError(f"no {kind.__name__} on the stack")
        return self.stack[-1]

    def pop(self, kind: type = object) -> Any:
        self.top(kind)
        return self.stack.pop()

    def pop_to_mark(self) -> list[Any]:
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def ignore(self, _: Any) -> None:
        """PROTO, FRAME: they tell a reader what to expect."""

    def push(self, argument: Any) -> None:
        self.stack.append(argument)

    def mark(self, _: Any) -> None:
        self.marks.append(len(self.stack))

    def append(self, _: Any) -> None:
        item = self.pop()
        self.top(list).append(item)

    def appends(self, _: Any) -> None:
        items = self.pop_to_mark()
        self.top(list).extend(items)

    def set_item(self, _: Any) -> None:
        value, key = self.pop(), self.pop()
        self.top(dict)[key_text(key)] = value

    def set_items(self, _: Any) -> None:
        items = self.pop_to_mark()
        keys = [key_text(key) for key in items[::2]]
        self.top(dict).update(zip(keys, items[1::2], strict=True))

    def make_tuple(self, _: Any) -> None:
        self.push(tuple(self.pop_to_mark()))

    def make_small_tuple(self, size: int) -> None:
        items = [self.pop() for _ in range(size)]
        self.push(tuple(reversed(items)))

    def put(self, index: int | None) -> None:
        self.memo[len(self.memo) if index is None else index] = self.stack[-1]

    def get(self, index: int) -> None:
        self.push(self.memo[index])

    def name(self, name: str) -> None:
        if name not in self.NAMES:
            raise FormatError("names a function or class that no such file needs")
        self.push(Record(name.split()[-1]))

    def name_from_stack(self, _: Any) -> None:
        attribute, module = self.pop(str), self.pop(str)
        self.name(f"{module} {attribute}")

    def reduce(self, _: Any) -> None:
        arguments, called = self.pop(tuple), self.pop(Record)
        if called.name == "encode":
            self.encode(arguments[0])
        else:
            self.push(Record(called.name, arguments))

    def encode(self, text: Any) -> None:
        self.may_encode -= len(as_text(text))
        if self.may_encode < 0:
            raise FormatError("asks for more bytes than it holds")
        self.push(as_bytes(text))

    def build(self, _: Any) -> None:
        state = self.pop(tuple)
        self.top(Record).state = state


def read_nothing(_: BinaryIO) -> None:
    """The argument of an opcode that has none."""


def read_name(stream: BinaryIO) -> str:
    """The argument of GLOBAL: a module and a name, a line each."""
    return " ".join(stream.readline().removesuffix(b"\n").decode("latin-1") for _ in range(2))


Action = Callable[[PickleMachine, Any], None]
ACTIONS: dict[str, Action] = {
    **dict.fromkeys(["PROTO", "FRAME"], PickleMachine.ignore),
    **dict.fromkeys(["BINSTRING", "SHORT_BINSTRING"], PickleMachine.push),  # as in Python 2
    **dict.fromkeys(["BINBYTES", "SHORT_BINBYTES"], PickleMachine.push),
    **dict.fromkeys(["BINUNICODE", "SHORT_BINUNICODE"], PickleMachine.push),
    **dict.fromkeys(["BININT", "BININT1", "BININT2"], PickleMachine.push),
    "NONE": lambda machine, _: machine.push(None),
    "NEWTRUE": lambda machine, _: machine.push(True),
    "NEWFALSE": lambda machine, _: machine.push(False),
    "EMPTY_LIST": lambda machine, _: machine.push([]),
    "EMPTY_DICT": lambda machine, _: machine.push({}),
    "MARK": PickleMachine.mark,
    "APPEND": PickleMachine.append,
    "APPENDS": PickleMachine.appends,
    "SETITEM": PickleMachine.set_item,
    "SETITEMS": PickleMachine.set_items,
    "TUPLE": PickleMachine.make_tuple,
    "TUPLE1": lambda machine, _: machine.make_small_tuple(1),
    "TUPLE2": lambda machine, _: machine.make_small_tuple(2),
    "TUPLE3": lambda machine, _: machine.make_small_tuple(3),
    **dict.fromkeys(["BINPUT", "LONG_BINPUT", "MEMOIZE"], PickleMachine.put),
    **dict.fromkeys(["BINGET", "LONG_BINGET"], PickleMachine.get),
    "GLOBAL": PickleMachine.name,
    "STACK_GLOBAL": PickleMachine.name_from_stack,
    "REDUCE": PickleMachine.reduce,
    "BUILD": PickleMachine.build,
}
READERS: dict[str, Callable[[BinaryIO], Any]] = {
    **{opcode.name: opcode.arg.reader for opcode in pickletools.opcodes if opcode.arg},
    "GLOBAL": read_name,
}
OPCODES = {
    opcode.code.encode("latin-1"): (READERS.get(opcode.name, read_nothing), ACTIONS[opcode.name])
    for opcode in pickletools.opcodes
    if opcode.name in ACTIONS
}


def read_pickle(data: bytes) -> dict[str, Any]:
    """The dictionary in a pickle of protocol 2 to 4, such as CIFAR's, without running `pickle`.

    Admitted are dictionaries, lists, tuples, whole numbers, text, bytes and the names that an
    array needs. Keys, and the byte strings of Python 2, become text, one letter a byte (Latin-1).
    """
    try:
        result = PickleMachine(data).run()
    except FormatError:
        raise
    except (ValueError, LookupError, struct.error) as error:
        raise FormatError("is cut short or damaged: its pickle does not parse") from error
    if not isinstance(result, dict):
        raise FormatError("does not hold a dictionary")
    return result


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
