"""Batch norm by kernels, against the CPU's in float64."""

from __future__ import annotations

import numpy as np
import pytest
from support.gpu import gpu as gpu

from minihyperflows import Tensor, nn, no_grad
from minihyperflows import functional as F
from minihyperflows.engine import norm
from minihyperflows.engine.backend import cupy, to_device, to_numpy
from minihyperflows.engine.gpu import norm as gpu_norm
from minihyperflows.engine.gpu.capture import Replay

DTYPES = ("float32", "float16")
# Relative to the largest number. float16 has 11 bits: a rounding is 5e-4, and x, y, c and dx are
# rounded once each.
TOLERANCE = {"float32": 2e-6, "float16": 1.5e-3}
# Rows and channels: one pixel, packs of all widths, several strips of blocks, slabs, uneven ends.
SHAPES = [
    *((2, 1), (5, 3), (1, 3, 1, 5), (2, 3, 5, 8), (3, 1, 1, 24), (1, 7, 5, 34), (4, 8, 9, 12)),
    *((70, 264), (3, 600), (9, 15, 15, 16), (40, 7, 7, 4)),
]
MERGED = [(False, False), (False, True), (True, False), (True, True)]  # residual, ReLU
every_shape = pytest.mark.parametrize("shape", SHAPES)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


def draw(shape: tuple[int, ...], dtype: str, seed: int = 0) -> dict[str, np.ndarray]:
    rng, c = np.random.default_rng(seed), shape[-1]
    large = {k: rng.standard_normal(shape).astype(dtype) for k in ("x", "residual", "cotangent")}
    small = {
        "scale": rng.random(c) + 0.5,
        "shift": rng.standard_normal(c),
        "mean": rng.standard_normal(c),
        "var": rng.random(c) + 0.5,
    }
    return large | {k: a.astype("float32") for k, a in small.items()}


def train(arrays, device, residual, relu, dtype=None):
    """y, all gradients, and the running statistics, of one step."""
    placed = {k: to_device(a.copy() if dtype is None else a.astype(dtype), device)
              for k, a in arrays.items()}  # fmt: skip
    names = ("x", "scale", "shift", *(("residual",) if residual else ()))
    leaves = {k: Tensor(placed[k], requires_grad=True) for k in names}
    batches = to_device(np.array(6), device)
    y = F.batch_norm(
        *(leaves[k] for k in ("x", "scale", "shift")),
        *(placed["mean"], placed["var"]),
        training=True,
        residual=leaves.get("residual"),
        relu=relu,
        num_batches_tracked=batches,
    )
    y.backward(placed["cotangent"])
    results = {"y": y.data, "mean": placed["mean"], "var": placed["var"], "batches": batches}
    return results | {f"d{k}": leaf.grad for k, leaf in leaves.items()}


def assert_near(results, expected, dtype, factor=1.0):
    for name, want in expected.items():
        found = to_numpy(results[name]).astype(np.float64)
        bound = factor * TOLERANCE[dtype] * max(1, np.abs(want).max())
        assert np.abs(found - want).max() <= bound, (name, np.abs(found - want).max() / bound)


def unambiguous(arrays, residual):
    """Move x away from where float32 and float64 disagree about the sign before the ReLU.

    A change of x changes the statistics a little, so this goes on until nothing is near 0.
    """
    for _ in range(20):
        wide = {k: a.astype(np.float64) for k, a in arrays.items()}
        added = Tensor(wide["residual"]) if residual else None
        vectors = Tensor(wide["scale"]), Tensor(wide["shift"])
        y = F.batch_norm(Tensor(wide["x"]), *vectors, training=True, residual=added).numpy()
        near = np.abs(y) < 4e-3
        if not near.any():
            return arrays
        arrays["x"] = np.where(near, arrays["x"] + 0.05, arrays["x"]).astype(arrays["x"].dtype)
    raise AssertionError("there is always something near 0")


@every_shape
@every_dtype
@pytest.mark.parametrize(("residual", "relu"), MERGED)
def test_training_is_that_of_the_cpu(gpu, shape, dtype, residual, relu):
    arrays = draw(shape, dtype)
    if shape == (2, 1):
        arrays["x"][0] = arrays["x"][1] + 2
    if relu:
        arrays = unambiguous(arrays, residual)
    expected = train(arrays, "cpu", residual, relu, np.float64)
    results = train(arrays, "cuda", residual, relu)
    assert results["y"].dtype == results["dx"].dtype == dtype
    assert all(results[k].dtype == "float32" for k in ("dscale", "dshift", "mean", "var"))
    assert results["batches"].item() == 7
    small = {"mean", "var", "dscale", "dshift", "batches"}
    # Sums over the rows are float32 even if what is summed is float16.
    assert_near(results, {k: a for k, a in expected.items() if k in small}, "float32", 3)
    assert_near(results, {k: a for k, a in expected.items() if k not in small}, dtype)


