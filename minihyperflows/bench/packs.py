"""Networks and records in few, small files, to bring them back from a machine that is lent.

A checkpoint of a network of 20 million weights, with its presences and the optimisers' state, has
400 MB. A few MB of them are worth keeping. Of a pruned network these are the weights that are left,
in half precision, and a bit for each weight that says whether it is left. Of a dense one they are
all its weights, in half precision. (Pruning begins with new optimisers, so their state is not
missed.)
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from minihyperflows.errors import UserError
from minihyperflows.lab.checkpoint import (
    load_checkpoint,
    save_checkpoint,
    to_json,
    write_atomically,
)
from minihyperflows.lab.folders import RunFolder, foreign

PART_BYTES = 16_000_000  # of a part of a pack
PACK = "networks.zip"
RECORDS = "records.zip"
PACKED = r"networks\.zip\.\d+|records\.zip"  # the names in a pack's folder
NET, STEP = "net.", ".step"
BITS, VALUES, SHAPE, HALF = ".bits", ".values", ".shape", ".half"
PRESENCE, WEIGHT = ".presence", ".weight"
ROUNDED = "rounded to float16"


# -- one network ---------------------------------------------------------------------------------


def packed_network(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays of a state dict (presences among them or not), in as few bytes as possible.

    A gated weight becomes the bits of its mask and the weights that are left, in float16, any other
    matrix a float16 array; vectors, and counts, stay as they are.
    """
    packed: dict[str, np.ndarray] = {}
    for name, array in state.items():
        presence = state.get(name.removesuffix(WEIGHT) + PRESENCE)
        if name.endswith(PRESENCE):
            continue
        if name.endswith(WEIGHT) and presence is not None:
            mask = presence >= 0
            packed[name + BITS] = np.packbits(mask)
            packed[name + VALUES] = array[mask].astype(np.float16)
            packed[name + SHAPE] = np.array(array.shape)
        elif array.dtype == np.float32 and array.ndim > 1:
            packed[name + HALF] = array.astype(np.float16)
        else:
            packed[name] = array
    return packed


