"""Batches made on the GPU: Philox's published numbers, and equality with the simple versions."""

from __future__ import annotations

import re

import numpy as np
import pytest

from minihyperflows.data.augment import crop, flip
from minihyperflows.data.gpu.batches import (
    SOURCE,
    DeviceData,
    advance,
    batch_in_numpy,
    device_data,
    load_batch,
    random_crops,
)
from minihyperflows.data.philox import KEY_STEPS, MULTIPLIERS, ROUNDS, below, philox4x32
from minihyperflows.engine.backend import cupy, to_device, to_numpy
from minihyperflows.engine.errors import ShapeError
from minihyperflows.lab import Dataset, normalise

# -- Philox ----------------------------------------------------------------------------------------

# Random123's known answers (tests/kat_vectors): counter, key, numbers.
KNOWN = [
    (4 * "00000000 ", 2 * "00000000 ", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    (4 * "ffffffff ", 2 * "ffffffff ", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (
        "243f6a88 85a308d3 13198a2e 03707344",
        "a4093822 299f31d0",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


def words(text: str) -> np.ndarray:
    return np.array([int(word, 16) for word in text.split()], np.uint32)


@pytest.mark.parametrize(("counter", "key", "numbers"), KNOWN)
def test_philox_gives_the_published_numbers(counter: str, key: str, numbers: str) -> None:
    np.testing.assert_array_equal(philox4x32(words(counter), words(key)), words(numbers))


def test_philox_takes_many_counters() -> None:
    key = words(KNOWN[2][1])
    counters = np.stack([words(KNOWN[2][0]), words(KNOWN[0][0])])
    numbers = philox4x32(counters, key)
    assert numbers.dtype == np.uint32
    np.testing.assert_array_equal(numbers[0], words(KNOWN[2][2]))
    np.testing.assert_array_equal(numbers[1], philox4x32(counters[1], key))


@pytest.mark.slow
@pytest.mark.parametrize(("counter", "key", "numbers"), KNOWN)
def test_philox_of_the_kernels(gpu, counter: str, key: str, numbers: str) -> None:
    text = """
    #include "common.cuh"
    #include "philox.cuh"
    __global__ void random_words(const unsigned* counter, const unsigned* key, unsigned* numbers) {
        RandomWords words;
        for (int i = 0; i < 4; ++i) words.word[i] = counter[i];
        words = philox4x32(words, key[0], key[1]);
        for (int i = 0; i < 4; ++i) numbers[i] = words.word[i];
    }"""
    options = SOURCE.options()
    module = cupy().RawModule(code=text, options=options, name_expressions=("random_words",))
    found = cupy().empty(4, np.uint32)
    arrays = (to_device(words(counter), "cuda"), to_device(words(key), "cuda"), found)
    module.get_function("random_words")((1,), (1,), arrays)
    np.testing.assert_array_equal(to_numpy(found), words(numbers))


def test_both_philox_have_the_same_constants() -> None:
    text = (SOURCE.folder() / "philox.cuh").read_text(encoding="utf-8")
    constants = {int(c, 16) for c in re.findall(r"0x[0-9A-F]{8}", text)}
    assert constants == {*MULTIPLIERS, *KEY_STEPS}
    assert f"round < {ROUNDS};" in text


def test_below_is_even_over_all_words() -> None:
    """The first word that gives k is the least with 9 word >= k 2^32."""
    starts = [-(-(k << 32) // 9) for k in range(10)]
    first = below(np.array(starts[:9], np.uint32), 9)
    last = below(np.array([s - 1 for s in starts[1:]], np.uint32), 9)
    assert first.tolist() == last.tolist() == list(range(9))
    counts = np.diff(starts)
    assert sorted(counts.tolist()) == [477_218_588] * 5 + [477_218_589] * 4


# -- batches ---------------------------------------------------------------------------------------

SHAPES = [(32, 32, 3), (8, 8, 1), (7, 5, 3), (1, 1, 1), (5, 9, 2), (4, 16, 5)]
KEY = np.array([7, 3], np.uint32)


def make(rng: np.random.Generator, shape: tuple[int, ...], n: int = 21) -> Dataset:
    images = rng.integers(0, 256, (n, *shape), np.uint8)
    labels = rng.integers(0, 10, n)
    mean, std = rng.uniform(0.4, 0.5, shape[-1]), rng.uniform(0.2, 0.3, shape[-1])
    classes = tuple("0123456789")
    return Dataset("made", images, labels, images, labels, classes, tuple(mean), tuple(std))


def on_gpu(data: Dataset) -> DeviceData:
    return device_data(data.train_x, data.train_y, data.mean, data.std)


def load(data, position, order, batch, dtype="float32", augment=True, key=KEY, pad=4):
    """A batch as NumPy arrays, loaded into arrays full of something else."""
    x = to_device(np.full((batch, *data.images.shape[1:]), 7, dtype), "cuda")
    labels = to_device(np.full(batch, 77, np.int32), "cuda")
    start, order, key = (
        to_device(a, "cuda") for a in (np.array([position]), order.astype(np.int32), key)
    )
    load_batch(data, start, order, key, x, labels, augment, pad)
    return to_numpy(x), to_numpy(labels)


def by_definition(data: Dataset, places, order, augment=True, key=KEY, pad=4):
    mean, std = np.float32(data.mean), np.float32(data.std)
    arguments = (data.train_x, data.train_y, places, order, key, mean, std, augment, pad)
    return batch_in_numpy(*arguments)


@pytest.mark.slow
@pytest.mark.parametrize("augment", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_batch_is_its_definition(gpu, rng, shape, dtype, augment: bool) -> None:
    """To the last bit in float32: one rounding for each operation; float16 is its rounding."""
    data, order = make(rng, shape), rng.permutation(21)
    x, labels = load(on_gpu(data), 6, order, 9, dtype, augment)
    expected, expected_labels = by_definition(data, np.arange(6, 15), order, augment)
    np.testing.assert_array_equal(x, expected.astype(dtype))
    np.testing.assert_array_equal(labels, expected_labels)


@pytest.mark.parametrize("pad", [0, 1, 9])
def test_any_padding(gpu, rng, pad: int) -> None:
    data, order = make(rng, (6, 4, 3)), rng.permutation(21)
    x, _ = load(on_gpu(data), 0, order, 21, pad=pad)
    np.testing.assert_array_equal(x, by_definition(data, np.arange(21), order, pad=pad)[0])


@pytest.mark.parametrize("shape", SHAPES)
def test_the_definition_is_that_of_the_cpu(rng, shape) -> None:
    """crop, flip and normalise of the lab, with Philox's numbers instead of the Generator's."""
    data, order, places = make(rng, shape), rng.permutation(21), np.arange(3, 14)
    top, left, flipped = map(np.array, zip(*random_crops(places, KEY, 4), strict=True))
    images = crop(data.train_x[order[places]], top, left, 4)
    flip(images, flipped)
    x, labels = by_definition(data, places, order)
    np.testing.assert_array_equal(x, normalise(images, data, np.float32))
    np.testing.assert_array_equal(labels, data.train_y[order[places]])


def test_without_augmentation_it_is_normalise(gpu, rng) -> None:
    data = make(rng, (8, 8, 3))
    x, labels = load(on_gpu(data), 0, np.arange(21), 21, augment=False)
    np.testing.assert_array_equal(x, normalise(data.train_x, data, np.float32))
    np.testing.assert_array_equal(labels, data.train_y)


def test_the_size_of_a_batch_changes_nothing(gpu, rng) -> None:
    data, order = make(rng, (7, 6, 3)), rng.permutation(21)
    device = on_gpu(data)
    whole, labels = load(device, 0, order, 21)
    for batch in (1, 4, 8):  # the last one of 8 is partial
        starts = range(0, 21, batch)
        parts = [load(device, s, order, min(batch, 21 - s)) for s in starts]
        np.testing.assert_array_equal(np.concatenate([x for x, _ in parts]), whole)
        np.testing.assert_array_equal(np.concatenate([y for _, y in parts]), labels)


def test_places_past_the_end_are_marked(gpu, rng) -> None:
    data, order = make(rng, (5, 5, 3)), rng.permutation(21)
    x, labels = load(on_gpu(data), 16, order, 8)
    np.testing.assert_array_equal(x[:5], by_definition(data, np.arange(16, 21), order)[0])
    assert (x[5:] == 0).all()
    assert (labels[5:] == -1).all()


def test_the_order_may_be_shorter_than_the_data(gpu, rng) -> None:
    data, order = make(rng, (5, 5, 1)), np.array([20, 3, 3, 0])
    x, labels = load(on_gpu(data), 1, order, 3)
    np.testing.assert_array_equal(x, by_definition(data, np.arange(1, 4), order)[0])
    np.testing.assert_array_equal(labels, data.train_y[order[1:]])


def test_keys_and_places_change_the_crops(gpu, rng) -> None:
    data, order = make(rng, (9, 9, 1)), np.full(21, 5)  # the same image again and again
    device = on_gpu(data)
    first, _ = load(device, 0, order, 20)
    for key in ([8, 3], [7, 4]):
        other, _ = load(device, 0, order, 20, key=np.array(key, np.uint32))
        assert (first != other).any(axis=(1, 2, 3)).mean() > 0.8
    assert len({image.tobytes() for image in first}) > 15


def test_crops_and_flips_are_even_over_an_epoch() -> None:
    """Chi-square over the 9 x 9 x 2 combinations: 161 degrees of freedom, within 4 deviations."""
    n = 50_000
    top, left, flipped = map(np.array, zip(*random_crops(np.arange(n), KEY, 4), strict=True))
    counts = np.bincount((top * 9 + left) * 2 + flipped, minlength=162)
    expected = n / 162
    chi_square = ((counts - expected) ** 2).sum() / expected
    assert len(counts) == 162
    assert abs(chi_square - 161) < 4 * np.sqrt(2 * 161)


def test_neighbouring_places_and_epochs_are_unrelated() -> None:
    places = np.arange(20_000)
    crops = np.array(random_crops(places, KEY, 4), float)
    next_epoch = np.array(random_crops(places, KEY + np.uint32([0, 1]), 4), float)
    for a, b in [(crops[1:], crops[:-1]), (crops, next_epoch)]:
        for i in range(3):
            for j in range(3):
                assert abs(np.corrcoef(a[:, i], b[:, j])[0, 1]) < 5 / np.sqrt(len(places))


def test_large_places_use_both_words() -> None:
    """As in the kernel: place mod 2^32 and place div 2^32."""
    place = 5 * 2**32 + 11
    top, left, flipped = random_crops(np.array([place]), KEY, 4)[0]
    random = philox4x32(np.array([11, 5, 0, 0], np.uint32), KEY)
    assert (top, left) == tuple(below(random[:2], 9).tolist())
    assert flipped == (random[2] >= 2**31)


def test_a_captured_batch_reads_what_is_new(gpu, rng) -> None:
    """Replays load the next batch each time, of a new order and key too."""
    data, order = make(rng, (6, 6, 3)), rng.permutation(21)
    device, xp = on_gpu(data), cupy()
    x, labels = xp.zeros((7, 6, 6, 3), np.float32), xp.zeros(7, np.int32)
    position, order_there, key_there = (
        to_device(a, "cuda") for a in (np.zeros(1, np.int64), order.astype(np.int32), KEY.copy())
    )

    def step() -> None:
        load_batch(device, position, order_there, key_there, x, labels, augment=True)
        advance(position, 7)

    step()  # compiles
    position.fill(0)
    stream = xp.cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        step()
        graph = stream.end_capture()
    for key in (KEY, np.array([1, 2], np.uint32)):
        key_there[...] = to_device(key, "cuda")
        position.fill(0)
        for start in (0, 7, 14):
            xp.cuda.Device().synchronize()
            graph.launch(stream)
            stream.synchronize()
            expected = by_definition(data, np.arange(start, start + 7), order, key=key)
            np.testing.assert_array_equal(to_numpy(x), expected[0])
            np.testing.assert_array_equal(to_numpy(labels), expected[1])
        assert position.item() == 21
        order = rng.permutation(21)
        order_there[...] = to_device(order.astype(np.int32), "cuda")


def test_an_empty_batch_is_nothing(gpu, rng) -> None:
    x, labels = load(on_gpu(make(rng, (4, 4, 3))), 0, np.arange(21), 0)
    assert x.shape == (0, 4, 4, 3)
    assert labels.shape == (0,)


# -- what a kernel would not notice ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "array", "error"),
    [
        ("position", np.zeros(1, np.int32), TypeError),
        ("position", np.zeros(2, np.int64), ShapeError),
        ("order", np.zeros(4, np.int64), TypeError),
        ("order", np.zeros((2, 2), np.int32), ShapeError),
        ("key", np.zeros(2, np.int32), TypeError),
        ("key", np.zeros(3, np.uint32), ShapeError),
        ("x", np.zeros((4, 5, 4, 3), np.float32), ShapeError),
        ("labels", np.zeros(4, np.int64), TypeError),
        ("labels", np.zeros(3, np.int32), ShapeError),
        ("labels", np.zeros(8, np.int32)[::2], TypeError),
        ("x", np.zeros((4, 4, 4, 6), np.float32)[..., ::2], TypeError),
        ("x", np.zeros((4, 4, 4, 3), np.float64), TypeError),
    ],
)
def test_wrong_arrays_are_refused(gpu, rng, name: str, array: np.ndarray, error: type) -> None:
    arrays = {
        "position": np.zeros(1, np.int64),
        "order": np.zeros(4, np.int32),
        "key": KEY,
        "x": np.zeros((4, 4, 4, 3), np.float32),
        "labels": np.zeros(4, np.int32),
    }
    there = {k: to_device(a, "cuda") for k, a in arrays.items()}
    if array.flags.c_contiguous:
        there[name] = to_device(array, "cuda")
    else:
        there[name] = to_device(array.base, "cuda")[..., ::2]
    with pytest.raises(error):
        load_batch(on_gpu(make(rng, (4, 4, 3))), augment=True, **there)


def test_wrong_data_is_refused(gpu, rng) -> None:
    images, labels = rng.integers(0, 256, (5, 4, 4, 3), np.uint8), np.zeros(5, int)
    for arguments in (
        (images.astype(float), labels, [0.5] * 3, [0.2] * 3),
        (images[0], labels, [0.5] * 3, [0.2] * 3),
        (images, labels[:4], [0.5] * 3, [0.2] * 3),
        (images, labels, [0.5], [0.2] * 3),
    ):
        with pytest.raises(ShapeError):
            device_data(*arguments)
