"""data: the embedded and the drawn set, published layouts, and files that lie."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import importlib.util
import io
import os
import pickle
import struct
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from support import REPOSITORY

from minihyperflows.data import datasets as lab_data
from minihyperflows.data import pickles, shapes
from minihyperflows.data.datasets import CIFAR, Dataset, load, make_shapes32, normalise
from minihyperflows.errors import UserError


def script(name: str) -> ModuleType:
    """The module in data_scripts/, which is not a package."""
    path = REPOSITORY / "data_scripts" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def assert_sound(data: Dataset) -> None:
    for images, labels in ((data.train_x, data.train_y), (data.test_x, data.test_y)):
        assert images.dtype == np.uint8
        assert images.ndim == 4
        assert images.flags.c_contiguous
        assert labels.dtype == np.int64
        assert labels.shape == (len(images),)
        assert 0 <= labels.min() <= labels.max() < len(data.classes)
    assert len(data.mean) == len(data.std) == data.train_x.shape[-1]


# --- digits and shapes32 ------------------------------------------------------------------------


def test_digits_are_there_without_any_file() -> None:
    data = load("digits", root="/no/such/folder")
    assert_sound(data)
    assert data.train_x.shape == (1437, 8, 8, 1)
    assert data.test_x.shape == (360, 8, 8, 1)
    assert data.train_x.max() == 255
    assert len(np.unique(data.train_x)) == 17  # the counts 0 to 16, none merged
    share = np.bincount(data.test_y) / np.bincount(np.concatenate([data.train_y, data.test_y]))
    np.testing.assert_allclose(share, 0.2, atol=0.005)


@pytest.mark.slow
def test_the_digits_file_is_what_its_script_makes() -> None:
    pytest.importorskip("sklearn")
    made = script("make_digits").digits_arrays()
    with np.load(Path(lab_data.__file__).parent / "embedded" / "digits.npz") as file:
        assert set(file) == set(made)
        for name in file:
            np.testing.assert_array_equal(file[name], made[name])
            assert file[name].dtype == made[name].dtype


def test_the_digits_name_their_licence() -> None:
    text = (Path(lab_data.__file__).parent / "embedded" / "digits.LICENSE.txt").read_text("utf-8")
    assert "CC BY 4.0" in text
    assert "UCI" in text


def test_shapes32_has_the_geometry_of_cifar() -> None:
    data = make_shapes32(train=200, test=100)
    assert_sound(data)
    assert data.train_x.shape == (200, 32, 32, 3)
    assert data.classes == shapes.CLASSES
    assert len(data.classes) == 10
    assert (np.bincount(data.train_y) == 20).all()


def test_shapes32_is_the_same_on_every_machine() -> None:
    data = make_shapes32(train=100, test=30, seed=3)
    labels = data.train_y.astype(np.uint8).tobytes()
    digest = hashlib.sha256(data.train_x.tobytes() + data.test_x.tobytes() + labels)
    assert digest.hexdigest()[:16] == "82efe4bdc04423dd"


def test_a_smaller_shapes32_begins_a_larger_one() -> None:
    small, large = make_shapes32(train=37, test=5), make_shapes32(train=450, test=60)
    np.testing.assert_array_equal(small.train_x, large.train_x[:37])
    np.testing.assert_array_equal(small.train_y, large.train_y[:37])
    np.testing.assert_array_equal(small.test_x, large.test_x[:5])


def test_shapes32_differs_between_seeds_and_splits() -> None:
    first, second = make_shapes32(20, 20, seed=0), make_shapes32(20, 20, seed=1)
    assert not np.array_equal(first.train_x, second.train_x)
    assert not np.array_equal(first.train_x, first.test_x)


def test_shapes32_reads_exactly_the_random_numbers_it_declares() -> None:
    bits = np.zeros((10, shapes.Draws.COLUMNS), np.uint64)
    noise = np.zeros((2, 10, 3, 32, 32), np.uint8)
    labels = np.arange(10)
    shapes.draw_images(labels, bits, noise)
    with pytest.raises(StopIteration):
        shapes.draw_images(labels, bits[:, 1:], noise)


@pytest.mark.parametrize(("train", "test", "seed"), [(0, 1, 0), (1, 0, 0), (1, 1, -1)])
def test_shapes32_refuses_empty_splits_and_negative_seeds(train: int, test: int, seed: int) -> None:
    with pytest.raises(ValueError, match=f"train={train}, test={test}, seed={seed}"):
        make_shapes32(train, test, seed)


@pytest.mark.slow
def test_the_shapes32_script_writes_what_cifar_readers_read(tmp_path: Path) -> None:
    module = script("make_shapes32")
    folder = tmp_path / "new"
    assert module.main([str(folder), "--train", "53", "--test", "20"]) == 0
    made, read = make_shapes32(53, 20), load("cifar10", folder)
    np.testing.assert_array_equal(read.train_x, made.train_x)
    np.testing.assert_array_equal(read.test_y, made.test_y)
    assert read.classes == made.classes
    with (folder / "cifar-10-batches-py" / "test_batch").open("rb") as file:
        ordinary = pickle.load(file)  # as other programs would
    np.testing.assert_array_equal(ordinary["data"][0, :1024], made.test_x[0, :, :, 0].reshape(-1))
    assert module.main([str(folder)]) == 2  # it is not empty
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new"]


# --- what every data set offers -----------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_normalise_is_its_formula(dtype: type) -> None:
    data = make_shapes32(train=20, test=10)
    result = normalise(data.test_x, data, dtype)
    expected = (data.test_x / 255 - np.array(data.mean)) / np.array(data.std)
    assert result.dtype == dtype
    assert result.shape == data.test_x.shape
    np.testing.assert_allclose(result, expected, rtol=0, atol=8 * np.finfo(dtype).eps)


def test_normalised_training_sets_have_mean_zero_and_deviation_one() -> None:
    for data in (load("digits"), make_shapes32(train=100, test=10)):
        images = normalise(data.train_x, data, np.float64)
        np.testing.assert_allclose(images.mean(axis=(0, 1, 2)), 0, atol=1e-12)
        np.testing.assert_allclose(images.std(axis=(0, 1, 2)), 1, atol=1e-12)


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(UserError, match="digits, shapes32, mnist, cifar10, cifar100"):
        load("imagenet")


def test_the_data_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MINIHYPERFLOWS_DATA", raising=False)
    assert lab_data.data_folder() == Path.home() / ".cache" / "minihyperflows"
    monkeypatch.setenv("MINIHYPERFLOWS_DATA", str(tmp_path))
    assert lab_data.data_folder() == tmp_path
    assert lab_data.data_folder("elsewhere") == Path("elsewhere")


def test_an_error_is_one_line() -> None:
    assert str(UserError("a\nb\r\nc")) == "a b c"


# --- MNIST --------------------------------------------------------------------------------------


def idx(array: np.ndarray) -> bytes:
    """An idx file of unsigned bytes, as its authors describe it."""
    lengths = struct.pack(f">{array.ndim}I", *array.shape)
    return bytes([0, 0, 8, array.ndim]) + lengths + array.astype(np.uint8).tobytes()


def mnist_files(train: int = 7, test: int = 3) -> dict[str, bytes]:
    rng = np.random.default_rng(0)
    files = {}
    for split, number in (("train", train), ("t10k", test)):
        images = rng.integers(0, 256, (number, 28, 28))
        files[f"{split}-images-idx3-ubyte"] = idx(images)
        files[f"{split}-labels-idx1-ubyte"] = idx(np.arange(number) % 10)
    return files


def write(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("folder", [".", "MNIST/raw", "mnist"])
@pytest.mark.parametrize("gzipped", [False, True])
@pytest.mark.parametrize("dotted", [False, True])
def test_mnist_in_its_published_layouts(
    tmp_path: Path, folder: str, gzipped: bool, dotted: bool
) -> None:
    files = mnist_files()
    if gzipped:
        files = {f"{name}.gz": gzip.compress(content) for name, content in files.items()}
    if dotted:
        files = {name.replace("-idx", ".idx"): content for name, content in files.items()}
    write(tmp_path / folder, files)
    data = load("mnist", tmp_path)
    assert_sound(data)
    assert data.train_x.shape == (7, 28, 28, 1)
    assert data.test_y.tolist() == [0, 1, 2]
    images = np.random.default_rng(0).integers(0, 256, (7, 28, 28))
    np.testing.assert_array_equal(data.train_x[..., 0], images)
    assert (data.mean, data.std) == ((0.1307,), (0.3081,))


def test_a_gzipped_file_may_have_lost_its_suffix(tmp_path: Path) -> None:
    files = {name: gzip.compress(content) for name, content in mnist_files().items()}
    assert_sound(load("mnist", write(tmp_path, files)))


def test_mnist_that_is_not_there_says_how_to_fetch_it(tmp_path: Path) -> None:
    for root in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match=r"train-images-idx3-ubyte.*fetch\.py mnist"):
            load("mnist", root)


def zeros_bomb(size: int) -> bytes:
    """A gzipped idx header that announces ten images, before `size` zeros."""
    buffer = io.BytesIO()
    with gzip.GzipFile(fileobj=buffer, mode="wb") as file:
        file.write(idx(np.zeros((10, 28, 28)))[:16])
        for _ in range(size // 2**20):
            file.write(bytes(2**20))
    return buffer.getvalue()


IMAGES = idx(np.zeros((7, 28, 28)))
BAD_IMAGES = {
    "empty": (b"", "cut short"),
    "header cut short": (IMAGES[:15], "cut short"),
    "data cut short": (IMAGES[:-1], "cut short"),
    "trailing garbage": (IMAGES + b"x", "after"),
    "magic of labels": (idx(np.zeros(7)) + bytes(100), "00000801"),
    "floats": (b"\x00\x00\x0d" + IMAGES[3:], "00000d03"),
    "another size": (idx(np.zeros((7, 32, 32))), r"\(32, 32\)"),
    "huge": (IMAGES[:4] + struct.pack(">3I", 2**32 - 1, 28, 28) + bytes(99), "4294967295"),
    "huge sides": (IMAGES[:4] + struct.pack(">3I", 7, 2**31, 2**31), "2147483648"),
    "none": (idx(np.zeros((0, 28, 28))), "0 items"),
    "an error page": (b"<html>404 not found</html>", "3c68746d"),
    "more labels than images": (idx(np.zeros((6, 28, 28))), "7 labels for 6 images"),
    "gzip cut short": (gzip.compress(IMAGES)[:-9], "cut short"),
    "gzip damaged": (gzip.compress(IMAGES)[:30] + b"damage" * 9, "damaged"),
    "gzip bomb": (zeros_bomb(2**26), "after"),
    "gzip in gzip": (gzip.compress(gzip.compress(IMAGES)), "1f8b0800"),
}


@pytest.mark.parametrize("case", BAD_IMAGES)
def test_bad_idx_files(tmp_path: Path, case: str) -> None:
    content, message = BAD_IMAGES[case]
    name = "train-images-idx3-ubyte"
    write(tmp_path, {**mnist_files(), name: content})
    with pytest.raises(UserError, match=message) as caught:
        load("mnist", tmp_path)
    assert "\n" not in str(caught.value)
    assert "fetch.py mnist" in str(caught.value)
    assert "ubyte" in str(caught.value)


def test_labels_out_of_range_are_named(tmp_path: Path) -> None:
    labels = idx(np.array([0, 1, 2, 10, 3, 4, 5]))
    write(tmp_path, {**mnist_files(), "train-labels-idx1-ubyte": labels})
    with pytest.raises(UserError, match=r"train-labels-idx1-ubyte holds the label 10"):
        load("mnist", tmp_path)


def test_a_folder_or_a_closed_file_in_place_of_a_file(tmp_path: Path) -> None:
    write(tmp_path, mnist_files())
    path = tmp_path / "train-images-idx3-ubyte"
    path.chmod(0)
    if not os.access(path, os.R_OK):  # not so for root, nor on Windows
        with pytest.raises(UserError, match="cannot be read"):
            load("mnist", tmp_path)
    path.chmod(0o600)
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match="fetch it with"):
        load("mnist", tmp_path)


# --- CIFAR --------------------------------------------------------------------------------------


class Python2:
    """Pickles as Python 2 wrote them: protocol 2, text as byte strings, everything memoised."""

    def __init__(self) -> None:
        self.memos = 0

    def put(self) -> bytes:
        self.memos += 1
        small = self.memos < 256
        return b"q" + bytes([self.memos]) if small else b"r" + struct.pack("<I", self.memos)

    def text(self, text: str) -> bytes:
        content = text.encode("latin-1")
        head = b"U" + bytes([len(content)]) if len(content) < 256 else b""
        return (head or b"T" + struct.pack("<I", len(content))) + content + self.put()

    @staticmethod
    def whole(number: int) -> bytes:
        return b"K" + bytes([number]) if number < 256 else b"M" + struct.pack("<H", number)

    def many(self, items: list[bytes]) -> bytes:
        return b"]" + self.put() + b"(" + b"".join(items) + b"e"

    def array(self, array: np.ndarray) -> bytes:
        content = array.tobytes()
        return b"".join(
            [
                b"cnumpy.core.multiarray\n_reconstruct\n",
                self.put(),
                b"cnumpy\nndarray\n",
                self.put(),
                b"K\x00\x85U\x01b\x87R",
                self.put(),
                b"(K\x01",
                b"".join(self.whole(length) for length in array.shape) + b"\x86",
                b"cnumpy\ndtype\n",
                self.put(),
                b"U\x02u1K\x00K\x01\x87R",
                self.put(),
                b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb",
                b"\x89T" + struct.pack("<I", len(content)) + content + b"tb",
            ]
        )

    def pickle(self, entries: dict[str, Any]) -> bytes:
        parts = [b"\x80\x02}", self.put(), b"("]
        for key, value in entries.items():
            parts.append(self.text(key))
            if isinstance(value, np.ndarray):
                parts.append(self.array(value))
            elif isinstance(value, list) and isinstance(value[0], str):
                parts.append(self.many([self.text(item) for item in value]))
            elif isinstance(value, list):
                parts.append(self.many([self.whole(item) for item in value]))
            else:
                parts.append(self.text(value) if isinstance(value, str) else self.whole(value))
        return b"".join([*parts, b"u."])


def python2(entries: dict[str, Any]) -> bytes:
    return Python2().pickle(entries)


def python3(protocol: int, encode: bool) -> Callable[[dict[str, Any]], bytes]:
    """As a program in Python 3 would write it again, with keys that are text or bytes."""

    def write_again(entries: dict[str, Any]) -> bytes:
        keyed = {key.encode() if encode else key: value for key, value in entries.items()}
        return pickle.dumps(keyed, protocol)

    return write_again


def batch(number: int, classes: int = 10, key: str = "labels", seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        "batch_label": "training batch 1 of 5",
        key: rng.integers(0, classes, number).tolist(),
        "data": rng.integers(0, 256, (number, 3072), dtype=np.uint8),
        "filenames": [f"leptodactylus_pentadactylus_s_{i:06d}.png" for i in range(number)],
    }


NAMES10 = ["airplane", "automobile", "bird", "cat", "deer"]
NAMES10 += ["dog", "frog", "horse", "ship", "truck"]
NAMES100 = [f"class_{number}" for number in range(100)]


def cifar10_files(
    dump: Callable[[dict[str, Any]], bytes] = python2, number: int = 4
) -> dict[str, bytes]:
    layout = CIFAR["cifar10"]
    names = (*layout.train, layout.test)
    files = {name: dump(batch(number, seed=seed)) for seed, name in enumerate(names)}
    meta = {"num_cases_per_batch": 10000, "label_names": NAMES10, "num_vis": 3072}
    return {**files, "batches.meta": dump(meta)}


def cifar100_files(dump: Callable[[dict[str, Any]], bytes] = python2) -> dict[str, bytes]:
    coarse = {"coarse_labels": [0] * 6}
    return {
        "train": dump({**batch(6, 100, "fine_labels", seed=0), **coarse}),
        "test": dump({**batch(6, 100, "fine_labels", seed=1), **coarse}),
        "meta": dump({"fine_label_names": NAMES100, "coarse_label_names": NAMES10}),
    }


@pytest.mark.parametrize("folder", [".", "cifar-10-batches-py"])
def test_cifar10_as_published(tmp_path: Path, folder: str) -> None:
    write(tmp_path / folder, cifar10_files(number=300))  # more than 255 memos: long ones too
    data = load("cifar10", tmp_path)
    assert_sound(data)
    assert data.train_x.shape == (1500, 32, 32, 3)
    assert data.test_x.shape == (300, 32, 32, 3)
    assert data.classes == tuple(NAMES10)
    last = batch(300, seed=4)
    assert data.train_y[-300:].tolist() == last["labels"]
    expected = last["data"].reshape(300, 3, 32, 32).transpose(0, 2, 3, 1)
    np.testing.assert_array_equal(data.train_x[-300:], expected)


@pytest.mark.parametrize("folder", [".", "cifar-100-python"])
def test_cifar100_as_published(tmp_path: Path, folder: str) -> None:
    write(tmp_path / folder, cifar100_files())
    data = load("cifar100", tmp_path)
    assert_sound(data)
    assert data.train_y.tolist() == batch(6, 100, "fine_labels")["fine_labels"]
    assert data.classes == tuple(NAMES100)


@pytest.mark.parametrize("protocol", [2, 3, 4])
@pytest.mark.parametrize("encode", [False, True])
def test_cifar10_written_again_by_python_3(tmp_path: Path, protocol: int, encode: bool) -> None:
    write(tmp_path / "old", cifar10_files())
    write(tmp_path / "new", cifar10_files(python3(protocol, encode)))
    old, new = load("cifar10", tmp_path / "old"), load("cifar10", tmp_path / "new")
    np.testing.assert_array_equal(old.train_x, new.train_x)
    np.testing.assert_array_equal(old.train_y, new.train_y)
    assert old.classes == new.classes


def test_the_test_files_are_what_pickle_reads() -> None:
    """The imitation of Python 2 above is a pickle, by the judgement of `pickle` itself."""
    entries = batch(300)
    read = pickle.loads(python2(entries), encoding="latin1")
    assert read["labels"] == entries["labels"]
    np.testing.assert_array_equal(read["data"], entries["data"])


def tar_gz(files: dict[str, bytes], folder: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def test_cifar10_in_its_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = tar_gz({**cifar10_files(), "readme.html": b"hello"}, "cifar-10-batches-py")
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(content)
    with pytest.raises(UserError, match="not the published archive"):
        load("cifar10", tmp_path)
    sha256 = hashlib.sha256(content).hexdigest()
    layout = dataclasses.replace(CIFAR["cifar10"], sha256=sha256)
    monkeypatch.setitem(CIFAR, "cifar10", layout)
    assert_sound(load("cifar10", tmp_path))


def test_cifar_that_is_not_there_says_how_to_fetch_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cifar-100-python.*fetch\.py cifar100"):
        load("cifar100", tmp_path)
    write(tmp_path, cifar10_files())
    (tmp_path / "data_batch_3").unlink()
    with pytest.raises(UserError, match=r"data_batch_3 is missing.*fetch\.py cifar10"):
        load("cifar10", tmp_path)


class Call:
    """Pickles as a call of a function, which an ordinary reader of pickles would make."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.function, self.arguments


