"""What a single weight is worth, exactly, and what its gate reports of it (chapter 06).

The worth of weight i is the loss without it minus the loss with it, everything else as it is:

    v_i = L(w'_i = 0) - L(w'_i = w_i)

for a present weight the damage of removing it, for a removed one the gain of bringing it back. Run
as a command, this module prunes LeNet-300 and at several moments correlates the worth of sampled
weights with the estimates of it, per layer, for present and for removed weights::

    minihyperflows study removal --data-dir DIR --out removal-lenet.csv
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from minihyperflows.analysis import Probe, dominance, interval, spearman, worths
from minihyperflows.analysis.summaries import means
from minihyperflows.data.datasets import Dataset, normalise
from minihyperflows.flows.gates import KAPPA, gated_layers
from minihyperflows.flows.stages import DENSE, PRUNING
from minihyperflows.lab.recipes import RECIPES, Recipe, find
from minihyperflows.lab.records import Row
from minihyperflows.lab.training import EpochRecord, Trainer, build_network
from minihyperflows.studies.frame import Bench, Study, Tables, main
from minihyperflows.studies.options import choice, one, parse_count, parse_scale, seeds

LAYERS = ("fc1", "fc2", "fc3")
DENSITIES = (0.5, 0.2, 0.05)  # moments: the first epochs to end at or below these, and the last
FEWEST = 20  # weights from which on a correlation is worth reporting

# -- what the gate reports -----------------------------------------------------------------------


class WatchingTrainer(Trainer):
    """A trainer that adds up the flux of every weight over the steps of an epoch.

    Attributes:
        history: the worth of all weights to second order on the images of ``watch``, by layer, at
            the end of each epoch with gates.
    """

    def watch(self, x: np.ndarray, labels: np.ndarray) -> None:
        """Use these images for the worth."""
        self.images = x, labels
        self.history: list[dict[str, np.ndarray]] = []

    def probe(self) -> Probe:
        """The network as it is, on the images of :meth:`watch`."""
        return Probe(self.net, *self.images, self.recipe.pruning.label_smoothing)

    def run_epoch(self) -> EpochRecord:
        self.steps = 0
        self.flux_sum: dict[str, np.ndarray] = {}
        self.square_sum: dict[str, np.ndarray] = {}
        record = super().run_epoch()
        if self.steps:
            probe = self.probe()
            self.history.append({k: probe.second_order(k).astype(np.float32) for k in LAYERS})
        return record

    def step(self) -> None:
        if self.stage != DENSE:
            layers = gated_layers(self.net)
            share = self.gamma() / sum(layer.weight.size for layer in layers.values())
            for name, layer in layers.items():
                flux = np.asarray(layer.presence.grad) - share
                self.flux_sum[name] = self.flux_sum.get(name, 0) + flux
                self.square_sum[name] = self.square_sum.get(name, 0) + flux * flux
            self.steps += 1
        super().step()


def estimates(
    probe: Probe, trainer: WatchingTrainer, name: str, places: np.ndarray
) -> dict[str, np.ndarray]:
    """The worth of the weights at ``places`` and everything that is to be compared with it.

    worth: exact. first: -w g, which is minus the flux over kappa. second: with the curvature.
    other: -w g on the other side of the flip. both: the mean of first and other. magnitude: |w|.
    After steps with gates also presence: t. aggregated: minus the mean flux over the steps of the
    epoch, over kappa. signal: minus the mean flux over its root mean square. earlier: the worth to
    second order one epoch earlier; average: its mean over the ends of all pruning epochs but this
    one. No estimates: even,
    odd, the worth over half of the images each; noise, the standard deviation of -w g in a batch
    of 128 over the size of its mean.
    """
    at = np.unravel_index(places, probe.weight[name].shape)
    w = probe.weight[name][at]
    exact = worths(probe, name, places)
    first, other = -w * probe.gradient(name)[at], -w * exact["other"]
    cotangents, inputs = probe.gradient(name, examples=True), probe.inputs[name]
    spread = abs(w) * (cotangents[:, at[0]] * inputs[:, at[1]]).std(axis=0) / math.sqrt(128)
    columns = exact | {"first": first, "second": probe.second_order(name)[at], "other": other}
    columns |= {"both": (first + other) / 2, "magnitude": abs(w)}
    columns["noise"] = spread / np.maximum(abs(first), 1e-300)
    if trainer.steps and name in trainer.flux_sum:
        mean = trainer.flux_sum[name][at].astype(np.float64) / trainer.steps
        square = trainer.square_sum[name][at].astype(np.float64) / trainer.steps
        columns["presence"] = gated_layers(trainer.net)[name].presence.data[at].astype(np.float64)
        columns["aggregated"] = -mean / KAPPA
        columns["signal"] = -mean / np.sqrt(np.maximum(square, 1e-300))
        past = [epoch[name][at].astype(np.float64) for epoch in trainer.history[:-1]]
        if past:
            columns["earlier"], columns["average"] = past[-1], np.mean(past, axis=0)
    return columns


def compare(columns: dict[str, np.ndarray]) -> Iterator[dict[str, Any]]:
    """A row for each estimate: its rank correlation with the worth, how often its sign is right
    (of the weights whose worth is not 0), and the ratio of the sums. In each of them also what does
    not depend on the estimate, with ``rho_average`` the rank correlation of the estimate with the
    average worth in the past, and ``halves``, the rank correlation of the worth over half of the
    images with that over the other half: what is to be had, with so few images."""
    worth = columns["worth"]
    general = {
        "weights": len(worth),
        "helpful": float((worth > 0).mean()),
        "mean_worth": float(worth.mean()),
        "noise": float(np.median(columns["noise"])),
        "halves": spearman(columns["even"], columns["odd"]),
    }
    average = columns.get("average", np.full(len(worth), math.nan))
    for name, values in columns.items():
        if name in ("worth", "noise", "even", "odd"):
            continue
        rho = spearman(values, worth)
        if math.isnan(rho):
            continue
        low, high = interval(rho, len(worth))
        counted = worth != 0
        sign = float((np.sign(values) == np.sign(worth))[counted].mean())
        ratio = float(values.sum() / worth.sum())
        row = {"estimate": name, "rho": rho, "low": low, "high": high, "same_sign": sign}
        past = {"rho_average": spearman(values, average) if "average" in columns else math.nan}
        yield row | {"sum_ratio": ratio} | past | general


# -- the study -----------------------------------------------------------------------------------


def measure(
    trainer: WatchingTrainer, sample: int, rng: np.random.Generator
) -> Iterator[dict[str, Any]]:
    """The rows of one moment: every layer, present and removed weights, every estimate; and as
    estimate "mask" how much oftener a present weight is worth more than a removed one than less."""
    probe = trainer.probe()
    for name in LAYERS:
        found: dict[str, np.ndarray] = {}
        head = {"layer": name, "images": len(probe.q), "loss": probe.loss}
        for state, mask in (("present", probe.present[name]), ("removed", ~probe.present[name])):
            candidates = np.flatnonzero(mask)
            if len(candidates) < FEWEST:
                continue
            size = min(sample, len(candidates))
            places = np.sort(rng.choice(candidates, size, replace=False))
            columns = estimates(probe, trainer, name, places)
            found[state] = columns["worth"]
            for row in compare(columns):
                yield head | {"state": state} | row
        if len(found) == 2:
            rho, low, high = dominance(found["present"], found["removed"], rng)
            row = {"state": "both", "estimate": "mask", "rho": rho, "low": low, "high": high}
            yield head | row


def study(
    recipe: Recipe,
    data: Dataset,
    seed: int,
    images: int = 3000,
    sample: int = 300,
    densities: Sequence[float] = DENSITIES,
    tick: Callable[[], Any] = lambda: None,
) -> Iterator[dict[str, Any]]:
    """Prune with ``seed``, and measure at the end of the dense stage, when the density has come
    down to each of ``densities``, and at the end of the pruning stage."""
    rng = np.random.default_rng(seed)
    draw = np.random.default_rng([seed, 6])  # of the samples: the run is that of ``prune``
    trainer = WatchingTrainer(build_network(recipe, data, rng), data, recipe, rng)
    chosen = np.sort(draw.choice(len(data.train_y), min(images, len(data.train_y)), replace=False))
    trainer.watch(normalise(data.train_x[chosen], data, np.float64), data.train_y[chosen])
    waiting = sorted(densities, reverse=True)
    last = recipe.dense.epochs + recipe.timeline.pruning
    while trainer.epoch < last:
        record = trainer.run_epoch()
        tick()
        moment = None
        if record.epoch == recipe.dense.epochs:
            moment = DENSE
        elif record.epoch == last:
            moment = "end"
        elif record.stage == PRUNING and waiting and record.density <= waiting[0]:
            moment = f"{waiting[0]:g}"
            waiting = [d for d in waiting if d < record.density]
        if moment:
            head = {"moment": moment, "epoch": record.epoch}
            head |= {"density": record.density, "test_accuracy": record.test_accuracy}
            for row in measure(trainer, sample, draw):
                yield head | row


@dataclasses.dataclass(frozen=True)
class Run:
    """A run, and how closely it is looked at."""

    recipe: str = choice(*sorted(RECIPES), default=["lenet300-mnist"])
    epochs_scale: float = one(parse_scale, 0.5, identity=False)
    images: int = one(parse_count, 3000, identity=False)
    sample: int = one(parse_count, 300, identity=False, help="weights per layer and state")
    seed: int = seeds(3)


class Removal(Study[Run]):
    """What a single weight is worth, exactly, and what its gate reports of it."""

    name, Setting = "removal", Run
    digits = 6

    def recipe(self, s: Run) -> Recipe:
        return find(s.recipe).scaled(s.epochs_scale)

    def dataset(self, s: Run) -> str:
        return self.recipe(s).dataset

    def dtype(self, s: Run) -> str:
        return f"{self.recipe(s).dtype}, measured in float64"

    def check(self, s: Run, bench: Bench) -> None:
        bench.data(self.dataset(s))

    def run(self, s: Run, bench: Bench) -> Tables:
        data = bench.data(self.dataset(s))
        found = study(self.recipe(s), data, s.seed, s.images, s.sample, tick=bench.tick)
        return [[row | {"dataset": data.name} for row in found]]

    def report(self, rows: Sequence[Row]) -> str:
        return means(rows, ("moment", "layer", "state", "estimate"), ("rho", "same_sign"))


STUDY = Removal()

if __name__ == "__main__":
    main(STUDY)
