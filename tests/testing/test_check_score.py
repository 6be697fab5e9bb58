"""The check of scores: it passes those of the package and objects to broken ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

from minihyperflows.nn import BatchNorm2d, Module
from minihyperflows.related.derivatives import Landscape
from minihyperflows.related.gradient_flow import loss_change, loss_change_to_second_order, per_group
from minihyperflows.related.scores import SCORES, importance, layers_by_weight
from minihyperflows.testing.scores import check_score

Arrays = dict[str, np.ndarray]


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("level", ["weight", "filter"])
@pytest.mark.parametrize("name", [s for s in SCORES if s not in ("random", "distance")])
def test_the_package_s_scores_pass(name: str, level: str, mode: str) -> None:
    check_score(lambda net, x, y: importance(net, x, y, name, level, mode=mode), level)


@pytest.mark.parametrize("level", ["weight", "filter"])
@pytest.mark.parametrize("name", [s for s in SCORES if s not in ("random", "distance")])
def test_scores_in_single_precision_pass(name: str, level: str) -> None:
    """Sums in another order differ more than in double precision."""
    for seed in range(3):
        check_score(
            lambda net, x, y: importance(net, x, y, name, level, dtype=np.float32), level, rng=seed
        )


def of_layers(net: Module, arrays: Mapping[str, np.ndarray]) -> Arrays:
    return {name: arrays[name] for name in layers_by_weight(net)}


def first_order(net: Module, x: np.ndarray, labels: np.ndarray) -> Arrays:
    land = Landscape(net, x, labels)
    return of_layers(net, land.arrays(loss_change(land.weights, land.gradient())))


def second_order(net: Module, x: np.ndarray, labels: np.ndarray) -> Arrays:
    """(15.8) for each filter."""
    land = Landscape(net, x, labels)
    scores: Arrays = {}
    for name, layer in layers_by_weight(net).items():
        scores[name] = np.zeros(layer.weight.shape[0])
        for i in range(len(scores[name])):
            members = {k: np.zeros(p.shape, bool) for k, p in land.parameters.items()}
            members[name][i] = True
            vector = land.vector(members)
            scores[name][i] = loss_change_to_second_order(land, land.weights, vector)
    return scores


@pytest.mark.slow
def test_estimates_of_the_loss_are_told_apart_by_their_order() -> None:
    check_score(first_order, loss_order=1)
    check_score(second_order, "filter", loss_order=2)
    check_score(second_order, "filter", loss_order=1)  # better than was asked for
    with pytest.raises(AssertionError, match="For an estimate of order 2"):
        check_score(first_order, loss_order=2)


def filters_first_order(net: Module, x: np.ndarray, labels: np.ndarray) -> Arrays:
    return per_group(first_order(net, x, labels), "filter")


def test_a_filter_s_terms_add_up() -> None:
    check_score(filters_first_order, "filter", loss_order=1)


# -- broken ones ---------------------------------------------------------------------------------


def all_parameters(net: Module, x: Any, labels: Any) -> Arrays:
    land = Landscape(net, x, labels)
    return land.arrays(land.weights)


def flat(net: Module, x: Any, labels: Any) -> Arrays:
    return {k: a.reshape(-1) for k, a in importance(net, x, labels).items()}


def not_a_number(net: Module, x: Any, labels: Any) -> Arrays:
    return {k: 0 * np.log(a - a) for k, a in importance(net, x, labels).items()}


def stays_in_eval(net: Module, x: Any, labels: Any) -> Arrays:
    net.eval()
    return importance(net, x, labels)


def moves_the_statistics(net: Module, x: Any, labels: Any) -> Arrays:
    if any(isinstance(m, BatchNorm2d) for _, m in net.named_modules()):
        net(x)
    return importance(net, x, labels)


def normalises_the_weights(net: Module, x: Any, labels: Any) -> Arrays:
    for parameter in net.named_parameters().values():
        parameter.data = parameter.data / 2
    return importance(net, x, labels)


def random(net: Module, x: Any, labels: Any) -> Arrays:
    return importance(net, x, labels, "random", rng=np.random.default_rng(None))


def by_place(net: Module, x: Any, labels: Any) -> Arrays:
    return importance(net, x, labels, "random", rng=np.random.default_rng(0))


def first_image(net: Module, x: Any, labels: Any) -> Arrays:
    return importance(net, x[:1], labels[:1])


@pytest.mark.parametrize("broken", [random, by_place, first_image])
def test_broken_scores_are_found_in_single_precision(broken: Callable[..., Arrays]) -> None:
    with pytest.raises(AssertionError, match="other scores"):
        check_score(lambda *given: {k: a.astype(np.float32) for k, a in broken(*given).items()})


def almost(net: Module, x: Any, labels: Any) -> Arrays:
    """Depends on the order of the images in the fifth digit: too much in double precision only."""
    factor = 1 + 3e-5 * np.sign(labels[0] - labels[-1])
    return {k: factor * a for k, a in importance(net, x, labels).items()}


def test_double_precision_is_held_to_more_than_single() -> None:
    with pytest.raises(AssertionError, match="other scores"):
        check_score(almost)
    check_score(lambda *given: {k: a.astype(np.float32) for k, a in almost(*given).items()})


@pytest.mark.filterwarnings("ignore:divide by zero", "ignore:invalid value")
@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (all_parameters, "the weights of convolutions and linear layers are"),
        (flat, r"have shape \(72,\); at the level of a weight it is \(4, 3, 3, 2\)"),
        (not_a_number, "not finite"),
        (stays_in_eval, "in another mode"),
        (moves_the_statistics, "changes '1.running_mean'"),
        (normalises_the_weights, "changes '0.weight'"),
        (random, "a second call gives other scores"),
        (by_place, "with the hidden units in another order"),
        (first_image, "with the images in another order"),
    ],
)
def test_broken_scores_are_found(broken: Callable[..., Arrays], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_score(broken)


def without_sign(net: Module, x: Any, labels: Any) -> Arrays:
    return {k: abs(a) for k, a in first_order(net, x, labels).items()}


def twice(net: Module, x: Any, labels: Any) -> Arrays:
    return {k: 2 * a for k, a in first_order(net, x, labels).items()}


@pytest.mark.parametrize("broken", [without_sign, twice])
def test_wrong_estimates_are_found(broken: Callable[..., Arrays]) -> None:
    check_score(broken)
    with pytest.raises(AssertionError, match="the score says"):
        check_score(broken, loss_order=1)


def test_the_level_must_be_known() -> None:
    with pytest.raises(ValueError, match="level must be one of weight, filter"):
        check_score(first_order, "layer")
