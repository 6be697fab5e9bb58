"""Makes training.npz: what a short training ends with, by the public names alone.

``python tests/golden/make_training.py`` writes the file; with the package of an earlier commit on
PYTHONPATH it writes what that one gives. ``--print`` prints a digest of all bits instead, to
compare two commits on one machine.

Two networks on the digits, in float64: LeNet-300 with Adam, and a small convolutional one with
batch norm, SGD and momentum. Each has a dense, a pruning and a regrowth stage of a few epochs.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import numpy as np

from minihyperflows import lab, models, nn

FILE = Path(__file__).with_name("training.npz")
SHORT = {"dense.epochs": 1, "pruning.epochs": 8, "regrowth.epochs": 3, "dtype": "float64"}
FAST = {"presence.lr": 0.01, "pressure.step": 1.0}
SGD = {f"{stage}.optimizer": "sgd" for stage in ("dense", "pruning")} | {"dense.lr": 0.05}


def perceptron(rng: np.random.Generator) -> nn.Module:
    return models.lenet300(in_features=64, num_classes=10, rng=rng, dtype=np.float64)


def convolutional(rng: np.random.Generator) -> nn.Module:
    def layer(before: int, after: int) -> list[nn.Module]:
        convolution = nn.Conv2d(before, after, 3, padding=1, rng=rng, dtype=np.float64)
        return [convolution, nn.BatchNorm2d(after, dtype=np.float64), nn.ReLU()]

    head = nn.Linear(4 * 4 * 8, 10, rng=rng, dtype=np.float64)
    return nn.Sequential(*layer(1, 4), nn.MaxPool2d(2), *layer(4, 8), nn.Flatten(), head)


CASES = {
    "perceptron": (perceptron, SHORT | FAST),
    "convolutional": (convolutional, SHORT | FAST | SGD),
}


def training(name: str) -> dict[str, np.ndarray]:
    """The weights and presences that a training ends with, and its epochs' losses and densities."""
    make, fields = CASES[name]
    rng = np.random.default_rng(7)
    net, data = make(rng), lab.load("digits")
    recipe = lab.RECIPES["lenet300-digits"].with_fields(fields).with_target(0.8)
    records = list(lab.train(net, data, recipe, rng=rng))
    arrays = {f"net.{key}": value for key, value in net.state_dict().items()}
    arrays["loss"] = np.array([record.train_loss for record in records])
    arrays["density"] = np.array([record.density for record in records])
    return {f"{name}.{key}": value for key, value in arrays.items()}


def sample(array: np.ndarray) -> np.ndarray:
    """Every 37th number of a large array."""
    return array.reshape(-1)[:: 37 if array.size > 1000 else 1]


def main() -> None:
    arrays = training("perceptron") | training("convolutional")
    if "--print" in sys.argv:
        print(hashlib.sha256(b"".join(a.tobytes() for a in arrays.values())).hexdigest())
    else:
        np.savez_compressed(FILE, **{key: sample(value) for key, value in arrays.items()})


if __name__ == "__main__":
    main()
