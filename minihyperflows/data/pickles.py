"""Pickles without `pickle`: a reader that can build arrays' raw material, and do nothing else.

Python's `pickle` calls whatever functions a file names, so a file can run any program. The
machine below knows only the opcodes that the published CIFAR files are made of, and none that
calls: where an array would be made, it notes down what was to be called with what.
"""

from __future__ import annotations

import io
import pickletools
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO, ClassVar

from minihyperflows.errors import FormatError

MAX_OPCODES = 1_000_000  # in one pickle; a published one has four or five for each image
MAX_KEY_LENGTH = 100  # of a dictionary's key; the longest published one has 19 letters


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