def unpacked_network(packed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A state dict, float32; of the presences only the sign is known: 1 or -1."""
    state: dict[str, np.ndarray] = {}
    for name, array in packed.items():
        if name.endswith(BITS):
            weight = name.removesuffix(BITS)
            shape = tuple(packed[weight + SHAPE].tolist())
            mask = np.unpackbits(array, count=int(np.prod(shape))).reshape(shape).astype(bool)
            state[weight] = np.zeros(shape, np.float32)
            state[weight][mask] = packed[weight + VALUES]
            state[weight.removesuffix(WEIGHT) + PRESENCE] = np.where(mask, 1, -1).astype(np.float32)
        elif name.endswith(HALF):
            state[name.removesuffix(HALF)] = array.astype(np.float32)
        elif not name.endswith((VALUES, SHAPE)):
            state[name] = array
    return state


def _to_npz(arrays: Mapping[str, np.ndarray], values: Mapping[str, Any]) -> bytes:
    file = io.BytesIO()
    text = np.frombuffer(to_json(values).encode("utf-8"), np.uint8)
    np.savez_compressed(file, **arrays, values=text)  # type: ignore[arg-type]
    return file.getvalue()


def _from_npz(content: bytes) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    with np.load(io.BytesIO(content), allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    return arrays, json.loads(arrays.pop("values").tobytes())


# -- many of them --------------------------------------------------------------------------------


def pack(
    folders: Sequence[Path], out: Path, dense: Sequence[Path] = (), limit: int = 3 * PART_BYTES
) -> list[str]:
    """Write into ``out`` what can be brought back of these runs.

    ``records.zip`` has the records of all of them. ``networks.zip.0``, ``.1`` and so on, parts of
    one file, have the pruned networks of the runs that are finished, and the dense networks of the
    folders in ``dense``, in this order and as many as fit.

    Args:
        folders: of runs, finished or not.
        out: made if needed; a pack that is there is replaced.
        dense: of the ``folders``, those whose dense network is wanted.
        limit: bytes of all networks together.

    Returns:
        What did not fit, in words.

    Raises:
        UserError: the folder ``out`` has something else in it.
    """
    _require_ours(out)
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob(f"{PACK}.*"):
        old.unlink()
    write_atomically(out / RECORDS, _records(folders), durable=False)
    content, left_out = io.BytesIO(), []
    with zipfile.ZipFile(content, "w", zipfile.ZIP_STORED) as archive:
        for kind, folder in [*(("pruned", f) for f in folders), *(("dense", f) for f in dense)]:
            network = _network(RunFolder(folder), kind)
            if network is None:
                continue
            if content.tell() + len(network) > limit:
                left_out.append(f"the {kind} network of {folder.name} ({len(network):,} bytes)")
                continue
            archive.writestr(f"{folder.name}/{kind}.npz", network)
    whole = content.getvalue()
    for number, start in enumerate(range(0, len(whole), PART_BYTES)):
        part = whole[start : start + PART_BYTES]
        write_atomically(out / f"{PACK}.{number}", part, durable=False)
    return left_out


def _require_ours(out: Path) -> None:
    found = foreign(out, lambda entry: entry.name.endswith(".partial"))
    others = [name for name in found if not re.fullmatch(PACKED, name)]
    if others or (found and not _is_records(out / RECORDS)):
        other = next(iter(others or found))
        raise UserError(f"{out} is not a pack's folder (it has {other}): choose another one")


def _is_records(file: Path) -> bool:
    try:
        with zipfile.ZipFile(file) as archive:
            return any(name.endswith("/recipe.json") for name in archive.namelist())
    except (OSError, zipfile.BadZipFile):
        return False


def _records(folders: Sequence[Path]) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        for folder in map(RunFolder, folders):
            files = (folder.recipe, folder.metrics, folder.layers, folder.summary)
            for file in (f for f in files if f.exists()):
                archive.write(file, f"{folder.path.name}/{file.name}")
    return content.getvalue()


def _network(folder: RunFolder, kind: str) -> bytes | None:
    """The packed network of a run; None if there is none of this kind yet."""
    file = folder.dense if kind == "dense" else folder.checkpoint
    if not file.exists() or (kind == "pruned" and not folder.is_finished):
        return None
    arrays, values = load_checkpoint(file)
    net = {k.removeprefix(NET): v for k, v in arrays.items() if k.startswith(NET)}
    if kind == "dense":  # what a run needs that begins with it
        steps = {k: np.zeros_like(v) for k, v in arrays.items() if k.endswith(STEP)}
        return _to_npz(packed_network(net) | steps, values)
    about = {name: values[name] for name in ("recipe", "seed", "device")}
    return _to_npz(packed_network(net), about | {"epoch": values["trainer"]["epoch"]})


def unpack(folder: Path) -> zipfile.ZipFile:
    """The archive whose parts :func:`pack` has written.

    Raises:
        UserError: there are none, or one is missing.
    """
    parts = sorted(folder.glob(f"{PACK}.*"), key=lambda p: int(p.suffix[1:]))
    content = io.BytesIO(b"".join(p.read_bytes() for p in parts))
    try:
        return zipfile.ZipFile(content)
    except zipfile.BadZipFile as error:
        raise UserError(f"{folder} does not hold all parts of {PACK}: {error}") from error


def pruned_network(archive: zipfile.ZipFile, run: str) -> tuple[dict[str, np.ndarray], Any]:
    """The state dict of a run's pruned network, and what it is."""
    arrays, values = _from_npz(archive.read(f"{run}/pruned.npz"))
    return unpacked_network(arrays), values


def restore_dense(archive: zipfile.ZipFile, out: Path) -> list[Path]:
    """Make of each dense network in a pack a folder in ``out`` that runs can begin with
    (``dense_from``). Its name says that the weights are rounded to half precision: a run that
    begins there ends a little different from one that trained its own."""
    made = []
    for name in archive.namelist():
        run, _, file = name.partition("/")
        if file != "dense.npz":
            continue
        arrays, values = _from_npz(archive.read(name))
        steps = {k: arrays.pop(k) for k in list(arrays) if k.endswith(STEP)}
        net = {NET + k: v for k, v in unpacked_network(arrays).items()}
        folder = RunFolder(out / f"{run}, dense, {ROUNDED}")
        folder.require_ours()
        folder.create()
        save_checkpoint(folder.dense, net | steps, values)
        made.append(folder.path)
    return made
