"""Data augmentation: the random crop and flip of the CIFAR experiments."""

from __future__ import annotations

import numpy as np


def crop_and_flip(images: np.ndarray, rng: np.random.Generator, pad: int = 4) -> np.ndarray:
    """Each image padded with ``pad`` black pixels, cropped at random, flipped half the time.

    Args:
        images: (N, H, W, C), before normalisation, so that padding is black.

    Returns:
        (N, H, W, C), a new array of the same dtype.
    """
    n, h, w, _ = images.shape
    padded = np.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    top, left = rng.integers(0, 2 * pad + 1, (2, n))
    flipped = np.less(rng.random(n), 0.5)
    rows = top[:, None] + np.arange(h)  # (N, H)
    columns = np.where(flipped[:, None], np.arange(w)[::-1], np.arange(w)) + left[:, None]  # (N, W)
    return padded[np.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]]
