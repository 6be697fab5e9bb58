"""Does a pruner keep its contract?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from minihyperflows import functional as F
from minihyperflows.engine.tensor import Tensor
from minihyperflows.nn import Linear, Module, ReLU, Sequential, optim
from minihyperflows.related.pruners import Mask, Pruner, kept_weights

INPUTS, CLASSES = 12, 3


def check_pruner(
    make: Callable[[float], Pruner],
    sparsity: float = 0.9,
    steps: int = 60,
    rng: np.random.Generator | int = 0,
) -> None:
    """Check a method of pruning: a subclass of :class:`minihyperflows.related.pruners.Pruner`.

    A network with two layers learns from random images of three classes. After every step each mask
    must be an array of bools of its layer's shape and still be in charge of that layer; after the
    last one the number of present weights must be right to the weight. ``finish`` must leave the
    network's answers as they were. A second run with the same seed must end with the same masks.
    Which weights are kept is not judged. Example::

        check_pruner(lambda sparsity: Gradual(sparsity, every=10))

    Args:
        make: a new pruner for a sparsity, the class for example.
        sparsity: to ask for.
        steps: how long to train.
        rng: seed or generator for weights, images, and what the pruner draws.

    Raises:
        AssertionError: says what went wrong, and after which step.
    """
    seed = int(np.random.default_rng(rng).integers(2**32))
    first, second = (_train(make(sparsity), steps, seed) for _ in range(2))
    for name, present in first.items():
        if not np.array_equal(present, second[name]):
            raise AssertionError(
                f"two runs with the same seed end with different masks of layer {name!r}: draw "
                "from self.rng, and set up everything that changes in prepare"
            )


def _train(pruner: Pruner, steps: int, seed: int) -> dict[str, np.ndarray]:
    """The masks at the end of a run."""
    rng = np.random.default_rng(seed)
    options: dict[str, Any] = {"rng": rng, "dtype": np.float64}
    net = Sequential(Linear(INPUTS, 20, **options), ReLU(), Linear(20, CLASSES, **options))
    layers: list[Any] = [net[0], net[2]]
    optimizer = optim.Adam(net.parameters(), 1e-2)
    pruner.start(net, optimizer, steps, np.random.default_rng(seed + 1))
    for step in range(1, steps + 1):
        x = rng.standard_normal((16, INPUTS))
        net.zero_grad()
        F.cross_entropy(net(Tensor(x)), x[:, :CLASSES].argmax(axis=1)).backward()
        optimizer.step()
        pruner.after_step(step)
        for (name, mask), layer in zip(pruner.masks.items(), layers, strict=True):
            _check_mask(f"after step {step} the mask of layer {name!r}", mask, layer)
    total = sum(layer.weight.size for layer in layers)
    wanted = kept_weights(pruner.sparsity, total)
    found = sum(int(mask.present.sum()) for mask in pruner.masks.values())
    if found != wanted:
        raise AssertionError(
            f"after the last of {steps} steps {found} of {total} weights are present; a sparsity "
            f"of {pruner.sparsity:g} leaves {wanted} (self.kept)"
        )
    masks = {name: mask.present.copy() for name, mask in pruner.masks.items()}
    _check_finish(pruner, net, layers, rng.standard_normal((8, INPUTS)))
    return masks


def _check_mask(what: str, mask: Mask, layer: Any) -> None:
    present = mask.present
    if not isinstance(present, np.ndarray) or present.dtype != bool:
        kind = getattr(present, "dtype", type(present).__name__)
        raise AssertionError(f"{what} is of {kind}: it must be an array of bool")
    if present.shape != layer.weight.shape:
        raise AssertionError(f"{what} is of shape {present.shape}, its weight {layer.weight.shape}")
    if layer.weight_gate is not mask or mask.weight is not layer.weight:
        raise AssertionError(f"{what} was taken off its layer: assign mask.present, nothing else")


def _check_finish(pruner: Pruner, net: Module, layers: list[Any], x: np.ndarray) -> None:
    before = net(Tensor(x)).data
    pruner.finish()
    if any(layer.weight_gate is not None for layer in layers):
        raise AssertionError("finish leaves masks on the network: call super().finish()")
    if not np.allclose(net(Tensor(x)).data, before, rtol=1e-9, atol=1e-12):
        raise AssertionError("finish changes what the network computes: call super().finish()")
