"""The random crop and flip."""

import numpy as np
import pytest

from minihyperflows.data.augment import crop, crop_and_flip, flip


def images(n, height=6, width=5, channels=3, dtype=np.uint8):
    """Images in which every pixel is nonzero and different from the others of its image."""
    x = np.arange(1, n * height * width * channels + 1, dtype=np.int64) % 250 + 1
    return x.reshape(n, height, width, channels).astype(dtype)


def simple_crop_and_flip(x, rng, pad):
    """The definition, one image after the other."""
    top, left = rng.integers(0, 2 * pad + 1, (2, len(x)))
    flipped = rng.random(len(x)) < 0.5
    result = []
    for image, t, le, mirror in zip(x, top, left, flipped, strict=True):
        padded = np.pad(image, ((pad, pad), (pad, pad), (0, 0)))
        cut = padded[t : t + image.shape[0], le : le + image.shape[1]]
        result.append(cut[:, ::-1] if mirror else cut)
    return np.stack(result)


@pytest.mark.parametrize(("height", "width", "channels", "pad"), [(6, 5, 3, 4), (4, 7, 1, 2)])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_it_is_its_definition(height, width, channels, pad, dtype):
    x = images(50, height, width, channels, dtype)
    before = x.copy()
    found = crop_and_flip(x, np.random.default_rng(3), pad)
    expected = simple_crop_and_flip(x, np.random.default_rng(3), pad)
    np.testing.assert_array_equal(found, expected)
    assert found.dtype == dtype
    np.testing.assert_array_equal(x, before)


def test_by_default_every_image_is_a_crop_of_the_image_with_four_black_pixels_around():
    """Each of the 81 crops and each flip of it comes up, about equally often."""
    pad, n = 4, 20_000
    x = np.broadcast_to(images(1), (n, 6, 5, 3))
    padded = np.pad(x[0], ((pad, pad), (pad, pad), (0, 0)))
    crops = [padded[t : t + 6, le : le + 5] for t in range(9) for le in range(9)]
    known = {}
    for i, cut in enumerate(crops):
        known[cut.tobytes()] = (i, 0)
        known[cut[:, ::-1].tobytes()] = (i, 1)
    assert len(known) == 162
    counts = np.zeros((81, 2))
    for image in crop_and_flip(x, np.random.default_rng(0)):
        counts[known[image.tobytes()]] += 1
    mean = n / 162  # 123; four standard deviations are 44
    assert abs(counts - mean).max() < 5 * mean**0.5
    assert counts[:, 1].sum() / n == pytest.approx(0.5, abs=0.015)


def test_the_generator_decides():
    x, rng = images(40), np.random.default_rng(5)
    one, other = crop_and_flip(x, np.random.default_rng(5)), crop_and_flip(x, rng)
    np.testing.assert_array_equal(one, other)
    assert (crop_and_flip(x, rng) != one).any()


def test_the_parts():
    x = images(3)
    top, left = np.array([0, 1, 2]), np.array([2, 1, 1])
    cut = crop(x, top, left, pad=1)
    np.testing.assert_array_equal(cut[1], x[1])  # in the middle: the image itself
    np.testing.assert_array_equal(cut[0, 1:, :-1], x[0, :-1, 1:])
    assert not cut[0, 0].any()
    assert not cut[0, :, -1].any()
    y = x.copy()
    flip(y, np.array([True, False, True]))
    np.testing.assert_array_equal(y[::2], x[::2, :, ::-1])
    np.testing.assert_array_equal(y[1], x[1])


def test_no_images_are_no_problem():
    assert crop_and_flip(images(0), np.random.default_rng(0)).shape == (0, 6, 5, 3)
