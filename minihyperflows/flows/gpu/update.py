"""Stepping all parameters in one launch, on flat arrays in GPU memory (chapter 14)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np

from minihyperflows.engine.backend import Array, cupy
from minihyperflows.engine.gpu.launch import C_TYPES, THREADS, Source, blocks_for, c_type

TILE = 2048  # numbers that a block of the kernel steps; parameters begin at multiples of it
NO_GATE, AS_IT_IS = -1, -2  # in the place of a layer's number


class Rule(IntEnum):
    """The optimisers that the kernel knows; NONE for presences that there are not."""

    SGD, ADAM, NONE = range(3)


# The enumerations of update.cu; a test holds them equal.
class Setting(IntEnum):
    """What the host sets, for the weights (row 0) and for the presences (row 1)."""

    LR, DECAY, MOMENTUM, SECOND_MOMENTUM, EPSILON, NESTEROV = range(6)


class PressureSetting(IntEnum):
    """What the host sets of the pressure (row 2): gamma / N, and the floor."""

    SHARE, FLOOR = range(2)


class Counter(IntEnum):
    """The integers that the steps count; see update.cu."""

    OVERFLOWED, FROZEN, WEIGHT_STEPS, PRESENCE_STEPS, GOOD_STEPS, SKIPPED = range(6)
    BATCHES, FIRST_BAD = 6, 7


SOURCE = Source(
    "update.cu",
    [
        *(f"update<{t}, {w}, {p}>" for t in C_TYPES.values() for w in (0, 1) for p in (0, 1, 2)),
        *(f"write_in_use<{t}>" for t in C_TYPES.values()),
        *("check_finite", "prepare", "finish_step", "add_mean_flux"),
    ],
    __package__,
)


def padded(size: int) -> int:
    """``size`` rounded up to whole tiles."""
    return -(-size // TILE) * TILE


@dataclass(frozen=True)
class Place:
    """Where a parameter lies in the flat arrays, and the number of its gated layer."""

    start: int
    size: int
    layer: int  # or NO_GATE, AS_IT_IS

    def view(self, flat: Array, shape: tuple[int, ...]) -> Array:
        """Its part of a flat array, in its shape."""
        return flat[self.start : self.start + self.size].reshape(shape)


def lay_out(gated: Sequence[int], weights: Sequence[int], others: Sequence[int]) -> list[Place]:
    """Places for parameters of these sizes: gated weights, weights without a gate, the others."""
    places: list[Place] = []
    start = 0
    layers = [*range(len(gated)), *[NO_GATE] * len(weights), *[AS_IT_IS] * len(others)]
    for size, layer in zip([*gated, *weights, *others], layers, strict=True):
        places.append(Place(start, size, layer))
        start += padded(size)
    return places


class FlatArrays:
    """The parameters of a network, their optimisers' state and the counters, in GPU memory.

    Attributes:
        theta, gradient: (n,) float32, all parameters and the gradients of the scaled loss.
        first, second: (n,) what the weights' optimiser keeps: velocity, or m and v.
        t, t_first, t_second: (gated,) the presences and what their optimiser keeps.
        in_use: (weights,) the weights as the network computes with them.
        settings: (3, 6) float32, see :class:`Setting`.
        counters: (8,) int32, see :class:`Counter`.
        scale: (2,) float32, the loss scale S and 1 / S.
        position: (1,) int64, the next sample of the epoch.
        loss_sum: (1,) float64, the sum of the losses of the epoch's samples.
        changes: (layers, 2) uint64, flips and regrowths since they were cleared.
        present: (2,) int64, the weights present when ``changes`` were cleared, and the number from
            which on t stays as it is.
        flux, observed: (layers, 2) sums of mean |flux| over the weights present and removed, and
            how many steps are in them.
    """

    def __init__(
        self, places: Sequence[Place], rules: tuple[Rule, Rule], dtype: Any, scale: float
    ) -> None:
        xp = cupy()
        gated = [p for p in places if p.layer >= 0]
        weights = [p for p in places if p.layer != AS_IT_IS]
        ends = [sum(padded(p.size) for p in some) for some in (places, weights, gated)]
        self.rules, self.layers = rules, len(gated)
        self.theta, self.gradient, self.first = (_zeros(ends[0]) for _ in range(3))
        self.second = _zeros(ends[0] if rules[0] is Rule.ADAM else 0)
        self.in_use = xp.zeros(ends[1], dtype)
        self.t = _zeros(ends[2]) - np.float32(1)
        self.t_first = _zeros(ends[2])
        self.t_second = _zeros(ends[2] if rules[1] is Rule.ADAM else 0)
        self.settings, self.corrections, self.scale = _zeros((3, 6)), _zeros(4), _zeros(2)
        self.scale[...] = xp.asarray(np.array([scale, 1 / scale], np.float32))
        self.counters = xp.zeros(len(Counter), np.int32)
        self.position, self.loss_sum = xp.zeros(1, np.int64), xp.zeros(1, np.float64)
        self.changes = xp.zeros((max(1, self.layers), 2), np.uint64)
        self.present = xp.zeros(2, np.int64)
        self.flux = xp.zeros((max(1, self.layers), 2), np.float64)
        self.observed = xp.zeros((max(1, self.layers), 2), np.int32)
        self._tables(places, gated)

    def _tables(self, places: Sequence[Place], gated: Sequence[Place]) -> None:
        xp = cupy()
        layer_of = [np.full(padded(p.size) // TILE, p.layer, np.int32) for p in places]
        first_tiles = np.cumsum([0, *(padded(p.size) // TILE for p in gated)], dtype=np.int32)
        self._tile_layer = xp.asarray(np.concatenate(layer_of))
        self._layer_tiles = xp.asarray(first_tiles)
        self._layer_size = xp.asarray(np.array([p.size for p in gated], np.int32))
        self._tile_flux = _zeros((max(1, int(first_tiles[-1])), 2))
        self._tile_present = xp.zeros(max(1, int(first_tiles[-1])), np.int32)

    # -- kernels ---------------------------------------------------------------------------------

    def write_in_use(self) -> None:
        """Bring ``in_use`` up to date after ``theta`` or ``t`` were changed by hand."""
        kernel = f"write_in_use<{c_type(self.in_use)}>"
        arrays = (self._tile_layer, self.theta, self.t, self.in_use)
        SOURCE.launch(kernel, len(self._tile_layer), THREADS, *arrays)

    def prepare(self) -> None:
        """Work out what the next step needs of ``settings`` and ``counters``, if they were changed
        by hand."""
        SOURCE.launch("prepare", 1, 1, self.settings, self.counters, self.corrections)

    def step(self, loss: Array, batch: int, growth_interval: int) -> None:
        """Step all parameters along ``gradient``, and count.

        A step with infinite gradients is left out, and the loss scale halved.

        Args:
            loss: () float32, of this batch.
            batch: how many samples it had.
            growth_interval: the scale is doubled after so many good steps; 0: it is constant.
        """
        count = np.int64(self.gradient.size)
        blocks = blocks_for(self.gradient.size // 4)
        SOURCE.launch("check_finite", blocks, THREADS, self.gradient, count, self.counters)
        kernel = f"update<{c_type(self.in_use)}, {self.rules[0]:d}, {self.rules[1]:d}>"
        SOURCE.launch(
            kernel,
            len(self._tile_layer),
            THREADS,
            self._tile_layer,
            *(self.theta, self.gradient, self.first, self.second),
            *(self.t, self.t_first, self.t_second, self.in_use),
            *(self.settings, self.corrections, self.scale, self.counters),
            *(self.changes, self._tile_flux, self._tile_present),
        )
        SOURCE.launch(
            "finish_step",
            1,
            1,
            *(loss, batch, growth_interval, self.settings, self.corrections, self.scale),
            *(self.counters, self.position, self.loss_sum, self.changes, self.layers, self.present),
        )

    def observe_flux(self) -> None:
        """Add the last step's mean |flux| of every gated layer to ``flux``."""
        arrays = (self._layer_tiles, self._layer_size, self._tile_flux, self._tile_present)
        SOURCE.launch("add_mean_flux", self.layers, THREADS, *arrays, self.flux, self.observed)


def _zeros(shape: int | tuple[int, ...]) -> Array:
    return cupy().zeros(shape, np.float32)
