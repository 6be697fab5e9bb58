"""What must be right about a recipe before anything is trained, beyond the ranges of its fields."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import numpy as np

from minihyperflows import flows
from minihyperflows.data.datasets import IMAGES, Dataset, Images
from minihyperflows.engine import Tensor, no_grad
from minihyperflows.engine.backend import to_device
from minihyperflows.errors import UserError
from minihyperflows.lab import registry
from minihyperflows.lab.networks import build
from minihyperflows.lab.recipes import Recipe, refuse, unknown_names
from minihyperflows.nn import Module, optim, weight_groups
from minihyperflows.nn.counting import kept_weights, trace


def require_names(recipe: Recipe, device: str = "cpu") -> None:
    """Raise UserError, which lists the mistakes, unless all that ``recipe`` names is there and can
    run on ``device``."""
    refuse(unknown_names(recipe.to_json()))
    require_kernels(recipe, device)


def require_usable(recipe: Recipe, device: str = "cpu", data: Dataset | None = None) -> None:
    """Find what would end a run of ``recipe``, before the data are read if they are built in.

    Its names are looked up; its network is built and sent one image of zeros, of the size of the
    data set's; and there must be something to train.

    Args:
        data: the data set, if it is not a built-in one.

    Raises:
        UserError: lists the mistakes.
    """
    require_names(recipe, device)
    if data is None:
        kind = IMAGES[recipe.dataset]
    else:
        kind = Images(data.train_x.shape[1:], len(data.classes), len(data.train_y))
    net = build(recipe, kind.classes, kind.shape, np.random.default_rng(0))
    try:
        trace(net, kind.shape)
    except ValueError as error:
        size = " x ".join(map(str, kind.shape))
        raise UserError(
            f"{recipe.model} cannot read the images of {recipe.dataset} ({size}): {error}"
        ) from error
    require_trainable(net, recipe, kind.shape, kind.train)


def require_kernels(recipe: Recipe, device: str) -> None:
    """Raise UserError unless ``device`` has kernels for the recipe's weights, optimisers and
    pressure."""
    if device == "cpu":
        return
    if recipe.dtype != "float32":
        raise UserError(f"{recipe.name} has {recipe.dtype} weights: a GPU trains float32 ones only")
    for part in (recipe.dense, recipe.pruning, recipe.presence):
        if registry.find("optimizer", part.optimizer) not in (optim.SGD, optim.Adam):
            raise UserError(
                f"there is no GPU kernel for the optimizer {part.optimizer!r}: choose adam or sgd, "
                "or train on the CPU"
            )
    if registry.find("pressure", recipe.pressure.kind) is not flows.pressure:
        raise UserError(
            f"there is no GPU kernel for the pressure {recipe.pressure.kind!r}: choose mean, or "
            "train on the CPU"
        )


def require_trainable(net: Module, recipe: Recipe, image: tuple[int, ...], images: int) -> None:
    """Raise UserError unless ``recipe`` can train ``net`` on so many images of that shape."""
    refuse(_untrainable(net, recipe, image, images))


def _untrainable(net: Module, recipe: Recipe, image: tuple[int, ...], images: int) -> Iterator[str]:
    weights = gateable(net)
    if recipe.target_sparsity is not None and kept_weights(1 - recipe.target_sparsity, weights) < 1:
        yield (
            f"target_sparsity {recipe.target_sparsity!r} leaves none of the {weights:,} weights: "
            f"choose one below {1 - 1 / max(weights, 1):.6g}"
        )
    sizes = {min(images, recipe.batch_size), images % recipe.batch_size}
    if 1 in sizes and (reason := _why_not_one_image(net, image)):
        yield (
            f"with batch_size {recipe.batch_size:,} the last of {images:,} images are a batch of "
            f"one, and {reason}: choose another batch_size"
        )


def gateable(net: Module) -> int:
    """How many weights of ``net`` pruning can remove; one that layers share counts once."""
    return sum(layers[0].weight.size for layers in weight_groups(net).values())


def _why_not_one_image(net: Module, image: tuple[int, ...]) -> str | None:
    """What a training step with a batch of one image runs into; None if nothing."""
    net = copy.deepcopy(net)  # a step changes the running statistics
    like = net.parameters()[0]
    try:
        with no_grad():
            net(Tensor(to_device(np.zeros((1, *image), like.dtype), like.device)))
    except ValueError as error:
        return str(error)
    return None
