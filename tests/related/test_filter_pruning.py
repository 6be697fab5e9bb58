"""Pruning in rounds: the schedule, the ranking, filters that really go, and the loop."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from support.lanes import large

from minihyperflows import flows, models, nn, optim
from minihyperflows import functional as F
from minihyperflows.engine.tensor import Tensor
from minihyperflows.nn.counting import flops
from minihyperflows.related.channels import (
    ChannelGroup,
    channel_groups,
    group_of_inputs,
    group_of_outputs,
)
from minihyperflows.related.filters import (
    channel_scores,
    fewest,
    remove_filters,
    safeguard,
    widths,
    zero_filters,
)
from minihyperflows.related.ranking import (
    fractions_between,
    keep_highest,
    keep_within,
    kept_fraction,
    round_fraction,
    shuffled,
)
from minihyperflows.related.rounds import (
    finish,
    prune_filters,
    prune_to_widths,
    prune_weights,
)
from minihyperflows.related.scores import importance

IMAGE = (32, 32, 3)

# -- the schedule --------------------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.75, 0.98])
@pytest.mark.parametrize("rounds", [1, 5, 25])
def test_the_schedule_telescopes(rounds: int, sparsity: float) -> None:
    left = 1.0
    for k in range(1, rounds + 1):
        left *= 1 - round_fraction(k, rounds, sparsity)
        assert left == pytest.approx(kept_fraction(k, rounds, sparsity), rel=1e-12)
    assert left == pytest.approx(1 - sparsity, rel=1e-12)
    inverse = [1 / kept_fraction(k, rounds, sparsity) for k in range(rounds + 1)]
    np.testing.assert_allclose(inverse, np.linspace(1, 1 / (1 - sparsity), rounds + 1), rtol=1e-12)


@pytest.mark.parametrize(("rounds", "first"), [(1, 0.75), (5, 0.375), (25, 0.75 / 7)])
def test_the_first_round_removes_the_most(rounds: int, first: float) -> None:
    """The numbers for 75 %: 75, 37.5 and 10.7 % of the network."""
    assert round_fraction(1, rounds, 0.75) == pytest.approx(first, rel=1e-12)


def test_thresholds_by_hand() -> None:
    fractions = fractions_between([0.2, 0.5, 0.5, 0.75])
    np.testing.assert_allclose(fractions, [0.2, 0.375, 0, 0.5], rtol=1e-12)
    assert math.prod(1 - p for p in fractions) == pytest.approx(0.25)


@pytest.mark.parametrize("call", [(0, 5, 0.5), (6, 5, 0.5), (1, 5, 1.0), (1, 5, -0.1)])
def test_impossible_rounds_are_refused(call: tuple[int, int, float]) -> None:
    with pytest.raises(ValueError, match=r"round|sparsity"):
        round_fraction(*call)
    with pytest.raises(ValueError, match="rise"):
        fractions_between([0.5, 0.4])


# -- the ranking ---------------------------------------------------------------------------------


def test_one_ranking_of_everything() -> None:
    scores = {"a": np.array([[3.0, 1], [5, -1]]), "b": np.array([2.0, -4, 4])}
    keep = keep_highest(scores, 4)
    np.testing.assert_array_equal(keep["a"], [[True, False], [True, False]])
    np.testing.assert_array_equal(keep["b"], [True, False, True])


def test_the_best_of_each_are_protected_not_the_first() -> None:
    scores = {"a": np.array([10.0, 11, 12]), "b": np.array([1.0, 3, 2])}
    keep = keep_highest(scores, 3, least={"a": 1, "b": 2})
    np.testing.assert_array_equal(keep["a"], [False, False, True])
    np.testing.assert_array_equal(keep["b"], [False, True, True])
    assert not keep_highest(scores, 3)["b"].any()  # without, a layer may vanish


def test_what_is_removed_stays_removed() -> None:
    """Also where the living have negative scores, below the zero of the dead."""
    scores = {"a": np.array([-1.0, 0, -3, 0, 2])}
    present = {"a": np.array([True, False, True, False, True])}
    np.testing.assert_array_equal(
        keep_highest(scores, 2, present=present)["a"], [True, False, False, False, True]
    )
    np.testing.assert_array_equal(
        keep_highest(scores, 3, least=5, present=present)["a"], present["a"]
    )


def test_ties_keep_the_count() -> None:
    scores = {"a": np.zeros(4), "b": np.zeros((2, 3))}
    keep = keep_highest(scores, 5, least=2)
    assert keep["a"].sum() + keep["b"].sum() == 5
    assert min(keep["a"].sum(), keep["b"].sum()) >= 2


def test_infinite_scores_are_scores() -> None:
    """What is not there is kept by no score, and what is protected stays before an infinite one."""
    low = {"a": np.array([1.0, -np.inf, 2, -np.inf])}
    present = {"a": np.array([True, False, True, True])}
    np.testing.assert_array_equal(keep_highest(low, 3, present=present)["a"], present["a"])
    everything = keep_highest(low, 2, least=2, present={"a": np.array([False, False, True, True])})
    np.testing.assert_array_equal(everything["a"], [False, False, True, True])
    high = {"a": np.array([np.inf, np.inf]), "b": np.array([1.0])}
    keep = keep_highest(high, 2, least={"a": 0, "b": 1})
    np.testing.assert_equal(keep, {"a": [True, False], "b": [True]})


def test_numbers_of_numpy_are_numbers() -> None:
    scores = {"a": np.array([10, 11, 12]), "b": np.array([0, 3, 2], np.uint8)}
    keep = keep_highest(scores, np.int64(2), least=np.int64(1))
    np.testing.assert_equal(keep, {"a": [False, False, True], "b": [False, True, False]})
    within = keep_within(scores, 2, lambda keep: sum(m.sum() for m in keep.values()), np.int64(1))
    np.testing.assert_equal(within, keep)


def test_as_many_as_a_cost_allows() -> None:
    """The longest beginning of the ranking that is cheap enough, not a cheaper choice beside it."""
    scores = {"a": np.array([9.0, 7, 5]), "b": np.array([8.0, 6, 4])}
    price = {"a": 10, "b": 1}

    def cost(keep: dict[str, np.ndarray]) -> float:
        return sum(price[name] * mask.sum() for name, mask in keep.items())

    for limit, count in ((0, 0), (10, 1), (11, 2), (20, 2), (22, 4), (1000, 6)):
        keep = keep_within(scores, limit, cost)
        np.testing.assert_equal(keep, keep_highest(scores, count))
        assert cost(keep) <= limit
    keep = keep_within(scores, 12, cost, least={"a": 0, "b": 2})
    np.testing.assert_equal(keep, {"a": [True, False, False], "b": [True, True, False]})
    present = {"a": np.array([False, True, True]), "b": np.ones(3, bool)}
    keep = keep_within(scores, 11, cost, present=present)
    np.testing.assert_equal(keep, {"a": [False, True, False], "b": [True, False, False]})
    with pytest.raises(ValueError, match="the least choice costs 20, more than 19"):
        keep_within(scores, 19, cost, least={"a": 2, "b": 0})


@pytest.mark.parametrize(
    ("count", "least", "value"), [(7, 0, 0.0), (3, 2, 0.0), (2, 0, np.nan), (-1, 0, 0.0)]
)
def test_impossible_choices_are_refused(count: int, least: int, value: float) -> None:
    with pytest.raises(ValueError, match=r"cannot be kept|NaN"):
        keep_highest({"a": np.array([1.0, value, 2]), "b": np.ones(3)}, count, least)


def test_shuffled_masks_keep_the_numbers(rng: np.random.Generator) -> None:
    keep = {"a": rng.random((20, 30)) < 0.3, "b": rng.random(50) < 0.9}
    other = shuffled(keep, rng)
    for name, mask in keep.items():
        assert other[name].shape == mask.shape
        assert other[name].sum() == mask.sum()
        assert (other[name] != mask).any()


# -- filters that go -----------------------------------------------------------------------------


def network(name: str, rng: np.random.Generator) -> tuple[nn.Module, tuple[int, ...]]:
    options: dict[str, Any] = {"rng": rng, "dtype": np.float64}
    if name == "lenet300":
        return models.lenet300(**options), (28, 28, 1)
    if name == "resnet20":
        return models.resnet(20, width=0.5, **options), IMAGE
    if name == "flatten":
        layers = (nn.Conv2d(3, 6, 3, **options), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten())
        return nn.Sequential(*layers, nn.Linear(6 * 9, 8, **options), nn.ReLU()), (8, 8, 3)
    if name == "resnet50":
        return models.resnet50(width=0.0625, stem_stride=2, **options), (16, 16, 3)
    width = 0.0625 if name.startswith("mobilenet") else 0.125
    return getattr(models, name)(width=width, **options), IMAGE


SMALL = ["lenet300", "flatten", "vgg13", "resnet20"]
NETWORKS = [*SMALL, *large("resnet50", "mobilenet_v1", "mobilenet_v2")]


def unsettle(net: nn.Module, rng: np.random.Generator) -> None:
    """Batch norms that shift and scale, so that a channel of zeros is not one by chance."""
    for module in (m for _, m in net.named_modules() if isinstance(m, nn.BatchNorm2d)):
        size = module.weight.shape
        module.weight.data, module.bias.data = rng.random(size) + 0.5, rng.standard_normal(size)
        module.running_mean.data = rng.standard_normal(size)
        module.running_var.data = rng.random(size) + 0.5


def random_keep(groups: Any, rng: np.random.Generator, fraction: float) -> dict[str, np.ndarray]:
    keep = {n: rng.random(size) < fraction for n, size in widths(groups).items()}
    for mask in keep.values():
        mask[rng.integers(len(mask))] = True
    return keep


@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.8])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_smaller_network_computes_the_same_as_zeros(name: str, fraction: float) -> None:
    """In evaluation and in training; with 0, one filter everywhere."""
    rng = np.random.default_rng(3)
    net, image = network(name, rng)
    unsettle(net, rng)
    state = net.state_dict()
    groups = channel_groups(net, image)
    keep = random_keep(groups, rng, fraction)
    smaller, zeroed = remove_filters(net, keep, image), zero_filters(net, keep, image)
    x = rng.standard_normal((3, *image))
    for mode in (False, True):
        for net_ in (smaller, zeroed):
            net_.train(mode)
        found, expected = smaller(x).numpy(), zeroed(x).numpy()
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-10 * abs(expected).max())
    assert all((net.state_dict()[k] == v).all() for k, v in state.items())  # the original
    if fraction == 0:
        assert set(widths(channel_groups(smaller, image)).values()) == {1}


def test_zeros_are_where_they_belong(rng: np.random.Generator) -> None:
    """Layer by layer, written out: the outputs of removed filters behind batch norm and ReLU."""
    net, image = network("vgg13", rng)
    unsettle(net, rng)
    keep = random_keep(channel_groups(net, image), rng, 0.5)
    x = Tensor(rng.standard_normal((2, *image)))
    net.eval()
    smaller = remove_filters(net, keep, image)
    layers = dict(net.features.children())
    y = x
    for name, layer in layers.items():
        y = layer(y)
        if isinstance(layer, nn.ReLU):
            y = y * keep[f"features.{int(name) - 2}"].astype(float)
    expected = net.classifier(F.flatten(net.pool(y))).numpy()
    np.testing.assert_allclose(smaller(x).numpy(), expected, rtol=1e-9, atol=1e-12)


def test_a_residual_stream_loses_a_channel_everywhere(rng: np.random.Generator) -> None:
    """Written out for a block: what is added to the stream, and what is read from it."""
    net, image = network("resnet20", rng)
    unsettle(net, rng)
    net.eval()
    keep = {"conv1": np.array([True] * 5 + [False] * 3)}
    smaller = remove_filters(net, keep, image)
    mask = keep["conv1"].astype(float)
    y = net.bn1.then_relu(net.conv1(Tensor(rng.standard_normal((2, *image))))) * mask
    for block in (net.layer1[i] for i in range(3)):
        y = block(y) * mask
    small = y.numpy()[..., :5]
    for layer in ("layer2", "layer3"):
        y = getattr(net, layer)(y)
    expected = net.fc(F.flatten(y.mean(axis=(1, 2)))).numpy()
    z = smaller.layer3(smaller.layer2(Tensor(small)))
    found = smaller.fc(F.flatten(z.mean(axis=(1, 2)))).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", NETWORKS)
def test_flops_fall_as_computed(name: str, rng: np.random.Generator) -> None:
    """By hand: outputs times (2 K - 1), with the channels that are left."""
    net, image = network(name, rng)
    groups = channel_groups(net, image)
    keep = random_keep(groups, rng, 0.5)
    left = {n: int(keep[n].sum()) if n in keep else g.size for n, g in groups.items()}
    outputs, inputs = group_of_outputs(groups), group_of_inputs(groups)
    expected = {}
    for layer, dense in flops(net, image).items():
        shape = dict(net.named_modules())[layer].weight.shape
        group = groups[inputs[layer]]
        positions = dense // (shape[0] * (2 * math.prod(shape[1:]) - 1))
        fan_in = math.prod(shape[1:-1])
        if layer not in group.depthwise:
            fan_in *= left[inputs[layer]] * group.inputs[layer]
        expected[layer] = positions * left[outputs[layer]] * (2 * fan_in - 1)
    assert flops(remove_filters(net, keep, image), image) == expected


def test_a_smaller_network_is_an_ordinary_one(rng: np.random.Generator) -> None:
    """It trains, and its state loads into another one of these widths."""
    net, image = network("mobilenet_v1", rng)
    keep = random_keep(channel_groups(net, image), rng, 0.5)
    smaller, twin = remove_filters(net, keep, image), remove_filters(net, keep, image)
    optimizer = optim.SGD(smaller.parameters(), 0.1, momentum=0.9)
    x, labels = rng.standard_normal((4, *image)), rng.integers(0, 10, 4)
    losses = []
    for _ in range(3):
        smaller.zero_grad()
        loss = F.cross_entropy(smaller(x), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[0]
    twin.load_state_dict(smaller.state_dict())
    np.testing.assert_array_equal(twin(x).numpy(), smaller(x).numpy())


def test_removing_step_by_step_or_at_once(rng: np.random.Generator) -> None:
    net, image = network("resnet20", rng)
    first = random_keep(channel_groups(net, image), rng, 0.7)
    once = remove_filters(net, first, image)
    second = random_keep(channel_groups(once, image), rng, 0.7)
    twice = remove_filters(once, second, image)
    both = {n: mask.copy() for n, mask in first.items()}
    for name, mask in both.items():
        mask[mask] = second[name]
    directly = remove_filters(net, both, image)
    for name, value in twice.state_dict().items():
        np.testing.assert_array_equal(value, directly.state_dict()[name])


@pytest.mark.parametrize(
    ("keep", "error"),
    [
        ({"features.0": np.zeros(8, bool)}, ValueError),
        ({"features.0": np.ones(7, bool)}, ValueError),
        ({"features.0": np.zeros(1, bool)}, ValueError),  # would be broadcast
        ({"classifier": np.arange(10) > 0}, ValueError),
        ({"input": np.arange(3) > 0}, ValueError),
        ({"features.1": np.ones(8, bool)}, KeyError),
    ],
)
@pytest.mark.parametrize("take", [remove_filters, zero_filters])
def test_what_cannot_go_is_refused(
    take: Any, keep: dict[str, np.ndarray], error: type[Exception], rng: np.random.Generator
) -> None:
    net, image = network("vgg13", rng)
    with pytest.raises(error):
        take(net, keep, image)


@pytest.mark.parametrize("take", [remove_filters, zero_filters])
def test_gates_come_off_before_filters_go(take: Any, rng: np.random.Generator) -> None:
    net, image = network("vgg13", rng)
    flows.attach(net, rng=rng)
    with pytest.raises(ValueError, match="gates"):
        take(net, {"features.0": np.arange(8) > 0}, image)


@pytest.mark.parametrize(("activation", "of_zero"), [(F.tanh, 0.0), (F.sigmoid, 0.5)])
def test_an_activation_makes_something_of_zeros(
    activation: Any, of_zero: float, rng: np.random.Generator
) -> None:
    """What is removed is 0 to its readers; what is zeroed is f(0), through the next weights."""
    net = Activated(activation, rng)
    keep = {"first": np.arange(6) > 1}
    smaller, zeroed = (take(net, keep, (4,)) for take in (remove_filters, zero_filters))
    x = rng.standard_normal((3, 4))
    more = of_zero * net.last.weight.data[:, :2].sum(axis=1)
    np.testing.assert_allclose(zeroed(x).data, smaller(x).data + more, rtol=1e-12)


class Activated(nn.Module):
    def __init__(self, activation: Any, rng: np.random.Generator) -> None:
        self.activation = activation
        self.first = nn.Linear(4, 6, rng=rng, dtype=np.float64)
        self.last = nn.Linear(6, 2, rng=rng, dtype=np.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.activation(self.first(x)))


# -- scores of channels --------------------------------------------------------------------------


def test_a_channel_has_the_score_of_its_filters(rng: np.random.Generator) -> None:
    net, image = network("resnet20", rng)
    groups = channel_groups(net, image)
    layers = {n: m for n, m in net.named_modules() if isinstance(m, nn.Weighted)}
    scores = {f"{n}.weight": rng.random(m.weight.shape[0]) for n, m in layers.items()}
    found = channel_scores(scores, groups)
    assert {n: len(s) for n, s in found.items()} == widths(groups)
    np.testing.assert_array_equal(found["layer1.0.conv1"], scores["layer1.0.conv1.weight"])
    members = ["conv1", *(f"layer1.{i}.conv2" for i in range(3))]
    stacked = np.stack([scores[f"{m}.weight"] for m in members])
    expectations = {"mean": stacked.mean(0), "sum": stacked.sum(0), "max": stacked.max(0)}
    for combine, expected in expectations.items():
        np.testing.assert_allclose(channel_scores(scores, groups, combine)["conv1"], expected)
    with pytest.raises(ValueError, match="combine"):
        channel_scores(scores, groups, "median")


def test_depthwise_filters_inherit(rng: np.random.Generator) -> None:
    net, image = network("mobilenet_v1", rng)
    groups = channel_groups(net, image)
    scores = importance(net, rng.random((2, *image)), np.zeros(2, int), "magnitude", "filter")
    found = channel_scores(scores, groups)
    for name, score in found.items():
        np.testing.assert_array_equal(score, scores[f"{name}.weight"])


def test_the_safeguard_is_a_twentieth_and_one(rng: np.random.Generator) -> None:
    groups = channel_groups(models.vgg13(rng=rng), IMAGE)
    found = safeguard(groups)
    assert found["features.0"] == 4
    assert sum(found.values()) == 152  # of 2944 filters, as in the authors' code
    assert sum(widths(groups).values()) == 2944


def test_two_channels_stay_where_a_depthwise_layer_filters_them(rng: np.random.Generator) -> None:
    """With one it could not be told from an ordinary convolution, and the groups would change."""
    net = models.mobilenet_v1(width=0.25, rng=rng)
    groups = channel_groups(net, IMAGE)
    least = safeguard(groups)
    assert least["features.0.0"] == 2  # of 8
    keep = {
        name: np.arange(group.size) < least[name] for name, group in groups.items() if name in least
    }
    smaller = channel_groups(remove_filters(net, keep, IMAGE), IMAGE)
    assert smaller.keys() == groups.keys()
    assert widths(smaller) == least


def test_the_safeguard_takes_the_fraction_that_was_meant() -> None:
    """0.29 of 100 are 29, though 0.29 * 100 is 28.999999999999996."""
    assert safeguard({"a": ChannelGroup("a", 100)}, 0.29) == {"a": 30}


class Attention(nn.Module):
    """Two convolutions with a map of one channel between them."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.first = nn.Conv2d(2, 4, 1, rng=rng, dtype=np.float64)
        self.map = nn.Conv2d(4, 1, 1, rng=rng, dtype=np.float64)
        self.last = nn.Conv2d(4, 5, 1, rng=rng, dtype=np.float64)
        self.scores = nn.Linear(5, 3, rng=rng, dtype=np.float64)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.scores(F.relu(self.last(x * F.sigmoid(self.map(x)))).mean(axis=(1, 2)))


