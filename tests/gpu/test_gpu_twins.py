"""How an operation finds its twin on a GPU, and what stays as it was."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from support.functions import subclasses
from support.gpu import gpu as gpu
from support.lanes import large

import minihyperflows as mh
from minihyperflows import Function, GraphError, ShapeError, Tensor, apply, no_grad
from minihyperflows import functional as F
from minihyperflows.engine import conv, norm, ops, pooling, twins
from minihyperflows.engine.backend import to_device, to_numpy
from minihyperflows.engine.gpu import convolution, elementwise, linear, loss
from minihyperflows.engine.gpu import norm as gpu_norm
from minihyperflows.engine.gpu import pooling as gpu_pooling

TWINS = {
    ops.ReLU: elementwise.ReLU,
    ops.Linear: linear.Linear,
    ops.CrossEntropy: loss.CrossEntropy,
    conv.Conv2d: convolution.Conv2d,
    pooling.MaxPool2d: gpu_pooling.MaxPool2d,
    pooling.AvgPool2d: gpu_pooling.AvgPool2d,
    norm.BatchNorm: gpu_norm.BatchNorm,
    norm.Normalise: gpu_norm.Normalise,
}


def on_gpu(array: np.ndarray, requires_grad: bool = False) -> Tensor:
    return Tensor(to_device(array.astype(np.float32), "cuda"), requires_grad)


def test_every_twin_is_registered_under_its_own_name() -> None:
    """So that messages name the operation, whoever computes it."""
    twin_classes = {
        f
        for f in subclasses(Function)
        if f.__module__.startswith("minihyperflows.engine.gpu.") and "forward" in vars(f)
    }
    assert set(TWINS.values()) == twin_classes
    found = {k: v for k, v in twins._twins().items() if isinstance(k, type)}
    assert found == TWINS
    for original, twin in TWINS.items():
        assert issubclass(twin, original)
        assert twin.__name__ == original.__name__
        assert twin.arithmetic is original.arithmetic


class Leaky(ops.ReLU):
    """max(x, 0) + x / 10: a student's, who knows nothing of twins."""

    def forward(self, x):
        return super().forward(x) + x / 10

    def backward(self, c):
        return super().backward(c) + c / 10


def test_a_subclass_is_not_replaced(gpu) -> None:
    x = on_gpu(np.array([-2.0, 3.0]), requires_grad=True)
    y = apply(Leaky(), x)
    assert type(y.creator) is Leaky
    np.testing.assert_allclose(y.numpy(), [-0.2, 3.3], rtol=1e-6)
    y.backward(np.ones(2))
    np.testing.assert_allclose(to_numpy(x.grad), [0.1, 1.1], rtol=1e-6)


def test_a_twin_is_the_function_in_all_but_its_type(gpu) -> None:
    """Its attributes, its name, and that an instance records one application."""
    pool = pooling.MaxPool2d(2, 1)
    pool.note = "kept"
    x = on_gpu(np.arange(9.0).reshape(1, 3, 3, 1), requires_grad=True)
    y = apply(pool, x)
    assert type(y.creator) is gpu_pooling.MaxPool2d
    assert (y.creator.note, y.creator.size, y.creator.stride) == ("kept", (2, 2), (1, 1))
    assert pool.inputs == y.creator.inputs == (x,)
    with pytest.raises(GraphError, match="this MaxPool2d was applied already"):
        apply(pool, x)
    y.sum().backward()
    assert pool.freed
    assert "place" not in vars(pool)
    with pytest.raises(GraphError, match="this MaxPool2d was applied already"):
        apply(pool, x)


def test_without_a_graph_one_function_serves_both_devices(gpu) -> None:
    relu, x = ops.ReLU(), np.array([-1.0, 2.0], np.float32)
    with no_grad():
        for tensor in (on_gpu(x), Tensor(x), on_gpu(x), Tensor(x.astype(np.float16))):
            y = apply(relu, tensor)
            assert (y.device, y.dtype) == (tensor.device, tensor.dtype)
            assert y.numpy().tolist() == [0, 2]
    assert type(relu) is ops.ReLU


@pytest.mark.slow
def test_mistakes_are_named_as_on_the_cpu(gpu) -> None:
    """A twin looks at the shapes too, and takes() itself stumbles over none."""
    rng = np.random.default_rng(0)
    shapes = [
        (),
        (3,),
        (3, 4),
        (2, 3, 4),
        (2, 3, 3, 4),
        (0, 3),
        (0, 3, 3, 4),
        (5, 2, 2, 4),
        (5,),
        (4,),
    ]
    arrays = [rng.standard_normal(s).astype(np.float32) for s in shapes]
    labels = np.array([0, 1, 2])
    calls = {
        "Linear": lambda to, a, b: apply(ops.Linear(), to(a), to(b)),
        "Conv2d": lambda to, a, b: apply(conv.Conv2d(1, 1), to(a), to(b)),
        "bias": lambda to, a, b: apply(conv.Conv2d(), to(arrays[4]), to(arrays[7]), to(b)),
        "MaxPool2d": lambda to, a, b: apply(pooling.MaxPool2d(3), to(a)),
        "AvgPool2d": lambda to, a, b: apply(pooling.AvgPool2d(2), to(a)),
        "CrossEntropy": lambda to, a, b: F.cross_entropy(to(a), to(labels).data),
        "batch_norm": lambda to, a, b: F.batch_norm(to(a), to(b), training=True),
        "ReLU": lambda to, a, b: F.relu(to(a)),
        "Add": lambda to, a, b: to(a) + to(b),
    }
    outcomes = set()
    for name, call in calls.items():
        for a in arrays:
            for b in arrays:
                ours, theirs = (
                    _outcome(lambda d=d: call(lambda x: Tensor(to_device(x, d)), a, b))  # noqa: B023
                    for d in ("cuda", "cpu")
                )
                assert ours == theirs, (name, a.shape, b.shape)
                outcomes.add((name, ours[:1]))
    assert {(name, "y") for name in calls} <= {(name, kind) for name, kind in outcomes}