@every_dtype
def test_numbers_in_the_place_of_scale_and_shift(gpu, dtype):
    arrays = draw((6, 5), dtype)
    expected = F.batch_norm(Tensor(arrays["x"].astype(np.float64)), None, None, training=True)
    x = Tensor(to_device(arrays["x"], "cuda"), requires_grad=True)
    y = F.batch_norm(x, None, None, training=True)
    assert isinstance(y.creator, gpu_norm.BatchNorm)
    assert_near({"y": y.data}, {"y": expected.numpy()}, dtype)
    y.backward(to_device(arrays["cotangent"], "cuda"))
    assert x.grad.dtype == dtype


@pytest.mark.parametrize(
    ("offset", "first", "rtol"), [(1e3, 0, 2e-6), (-3e4, 0, 2e-6), (0, 40, 2e-5)]
)
def test_a_mean_far_from_zero_costs_no_digits(gpu, offset, first, rtol):
    """The variance is right to 2e-6 though the mean is 1000 (30,000) standard deviations away.

    The differences are taken from the first row. If that is 40 standard deviations away from the
    others, 5 digits are left.
    """
    rng = np.random.default_rng(0)
    x = (offset + rng.standard_normal((700, 5))).astype(np.float32)
    x[0] += first
    wide = x.astype(np.float64)
    running = [to_device(np.zeros(5, np.float32), "cuda") for _ in range(2)]
    y = F.batch_norm(
        Tensor(to_device(x, "cuda")), None, None, *running, training=True, momentum=1.0
    )
    np.testing.assert_allclose(to_numpy(running[0]), wide.mean(axis=0), rtol=2e-7, atol=rtol / 4)
    np.testing.assert_allclose(to_numpy(running[1]), wide.var(axis=0, ddof=1), rtol=rtol)
    expected = (wide - wide.mean(axis=0)) / np.sqrt(wide.var(axis=0) + 1e-5)
    spacing = abs(offset) * 2**-23  # of the float32 numbers near the mean
    np.testing.assert_allclose(y.numpy(), expected, rtol=rtol, atol=2 * spacing + rtol)


@every_dtype
def test_gradients_go_to_their_buffers(gpu, dtype):
    arrays = draw((4, 3, 3, 8), dtype)
    x, c = (to_device(arrays[k], "cuda") for k in ("x", "cotangent"))
    flat = cupy().zeros(19, "float32")  # the parameters' gradients lie at odd places in it
    scale, shift = (Tensor(to_device(arrays[k], "cuda"), requires_grad=True)
                    for k in ("scale", "shift"))  # fmt: skip
    scale.gradient_buffer, shift.gradient_buffer = flat[1:9], flat[9:17]
    F.batch_norm(Tensor(x), scale, shift, training=True).backward(c)
    assert scale.grad is scale.gradient_buffer
    expected = train(arrays, "cpu", False, False, np.float64)
    assert_near({"dscale": flat[1:9]}, {"dscale": expected["dscale"]}, "float32", 3)
    assert_near({"dshift": flat[9:17]}, {"dshift": expected["dshift"]}, "float32", 3)
    assert to_numpy(flat)[[0, 17, 18]].tolist() == [0, 0, 0]
    F.batch_norm(Tensor(x), scale, shift, training=True).backward(c)  # a second one is added
    assert_near({"dscale": flat[1:9]}, {"dscale": 2 * expected["dscale"]}, "float32", 3)


@every_dtype
def test_a_thread_may_have_many_turns(gpu, dtype, monkeypatch):
    """Few blocks, or many: the same sums in another order, the same everything else."""
    arrays = unambiguous(draw((9, 15, 15, 16), dtype), residual=True)
    expected = train(arrays, "cpu", True, True, np.float64)
    for most, slabs in ((1, 1), (3, 2), (10**6, 10**6)):
        monkeypatch.setattr(gpu_norm, "MOST_BLOCKS", most)
        monkeypatch.setattr(gpu_norm, "SLAB_BLOCKS", slabs)
        results = train(arrays, "cuda", True, True)
        small = {"mean", "var", "dscale", "dshift"}
        assert_near(results, {k: expected[k] for k in small}, "float32", 3)
        assert_near(results, {k: expected[k] for k in ("y", "dx", "dresidual")}, dtype)