def test_two_channels_stay_where_a_map_is_stretched_over_them(rng: np.random.Generator) -> None:
    """With one it could not be told from the map, and the groups would be others next round."""
    net = Attention(rng)
    groups = channel_groups(net, (3, 3, 2))
    assert {n: fewest(groups[n]) for n in widths(groups)} == {"first": 2, "map": 1, "last": 1}

    def score(net: nn.Module) -> dict[str, np.ndarray]:
        layers = {n: m for n, m in net.named_modules() if isinstance(m, nn.Weighted)}
        large = {"first": 0, "map": 9, "last": 5, "scores": 0}
        return {f"{n}.weight": large[n] + rng.random(len(m.weight)) for n, m in layers.items()}

    rounds = list(prune_filters(net, (3, 3, 2), 0.5, 3, lambda net: None, score))
    for done in rounds:
        left = widths(channel_groups(done.net, (3, 3, 2)))
        assert left.keys() == widths(groups).keys()
        assert sum(left.values()) == done.kept
    assert left == {"first": 2, "map": 1, "last": 2}


# -- the loop ------------------------------------------------------------------------------------


class Digits:
    """Two blobs of images, a small network, and a few steps of training for an epoch."""

    def __init__(self, rng: np.random.Generator, convolutions: bool) -> None:
        self.labels = rng.integers(0, 3, 60)
        self.x = rng.standard_normal((60, 6, 6, 2)) + self.labels.reshape(-1, 1, 1, 1)
        options: dict[str, Any] = {"rng": rng, "dtype": np.float64}
        self.image = (6, 6, 2)
        if convolutions:
            self.net: nn.Module = nn.Sequential(
                *(nn.Conv2d(2, 12, 3, **options), nn.BatchNorm2d(12, dtype=np.float64), nn.ReLU()),
                *(nn.Conv2d(12, 16, 3, **options), nn.ReLU(), nn.Flatten()),
                nn.Linear(64, 3, **options),
            )
        else:
            layers = (nn.Flatten(), nn.Linear(72, 20, **options), nn.ReLU())
            self.net = nn.Sequential(*layers, nn.Linear(20, 3, **options))
        self.epochs = 0

    def train(self, net: nn.Module) -> None:
        self.epochs += 1
        optimizer = optim.SGD(net.parameters(), 0.02, momentum=0.9, weight_decay=1e-4)
        for _ in range(20):
            net.zero_grad()
            F.cross_entropy(net(self.x), self.labels).backward()
            optimizer.step()

    def loss(self, net: nn.Module) -> float:
        return F.cross_entropy(net(self.x), self.labels).item()


