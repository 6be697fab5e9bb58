"""Files that are either the old ones or the new ones, never something in between.

Everything a run writes goes to a temporary file beside its destination and is then renamed, so a
process killed at any moment leaves the previous file whole. What cannot be made again is forced to
the disk before the renaming, so that a power failure does no harm either. Temporary names are of
one process and one moment, so two writers never meet in one.

A checkpoint has a checksum of its arrays and values. A damaged file is refused, not believed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from minihyperflows.errors import UserError, reason_of

FORMAT = "minihyperflows checkpoint 2"
WITHOUT_CHECKSUM = "minihyperflows checkpoint 1"  # the format before; still read
_FORMAT_NAMES = re.compile(r"minihyperflows checkpoint \d+")

_TEMPORARY = re.compile(r"(.+)\.\d+-[0-9a-f]{8}\.partial")
_MOST_OF_A_NAME = 50  # characters, of up to four bytes: a temporary name is not to be too long


def named_path(text: str) -> Path:
    """The type of an option that names a file or folder to write.

    Raises:
        UserError: ``text`` is empty, which would mean the current folder.
    """
    if not text:
        raise UserError('an empty name is not a place to write to: write "." for this folder')
    return Path(text)


# -- writing -------------------------------------------------------------------------------------


def write_atomically(path: Path, content: bytes, durable: bool = True) -> None:
    """Replace ``path`` by a file with ``content``, or leave it as it is. A link is followed.

    ``durable`` waits until the content is on the disk, which can take a second on a busy one.

    Raises:
        UserError: the disk is full, the folder is gone or not writable, or ``path`` is a folder or
            a device; it is untouched.
    """
    try:
        target = Path(os.path.realpath(path))
        if target.exists() and not target.is_file():
            raise UserError(f"cannot write {path}: it is not a file")
        _replace(target, content, durable)
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        kept = "; the previous file is untouched" if os.path.lexists(path) else ""
        raise UserError(f"cannot write {path}: {reason_of(error)}{kept}") from error


def _replace(target: Path, content: bytes, durable: bool) -> None:
    temporary = target.with_name(_temporary_name(target.name))
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):  # the first error is the one to report
            temporary.unlink(missing_ok=True)
        raise


def _temporary_name(name: str) -> str:
    return f"{name[:_MOST_OF_A_NAME]}.{os.getpid()}-{secrets.token_hex(4)}.partial"


def is_temporary(name: str, names: Collection[str]) -> bool:
    """Whether a file called ``name`` is the beginning of one called as one of ``names``."""
    found = _TEMPORARY.fullmatch(name)
    return found is not None and found[1] in names


def remove_temporary(folder: Path, names: Collection[str]) -> None:
    """Remove what processes that died while they wrote the files ``names`` left in ``folder``.

    For the holder of the lock that all writers of these files hold: then none of them lives.
    """
    with contextlib.suppress(OSError):  # litter does no harm
        for file in list(folder.iterdir()):
            if is_temporary(file.name, names):
                file.unlink(missing_ok=True)


# -- JSON ----------------------------------------------------------------------------------------


def to_json(values: Any, **options: Any) -> str:
    """``values`` as JSON; NumPy's scalars are the numbers that they are equal to.

    All JSON is written here. ``options``: of :func:`json.dumps`.

    Raises:
        TypeError: JSON has no form for a value.
    """
    return json.dumps(values, default=_plain, **options)


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} {value!r} is not a value of JSON")


def write_json(path: Path, values: Any) -> None:
    """``values`` as indented JSON, written atomically."""
    text = to_json(values, indent=2, allow_nan=False) + "\n"
    write_atomically(path, text.encode("utf-8"))


def read_json(path: Path, advice: str = "remove it or start over") -> Any:
    """The content of a JSON file.

    Raises:
        UserError: it cannot be read, or it is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path}: {reason_of(error)}; {advice}") from error


# -- checkpoints ---------------------------------------------------------------------------------


def save_checkpoint(path: Path, arrays: Mapping[str, np.ndarray], values: dict[str, Any]) -> None:
    """Arrays and JSON values in one safetensors file, written atomically, with a checksum."""
    text = to_json(values)
    contiguous = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    metadata = {"format": FORMAT, "values": text, "checksum": checksum(contiguous, text)}
    write_atomically(path, save(contiguous, metadata))


def checksum(arrays: Mapping[str, np.ndarray], text: str) -> str:
    """SHA-256 over the text and each array: its name, dtype, shape and bytes, by name."""
    total = hashlib.sha256(text.encode("utf-8"))
    for name in sorted(arrays):
        array = arrays[name]
        total.update(f"\0{name} {array.dtype.str} {array.shape}\0".encode())
        total.update(array.reshape(-1).view(np.uint8).data)
    return total.hexdigest()


def load_checkpoint(
    path: Path, advice: str = "start over with --no-resume"
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """What :func:`save_checkpoint` wrote.

    Args:
        path: the file.
        advice: what to do if it cannot be read; ends the error's line.

    Raises:
        UserError: the file is missing, damaged, or no checkpoint of this program.
    """
    with _readable(path, advice) as file:
        metadata = file.metadata() or {}
        _require_format(path, metadata, advice)
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        text = metadata["values"]
        if metadata["format"] == FORMAT and metadata["checksum"] != checksum(arrays, text):
            raise ValueError("it is damaged, its content does not have its checksum")
        return arrays, json.loads(text)


def _require_format(path: Path, metadata: Mapping[str, str], advice: str) -> None:
    found = metadata.get("format", "")
    names = {FORMAT: {"format", "values", "checksum"}, WITHOUT_CHECKSUM: {"format", "values"}}
    if names.get(found) == set(metadata):
        return
    if found in names:
        raise ValueError("it is damaged, its header has other entries than a checkpoint's")
    if _FORMAT_NAMES.fullmatch(found):
        raise UserError(f"{path} was written by a newer version of minihyperflows; {advice}")
    raise UserError(f"{path} is not a checkpoint of minihyperflows; {advice}")


def safetensors_metadata(path: Path) -> dict[str, str] | None:
    """What the header of a safetensors file says; None if ``path`` is not one."""
    try:
        with _readable(path, "") as file:
            return file.metadata() or {}
    except UserError:
        return None


def is_checkpoint(path: Path) -> bool:
    """Whether ``path`` is a checkpoint of this program, damaged behind its header or not."""
    metadata = safetensors_metadata(path) or {}
    return bool(_FORMAT_NAMES.fullmatch(metadata.get("format", "")))


@contextlib.contextmanager
def _readable(path: Path, advice: str) -> Iterator[Any]:
    try:
        if path.exists() and not path.is_file():  # a pipe would keep its reader waiting
            raise ValueError("it is not a file")
        with safe_open(path, framework="numpy") as file:
            yield file
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"cannot read the checkpoint {path}: {error}; {advice}") from error
