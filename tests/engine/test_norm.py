"""Batch norm: the fast version against the simple one, statistics, misuse."""

import numpy as np
import pytest

from minihyperflows import ShapeError, Tensor, nn, no_grad
from minihyperflows import functional as F
from minihyperflows.engine.norm import batch_norm_simple, channel_sum


@pytest.mark.parametrize("shape", [(8, 3), (2, 3, 4, 5), (2, 1, 1, 3)])
def test_the_fast_version_is_the_simple_one(shape):
    rng = np.random.default_rng(0)
    arrays = rng.standard_normal(shape), rng.random(shape[-1]) + 0.5, rng.random(shape[-1])
    c = rng.standard_normal(shape)
    results = []
    for function in (lambda *a: F.batch_norm(*a, training=True), batch_norm_simple):
        leaves = [Tensor(a, requires_grad=True) for a in arrays]
        y = function(*leaves)
        y.backward(c)
        results.append([y.numpy(), *(leaf.grad for leaf in leaves)])
    for fast, simple in zip(*results, strict=True):
        np.testing.assert_allclose(fast, simple, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("with_residual", [True, False])
def test_residual_and_relu_in_one_go(training, with_residual):
    """relu(batch norm + residual), value and all gradients, as from the operations themselves."""
    rng = np.random.default_rng(0)
    arrays = rng.standard_normal((6, 5, 4, 3)), rng.random(3) + 0.5, rng.random(3)
    c, r = rng.standard_normal((2, 6, 5, 4, 3))
    statistics = rng.random(3), rng.random(3) + 0.5

    def separate(x, scale, shift, residual=None):
        y = F.batch_norm(x, scale, shift, *statistics, training, momentum=0.0)
        return F.relu(y if residual is None else y + residual)

    def together(x, scale, shift, residual=None):
        options = {"momentum": 0.0, "residual": residual, "relu": True}
        return F.batch_norm(x, scale, shift, *statistics, training, **options)

    results = []
    for function in (separate, together):
        leaves = [Tensor(a, requires_grad=True) for a in arrays + (r,) * with_residual]
        y = function(*leaves)
        y.backward(c)
        results.append([y.numpy(), *(leaf.grad for leaf in leaves)])
    for one, other in zip(*results, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-13)


def test_a_sequence_merges_batch_norm_and_relu():
    rng = np.random.default_rng(0)
    net = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.ReLU(), nn.BatchNorm2d(3), nn.Flatten())
    x = rng.standard_normal((4, 2, 2, 3)).astype(np.float32)
    modules = [module for _, module in net.children()]
    y = Tensor(x)
    for module in modules:
        y = module(y)
    np.testing.assert_allclose(net(x).numpy(), y.numpy(), rtol=1e-6)
    assert [m.num_batches_tracked.item() for m in modules[::3]] == [2, 2]


def test_normalised_channels_have_mean_0_and_variance_1():
    x = 3 + 2 * np.random.default_rng(0).standard_normal((4, 5, 5, 3))
    y = F.batch_norm(Tensor(x), training=True, eps=0.0).numpy()
    np.testing.assert_allclose(y.mean(axis=(0, 1, 2)), 0, atol=1e-12)
    np.testing.assert_allclose(y.var(axis=(0, 1, 2)), 1, rtol=1e-12)


def test_running_statistics_and_evaluation():
    """running <- 0.9 running + 0.1 batch, with the unbiased variance; used outside training."""
    x = np.random.default_rng(0).standard_normal((4, 2, 2, 3))
    layer = nn.BatchNorm2d(3, dtype=np.float64)
    with no_grad():
        layer(x)
    mean, var = layer.running_mean.data, layer.running_var.data
    np.testing.assert_allclose(mean, 0.1 * x.mean(axis=(0, 1, 2)))
    np.testing.assert_allclose(var, 0.9 + 0.1 * x.var(axis=(0, 1, 2), ddof=1))
    assert layer.num_batches_tracked.item() == 1
    layer.eval()
    np.testing.assert_allclose(layer(x).numpy(), (x - mean) / np.sqrt(var + 1e-5))
    assert layer.num_batches_tracked.item() == 1


@pytest.mark.parametrize("rows", [1, 2, 3, 100, 1000, 16384, 16411])
def test_channel_sums(rows):
    """All rows are in the sum; in float32 it is more accurate than adding them up in turn."""
    x = (1 + np.random.default_rng(0).random((rows, 7))).astype(np.float32)
    exact = x.astype(np.float64).sum(axis=0)
    error = np.abs(channel_sum(x) - exact).max() / exact.max()
    assert error < 1e-6
    if rows > 10_000:
        assert error < np.abs(x.sum(axis=0) - exact).max() / exact.max()


def test_misuse():
    with pytest.raises(ValueError, match="at least 2"):
        F.batch_norm(Tensor(np.zeros((1, 3))), training=True)
    with pytest.raises(ValueError, match="running_mean and running_var"):
        F.batch_norm(Tensor(np.zeros((4, 3))))
    with pytest.raises(ShapeError, match="residual"):
        F.batch_norm(Tensor(np.zeros((4, 3))), training=True, residual=Tensor(np.zeros((4, 2))))
    with pytest.raises(ShapeError, match="scale"):
        F.batch_norm(Tensor(np.zeros((4, 3))), Tensor(np.ones(2)), training=True)