@pytest.mark.parametrize(
    "score", ["magnitude", "biased_loss_preservation", "grasp", "gradient_norm_preservation"]
)
def test_weights_go_in_rounds(score: str, rng: np.random.Generator) -> None:
    task = Digits(rng, convolutions=False)
    total, rounds = 72 * 20 + 60, 4
    before = {name: np.ones(m.weight.shape, bool) for name, m in _layers(task.net).items()}
    for pruned in prune_weights(
        task.net, 0.9, rounds, task.train, lambda net: importance(net, task.x, task.labels, score)
    ):
        expected = round(kept_fraction(pruned.number, rounds, 0.9) * total)
        assert sum(mask.sum() for mask in pruned.keep.values()) == pruned.kept == expected
        assert pruned.sparsity == pytest.approx(1 - expected / total)
        for name, mask in pruned.keep.items():
            assert not (mask & ~before[name]).any()  # nobody comes back
        before = pruned.keep
    assert task.epochs == rounds
    assert pruned.kept == 150
    task.train(task.net)  # the masks are still on
    loss = task.loss(task.net)
    finish(task.net)
    assert task.loss(task.net) == pytest.approx(loss, rel=1e-12)
    for name, layer in _layers(task.net).items():
        assert layer.weight_gate is None
        assert not layer.weight.data[~before[name]].any()
    if score == "magnitude":
        assert loss < 0.7  # the chance of one in three is 1.1


