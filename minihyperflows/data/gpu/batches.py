"""Training batches straight from a data set in GPU memory (kernels: ``augment.cu``).

The whole data set lies on the GPU as bytes, and an epoch's order too, so a training step needs
nothing from the host: a counter in GPU memory says which batch is next.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from minihyperflows.data.philox import below, philox4x32
from minihyperflows.engine.backend import Array, to_device
from minihyperflows.engine.errors import ShapeError
from minihyperflows.engine.gpu.launch import (
    Source,
    c_type,
    every_type_and_width,
    pack_width,
    takes,
)

SOURCE = Source("augment.cu", [*every_type_and_width("load_batch"), "advance"], __package__)

PAD = 4  # black pixels on each side, before the crop
THREADS = 128  # of a block: 128 packs of 8 are a third of a CIFAR image


@dataclass(frozen=True, eq=False)
class DeviceData:
    """Images with their classes, and how they are normalised, in GPU memory."""

    images: Array  # (N, H, W, C), uint8
    labels: Array  # (N,), int32
    mean: Array  # (C,), float32, of pixels divided by 255
    std: Array  # (C,), float32


def device_data(
    images: np.ndarray, labels: np.ndarray, mean: Sequence[float], std: Sequence[float]
) -> DeviceData:
    """A data set, copied to the GPU.

    Args:
        images: (N, H, W, C), uint8.
        labels: (N,), integers.
        mean, std: one a channel, of pixels divided by 255.
    """
    if images.dtype != "uint8" or images.ndim != 4 or labels.shape != images.shape[:1]:
        raise ShapeError(
            f"a data set is (N, H, W, C) bytes and (N,) labels, "
            f"not {images.dtype} {images.shape} and {labels.shape}"
        )
    if len(mean) != images.shape[-1] or len(std) != images.shape[-1]:
        raise ShapeError(f"{len(mean)} means and {len(std)} std for {images.shape[-1]} channels")
    return DeviceData(
        images=to_device(np.ascontiguousarray(images), "cuda"),
        labels=to_device(labels.astype("int32"), "cuda"),
        mean=to_device(np.asarray(mean, "float32"), "cuda"),
        std=to_device(np.asarray(std, "float32"), "cuda"),
    )


def load_batch(
    data: DeviceData,
    position: Array,
    order: Array,
    key: Array,
    x: Array,
    labels: Array,
    augment: bool,
    pad: int = PAD,
) -> None:
    """Fill ``x`` and ``labels`` with the images that stand at ``position`` in ``order``.

        x[n] = (crop(image padded with zeros) / 255 - mean) / std,  mirrored or not,

    for image order[position + n]. The crop's place and the flip are the Philox numbers of position
    + n, so they depend on the key alone, not on how the epoch is cut into batches. The formula is
    computed in float32 and rounded to ``x``'s dtype once. Can be captured: what changes from step
    to step lies in GPU memory.

    Args:
        position: int64, (1,) or (): where the batch begins; see :func:`advance`.
        order: (samples,), int32: this epoch's order of the data set's indices.
        key: (2,), uint32: the run's seed, the epoch.
        x: (B, H, W, C), float32 or float16, written.
        labels: (B,), int32, written. Places past the end of ``order`` have the label -1 and zeros
            for x.
        augment: crop and flip; else the images as they are.
        pad: zeros on each side before the crop, one of (2 pad + 1)^2.
    """
    batch, height, width, channels = _check(data, position, order, key, x, labels)
    pack = pack_width(x, width * channels)
    packs = height * width * channels // pack
    if batch == 0 or packs == 0:
        return
    SOURCE.launch(
        f"load_batch<{c_type(x)}, {pack}>",
        (batch, -(-packs // THREADS)),
        THREADS,
        *(data.images, data.labels, order, position, key, data.mean, data.std),
        *(x, labels, np.int64(order.size), height, width, channels, augment, pad),
    )


def advance(position: Array, count: int) -> None:
    """position += count, for a step that is captured."""
    _check_dtypes(position=(position, "int64"))
    SOURCE.launch("advance", 1, 1, position, count)


def batch_in_numpy(
    images: np.ndarray,
    labels: np.ndarray,
    places: np.ndarray,
    order: np.ndarray,
    key: np.ndarray,
    mean: np.ndarray,
    std: np.ndarray,
    augment: bool,
    pad: int = PAD,
) -> tuple[np.ndarray, np.ndarray]:
    """What :func:`load_batch` computes for these ``places`` in ``order``: x (float32) and labels.

    One image at a time, by the definition, on NumPy arrays.
    """
    _, height, width, _ = images.shape
    chosen = order[places]
    crops = random_crops(places, key, pad) if augment else [(pad, pad, False)] * len(places)
    x = np.empty((len(places), *images.shape[1:]), mean.dtype)
    for n, (top, left, flip) in enumerate(crops):
        padded = np.pad(images[chosen[n]], ((pad, pad), (pad, pad), (0, 0)))
        crop = padded[top : top + height, left : left + width]
        x[n] = crop[:, ::-1] if flip else crop
    return (x / mean.dtype.type(255) - mean) / std, labels[chosen]


def random_crops(places: np.ndarray, key: np.ndarray, pad: int) -> list[tuple[int, int, bool]]:
    """The crop's top and left, from 0 to 2 pad, and whether to flip, for each place of an epoch.

    The counter is (place mod 2^32, place div 2^32, 0, 0). Words 0 and 1 give top and left (see
    :func:`~minihyperflows.data.philox.below` for the bias, 2e-9 of a probability), and the first
    bit of word 2 the flip.
    """
    counter = np.zeros((len(places), 4), np.uint32)
    counter[:, 0], counter[:, 1] = places & 0xFFFFFFFF, places >> 32
    words = philox4x32(counter, key)
    top, left = (below(words[:, i], 2 * pad + 1).tolist() for i in (0, 1))
    return list(zip(top, left, (words[:, 2] >> 31 != 0).tolist(), strict=True))


def _check(
    data: DeviceData, position: Array, order: Array, key: Array, x: Array, labels: Array
) -> tuple[int, int, int, int]:
    """The shape of ``x``. Raises what a kernel, which sees addresses alone, would not notice."""
    if x.ndim != 4 or x.shape[1:] != data.images.shape[1:] or labels.shape != x.shape[:1]:
        raise ShapeError(
            f"a batch of images {data.images.shape[1:]} does not fit into "
            f"{x.shape} with labels {labels.shape}"
        )
    if position.size != 1 or key.size != 2 or order.ndim != 1:
        raise ShapeError(
            f"position {position.shape}, key {key.shape} and order {order.shape} "
            "should be (1,), (2,) and (samples,)"
        )
    if not takes(x):
        raise TypeError(f"x should be contiguous float32 or float16 on a GPU, not {x.dtype}")
    _check_dtypes(
        position=(position, "int64"),
        order=(order, "int32"),
        key=(key, "uint32"),
        labels=(labels, "int32"),
    )
    return x.shape


def _check_dtypes(**arrays: tuple[Array, str]) -> None:
    for name, (array, dtype) in arrays.items():
        if array.dtype != dtype:
            raise TypeError(f"{name} should be {dtype}, not {array.dtype}")
        if not array.flags.c_contiguous:
            raise TypeError(f"{name} should be contiguous")
