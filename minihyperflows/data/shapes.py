"""shapes32: ten kinds of drawn shapes with CIFAR's geometry, made from a seed.

Every image shows one shape of random place, size, orientation and colour before a graded
background with two blurred specks, under noise. Light shapes stand on dark ground and dark ones
on light ground equally often, so the mean brightness tells nothing about the class.

What is promised: the same (train, test, seed) gives the same bytes on every machine and with
every NumPy. All randomness is raw PCG64 output, whose stream NumPy keeps (NEP 19); the geometry
uses only elementwise +, -, *, /, sqrt, abs, min, max and floor, which IEEE 754 rounds correctly;
the few sines and cosines are rounded to twelve decimals, so a last-digit difference between
mathematics libraries cannot show. And a smaller set is the beginning of a larger one.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]  # float32 throughout
Distance = Callable[[Floats, Floats], Floats]

SIZE = 32
CHUNK = 200  # images drawn together: a multiple of ten whose arrays stay in the processor's cache
ORIENTATIONS = 64


def direction(turns: float) -> tuple[float, float]:
    """The point of the unit circle after `turns` turns, to twelve decimals."""
    angle = 2 * math.pi * turns
    return round(math.cos(angle), 12), round(math.sin(angle), 12)


# --- shapes -------------------------------------------------------------------------------------
# Each is a distance: negative inside, positive outside, in units of the shape's radius, at the
# points (u, v); v points up. Union is minimum, intersection is maximum, complement is negation.


def half_planes(u: Floats, v: Floats, sides: int) -> Floats:
    """u cos(a) + v sin(a) for `sides` directions a, the first one downwards: (sides, ...)."""
    normals = [direction(k / sides - 0.25) for k in range(sides)]
    return np.stack([u * cosine + v * sine for cosine, sine in normals])


def circle(u: Floats, v: Floats, radius: float | Floats) -> Floats:
    return np.sqrt(u * u + v * v) - radius


def box(u: Floats, v: Floats, width: float, height: float) -> Floats:
    return np.maximum(np.abs(u) - width, np.abs(v) - height)


def bands(u: Floats, period: float) -> Floats:
    """Stripes across u, as wide as the gaps between them; one is centred at u = 0."""
    phase = u / period
    return np.abs(phase - np.floor(phase + 0.5)) * period - period / 4


def disc(u: Floats, v: Floats) -> Floats:
    return circle(u, v, 0.9)


def ring(u: Floats, v: Floats) -> Floats:
    return np.abs(circle(u, v, 0.75)) - 0.2


def square(u: Floats, v: Floats) -> Floats:
    return box(u, v, 0.78, 0.78)


def triangle(u: Floats, v: Floats) -> Floats:
    return half_planes(u, v, 3).max(axis=0) - 0.55


def cross(u: Floats, v: Floats) -> Floats:
    return np.minimum(box(u, v, 0.3, 1.0), box(u, v, 1.0, 0.3))


def star(u: Floats, v: Floats) -> Floats:
    """Five points: what lies within at least four of the five half-planes of a pentagon."""
    second_largest = np.sort(half_planes(u, v, 5), axis=0)[-2]
    return second_largest - 0.34


def crescent(u: Floats, v: Floats) -> Floats:
    return np.maximum(circle(u, v, 1.0), -circle(u - 0.5, v, 0.78))


def heart(u: Floats, v: Floats) -> Floats:
    """A square standing on its corner, and a disc on each of its two upper sides."""
    u, v = np.abs(u) * 1.15, v * 1.15 + 0.15
    diamond = (u + np.abs(v) - 1) * 0.7071
    return np.minimum(diamond, circle(u - 0.5, v - 0.5, 0.7071))


def stripes(u: Floats, v: Floats) -> Floats:
    return np.maximum(circle(u, v, 1.0), bands(u, 0.62))


def checker(u: Floats, v: Floats) -> Floats:
    """Where exactly one of two crossed sets of stripes is: exclusive or, cut to a square."""
    first, second = bands(u + 0.2, 0.8), bands(v + 0.2, 0.8)
    either = np.maximum(np.minimum(first, second), -np.maximum(first, second))
    return np.maximum(box(u, v, 0.8, 0.8), either)


SHAPES: dict[str, Distance] = {
    shape.__name__: shape
    for shape in (disc, ring, square, triangle, cross, star, crescent, heart, stripes, checker)
}
CLASSES = tuple(SHAPES)


# --- one chunk of images ------------------------------------------------------------------------


def coverage(distance: Floats) -> Floats:
    """How much of a pixel a shape covers, from the distance of its centre in pixels."""
    return np.clip(0.5 - distance, 0.0, 1.0)


class Draws:
    """A table of uniform numbers in [0, 1), one row an image, read column by column."""

    COLUMNS = 29  # how many numbers draw_images reads for an image

    def __init__(self, bits: NDArray[np.uint64]) -> None:
        self._columns = iter((bits >> np.uint64(40)).T.astype(np.float32) * np.float32(2.0**-24))

    def between(self, low: float, high: float) -> Floats:
        """The next column, spread over [low, high), ready to broadcast: (n, 1, 1)."""
        return (low + (high - low) * next(self._columns))[:, None, None]

    def direction(self) -> tuple[Floats, Floats]:
        """Cosine and sine of one of 64 equally likely orientations: (n, 1, 1) each."""
        table = np.array([direction(k / ORIENTATIONS) for k in range(ORIENTATIONS)], np.float32)
        chosen = table[self.between(0, ORIENTATIONS).astype(np.int64)]
        return chosen[..., 0], chosen[..., 1]


def rgb(hue: Floats, saturation: Floats, value: Floats) -> Floats:
    """HSV in [0, 1], the hue wrapping round, to RGB in [0, 255]: (n, 1, 1) -> (n, 3, 1, 1)."""
    red, green, blue = (np.abs(6 * (hue - np.floor(hue)) - peak) for peak in (3, 2, 4))
    pure = np.clip(np.stack([red - 1, 2 - green, 2 - blue], axis=1), 0, 1)
    return 255 * value[:, None] * (1 - saturation[:, None] * (1 - pure))


def two_tones(draws: Draws) -> tuple[Floats, Floats, Floats, Floats]:
    """Two neighbouring colours for the ground and two for the shape, one pair dark, one light."""
    dark_ground = draws.between(0, 1) < 0.5
    pairs = []
    for is_dark in (dark_ground, ~dark_ground):
        hue, saturation = draws.between(0, 1), draws.between(0, 1)
        value = draws.between(0, 1)
        saturation = np.where(is_dark, 0.35 + 0.5 * saturation, 0.15 + 0.5 * saturation)
        value = np.where(is_dark, 0.10 + 0.32 * value, 0.72 + 0.28 * value)
        other_hue = hue + draws.between(-0.15, 0.15)
        other_value = value * draws.between(0.75, 1.0)
        pairs += [rgb(hue, saturation, value), rgb(other_hue, saturation, other_value)]
    return pairs[0], pairs[1], pairs[2], pairs[3]


def blend(under: Floats, over: Floats, amount: Floats) -> Floats:
    """`over` laid on `under` where amount is 1: (n, 3, 32, 32), with amount (n, 32, 32)."""
    return under + (over - under) * amount[:, None]


def draw_images(
    labels: NDArray[np.int64], bits: NDArray[np.uint64], noise: NDArray[np.uint8]
) -> NDArray[np.uint8]:
    """Images of the shapes that `labels` name: (n, 32, 32, 3) uint8.

    bits: (n, Draws.COLUMNS), the random numbers behind everything but the noise.
    noise: (2, n, 3, 32, 32), whose sum over the first axis is triangular.
    """
    draws = Draws(bits)
    x = np.arange(SIZE, dtype=np.float32) - (SIZE - 1) / 2  # (32,), to the right
    y = -x[:, None]  # (32, 1), upwards
    ground, other_ground, paint, other_paint = two_tones(draws)

    cosine, sine = draws.direction()
    image = blend(ground, other_ground, 0.5 + (x * cosine + y * sine) / 48)  # (n, 3, 32, 32)

    for _ in range(2):
        speck = rgb(draws.between(0, 1), draws.between(0.2, 0.7), draws.between(0.3, 0.8))
        right, up = x - draws.between(-14, 14), y - draws.between(-14, 14)
        blurred = 0.25 * circle(right, up, draws.between(1.5, 3.5))
        image = blend(image, speck, 0.8 * coverage(blurred))

    radius = draws.between(8.0, 12.5)
    margin = SIZE / 2 + 0.5 - radius  # how far from the middle the shape may stand
    right, up = x - margin * draws.between(-1, 1), y - margin * draws.between(-1, 1)
    cosine, sine = draws.direction()
    u, v = (right * cosine + up * sine) / radius, (up * cosine - right * sine) / radius
    distance = np.empty_like(u)  # (n, 32, 32)
    for label, shape in enumerate(SHAPES.values()):
        mine = labels == label
        distance[mine] = shape(u[mine], v[mine])
    colour = blend(paint, other_paint, np.clip(0.5 + 0.5 * v, 0, 1))
    image = blend(image, colour, coverage(distance * radius))

    amplitude = draws.between(0.02, 0.18)[:, None]
    image += amplitude * ((noise[0].astype(np.float32) + noise[1]) - 255)
    pixels = np.floor(np.clip(image, 0, 255) + 0.5).astype(np.uint8)
    return pixels.transpose(0, 2, 3, 1)  # (n, 32, 32, 3)


# --- whole sets ---------------------------------------------------------------------------------


def balanced_labels(bits: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Every class once in each ten images, in random order: (n,) from (n,), ten dividing n."""
    return np.argsort(bits.reshape(-1, len(CLASSES)), axis=1, kind="stable").reshape(-1)


def random_bytes(stream: np.random.PCG64, number: int) -> NDArray[np.uint8]:
    """`number` random bytes, a multiple of eight, in the same order on every machine."""
    return stream.random_raw(number // 8).astype("<u8").view(np.uint8)


def make_split(number: int, seed: int, split: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """`number` images (number, 32, 32, 3) uint8 and their labels (number,) int64."""
    stream = np.random.PCG64([seed, split, 0])
    noise_stream = np.random.PCG64([seed, split, 1])
    images = np.empty((number, SIZE, SIZE, 3), np.uint8)
    labels = np.empty(number, np.int64)
    for start in range(0, number, CHUNK):
        bits = stream.random_raw(CHUNK * (1 + Draws.COLUMNS)).reshape(CHUNK, -1)
        noise = random_bytes(noise_stream, 2 * CHUNK * 3 * SIZE * SIZE)
        noise = noise.reshape(2, CHUNK, 3, SIZE, SIZE)
        kept = slice(start, start + CHUNK)
        size = len(labels[kept])  # CHUNK, or fewer in the last chunk
        labels[kept] = balanced_labels(bits[:, 0])[:size]
        images[kept] = draw_images(labels[kept], bits[:size, 1:], noise[:, :size])
    return images, labels