def test_removed_weights_do_not_come_back_before_negative_scores(rng: np.random.Generator) -> None:
    """The largest first: what is removed has score 0, above all others."""
    task = Digits(rng, convolutions=False)

    def negative(net: nn.Module) -> dict[str, np.ndarray]:
        scores = importance(net, task.x, task.labels, "magnitude")
        return {name: -score for name, score in scores.items()}

    kept = [p.keep for p in prune_weights(task.net, 0.8, 3, lambda net: None, negative)]
    for before, after in pairwise(kept):
        assert not any((after[name] & ~before[name]).any() for name in after)


def test_some_layers_can_be_left_alone(rng: np.random.Generator) -> None:
    task = Digits(rng, convolutions=False)
    (pruned,) = prune_weights(
        task.net,
        0.5,
        1,
        lambda net: None,
        lambda net: importance(net, task.x, task.labels, "magnitude"),
        exclude=("3",),
    )
    assert list(pruned.keep) == ["1"]
    assert (pruned.kept, pruned.total) == (720, 1440)
    assert task.net[3].weight_gate.present.all()


def idle(net: nn.Module) -> None:
    """Train nothing."""


def test_weights_that_layers_share_go_once(rng: np.random.Generator) -> None:
    layers = [nn.Linear(6, 6, rng=rng, dtype=np.float64) for _ in range(3)]
    net = nn.Sequential(*layers)
    layers[2].weight = layers[0].weight
    x = rng.standard_normal((3, 6))

    def score(net: nn.Module) -> dict[str, np.ndarray]:
        return importance(net, x, np.zeros(3, int), "magnitude")

    (done,) = prune_weights(net, 0.75, 1, lambda net: None, score)
    assert (done.kept, done.total, set(done.keep)) == (18, 72, {"0", "1"})
    before = net(x).data
    finish(net)
    np.testing.assert_allclose(net(x).data, before, rtol=1e-12)
    assert sum(np.count_nonzero(layer.weight.data) for layer in layers[:2]) == 18
    (done,) = prune_weights(net, 0.5, 1, lambda net: None, score, exclude=["2"])
    assert set(done.keep) == {"1"}