def with_opcodes(opcodes: bytes) -> bytes:
    """A batch whose data are whatever `opcodes` leave on the stack."""
    labels = b"U\x06labels](K\x00K\x01e"
    return b"\x80\x02}(" + labels + b"U\x04data" + opcodes + b"u."


RECONSTRUCT = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
DTYPE = b"cnumpy\ndtype\nU\x02%sK\x00K\x01\x87R"
TWO_ROWS = b"T" + struct.pack("<I", 6144) + bytes(6144)


def array_state(
    shape: bytes = b"K\x02M\x00\x0c\x86",
    dtype: bytes = DTYPE % b"u1",
    order: bytes = b"\x89",
    content: bytes = TWO_ROWS,
) -> bytes:
    return with_opcodes(RECONSTRUCT + b"(K\x01" + shape + dtype + order + content + b"tb")


HOSTILE: dict[str, bytes] = {
    "os.system": pickle.dumps({"data": Call(os.system, "touch hacked")}),
    "os.system, protocol 2": pickle.dumps({"data": Call(os.system, "touch hacked")}, 2),
    "os.system, protocol 0": pickle.dumps({"data": Call(os.system, "touch hacked")}, 0),
    "eval": pickle.dumps({"data": Call(eval, "open('hacked', 'w')")}),
    "eval as a key": b"\x80\x02}(cbuiltins\neval\nU\x01x\x85RK\x01u.",
    "getattr": pickle.dumps({"data": Call(getattr, "", "format")}),
    "numpy.load": b"\x80\x02cnumpy\nload\nU\x06hacked\x85R.",
    "a dotted name": b"\x80\x04\x8c\x05numpy\x8c\x0bndarray.tobytes\x93.",
    "stack global of a tuple": b"\x80\x04)\x8c\x07ndarray\x93.",
    "instance": b"(ios\nsystem\n.",
    "object": b"\x80\x02(cos\nsystem\no.",
    "new object": b"\x80\x02cnumpy\nndarray\n(J\xff\xff\xff\x7ft\x81.",
    "extension": b"\x80\x02\x82\x01.",
    "persistent": b"Pname\n.",
    "array called with a huge shape": with_opcodes(b"cnumpy\nndarray\nJ\xff\xff\xff\x7f\x85R"),
    "array state that is not a tuple": with_opcodes(RECONSTRUCT + b"}b"),
    "array state too short": with_opcodes(RECONSTRUCT + b"K\x01\x85b"),
    "array without a state": with_opcodes(RECONSTRUCT),
    "array of objects": array_state(dtype=DTYPE % b"O8"),
    "array of floats": array_state(dtype=DTYPE % b"f8"),
    "array of NaN": array_state(
        dtype=DTYPE % b"f4", content=b"T\x00\x60\x00\x00" + b"\xff" * 24576
    ),
    "array in columns": array_state(order=b"\x88"),
    "array dtype that is none": array_state(dtype=b"N"),
    "array dtype that is an array": array_state(dtype=RECONSTRUCT),
    "array content that is a list": array_state(content=b"]"),
    "array content outside Latin-1": array_state(content=b"X\x02\x00\x00\x00\xc4\x80"),
    "array content too short": array_state(
        content=TWO_ROWS[:3000].replace(b"\x00\x18", b"\xb3\x0b")
    ),
    "array of one dimension": array_state(shape=b"M\x00\x18\x85"),
    "array of negative length": array_state(shape=b"J\xfe\xff\xff\xffM\x00\x0c\x86"),
    "array of another width": array_state(shape=b"M\x00\x04K\x06\x86"),
    "array longer than its content": array_state(shape=b"K\x03M\x00\x0c\x86"),
    "three images, two labels": array_state(
        shape=b"K\x03M\x00\x0c\x86", content=b"T" + struct.pack("<I", 9216) + bytes(9216)
    ),
    "state for a list": with_opcodes(b"]K\x01\x85b"),
    "state for a name": b"\x80\x02cnumpy\nndarray\n}U\x08__init__K\x01sb.",
    "call of a list": b"\x80\x02]K\x01\x85R.",
    "key that is a tuple": b"\x80\x02}(K\x01\x85K\x01u.",
    "key that is a list": b"\x80\x02}(]K\x01u.",
    "key that is long": b"\x80\x02}(U\xff" + bytes(255) + b"K\x01u.",
    "key without a value": b"\x80\x02}(U\x01au.",
    "no dictionary": b"\x80\x02].",
    "nothing": b"\x80\x02.",
    "empty": b"",
    "text": b"<html>not found</html>",
    "zeros": bytes(100),
    "gzip": gzip.compress(python2(batch(2))),
    "trailing garbage": python2(batch(4)) + b"x",
    "trailing pickle": python2(batch(4)) * 2,
    "no end": python2(batch(4))[:-1],
    "no labels": python2({"data": batch(2)["data"]}),
    "no data": python2({"labels": [0, 1]}),
    "data that are text": python2({"labels": [0], "data": "a" * 3072}),
    "label too large": python2({**batch(2), "labels": [0, 10]}),
    "label negative": pickle.dumps({**batch(2), "labels": [0, -1]}, 2),
    "label true": pickle.dumps({**batch(2), "labels": [0, True]}, 2),
    "label text": pickle.dumps({**batch(2), "labels": [0, "1"]}, 2),
    "label NaN": pickle.dumps({**batch(2), "labels": [0, float("nan")]}, 2),
    "labels an array": pickle.dumps({**batch(2), "labels": np.arange(2, dtype=np.uint8)}, 2),
    "too few labels": python2({**batch(3), "labels": [0, 1]}),
    "no images": pickle.dumps({"labels": [], "data": np.empty((0, 3072), np.uint8)}, 2),
    "signed bytes": pickle.dumps({"labels": [0], "data": np.zeros((1, 3072), np.int8)}, 2),
    "protocol 5": pickle.dumps({"labels": [0], "data": np.zeros((1, 3072), np.uint8)}, 5),
    "list in itself": b"\x80\x02]q\x01h\x01a.",
    "dictionary in itself": b"\x80\x02}q\x01U\x04datah\x01s.",
    "deep list": b"\x80\x02" + b"]" * 300_000 + b"a" * 299_999 + b".",
    "deep tuple": b"\x80\x02N" + b"\x85" * 300_000 + b".",
    "a tuple of 2^200 leaves as a key": b"\x80\x02}N" + b"q\x01h\x01\x86" * 200 + b"K\x01s.",
    "a tuple of 2^200 leaves as data": with_opcodes(b"N" + b"q\x01h\x01\x86" * 200),
    "memo index of four billion": b"\x80\x02]r\xff\xff\xff\xff.",
    "memo that was never put": b"\x80\x02h\x07.",
    "mark that was never set": b"\x80\x02K\x01t.",
    "more opcodes than any batch": b"\x80\x02]" + b"N" * 1_100_000 + b".",
    "text of four billion bytes": b"\x80\x02T\xff\xff\xff\x7f" + bytes(100),
    "bytes of 2^60 bytes": b"\x80\x04\x8e" + struct.pack("<Q", 2**60) + bytes(100),
    "number of a million digits": b"\x80\x02I" + b"9" * 1_000_000 + b"\n.",
    "copies of a long text": b"\x80\x02(c_codecs\nencode\nq\x01X\x00\x00\x10\x00"
    + b"a" * 2**20
    + b"\x85q\x02"
    + b"h\x01h\x02R" * 300_000
    + b"t.",
}