@every_shape
@every_dtype
@pytest.mark.parametrize(("residual", "relu"), MERGED)
def test_evaluation_is_one_kernel(gpu, shape, dtype, residual, relu, monkeypatch):
    arrays = draw(shape, dtype)

    def evaluate(device, dtype=None):
        placed = {k: Tensor(to_device(a if dtype is None else a.astype(dtype), device))
                  for k, a in arrays.items()}  # fmt: skip
        statistics = placed["mean"].data, placed["var"].data
        options = {"residual": placed["residual"] if residual else None, "relu": relu}
        with no_grad():
            vectors = placed["scale"], placed["shift"]
            return F.batch_norm(placed["x"], *vectors, *statistics, **options)

    expected = evaluate("cpu", np.float64)
    launched = []
    launch = gpu_norm.SOURCE.launch
    monkeypatch.setattr(gpu_norm.SOURCE, "launch", lambda *a: (launched.append(a[0]), launch(*a)))
    y = evaluate("cuda")
    assert [name.partition("<")[0] for name in launched] == ["evaluate"]
    assert y.dtype == dtype
    assert_near({"y": y.data}, {"y": expected.numpy()}, dtype)


@pytest.mark.slow
def test_evaluation_can_be_differentiated(gpu):
    arrays = draw((6, 5), "float32")
    x = Tensor(to_device(arrays["x"], "cuda"), requires_grad=True)
    statistics = (to_device(arrays[k], "cuda") for k in ("mean", "var"))
    F.batch_norm(x, None, None, *statistics, relu=True).sum().backward()
    y = (arrays["x"] - arrays["mean"]) / np.sqrt(arrays["var"] + 1e-5)
    slope = (y > 0) / np.sqrt(arrays["var"] + 1e-5)
    np.testing.assert_allclose(to_numpy(x.grad), slope, rtol=1e-5)


@pytest.mark.slow
def test_a_nan_is_not_lost(gpu):
    arrays = draw((6, 5), "float32")
    arrays["x"][4, 2] = np.nan
    results = train(arrays, "cuda", True, True)
    found = np.isnan(to_numpy(results["y"]))
    assert found[:, 2].all()
    assert not found[:, [0, 1, 3, 4]].any()
    assert np.isnan(to_numpy(results["var"])[2])


def test_other_types_go_the_general_way(gpu):
    layer = nn.BatchNorm2d(3, dtype=np.float64).to("cuda")
    x = np.random.default_rng(0).standard_normal((4, 3))
    y = layer(Tensor(to_device(x, "cuda")))
    assert type(y.creator) is norm.BatchNorm
    np.testing.assert_allclose(y.numpy().var(axis=0), 1, rtol=1e-4)
    assert layer.num_batches_tracked.item() == 1


@every_dtype
@pytest.mark.parametrize(("residual", "relu"), MERGED)
def test_a_replay_is_the_step_itself(gpu, dtype, residual, relu):
    """Bit for bit, on the numbers that lie in the inputs by then."""
    first, second = (draw((3, 7, 5, 24), dtype, seed) for seed in (1, 2))
    net = nn.BatchNorm2d(24).to("cuda")
    x, r = (Tensor(to_device(first[k].copy(), "cuda"), True) for k in ("x", "residual"))
    c = to_device(first["cotangent"].copy(), "cuda")
    results = {}

    def step():
        y = net._normalise(x, r if residual else None, relu)
        y.backward(c)
        leaves = {"x": x, "residual": r, "weight": net.weight, "bias": net.bias}
        results.update({k: leaf.grad for k, leaf in leaves.items() if leaf.grad is not None})
        results["y"] = y.data
        for leaf in leaves.values():
            leaf.grad = None

    def outcome():
        running = {k: b.data for k, b in net.named_tensors().items()}
        return {k: to_numpy(a).copy() for k, a in (results | running).items()}

    def reset():
        for b in (net.running_mean, net.running_var, net.num_batches_tracked):
            b.data.fill(0)

    step()
    reset()
    replay = Replay(step)
    for arrays in (first, second):
        for tensor, name in ((x, "x"), (r, "residual")):
            tensor.data.set(arrays[name])
        c.set(arrays["cotangent"])
        reset()
        before = dict(results)
        step()
        eager = outcome()
        results.update(before)
        reset()
        replay()
        again = outcome()
        assert again.keys() == eager.keys()
        for name in eager:
            np.testing.assert_array_equal(again[name], eager[name], err_msg=name)
        assert again["num_batches_tracked"] == 1