def test_so_many_weights_of_each_layer_stay(rng: np.random.Generator) -> None:
    """Though the scores of layer 3 are below all of layer 1, and with 0 it would vanish."""
    for least, left in ((0, 0), (25, 25), (100, 60)):  # of 60
        task = Digits(rng, convolutions=False)
        shapes = {name: m.weight.shape for name, m in _layers(task.net).items()}

        def score(net: nn.Module, shapes: Any = shapes) -> dict[str, np.ndarray]:
            places = np.arange(60.0).reshape(shapes["3"])
            return {"1.weight": 100 + np.zeros(shapes["1"]), "3.weight": places}

        *_, last = prune_weights(task.net, 0.8, 2, idle, score, least=least)
        assert last.kept == 300
        np.testing.assert_array_equal(last.keep["3"].reshape(-1), np.arange(60) >= 60 - left)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sparsity": 1.0}, "sparsity is the fraction removed"),
        ({"sparsity": 75}, "sparsity is the fraction removed"),
        ({"rounds": 0}, "rounds must be at least 1, not 0"),
        ({"exclude": ("3", "fc3")}, "no layer fc3 to exclude: there are 1, 3"),
        ({"exclude": ("1", "3")}, "nothing to prune"),
        ({"least": 200}, "leaves 150 of 1500, but 260 must stay"),
    ],
)
def test_a_mistake_is_named_before_weights_go(
    settings: dict[str, Any], message: str, rng: np.random.Generator
) -> None:
    """At the call, without a step of training, and the right call may follow."""
    task = Digits(rng, convolutions=False)

    def score(net: nn.Module) -> dict[str, np.ndarray]:
        return importance(net, task.x, task.labels, "magnitude")

    with pytest.raises(ValueError, match=message):
        prune_weights(
            task.net, **{"sparsity": 0.9, "rounds": 2} | settings, train=idle, score=score
        )
    assert all(layer.weight_gate is None for layer in _layers(task.net).values())
    assert len(list(prune_weights(task.net, 0.9, 2, idle, score))) == 2


