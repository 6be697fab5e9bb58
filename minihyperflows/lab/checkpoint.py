"""Files that are either the old ones or the new ones, never something in between.

Everything a run writes goes to a temporary file beside its destination and is then renamed, so a
process killed at any moment leaves the previous file whole. What cannot be made again is forced to
the disk before the renaming, so that a power failure does no harm either.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from minihyperflows.lab.errors import UserError

FORMAT = "minihyperflows checkpoint 1"


def write_atomically(path: Path, content: bytes, durable: bool = True) -> None:
    """Replace ``path`` by a file with ``content``, or leave it as it is.

    ``durable`` waits until the content is on the disk, which can take a second on a busy one.

    Raises:
        UserError: the disk is full or the folder is not writable; ``path`` is untouched.
    """
    temporary = path.with_name(path.name + ".partial")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):  # the first error is the one to report
            temporary.unlink(missing_ok=True)
        kept = "; the previous file is untouched" if path.exists() else ""
        raise UserError(f"cannot write {path}: {error.strerror or error}{kept}") from error


def write_json(path: Path, values: Any) -> None:
    """``values`` as indented JSON, written atomically."""
    text = json.dumps(values, indent=2, allow_nan=False) + "\n"
    write_atomically(path, text.encode("utf-8"))


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        UserError: it cannot be read or is no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}; remove it or start over") from error


def save_checkpoint(path: Path, arrays: dict[str, np.ndarray], values: dict[str, Any]) -> None:
    """Arrays and JSON values in one safetensors file, written atomically."""
    metadata = {"format": FORMAT, "values": json.dumps(values)}
    contiguous = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    write_atomically(path, save(contiguous, metadata))


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
        if metadata.get("format") != FORMAT:
            raise UserError(f"{path} is not a checkpoint of minihyperflows")
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return arrays, json.loads(metadata["values"])


@contextlib.contextmanager
def _readable(path: Path, advice: str) -> Iterator[Any]:
    try:
        with safe_open(path, framework="numpy") as file:
            yield file
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise UserError(f"cannot read the checkpoint {path}: {error}; {advice}") from error