@pytest.mark.slow
@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "data", {**cifar10_files(), "data_batch_2": HOSTILE[case]})
    with pytest.raises(UserError, match=r"data_batch_2 .*fetch\.py cifar10") as caught:
        load("cifar10", tmp_path / "data")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300 + 2 * len(str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["data"]  # nothing ran


BAD_META: dict[str, Any] = {
    "too few names": ["cat", "dog"],
    "an empty name": [*NAMES10[:9], ""],
    "a name of two lines": [*NAMES10[:9], "cat\ndog"],
    "numbers": list(range(10)),
}


@pytest.mark.parametrize("case", BAD_META)
def test_class_names_that_are_none(tmp_path: Path, case: str) -> None:
    meta = python2({"label_names": BAD_META[case]})
    write(tmp_path, {**cifar10_files(), "batches.meta": meta})
    with pytest.raises(UserError, match=r"batches\.meta"):
        load("cifar10", tmp_path)


def test_a_file_far_too_large_is_not_read(tmp_path: Path) -> None:
    write(tmp_path, cifar10_files())
    with (tmp_path / "data_batch_1").open("wb") as file:
        file.truncate(2**33)  # a hole: it takes no room on the disk
    with pytest.raises(UserError, match="larger than"):
        load("cifar10", tmp_path)


# --- damage at random ---------------------------------------------------------------------------


def assert_sound_or_user_error(name: str, folder: Path) -> bool:
    """Any other exception fails the test; True if the damage was noticed."""
    try:
        assert_sound(load(name, folder))
    except UserError:
        return True
    return False


@pytest.mark.parametrize("gzipped", [False, True])
def test_every_cut_of_an_idx_file_is_noticed(tmp_path: Path, gzipped: bool) -> None:
    write(tmp_path, mnist_files())
    whole = idx(np.zeros((7, 28, 28))) if not gzipped else gzip.compress(IMAGES)
    step = 1 if gzipped else 61
    for length in [*range(20), *range(20, len(whole), step)]:
        (tmp_path / "train-images-idx3-ubyte").write_bytes(whole[:length])
        assert assert_sound_or_user_error("mnist", tmp_path), length


@pytest.mark.slow
@pytest.mark.parametrize("dump", [python2, python3(2, True), python3(4, False)])
def test_every_cut_of_a_batch_is_noticed(
    tmp_path: Path, dump: Callable[[dict[str, Any]], bytes]
) -> None:
    write(tmp_path, cifar10_files())
    whole = dump(batch(2))
    for length in [
        *range(150),
        *range(150, len(whole) - 150, 97),
        *range(len(whole) - 150, len(whole)),
    ]:
        (tmp_path / "data_batch_1").write_bytes(whole[:length])
        assert assert_sound_or_user_error("cifar10", tmp_path), length


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_random_damage_never_ends_in_another_exception(tmp_path: Path, seed: int) -> None:
    """Bytes changed, removed, doubled and moved, mostly where the structure is."""
    rng = np.random.default_rng(seed)
    sources = {
        ("mnist", "train-images-idx3-ubyte"): gzip.compress(IMAGES),
        ("mnist", "train-labels-idx1-ubyte"): mnist_files()["train-labels-idx1-ubyte"],
        ("cifar10", "data_batch_1"): python2(batch(1)),
        ("cifar10", "test_batch"): pickle.dumps(batch(1), [2, 3, 4, 4][seed]),
        ("cifar10", "batches.meta"): cifar10_files()["batches.meta"],
        ("cifar100", "meta"): cifar100_files()["meta"],
    }
    for (name, file), whole in sources.items():
        folder = tmp_path / name / file
        good = {"mnist": mnist_files, "cifar10": cifar10_files, "cifar100": cifar100_files}[name]()
        write(folder, good)
        noticed = 0
        for _ in range(60):
            (folder / file).write_bytes(damaged(whole, rng))
            noticed += assert_sound_or_user_error(name, folder)
        assert noticed > 0


def damaged(whole: bytes, rng: np.random.Generator) -> bytes:
    content = bytearray(whole)
    for _ in range(rng.integers(1, 4)):
        head, tail = (
            rng.integers(0, min(len(content), 200)),
            rng.integers(1, min(len(content), 200)),
        )
        place = int(head if rng.random() < 0.7 else len(content) - tail)
        kind = rng.integers(4)
        if kind == 0:
            content[place] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            content[place] = int(rng.integers(256))
        elif kind == 2:
            del content[place : place + int(rng.integers(1, 9))]
        else:
            content[place:place] = content[place : place + int(rng.integers(1, 9))]
    return bytes(content)


def test_no_opcode_that_calls_is_admitted() -> None:
    calling = {"INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4", "PERSID", "BINPERSID"}
    assert not calling & set(pickles.ACTIONS)
    assert len(pickles.OPCODES) == len(pickles.ACTIONS)  # each is an opcode of pickle's


# -- what a data set is given ----------------------------------------------------------------------

TRAIN, TEST, WIDTH = 12, 8, 16


def parts(**changes: Any) -> dict[str, Any]:
    """The arguments of a sound data set, some of them changed."""
    rng = np.random.default_rng(0)
    sound = {
        "name": "mine",
        "train_x": rng.integers(0, 256, (TRAIN, WIDTH, WIDTH, 3), np.uint8),
        "train_y": rng.integers(0, 4, TRAIN),
        "test_x": rng.integers(0, 256, (TEST, WIDTH, WIDTH, 3), np.uint8),
        "test_y": rng.integers(0, 4, TEST),
        "classes": ("a", "b", "c", "d"),
        "mean": (0.5,) * 3,
        "std": (0.25,) * 3,
    }
    return {k: changes[k](v) if k in changes else v for k, v in sound.items()}


def test_sound_data_are_taken_as_they_are() -> None:
    for labels in (np.uint8, np.int32, np.int64):
        given = parts(train_y=lambda y, kind=labels: y.astype(kind))
        data = Dataset(**given)
        assert all(getattr(data, name) is value for name, value in given.items())
    Dataset(**parts(classes=list))
    grey = {"mean": lambda m: m[:1], "std": lambda s: s[:1]}
    images = {f"{part}_x": lambda x: x[..., :1] for part in ("train", "test")}
    Dataset(**parts(**images, **grey))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_x": lambda x: x / 255}, r"train_x holds float64: .*\(255 \* train_x\)\.round"),
        ({"train_x": lambda x: x * 1.0}, r"train_x holds float64: .* between 0 and 255$"),
        ({"test_x": lambda x: x.astype(np.int64)}, "test_x holds int64: pixels are uint8"),
        ({"train_x": lambda x: x.tolist()}, "train_x must be a NumPy array of uint8, not list"),
        ({"train_x": lambda x: x[..., 0]}, r"without channels: write train_x\[\.\.\., np\.newaxis"),
        ({"train_x": lambda x: x.reshape(TRAIN, -1)}, r"images are \(N, H, W, C\)"),
        ({"train_x": lambda x: x.transpose(0, 3, 1, 2)}, r"channels come last, train_x\.transpose"),
        ({"test_x": lambda x: x[:, 1:].transpose(0, 3, 1, 2)}, r"looks like \(N, C, H, W\)"),
        ({"test_x": lambda x: x[..., :2]}, "test_x has 2 channels, .* mean has 3 entries"),
        ({"test_x": lambda x: x[:, :8]}, r"train with are \(16, 16, 3\), .*\(8, 16, 3\)"),
        ({"train_x": lambda x: x[:0]}, "train_x holds no images"),
        ({"test_x": lambda x: x[:0]}, "test_x holds no images"),
        ({"train_y": lambda y: np.eye(4, dtype=int)[y]}, r"one-hot: .*train_y\.argmax\(axis=1\)"),
        ({"train_y": lambda y: y[:, None]}, r"train_y has shape \(12, 1\): labels are \(N,\)"),
        ({"train_y": lambda y: y * 1.0}, "train_y holds float64: labels are integers"),
        ({"train_y": list}, "train_y must be a NumPy array of integers, not list"),
        ({"train_y": lambda y: y[:-1]}, "train_y has 11 labels for 12 images"),
        ({"test_y": lambda y: y + 1}, "test_y holds 4: 4 classes are numbered from 0 to 3"),
        ({"test_y": lambda y: y - 1}, "test_y holds -1: 4 classes are numbered from 0 to 3"),
        ({"classes": len}, "classes are the names of the classes, a tuple, not 4"),
        ({"mean": lambda m: 0.5}, "mean and std are tuples with a number for each channel"),
        ({"std": lambda s: s[:2]}, "std needs a positive number for each of the 3 channels"),
        ({"std": lambda s: (0.25, 0.0, 0.25)}, "take 1 for a channel that never changes"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_cause(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        Dataset(**parts(**changes))
    assert "\n" not in str(caught.value)


def test_statistics_of_images_with_channels_first_do_not_hide_them() -> None:
    """The mean has as many entries as a row has pixels then."""
    changes = {f"{part}_x": lambda x: x.transpose(0, 3, 1, 2) for part in ("train", "test")}
    statistics = {"mean": lambda m: (0.5,) * WIDTH, "std": lambda s: (0.25,) * WIDTH}
    with pytest.raises(UserError, match=r"looks like \(N, C, H, W\)"):
        Dataset(**parts(**changes, **statistics))


def test_images_in_floats_are_not_normalised_again() -> None:
    data = Dataset(**parts())
    with pytest.raises(UserError, match=r"images holds float64: .*\(255 \* images\)"):
        normalise(data.train_x / 255, data, np.float32)