@pytest.mark.slow
@pytest.mark.parametrize("score", ["magnitude", "loss_preservation", "grasp", "random"])
def test_filters_go_in_rounds(score: str, rng: np.random.Generator) -> None:
    task = Digits(rng, convolutions=True)
    first, rounds = task.net, 3
    work = sum(flops(first, task.image).values())

    def scores(net: nn.Module) -> dict[str, np.ndarray]:
        return importance(net, task.x, task.labels, score, "filter", mode="eval", rng=rng)

    for pruned in prune_filters(first, task.image, 0.75, rounds, task.train, scores):
        sizes = widths(channel_groups(pruned.net, task.image))
        expected = round(kept_fraction(pruned.number, rounds, 0.75) * 28)
        assert sum(sizes.values()) == pruned.kept == expected
        assert min(sizes.values()) >= 1
        less = sum(flops(pruned.net, task.image).values())
        assert less < work
        work = less
    assert pruned.kept == 7
    assert first[0].weight.shape[0] == 12  # the first network is not touched
    for _ in range(3):
        task.train(pruned.net)
    assert task.loss(pruned.net) < 0.7


def test_channels_go_until_the_widths_are_reached(rng: np.random.Generator) -> None:
    """Whatever the score says of other groups, each loses its own lowest."""
    task = Digits(rng, convolutions=True)
    goals = [{"0": 9, "3": 16}, {"0": 3, "3": 5}]

    def score(net: nn.Module) -> dict[str, np.ndarray]:
        found = importance(net, task.x, task.labels, "magnitude", "filter")
        return {name: 1000 * s if name == "0.weight" else s for name, s in found.items()}

    norms = np.linalg.norm(task.net[0].weight.data.reshape(12, -1), axis=1)
    idle = prune_to_widths(task.net, task.image, goals, lambda net: None, score)
    for number, (pruned, goal) in enumerate(zip(idle, goals, strict=True), start=1):
        assert pruned.number == number
        assert widths(channel_groups(pruned.net, task.image)) == goal
        assert pruned.kept == sum(goal.values())
        assert pruned.total == 28
        if number == 1:
            np.testing.assert_array_equal(pruned.keep["0"], norms >= np.sort(norms)[3])
    task.train(pruned.net)
    assert task.epochs == 1
    with pytest.raises(ValueError, match="cannot be kept"):
        list(prune_to_widths(pruned.net, task.image, goals[:1], task.train, score))


