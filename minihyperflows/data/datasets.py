"""Data sets: `load(name)` gives the arrays of one, `normalise` makes them a network's input.

Two need no files: the digits, which the package carries, and shapes32, which is drawn from a
seed. MNIST and CIFAR are read from a folder, in the layouts in which they are published.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
from numpy.typing import DTypeLike, NDArray

from minihyperflows.data import formats, shapes
from minihyperflows.errors import FormatError, UserError

Pixels = NDArray[np.uint8]
Labels = NDArray[np.int64]


@dataclass(frozen=True)
class Images:
    """What is known of a data set before it is read."""

    shape: tuple[int, int, int]  # (H, W, C) of an image
    classes: int
    train: int  # images to train with


IMAGES = {
    "digits": Images((8, 8, 1), 10, 1_437),
    "shapes32": Images((32, 32, 3), 10, 10_000),
    "mnist": Images((28, 28, 1), 10, 60_000),
    "cifar10": Images((32, 32, 3), 10, 50_000),
    "cifar100": Images((32, 32, 3), 100, 50_000),
}
NAMES = tuple(IMAGES)
FOLDER_VARIABLE = "MINIHYPERFLOWS_DATA"


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images with their classes, split into a training and a test set.

    Every pixel is a uint8 from 0 to 255, so that scale is the same for all data sets. `mean` and
    `std` are the training set's, one a channel, of pixels divided by 255.

    Raises UserError, one sentence that names the cause, for arrays that do not fit this: floats
    (they are not converted, since whether 0.5 is half of white or nearly black is not known),
    channels first, labels that are one-hot, missing or not below the number of classes, no images.
    """

    name: str
    train_x: Pixels  # (N, H, W, C)
    train_y: Labels  # (N,)
    test_x: Pixels
    test_y: Labels
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.classes, list | tuple) or not self.classes:
            raise UserError(f"classes are the names of the classes, a tuple, not {self.classes!r}")
        if not all(
            isinstance(values, list | tuple | np.ndarray) for values in (self.mean, self.std)
        ):
            raise UserError("mean and std are tuples with a number for each channel")
        for part in ("train", "test"):
            images, labels = getattr(self, f"{part}_x"), getattr(self, f"{part}_y")
            check_images(f"{part}_x", images, len(self.mean))
            check_labels(f"{part}_y", labels, len(images), len(self.classes))
        if self.train_x.shape[1:] != self.test_x.shape[1:]:
            raise UserError(
                f"the images to train with are {self.train_x.shape[1:]}, those to test with "
                f"{self.test_x.shape[1:]}: (H, W, C) must be the same"
            )
        if len(self.mean) != len(self.std) or not all(0 < s < math.inf for s in self.std):
            raise UserError(
                f"std needs a positive number for each of the {len(self.mean)} channels, "
                f"not {self.std}: take 1 for a channel that never changes"
            )


def check_images(name: str, images: Pixels, channels: int) -> None:
    """Raise UserError, calling them `name`, unless these are images (N, H, W, channels) of uint8.

    Square images whose first axis after N is 1 or 3 long, with more channels than that, are taken
    for (N, C, H, W), even if they have the right number of channels by that accident.
    """
    require_pixels(name, images)
    shape = images.shape
    if len(shape) == 3:
        raise UserError(
            f"{name} has shape {shape}, without channels: write {name}[..., np.newaxis]"
        )
    if len(shape) != 4:
        raise UserError(f"{name} has shape {shape}: images are (N, H, W, C)")
    if 0 in shape:
        raise UserError(f"{name} holds no images, or empty ones: its shape is {shape}")
    first = shape[1] in (1, 3) and shape[2] == shape[3] > 4
    if first or shape[3] != channels == shape[1]:
        raise UserError(
            f"{name} has shape {shape}, which looks like (N, C, H, W): here channels come last, "
            f"{name}.transpose(0, 2, 3, 1)"
        )
    if shape[3] != channels:
        raise UserError(
            f"{name} has {shape[3]} channels, its shape being {shape}, and mean has {channels} "
            "entries: one for each channel"
        )