def _outcome(call) -> str:
    """The shape of a result, or the error and its message."""
    try:
        return f"y {call().shape}"
    except (ShapeError, ValueError, TypeError) as error:
        return f"error {type(error).__name__}: {error}"


@pytest.mark.parametrize("way", ["im2col", "winograd2"])
def test_a_way_that_was_asked_for_is_the_way(gpu, way) -> None:
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((2, 5, 5, 3)), rng.standard_normal((4, 3, 3, 3))
    function = conv.Conv2d(1, 1, way=way)
    y = apply(function, on_gpu(x, True), on_gpu(w))
    assert type(y.creator) is conv.Conv2d
    expected = apply(conv.Conv2d(1, 1), x, w).data
    np.testing.assert_allclose(y.numpy(), expected, rtol=1e-4, atol=1e-5)


def test_whole_numbers_become_floats_before_the_twin_is_asked(gpu) -> None:
    """Pixels as they are stored, and float32 weights: still the kernels' work."""
    rng = np.random.default_rng(0)
    pixels, w = rng.integers(0, 256, (2, 5, 5, 3), np.uint8), rng.standard_normal((4, 3, 3, 3))
    y = apply(conv.Conv2d(), to_device(pixels, "cuda"), on_gpu(w, True))
    assert type(y.creator) is convolution.Conv2d
    assert y.dtype == np.float32
    np.testing.assert_allclose(y.numpy(), apply(conv.Conv2d(), pixels, w).data, rtol=1e-4)


def test_batch_norm_of_given_statistics_is_one_function(gpu) -> None:
    """By kernels where nothing is to be differentiated; else the formula, with its gradient."""
    rng = np.random.default_rng(1)
    x, r = rng.standard_normal((2, 6, 5))
    mean, var = rng.standard_normal(5), rng.random(5) + 0.5
    given = [to_device(a.astype(np.float32), "cuda") for a in (mean, var)]
    expected_x, expected_r = Tensor(x, True), Tensor(r, True)
    expected = F.batch_norm(expected_x, None, None, mean, var, residual=expected_r, relu=True)
    expected.backward(r)

    y = F.batch_norm(on_gpu(x), None, None, *given, residual=on_gpu(r), relu=True)
    np.testing.assert_allclose(y.numpy(), expected.numpy(), rtol=1e-5, atol=1e-6)
    leaf, residual = on_gpu(x, True), on_gpu(r, True)
    y = F.batch_norm(leaf, None, None, *given, residual=residual, relu=True)
    assert type(y.creator) is norm.Normalise
    y.backward(r)
    for found, wanted in ((leaf, expected_x), (residual, expected_r)):
        np.testing.assert_allclose(to_numpy(found.grad), wanted.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("length", [1, 5, *large(3)])
def test_kernels_get_no_vector_of_another_length(gpu, length) -> None:
    """They would read beyond its end. Broadcasting, (1,) is the general way's."""
    x = np.random.default_rng(2).standard_normal((6, 5))
    scale, shift, ones = np.full(length, 2.0), np.zeros(length), np.ones(5, np.float32)
    for function, twin in (
        (lambda: norm.BatchNorm(), gpu_norm.BatchNorm),
        (lambda: norm.Normalise(*(to_device(a, "cuda") for a in (0 * ones, ones))), None),
    ):
        if length == 3:
            with pytest.raises(ValueError, match="broadcast"):
                apply(function(), on_gpu(x, True), on_gpu(scale), on_gpu(shift))
            continue
        y = apply(function(), on_gpu(x, True), on_gpu(scale), on_gpu(shift))
        assert isinstance(y.creator, twin or norm.Normalise) == (length == 5 or twin is None)
        z = (x - x.mean(0)) / x.std(0) if twin else x
        np.testing.assert_allclose(y.numpy(), 2 * z, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_a_computation_on_the_cpu_loads_no_twin() -> None:
    code = (
        "import sys; from minihyperflows.engine import ops, tensor; import numpy as np;"
        "x = tensor.Tensor(np.ones(3, np.float32), True);"
        "tensor.apply(ops.ReLU(), x + x).sum().backward();"
        "print([m for m in sys.modules if m == 'minihyperflows.engine.gpu.convolution'])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert result.stdout.strip() == "[]", mh.__file__
