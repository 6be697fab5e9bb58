"""Write shapes32 to files, for eyes and for other programs; `lab.load` needs no file of it.

    python data_scripts/make_shapes32.py FOLDER [--train N] [--test N] [--seed S]

FOLDER is made, and then holds

    shapes32.png           sixteen images of each class
    shapes32.npz           train_x, train_y, test_x, test_y, classes
    cifar-10-batches-py/   the same images as Python batches, in the layout of CIFAR-10, so that
                           any program that reads CIFAR-10 reads them (checksums off)
"""

from __future__ import annotations

import argparse
import pickle
import sys
import tempfile
from pathlib import Path

import numpy as np
from matplotlib.image import imsave

from minihyperflows.data.datasets import CIFAR, Dataset, make_shapes32
from minihyperflows.errors import UserError


def contact_sheet(data: Dataset, columns: int = 16, zoom: int = 2) -> np.ndarray:
    """One row a class, its first training images side by side: (height, width, 3) uint8."""
    rows = []
    for label in range(len(data.classes)):
        images = data.train_x[data.train_y == label][:columns]
        missing = np.full((columns - len(images), 32, 32, 3), 255, np.uint8)
        rows.append(np.concatenate([*images, *missing], axis=1))  # (32, 32 * columns, 3)
    return np.concatenate(rows).repeat(zoom, axis=0).repeat(zoom, axis=1)


def write_pickle(path: Path, entry: dict[str, object]) -> None:
    path.write_bytes(pickle.dumps(entry, protocol=4))


def write_batch(path: Path, images: np.ndarray, labels: np.ndarray) -> None:
    rows = images.transpose(0, 3, 1, 2).reshape(len(images), -1)  # (N, 3072), plane by plane
    data = np.ascontiguousarray(rows)
    write_pickle(path, {"batch_label": path.name, "labels": labels.tolist(), "data": data})


def write_batches(folder: Path, data: Dataset) -> None:
    """The training set in five files, the test set in one, and the names of the classes."""
    layout = CIFAR["cifar10"]
    folder.mkdir()
    images = np.array_split(data.train_x, len(layout.train))
    labels = np.array_split(data.train_y, len(layout.train))
    for name, batch_x, batch_y in zip(layout.train, images, labels, strict=True):
        write_batch(folder / name, batch_x, batch_y)
    write_batch(folder / layout.test, data.test_x, data.test_y)
    write_pickle(folder / layout.meta, {layout.names_key: list(data.classes)})


def write_all(folder: Path, data: Dataset) -> None:
    imsave(folder / "shapes32.png", contact_sheet(data))
    np.savez_compressed(
        folder / "shapes32.npz",
        train_x=data.train_x,
        train_y=data.train_y,
        test_x=data.test_x,
        test_y=data.test_y,
        classes=np.array(data.classes),
    )
    write_batches(folder / CIFAR["cifar10"].folder, data)


def make_folder(folder: Path, data: Dataset) -> None:
    """All files or none: they are written beside `folder`, which appears when they are complete."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists already; name a folder that is new or empty")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            unfinished = Path(scratch) / folder.name
            unfinished.mkdir()
            write_all(unfinished, data)
            if folder.exists():
                folder.rmdir()
            unfinished.rename(folder)
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror or error})") from error


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write shapes32 to files.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train", type=int, default=10_000, help="training images (%(default)s)")
    parser.add_argument("--test", type=int, default=2_000, help="test images (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    options = parser.parse_args(arguments)
    try:
        if options.train < len(CIFAR["cifar10"].train):
            raise UserError(f"--train {options.train} is too few for five batches; give 5 or more")
        make_folder(options.folder, make_shapes32(options.train, options.test, options.seed))
    except (UserError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {options.train} + {options.test} images to {options.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