def require_pixels(name: str, images: Pixels) -> None:
    """Raise UserError, calling them `name`, unless these are pixels from 0 to 255, of uint8."""
    if not isinstance(images, np.ndarray):
        raise UserError(f"{name} must be a NumPy array of uint8, not {type(images).__name__}")
    if images.dtype != np.uint8:
        hint = "convert them"
        if images.dtype.kind == "f" and images.size:
            low, high = float(images.min()), float(images.max())
            hint = f"these lie between {low:.3g} and {high:.3g}"
            if low >= 0 and high <= 1:
                hint += f": write (255 * {name}).round().astype(np.uint8)"
        raise UserError(
            f"{name} holds {images.dtype}: pixels are uint8 from 0 to 255, which normalise divides "
            f"by 255; {hint}"
        )


def check_labels(name: str, labels: Labels, images: int, classes: int) -> None:
    """Raise UserError, calling them `name`, unless these are (images,) integers below classes."""
    if not isinstance(labels, np.ndarray):
        raise UserError(f"{name} must be a NumPy array of integers, not {type(labels).__name__}")
    if labels.ndim == 2 and labels.shape[1] == classes > 1:
        raise UserError(
            f"{name} has shape {labels.shape}, which looks one-hot: labels are the numbers of the "
            f"classes, {name}.argmax(axis=1)"
        )
    if labels.ndim != 1:
        raise UserError(f"{name} has shape {labels.shape}: labels are (N,), one for each image")
    if labels.dtype.kind not in "iu":
        raise UserError(f"{name} holds {labels.dtype}: labels are integers, the numbers of classes")
    if len(labels) != images:
        raise UserError(f"{name} has {len(labels):,} labels for {images:,} images")
    if labels.min() < 0 or labels.max() >= classes:
        wrong = labels.min() if labels.min() < 0 else labels.max()
        raise UserError(
            f"{name} holds {wrong}: {classes} classes are numbered from 0 to {classes - 1}"
        )


def load(name: str, root: str | os.PathLike[str] | None = None) -> Dataset:
    """The data set called `name`: one of digits, shapes32, mnist, cifar10, cifar100.

    root: the folder that holds MNIST or CIFAR; see `data_folder` for where it is by default.
    Raises UserError, one line that says what to do, for an unknown name and for files that are
    missing, damaged or not what they should be.
    """
    if name == "digits":
        return load_digits()
    if name == "shapes32":
        return make_shapes32()
    if name not in NAMES:
        raise UserError(f"there is no data set {name!r}; choose one of {', '.join(NAMES)}")
    folder = data_folder(root)
    with blaming(folder, name, folder):
        return load_mnist(folder) if name == "mnist" else load_cifar(name, folder)


def normalise(images: Pixels, data: Dataset, dtype: DTypeLike) -> NDArray:
    """(images / 255 - data.mean) / data.std, channel by channel, in `dtype`: (N, H, W, C).

    It works on whole rows of pixels, (N * H, W * C), with mean and std repeated for each pixel of
    a row: NumPy is five times as fast on rows of 96 numbers as on pixels of 3.

    Raises UserError for images that are not uint8: those in [0, 1] would be divided by 255 again.
    """
    require_pixels("images", images)
    width, channels = images.shape[-2:]
    rows = images.reshape(-1, width * channels).astype(dtype)
    rows /= 255
    rows -= np.tile(np.asarray(data.mean, dtype), width)
    rows /= np.tile(np.asarray(data.std, dtype), width)
    return rows.reshape(images.shape)


