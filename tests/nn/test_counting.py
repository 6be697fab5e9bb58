"""Weights and floating-point operations against the published counts."""

import numpy as np
import pytest

from minihyperflows import flows, models, nn, no_grad
from minihyperflows import functional as F
from minihyperflows.nn.counting import ceil_of, floor_of, flops, kept_weights, sparse_flops
from minihyperflows.related import dhp

IMAGE = {"lenet300": (28, 28, 1)}

# name, classes, weights that pruning gates, batch-norm scales and shifts, FLOPs of one image
COUNTS = [
    ("lenet300", 10, 266_200, 0, 531_990),
    ("vgg19", 10, 20_024_000, 11_008, 795_969_526),
    ("vgg19", 100, 20_070_080, 11_008, None),
    ("resnet50", 10, 23_467_712, 53_120, 2_592_227_318),
    ("resnet50", 100, 23_652_032, 53_120, None),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "classes", "weights", "affine", "operations"), COUNTS)
def test_counts_are_the_published_ones(name, classes, weights, affine, operations):
    rng = np.random.default_rng(0)
    net = getattr(models, name)(num_classes=classes, rng=rng)
    flows.attach(net, rng=rng)
    assert sum(t.size for t in flows.presences(net).values()) == weights
    biases = classes + (400 if name == "lenet300" else 0)
    assert sum(p.size for p in net.parameters()) == weights + affine + biases
    if operations is not None:
        assert sum(flops(net, IMAGE.get(name, (32, 32, 3))).values()) == operations


def test_flops_by_layer_by_hand():
    """K multiplications and K - 1 additions for each output."""
    net = models.lenet300(in_features=4, num_classes=3, rng=np.random.default_rng(0))
    expected = {"fc1": 300 * 7, "fc2": 100 * 599, "fc3": 3 * 199}
    assert flops(net, (2, 2, 1)) == expected
    assert net.training  # as it was


class Again(nn.Module):
    """Four linear layers: the second is used twice, the last never."""

    def __init__(self, rng):
        shapes = {"first": (5, 8), "twice": (8, 8), "last": (8, 3), "never": (8, 8)}
        for name, (inputs, outputs) in shapes.items():
            setattr(self, name, nn.Linear(inputs, outputs, rng=rng))

    def forward(self, x):
        return self.last(self.twice(self.twice(self.first(x))))


def test_every_use_of_a_layer_counts(rng):
    net = Again(rng)
    assert flops(net, (5,)) == {"first": 8 * 9, "twice": 2 * 8 * 15, "last": 3 * 15}


def test_frozen_layers_count_like_others(rng):
    net = Again(rng)
    dense = flops(net, (5,))
    for parameters in ([net.first.weight, net.first.bias], net.parameters()):
        for parameter in parameters:
            parameter.requires_grad = False
        assert flops(net, (5,)) == dense
    assert not any(p.requires_grad for p in net.parameters())
    with no_grad(), pytest.raises(ValueError, match="leave no_grad"):
        flops(net, (5,))


class Once(nn.Module):
    """One linear layer with 5 inputs and 3 outputs, whose weight is computed by ``compute``."""

    def __init__(self, compute, rng):
        self.compute, self.fc = compute, nn.Linear(5, 3, rng=rng)
        self.t = nn.Parameter(np.ones((3, 5), np.float32), role="presence")

    def forward(self, x):
        return F.linear(x, self.compute(self), self.fc.bias)


@pytest.mark.parametrize(
    "compute",
    [
        lambda net: 0.5 * net.fc.weight,
        lambda net: flows.gate(net.t) * net.fc.weight,
        lambda net: np.ones((3, 1), np.float32) * (-net.fc.effective_weight()),
        lambda net: F.softmax(net.t) * net.fc.weight.T.T,
    ],
)
def test_the_layer_behind_a_computed_weight_is_found(compute, rng):
    net = Once(compute, rng)
    assert flops(net, (5,)) == {"fc": 3 * 9}
    flows.attach(net, rng=rng)
    assert flops(net, (5,)) == {"fc": 3 * 9}


def test_a_weight_that_nobody_learns_is_no_layers(rng):
    net = Once(lambda net: np.ones((3, 5), np.float32), rng)
    with pytest.raises(ValueError, match=r"Linear: no parameter is behind its weight .*\(3, 5\)"):
        flops(net, (5,))


def test_a_generated_weight_costs_what_the_layer_costs(rng):
    for build, image in (
        (lambda: models.resnet(20, rng=rng), (32, 32, 3)),
        (lambda: models.lenet300(rng=rng), (28, 28, 1)),
    ):
        net = build()
        dense = flops(net, image)
        network = dhp.HyperNetwork(net, image, rng=rng)
        assert flops(network, image) == {f"net.{name}": count for name, count in dense.items()}
        assert flops(network.net, image) == dense


def test_layers_that_share_a_weight_count_as_the_first(rng):
    net = nn.Sequential(nn.Linear(4, 4, rng=rng), nn.ReLU(), nn.Linear(4, 4, rng=rng))
    net[2].weight = net[0].weight
    assert flops(net, (4,)) == {"0": 2 * 4 * 7}


def test_sparse_flops_round_down_layer_by_layer():
    assert sparse_flops({"a": 10, "b": 7}, {"a": 0.25}) == {"a": 2, "b": 7}
    assert sparse_flops({"a": 100}, {"a": 0.29}) == {"a": 29}  # 28.999999999999996


def test_fractions_of_a_whole_are_those_that_were_meant():
    """Every fraction k / n of n, written as it comes: k / n, 1 - (n - k) / n, or in decimals."""
    for n in (*range(1, 200), 1000, 50_200, 266_200, 10**9):
        for k in {*range(0, min(n, 100) + 1), n // 3, n - 1, n}:
            for fraction in (k / n, 1 - (n - k) / n, 1 - (1 - k / n)):
                assert (
                    floor_of(fraction, n) == ceil_of(fraction, n) == kept_weights(fraction, n) == k
                )
    for hundredths in range(101):
        for n in range(1, 300):
            exact = hundredths * n
            for fraction in (hundredths / 100, 1 - (100 - hundredths) / 100):
                assert floor_of(fraction, n) == exact // 100
                assert ceil_of(fraction, n) == -(-exact // 100)
    assert floor_of(0.9999999, 10) == 9
    assert ceil_of(0.7000001, 10) == 8


def test_grouped_convolutions_count_their_own_channels_only():
    net = models.mobilenet_v1(width=0.25, rng=np.random.default_rng(0))
    per_layer = flops(net, (32, 32, 3))
    assert per_layer["features.0.0"] == 32 * 32 * 8 * (2 * 27 - 1)
    assert per_layer["features.1.0.0"] == 32 * 32 * 8 * (2 * 9 - 1)  # depthwise: 9 weights each