def test_the_safe_channels_of_each_group_stay(rng: np.random.Generator) -> None:
    """A number for all groups, or one for each by name; the others go by the score."""
    task = Digits(rng, convolutions=True)

    def score(net: nn.Module) -> dict[str, np.ndarray]:
        found = importance(net, task.x, task.labels, "magnitude", "filter")
        return {name: s + 100 * (name == "3.weight") for name, s in found.items()}

    for least, left in ((1, 1), (3, 3), ({"0": 5, "3": 1}, 5), ({"0": 0, "3": 0}, 1)):
        *_, last = prune_filters(task.net, task.image, 0.75, 2, idle, score, least=least)
        assert widths(channel_groups(last.net, task.image)) == {"0": left, "3": 7 - left}


@pytest.mark.parametrize("combine", ["mean", "sum", "max"])
def test_the_filters_of_a_group_share_a_score_in_the_way_that_was_asked_for(
    combine: str, rng: np.random.Generator
) -> None:
    """Two layers that are added, and one behind them: the three ways keep other channels."""
    layers = {"a": [9.0, 5, 3, 0], "b": [0.0, 5, 5.5, 1], "c": [4.7, 8.7, 0, 0]}

    def score(net: nn.Module) -> dict[str, np.ndarray]:
        return {f"{name}.weight": np.array(s) for name, s in layers.items()}

    # a with b: mean 4.5 5 4.25 0.5, sum 9 10 8.5 1, max 9 5 5.5 1; c: 4.7 8.7 0 0
    kept = {
        "mean": {"a": [False, True, False, False], "c": [True, True, False, False]},
        "sum": {"a": [True, True, False, False], "c": [False, True, False, False]},
        "max": {"a": [True, False, True, False], "c": [False, True, False, False]},
    }
    (pruned,) = prune_filters(Added(rng), (4,), 5 / 8, 1, idle, score, combine=combine)
    assert pruned.kept == 3
    np.testing.assert_equal(pruned.keep, kept[combine])