def channel_statistics(images: Pixels) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, pixels divided by 255.

    They come from a count of each pixel value and whole-number sums, so they are the same to the
    last digit on every machine.
    """
    means, deviations = [], []
    for channel in range(images.shape[-1]):
        counts = np.bincount(images[..., channel].reshape(-1), minlength=256)
        number, total, squares = (
            sum(int(count) * value**power for value, count in enumerate(counts))
            for power in (0, 1, 2)
        )
        means.append(total / (number * 255))
        deviations.append(math.sqrt(number * squares - total * total) / (number * 255))
    return tuple(means), tuple(deviations)


# --- without files ------------------------------------------------------------------------------


def load_digits() -> Dataset:
    """The UCI handwritten digits: 1,437 training and 360 test images of 8 x 8, in one channel.

    The file holds what UCI publishes, counts from 0 to 16 of the dark pixels in a 4 x 4 block;
    here they are spread over 0 to 255, rounded: (count * 255 + 8) // 16. Source and licence
    (CC BY 4.0) stand in embedded/digits.LICENSE.txt.
    """
    file = resources.files(__package__) / "embedded" / "digits.npz"
    with file.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
        counts, labels, is_test = arrays["counts"], arrays["labels"], arrays["is_test"]
    images = ((counts.astype(np.int64) * 255 + 8) // 16).astype(np.uint8)[..., None]
    labels = labels.astype(np.int64)
    mean, std = channel_statistics(images[~is_test])
    return Dataset(
        name="digits",
        train_x=images[~is_test],  # (1437, 8, 8, 1)
        train_y=labels[~is_test],
        test_x=images[is_test],  # (360, 8, 8, 1)
        test_y=labels[is_test],
        classes=tuple("0123456789"),
        mean=mean,
        std=std,
    )


def make_shapes32(train: int = 10_000, test: int = 2_000, seed: int = 0) -> Dataset:
    """Ten classes of drawn 32 x 32 colour images, `train` and `test` of them, from a seed.

    The same arguments give the same bytes on every machine (`lab.shapes` says how), every class
    comes equally often in each ten images, and a smaller set is the beginning of a larger one.
    """
    if train < 1 or test < 1 or seed < 0:
        raise ValueError(
            "shapes32 needs one image or more in each split and a seed of 0 or more, "
            f"not train={train}, test={test}, seed={seed}"
        )
    train_x, train_y = shapes.make_split(train, seed, split=0)
    test_x, test_y = shapes.make_split(test, seed, split=1)
    mean, std = channel_statistics(train_x)
    return Dataset("shapes32", train_x, train_y, test_x, test_y, shapes.CLASSES, mean, std)


# --- files --------------------------------------------------------------------------------------


def data_folder(root: str | os.PathLike[str] | None = None) -> Path:
    """`root`; else the folder in MINIHYPERFLOWS_DATA; else ~/.cache/minihyperflows."""
    chosen = root or os.environ.get(FOLDER_VARIABLE) or "~/.cache/minihyperflows"
    try:
        return Path(chosen).expanduser()
    except RuntimeError as error:
        raise UserError(f"{chosen} cannot be found: there is no such home folder") from error


def fetch_command(name: str, root: Path) -> str:
    return f'python data_scripts/fetch.py {name} "{root}"'


@contextmanager
def blaming(path: Path, name: str, root: Path) -> Iterator[None]:
    """Turns what goes wrong with the file at `path` into a UserError that names it."""
    try:
        yield
    except FormatError as error:
        again = f"delete it and run: {fetch_command(name, root)}"
        raise UserError(f"{path} {error}; {again}") from error
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing; fetch it with: {fetch_command(name, root)}") from error
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise UserError(f"{path} cannot be read ({reason}); check its permissions") from error


# --- MNIST --------------------------------------------------------------------------------------

MNIST_FOLDERS = ("MNIST/raw", "mnist", ".")  # below the data folder, in the order of search


def load_mnist(root: Path) -> Dataset:
    """MNIST's four idx files, gzipped or not, in `root`, root/MNIST/raw or root/mnist."""
    train_x, train_y = read_mnist_split(root, "train")
    test_x, test_y = read_mnist_split(root, "t10k")
    classes = tuple("0123456789")
    return Dataset("mnist", train_x, train_y, test_x, test_y, classes, (0.1307,), (0.3081,))


