"""Softmax cross-entropy by kernels, against the CPU's in float64."""

from __future__ import annotations

import numpy as np
import pytest
from support.gpu import gpu as gpu

from minihyperflows import ShapeError, Tensor
from minihyperflows import functional as F
from minihyperflows.engine.backend import cupy, to_device, to_numpy
from minihyperflows.engine.gpu.capture import Replay

SHAPES = [(1, 2), (3, 1), (5, 10), (128, 10), (130, 100), (7, 1003)]
every_shape = pytest.mark.parametrize("shape", SHAPES)
every_dtype = pytest.mark.parametrize("dtype", ["float32", "float16"])
every_smoothing = pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
# Of the loss and, relative to its largest number, the gradient: one rounding to float16, or the
# exponentials of float32.
TOLERANCE = {"float32": 3e-6, "float16": 6e-4}


def draw(shape, dtype, seed=0, spread=3.0):
    rng = np.random.default_rng(seed)
    logits = (spread * rng.standard_normal(shape)).astype(dtype)
    return logits, rng.integers(0, shape[1], shape[0])


def loss_and_gradient(logits, labels, smoothing, cotangent=None):
    leaf = Tensor(logits, requires_grad=True)
    loss = F.cross_entropy(leaf, labels, smoothing)
    loss.backward(cotangent)
    return loss.data, leaf.grad


def compare(logits, labels, smoothing, label_dtype="int32"):
    loss, gradient = loss_and_gradient(logits.astype(np.float64), labels, smoothing)
    arrays = to_device(logits, "cuda"), to_device(labels.astype(label_dtype), "cuda")
    loss_gpu, gradient_gpu = loss_and_gradient(*arrays, smoothing)
    assert loss_gpu.dtype == "float32"
    assert loss_gpu.shape == ()
    assert gradient_gpu.dtype == logits.dtype
    np.testing.assert_allclose(loss_gpu.item(), loss, rtol=TOLERANCE["float32"], atol=1e-6)
    bound = TOLERANCE[logits.dtype.name] * max(1e-6, np.abs(gradient).max())
    bound += 2**-25 * (logits.dtype == "float16")  # half the smallest float16
    np.testing.assert_allclose(to_numpy(gradient_gpu), gradient, rtol=0, atol=bound)


@every_shape
@every_dtype
@every_smoothing
@pytest.mark.parametrize("label_dtype", ["int32", "int64"])
def test_the_loss_is_that_of_the_cpu(gpu, shape, dtype, smoothing, label_dtype):
    compare(*draw(shape, dtype), smoothing, label_dtype)


@every_smoothing
@pytest.mark.parametrize(
    ("dtype", "spread"), [("float32", 1e4), ("float16", 1e4), ("float32", 1e30)]
)
def test_large_logits_overflow_nothing(gpu, dtype, spread, smoothing):
    compare(*draw((9, 13), dtype, spread=spread), smoothing)


def test_minus_infinity_is_a_probability_of_0(gpu):
    logits, labels = draw((4, 5), "float32")
    logits[0, (labels[0] + 1) % 5] = -np.inf
    compare(logits, labels, 0.0)


@every_dtype
@pytest.mark.parametrize("wrong", [-1, 5, 2**31 - 1, -(2**31)])
def test_a_label_out_of_range_makes_the_loss_nan(gpu, dtype, wrong):
    logits, labels = draw((6, 5), dtype)
    labels[2] = wrong
    arrays = to_device(logits, "cuda"), to_device(labels.astype("int32"), "cuda")
    loss, gradient = loss_and_gradient(*arrays, 0.0, to_device(np.float32(1), "cuda"))
    assert np.isnan(loss.item())
    assert np.isnan(to_numpy(gradient)).any(axis=1).tolist() == [n == 2 for n in range(6)]


def test_shapes_and_kinds_are_checked(gpu):
    logits = Tensor(to_device(np.zeros((4, 3), np.float32), "cuda"))
    with pytest.raises(ShapeError, match="do not fit"):
        F.cross_entropy(logits, cupy().zeros(3, "int32"))
    with pytest.raises(TypeError, match="integers"):
        F.cross_entropy(logits, cupy().zeros(4, "float32"))


def test_other_labels_go_the_general_way(gpu):
    """There the range is checked."""
    logits = Tensor(to_device(np.zeros((2, 3), np.float32), "cuda"))
    loss = F.cross_entropy(logits, to_device(np.array([0, 2], np.uint8), "cuda"))
    assert loss.item() == pytest.approx(np.log(3))
    with pytest.raises(ValueError, match="out of range"):
        F.cross_entropy(logits, to_device(np.array([0, 3], np.uint8), "cuda"))


@every_dtype
@pytest.mark.parametrize("cotangent_dtype", ["float32", "float16", "float64"])
def test_the_cotangent_scales_the_gradient(gpu, dtype, cotangent_dtype):
    logits, labels = draw((8, 10), dtype)
    arrays = to_device(logits, "cuda"), to_device(labels.astype("int32"), "cuda")
    scale = to_device(np.array(256, cotangent_dtype), "cuda")
    _, once = loss_and_gradient(*arrays, 0.1)
    _, scaled = loss_and_gradient(*arrays, 0.1, scale)
    assert scaled.dtype == dtype
    once, scaled = (to_numpy(a).astype(np.float64) for a in (once, scaled))
    bound = 1e-6 if dtype == "float32" else 6e-4
    np.testing.assert_allclose(scaled, 256 * once, rtol=0, atol=bound * np.abs(scaled).max())


@every_dtype
@every_smoothing
def test_a_replay_reads_new_logits_labels_and_scale(gpu, dtype, smoothing):
    """Bit for bit what the step itself computes, with the loss scale in GPU memory."""
    logits, labels = draw((70, 10), dtype)
    x = Tensor(to_device(logits, "cuda"), requires_grad=True)
    labels = to_device(labels.astype("int32"), "cuda")
    scale = to_device(np.array(1, np.float32), "cuda")
    results = {}

    def step():
        x.grad = None
        loss = F.cross_entropy(x, labels, smoothing)
        loss.backward(scale)
        results.update(loss=loss.data, gradient=x.grad)

    step()
    replay = Replay(step)
    recorded, seen = dict(results), []
    for seed, factor in ((1, 128), (2, 2**14)):
        new_logits, new_labels = draw((70, 10), dtype, seed)
        x.data.set(new_logits)
        labels.set(new_labels.astype("int32"))
        scale.set(np.array(factor, np.float32))
        replay()
        step()
        for name, array in recorded.items():
            np.testing.assert_array_equal(to_numpy(array), to_numpy(results[name]))
        wide = loss_and_gradient(new_logits.astype(np.float64), new_labels, smoothing)
        seen.append(recorded["loss"].item())
        np.testing.assert_allclose(seen[-1], wide[0], rtol=3e-6)
        gradient = factor * wide[1]
        bound = TOLERANCE[dtype] * np.abs(gradient).max()
        np.testing.assert_allclose(to_numpy(recorded["gradient"]), gradient, rtol=0, atol=bound)
    assert seen[0] != seen[1]