class Added(nn.Module):
    def __init__(self, rng: np.random.Generator) -> None:
        for name in ("a", "b", "c", "last"):
            setattr(self, name, nn.Linear(4, 4, rng=rng))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.c(self.a(x) + self.b(x)))


@pytest.mark.slow
@pytest.mark.parametrize("named", [False, True])
def test_depthwise_layers_stay_depthwise(named: bool, rng: np.random.Generator) -> None:
    """Where a depthwise layer filters them two channels stay, though fewer were asked for."""
    net, image = network("mobilenet_v1", rng)
    groups = channel_groups(net, image)

    def score(net: nn.Module) -> dict[str, np.ndarray]:
        return {f"{n}.weight": rng.random(m.weight.shape[0]) for n, m in _layers(net).items()}

    least: Any = dict.fromkeys(widths(groups), 1) if named else 1
    for pruned in prune_filters(net, image, 0.9, 3, idle, score, least=least):
        left = channel_groups(pruned.net, image)
        assert left.keys() == groups.keys()
        assert sum(widths(left).values()) == pruned.kept
    small = {name for name, group in left.items() if group.size == 2}
    assert any(groups[name].depthwise for name in small)
    goals = [{name: 1 for name in widths(groups)}]
    (pruned,) = prune_to_widths(net, image, goals, idle, score)
    assert {n: 2 if groups[n].depthwise else 1 for n in goals[0]} == widths(
        channel_groups(pruned.net, image)
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sparsity": 1.0}, "sparsity is the fraction removed"),
        ({"rounds": 0}, "rounds must be at least 1, not 0"),
        ({"combine": "median"}, "combine must be one of mean, sum, max"),
        ({"least": 4}, "leaves 7 of 28, but 8 must stay"),
        ({"least": {"0": 4, "3": 4}}, "leaves 7 of 28, but 8 must stay"),
        ({"least": {"0": 1}}, "are needed for the groups 0, 3, there are some for 0"),
        ({"least": {"0": 1, "3": 1, "5": 1}}, "there are some for 0, 3, 5"),
    ],
)
def test_a_mistake_is_named_before_filters_go(
    settings: dict[str, Any], message: str, rng: np.random.Generator
) -> None:
    """At the call, before a step of training."""
    task = Digits(rng, convolutions=True)
    given = {"sparsity": 0.75, "rounds": 2} | settings
    with pytest.raises(ValueError, match=message):
        prune_filters(task.net, task.image, train=idle, score=lambda net: {}, **given)


@pytest.mark.parametrize(
    ("goals", "settings", "message"),
    [
        ([{"0": 5}], {}, "are needed for the groups 0, 3, there are some for 0"),
        ([{"0": 5, "3": 17}], {}, "3: 17 of 16 channels cannot be kept"),
        ([{"0": 5, "3": 8}, {"0": 6, "3": 8}], {}, "0: 6 of 5 channels cannot be kept"),
        ([{"0": 5, "3": 8}], {"combine": "median"}, "combine must be one of"),
    ],
)
def test_a_mistake_is_named_before_the_widths_change(
    goals: Any, settings: dict[str, Any], message: str, rng: np.random.Generator
) -> None:
    task = Digits(rng, convolutions=True)
    with pytest.raises(ValueError, match=message):
        prune_to_widths(task.net, task.image, goals, idle, lambda net: {}, **settings)


def _layers(net: nn.Module) -> dict[str, nn.Weighted]:
    return {name: m for name, m in net.named_modules() if isinstance(m, nn.Weighted)}
