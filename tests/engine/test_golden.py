"""Against numbers from PyTorch that are kept in a file (tests/golden/make_golden.py made it)."""

import numpy as np
import pytest
from support import GOLDEN

from minihyperflows import Tensor, nn, optim
from minihyperflows import functional as F

# stride, padding, groups
CONVOLUTIONS = {
    "plain": (1, 1, 1),
    "strided": ((2, 1), (0, 1), 1),
    "grouped": (2, 1, 2),
    "depthwise": (1, 1, 3),
    "pointwise": (1, 0, 1),
}


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN, allow_pickle=False) as arrays:
        return dict(arrays)


def part(golden, name):
    return {k.removeprefix(f"{name}."): v for k, v in golden.items() if k.startswith(f"{name}.")}


def leaf(array):
    return Tensor(array, requires_grad=True)


def close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution(golden, name):
    g = part(golden, f"conv.{name}")
    x, w, b = leaf(g["x"]), leaf(g["w"]), leaf(g["b"])
    stride, padding, groups = CONVOLUTIONS[name]
    y = F.conv2d(x, w, b, stride, padding, groups)
    y.backward(g["c"])
    for found, expected in ((y.data, "y"), (x.grad, "dx"), (w.grad, "dw"), (b.grad, "db")):
        close(found, g[expected])


def test_batch_norm(golden):
    g = part(golden, "bn")
    x, scale, shift = leaf(g["x"]), leaf(g["scale"]), leaf(g["shift"])
    mean, var = g["mean"].copy(), g["var"].copy()
    y = F.batch_norm(x, scale, shift, mean, var, training=True)
    y.backward(g["c"])
    pairs = {"y": y.data, "dx": x.grad, "dscale": scale.grad, "dshift": shift.grad}
    for name, found in (pairs | {"new_mean": mean, "new_var": var}).items():
        close(found, g[name])


@pytest.mark.parametrize(("name", "pool"), [("max", F.max_pool2d), ("avg", F.avg_pool2d)])
def test_pooling_with_ties(golden, name, pool):
    g = part(golden, f"{name}_pool")
    x = leaf(g["x"])
    y = pool(x, 3, 2)
    y.backward(g["c"])
    close(y.data, g["y"])
    close(x.grad, g["dx"])


def test_cross_entropy(golden):
    g = part(golden, "ce")
    z = leaf(g["z"])
    loss = F.cross_entropy(z, g["labels"], label_smoothing=0.1)
    loss.backward()
    close(loss.data, g["loss"])
    close(z.grad, g["dz"])


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_optimisers(golden, name):
    g = part(golden, "optim")
    p = nn.Parameter(g["theta"].copy())
    optimiser = {
        "sgd": lambda: optim.SGD([p], 0.1, momentum=0.9, weight_decay=0.01, nesterov=True),
        "adam": lambda: optim.Adam([p], 0.01, weight_decay=0.01),
    }[name]()
    for gradient in g["gradients"]:
        p.grad = gradient
        optimiser.step()
    close(p.data, g[name])
