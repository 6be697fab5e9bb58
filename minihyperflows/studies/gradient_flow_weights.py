"""Single weights of LeNet-300 removed by the scores of the gradient flow: a part of
:mod:`~minihyperflows.studies.gradient_flow_claims`.

All layers share one ranking, the last one too, and no layer is protected: a score that leaves a
layer without weights is seen to do so. Gradients and curvatures come from the loss at temperature
1, those of ``-200`` from that at 200.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from minihyperflows.data.datasets import Dataset
from minihyperflows.nn import Module, models
from minihyperflows.related.rounds import Round, Train, prune_weights
from minihyperflows.studies.gradient_flow_runs import (
    DTYPE,
    Plan,
    Ranking,
    Row,
    Task,
    prune_and_train,
)

RANKINGS = {
    "random": Ranking("random"),
    "magnitude": Ranking("magnitude"),
    "loss": Ranking("loss_preservation"),
    "biased-loss": Ranking("biased_loss_preservation"),
    "grasp-1": Ranking("grasp", 1),
    "grasp-200": Ranking("grasp", 200),
    "preserve-1": Ranking("gradient_norm_preservation", 1),
    "preserve-200": Ranking("gradient_norm_preservation", 200),
}
PLANS = {
    "digits": Plan(images=1437, test_images=360, epochs=16, batch_size=32),
    "mnist": Plan(images=10_000, test_images=10_000, epochs=16, batch_size=128),
}
NETWORK = "lenet300"
TIMES = (0, 1, 10)
KEPT = (0.1, 0.02)


def build(data: Dataset, rng: np.random.Generator) -> Module:
    """LeNet-300 for the images of ``data``."""
    pixels = int(np.prod(data.train_x.shape[1:]))
    return models.lenet300(pixels, len(data.classes), rng=rng, dtype=DTYPE)


def run(task: Task, score: str, start: int, rounds: int, kept: float, seed: int) -> Row:
    """Prune all but the fraction ``kept`` of the weights, and train: the results."""
    scores = task.scores(RANKINGS[score], "weight", seed)

    def prune(net: Module, train: Train) -> Iterator[Round]:
        return prune_weights(net, 1 - kept, rounds, train, scores)

    done, effects = prune_and_train(task, seed, start, rounds, prune)
    return (size(done[-1]) if done else {}) | effects


def size(last: Round) -> Row:
    """How many weights are left, and the fraction of each layer's."""
    densities = {f"density_{name}": float(mask.mean()) for name, mask in last.keep.items()}
    return {"remaining": last.kept, "total": last.total} | densities