def read_mnist_split(root: Path, split: str) -> tuple[Pixels, Labels]:
    """Images (N, 28, 28, 1) and labels (N,)."""
    images_path = find_mnist(root, f"{split}-images", "idx3-ubyte")
    labels_path = find_mnist(root, f"{split}-labels", "idx1-ubyte")
    with blaming(images_path, "mnist", root):
        images = formats.read_idx(images_path, (28, 28))
    with blaming(labels_path, "mnist", root):
        labels = formats.read_idx(labels_path, ())
        formats.check_labels(labels, len(images), classes=10)
    return images[..., None], labels.astype(np.int64)


def find_mnist(root: Path, stem: str, kind: str) -> Path:
    """The first of the names under which the file is published that is there."""
    names = [f"{stem}{dot}{kind}{suffix}" for dot in "-." for suffix in ("", ".gz")]
    for folder in MNIST_FOLDERS:
        for name in names:
            if (path := root / folder / name).is_file():
                return path
    raise UserError(
        f"{root} holds no {names[0]} (.gz or not, itself or in MNIST/raw or mnist); "
        f"fetch it with: {fetch_command('mnist', root)}"
    )


# --- CIFAR --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CifarLayout:
    """Which files a CIFAR set is published in, and what they call their contents."""

    folder: str
    train: tuple[str, ...]
    test: str
    meta: str
    label_key: str
    names_key: str
    classes: int
    archive: str
    sha256: str  # of the archive
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def files(self) -> tuple[str, ...]:
        return (*self.train, self.test, self.meta)


CIFAR = {
    "cifar10": CifarLayout(
        folder="cifar-10-batches-py",
        train=tuple(f"data_batch_{number}" for number in range(1, 6)),
        test="test_batch",
        meta="batches.meta",
        label_key="labels",
        names_key="label_names",
        classes=10,
        archive="cifar-10-python.tar.gz",
        sha256="6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.247, 0.243, 0.261),
    ),
    "cifar100": CifarLayout(
        folder="cifar-100-python",
        train=("train",),
        test="test",
        meta="meta",
        label_key="fine_labels",
        names_key="fine_label_names",
        classes=100,
        archive="cifar-100-python.tar.gz",
        sha256="85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7",
        mean=(0.5071, 0.4867, 0.4408),
        std=(0.2675, 0.2565, 0.2761),
    ),
}


def load_cifar(name: str, root: Path) -> Dataset:
    """The published Python batches of cifar10 or cifar100: unpacked, or in their archive."""
    layout = CIFAR[name]
    source, read = open_cifar(name, root)
    with blaming(source / layout.meta, name, root):
        names = formats.read_cifar_names(read(layout.meta), layout.names_key, layout.classes)

    def read_batch(file: str) -> tuple[Pixels, Labels]:
        with blaming(source / file, name, root):
            return formats.read_cifar_batch(read(file), layout.label_key, layout.classes)

    train = [read_batch(file) for file in layout.train]
    train_x = np.concatenate([images for images, _ in train])
    train_y = np.concatenate([labels for _, labels in train])
    test_x, test_y = read_batch(layout.test)
    return Dataset(name, train_x, train_y, test_x, test_y, names, layout.mean, layout.std)


def open_cifar(name: str, root: Path) -> tuple[Path, Callable[[str], bytes]]:
    """Where the files lie, a folder or an archive, and a function that reads one of them."""
    layout = CIFAR[name]
    folders = [root / layout.folder, root]
    found = [folder for folder in folders if any((folder / f).is_file() for f in layout.files)]
    if found:
        return found[0], lambda file: formats.read_bytes(found[0] / file)
    archive = root / layout.archive
    if archive.is_file():
        with blaming(archive, name, root):
            return archive, formats.read_archive(archive, layout.sha256, layout.files).__getitem__
    raise UserError(
        f"{root} holds neither {layout.folder} nor {layout.archive}; "
        f"fetch it with: {fetch_command(name, root)}"
    )
