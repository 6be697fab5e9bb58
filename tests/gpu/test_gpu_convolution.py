"""Products, convolutions, linear layers and biases on a GPU, real or emulated, against the CPU."""

import numpy as np
import pytest

from minihyperflows import ShapeError, Tensor, apply, no_grad
from minihyperflows import functional as F
from minihyperflows.engine.backend import cupy, to_device
from minihyperflows.engine.conv import Conv2d
from minihyperflows.engine.errors import DeviceError
from minihyperflows.engine.gpu import bias, convolution, gemm, linear
from minihyperflows.engine.gpu.division import divisor
from minihyperflows.engine.im2col import col2im
from minihyperflows.engine.im2col import im2col as im2col_on_cpu
from minihyperflows.engine.ops import Linear
from minihyperflows.engine.windows import pad

pytestmark = pytest.mark.usefixtures("gpu")

TYPES = [np.float32, np.float16]

# The largest error, relative to the largest number. The results are float32 sums of products that
# are exact there; in half precision they are rounded once more (to 11 bits: 5e-4), and dL/dx is a
# sum of rounded numbers.
TOLERANCE = {np.float32: 2e-6, np.float16: 1e-3}


def draw(*shape, dtype=np.float64):
    """Numbers that every dtype here can hold."""
    seed = [len(shape), *shape]
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float16).astype(dtype)


def on_gpu(array):
    return to_device(array, "cuda")


def assert_close(found, expected, tolerance):
    found = cupy().asnumpy(found)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= tolerance * max(np.abs(expected).max(), 1e-30)


# -- products --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtypes", [(np.float32, np.float32), (np.float16,) * 2, TYPES[::-1]])
@pytest.mark.parametrize("transpose_a", [False, True])
@pytest.mark.parametrize("transpose_b", [False, True])
@pytest.mark.parametrize("gaps", [(0, 0, 0), (3, 0, 1), (0, 5, 2)])
@pytest.mark.parametrize("size", [(5, 7, 3), (8, 1, 16), (1, 4, 1)])
def test_products(dtypes, transpose_a, transpose_b, gaps, size):
    (dtype, out_dtype), (m, n, k) = dtypes, size
    shapes = (k, m) if transpose_a else (m, k), (n, k) if transpose_b else (k, n)
    a, b = (draw(r, c + gap, dtype=dtype) for (r, c), gap in zip(shapes, gaps, strict=False))
    rows_a, rows_b = a[:, : shapes[0][1]], b[:, : shapes[1][1]]
    wide = on_gpu(np.full((m, n + gaps[2]), 7, out_dtype))
    out = wide[:, :n]
    found = gemm.multiply(
        *(on_gpu(a)[:, : shapes[0][1]], on_gpu(b)[:, : shapes[1][1]], out),
        *(transpose_a, transpose_b),
    )
    assert found is out
    op_a, op_b = (x.astype(np.float64) for x in (rows_a, rows_b))
    expected = (op_a.T if transpose_a else op_a) @ (op_b.T if transpose_b else op_b)
    assert_close(out, expected, 1e-6 if out_dtype == np.float32 else 1e-3)
    assert (cupy().asnumpy(wide)[:, n:] == 7).all()  # what lies between the rows is not written


def test_product_is_added():
    a, b = draw(4, 6, dtype=np.float16), draw(6, 5, dtype=np.float16)
    out = on_gpu(np.full((4, 5), 2, np.float32))
    gemm.multiply(on_gpu(a), on_gpu(b), out, accumulate=True)
    assert_close(out, 2 + a.astype(np.float64) @ b.astype(np.float64), 1e-6)


def test_empty_products():
    a, b, out = (cupy().zeros(shape, np.float32) for shape in [(0, 3), (3, 2), (0, 2)])
    assert gemm.multiply(a, b, out) is out
    with pytest.raises(ShapeError, match=r"a \(0, 3\) transposed, .* leave nothing to add up"):
        gemm.multiply(a, out, b, transpose_a=True)


def test_what_cannot_be_multiplied():
    a, b, out = (on_gpu(draw(*s, dtype=np.float32)) for s in [(2, 3), (3, 4), (2, 4)])
    with pytest.raises(ShapeError, match=r"a \(2, 3\) transposed, b \(3, 4\) and out \(2, 4\)"):
        gemm.multiply(a, b, out, transpose_a=True)
    with pytest.raises(ShapeError, match=r"out \(3, 4\) do not fit"):
        gemm.multiply(a, b, b)
    with pytest.raises(ShapeError, match="does not lie row by row"):
        gemm.multiply(a, on_gpu(draw(4, 3, dtype=np.float32)).T, out)
    with pytest.raises(ShapeError, match=r"b of shape \(12,\) is not a matrix"):
        gemm.multiply(a, b.reshape(-1), out)
    with pytest.raises(TypeError, match="a is float32, b float16 and out float32"):
        gemm.multiply(a, b.astype(np.float16), out)
    with pytest.raises(TypeError, match="a is float32, b float32 and out float16"):
        gemm.multiply(a, b, out.astype(np.float16))
    with pytest.raises(TypeError, match="b is float64, not float32 or float16"):
        gemm.multiply(a, b.astype(np.float64), out)
    with pytest.raises(DeviceError, match="b lies on the cpu"):
        gemm.multiply(a, draw(3, 4, dtype=np.float32), out)


def test_cublas_says_what_failed():
    cublas = gemm.Cublas()
    a = on_gpu(np.zeros((2, 2), np.float32))
    matrix = (a.data.ptr, 0, 1)  # a leading dimension that is too small
    with pytest.raises(gemm.CublasError) as error:
        cublas.gemm(0, 0, 2, 2, 2, gemm._ONE, *matrix, *matrix, gemm._ZERO, *matrix, words="a, b")
    assert str(error.value) == "cublasGemmEx: status 7 (INVALID_VALUE) for a, b"


def test_each_stream_has_a_workspace(monkeypatch):
    cublas, calls = gemm.Cublas(), []
    monkeypatch.setattr(cublas, "_call", lambda name, *arguments: calls.append((name, *arguments)))
    for stream in (5, 5, 6, 5):
        cublas._use_stream(stream)
    names = ["cublasSetStream_v2", "cublasSetWorkspace_v2"] * 3  # set again after every change
    assert [call[0] for call in calls] == names
    assert [call[2] for call in calls[::2]] == [5, 6, 5]
    first, second, third = (call[2] for call in calls[1::2])
    assert first == third != second


def test_division_by_multiplication(rng):
    def divide(n, d):
        multiplier, shift = (int(i) for i in divisor(d))
        assert 0 < multiplier < 1 << 32
        return ((n * multiplier >> 32) + n) >> shift

    limit = (1 << 31) - 1
    divisors = [*range(1, 70), *(1 << i for i in range(31)), *rng.integers(1, limit, 200), limit]
    for d in map(int, divisors):
        numerators = {0, 1, d - 1, d, min(2 * d - 1, limit), limit - limit % d, limit}
        numerators |= {limit // d * d - 1} | set(rng.integers(0, limit, 20).tolist())
        assert all(divide(n, d) == n // d for n in numerators if 0 <= n <= limit)
    with pytest.raises(ValueError, match="not 0"):
        divisor(0)


# -- windows ---------------------------------------------------------------------------------------

# image, kernel, stride, padding
WINDOWS = [
    ((2, 5, 6, 3), (3, 3), (1, 1), (1, 1)),
    ((1, 7, 5, 2), (3, 2), (2, 1), (0, 1)),
    ((2, 6, 6, 4), (2, 2), (2, 2), (0, 0)),
    ((3, 3, 3, 5), (1, 1), (1, 1), (0, 0)),  # the windows are the pixels
    ((2, 3, 3, 5), (1, 1), (1, 1), (1, 1)),  # but not with padding
    ((2, 5, 5, 24), (1, 1), (2, 2), (0, 0)),  # a gather
    ((2, 1, 1, 8), (3, 3), (1, 1), (1, 1)),  # one pixel
    ((1, 1, 1, 1), (1, 1), (1, 1), (0, 0)),
    ((2, 7, 9, 8), (3, 3), (2, 2), (1, 1)),
    ((1, 8, 4, 6), (3, 3), (3, 1), (0, 2)),
    ((1, 9, 11, 1), (5, 4), (1, 3), (2, 1)),
    ((2, 4, 4, 16), (4, 4), (3, 3), (0, 0)),  # one window
    ((1, 5, 7, 12), (2, 3), (3, 4), (1, 0)),  # pixels between the windows
    ((1, 2, 3, 40), (7, 7), (2, 2), (3, 3)),  # windows larger than the image
    ((1, 3, 70, 32), (3, 3), (1, 1), (1, 1)),  # several blocks for a row
]


@pytest.mark.parametrize("case", WINDOWS, ids=str)
@pytest.mark.parametrize("dtype", TYPES)
def test_windows_and_their_adjoint(case, dtype):
    shape, kernel, stride, padding = case
    x = draw(*shape, dtype=dtype)
    expected = im2col_on_cpu(pad(x, padding), kernel, stride)[0]
    columns = convolution.im2col(on_gpu(x), kernel, stride, padding)
    np.testing.assert_array_equal(cupy().asnumpy(columns), expected)

    z = draw(*expected.shape, dtype=dtype)
    dx = convolution.im2col_adjoint(on_gpu(z), cupy().empty(shape, dtype), kernel, stride, padding)
    (n, h, w, c), (p, q) = shape, padding
    padded = (n, h + 2 * p, w + 2 * q, c)
    whole = col2im(z[None].astype(np.float64), padded, kernel, stride)
    assert_close(dx, whole[:, p : p + h, q : q + w], TOLERANCE[dtype])
    found, wanted = cupy().asnumpy(dx).astype(np.float64) * x, expected.astype(np.float64) * z
    assert abs(found.sum() - wanted.sum()) <= TOLERANCE[dtype] * np.abs(wanted).sum()


@pytest.mark.parametrize(("channels", "row"), [(3, 32), (1, 16), (5, 48), (4, 40), (8, 80)])
@pytest.mark.parametrize("dtype", TYPES)
def test_rows_of_windows_filled_up(channels, row, dtype):
    x = draw(2, 4, 5, channels, dtype=dtype)
    columns = cupy().asnumpy(convolution.im2col(on_gpu(x), (3, 3), (1, 2), (1, 1), row))
    expected = im2col_on_cpu(pad(x, (1, 1)), (3, 3), (1, 2))[0]
    np.testing.assert_array_equal(columns[:, : 9 * channels], expected)
    assert columns.shape[1] == row
    assert not columns[:, 9 * channels :].any()


# -- biases ----------------------------------------------------------------------------------------

# Several blocks side by side, several parts of the rows, as many parts as there can be.
MATRICES = [(1, 1), (1, 8), (5, 3), (7, 10), (130, 24), (33, 300), (600, 264), (1500, 16)]
MATRICES += [(70000, 2)]


@pytest.mark.slow
@pytest.mark.parametrize("shape", MATRICES, ids=str)
@pytest.mark.parametrize("dtype", TYPES)
def test_bias_and_its_gradient(shape, dtype):
    y, b = draw(*shape, dtype=dtype), draw(shape[1], dtype=np.float32)
    array = on_gpu(y)
    assert bias.add_bias(array, on_gpu(b)) is array
    assert_close(array, y.astype(np.float64) + b, TOLERANCE[dtype])
    found = bias.bias_gradient(on_gpu(y))
    assert found.dtype == np.float32
    scale = np.abs(y.astype(np.float64)).sum(axis=0).max()
    expected = y.astype(np.float64).sum(axis=0)
    assert np.abs(cupy().asnumpy(found) - expected).max() <= 1e-6 * scale


# -- layers ----------------------------------------------------------------------------------------

# image, weight, stride, padding
CONVOLUTIONS = [
    ((2, 5, 6, 3), (4, 3, 3, 3), 1, 1),
    ((2, 5, 4, 8), (16, 3, 3, 8), 1, 1),
    ((2, 6, 6, 8), (8, 3, 3, 8), 2, 1),
    ((1, 7, 5, 2), (3, 3, 2, 2), (2, 1), (0, 1)),
    ((3, 3, 3, 5), (2, 1, 1, 5), 1, 0),
    ((2, 5, 5, 16), (24, 1, 1, 16), 2, 0),
    ((2, 1, 1, 8), (5, 3, 3, 8), 1, 1),
    ((1, 4, 4, 1), (1, 4, 4, 1), 3, 0),
    ((1, 6, 6, 1), (6, 5, 5, 1), 1, 2),
]

# input, weight
LINEARS = [((4, 6), (3, 6)), ((2, 3, 16), (8, 16)), ((5,), (2, 5)), ((1, 1), (1, 1))]

LAYERS = [
    *((lambda s=s, p=p: Conv2d(s, p), x, w) for x, w, s, p in CONVOLUTIONS),
    *((Linear, x, w) for x, w in LINEARS),
]
NAMES = [str(case) for case in (*CONVOLUTIONS, *LINEARS)]


def gradients(layer, arrays, cotangent):
    """y and the gradients of all inputs of a layer."""
    inputs = [Tensor(a, requires_grad=True) for a in arrays]
    function = layer()
    y = apply(function, *inputs)
    fast = type(y.creator) is not type(function)  # its twin
    if callable(cotangent):
        cotangent = cotangent(y.shape)
    y.backward(cotangent)
    return fast, [y.data, *(x.grad for x in inputs)]


def compare(layer, arrays, dtype, tolerance_x=None):
    arrays = [a.astype(dtype) for a in arrays[:2]] + [a.astype(np.float32) for a in arrays[2:]]
    slow, expected = gradients(
        layer, [a.astype(np.float64) for a in arrays], lambda shape: draw(*shape)
    )
    cotangent = draw(*expected[0].shape, dtype=dtype)
    fast, found = gradients(layer, [on_gpu(a) for a in arrays], on_gpu(cotangent))
    assert (slow, fast) == (False, True)
    assert [a.dtype for a in found] == [dtype, dtype, dtype, *(np.float32 for _ in arrays[2:])]
    for name, f, e in zip(("y", "x", "weight", "bias"), found, expected, strict=False):
        tolerance = 2 * TOLERANCE[dtype] if name == "x" else TOLERANCE[dtype]
        assert_close(f, e, 2e-6 if name == "bias" else tolerance)


@pytest.mark.parametrize(("layer", "x", "weight"), LAYERS, ids=NAMES)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", TYPES)
def test_layers(layer, x, weight, with_bias, dtype):
    arrays = [draw(*x), draw(*weight), *([draw(weight[0])] if with_bias else [])]
    compare(layer, arrays, dtype)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("case", [CONVOLUTIONS[i] for i in (0, 1, 2, 5)], ids=str)
def test_convolution_in_parts(case, dtype, monkeypatch):
    """What would need too much memory at once is done for some images at a time."""
    (n, h, w, c), weight, stride, padding = case
    for limit, images in (("MOST_COLUMN_BYTES", 1), ("MOST_CACHED_BYTES", 2)):
        size = images * np.prod(weight[1:]) * h * w * np.dtype(dtype).itemsize
        monkeypatch.setattr(convolution, limit, int(size))
    arrays = [draw(2 * n + 1, h, w, c), draw(*weight), draw(weight[0])]
    compare(lambda: Conv2d(stride, padding), arrays, dtype)


@pytest.mark.parametrize(("layer", "x", "weight"), [LAYERS[1], LAYERS[-3]], ids=["conv", "linear"])
def test_gradients_of_half_precision_weights_go_to_their_buffers(layer, x, weight):
    arrays = [draw(*x, dtype=np.float16), draw(*weight, dtype=np.float16)]
    arrays.append(draw(weight[0], dtype=np.float32))
    inputs = [Tensor(on_gpu(a), requires_grad=True) for a in arrays]
    buffers = [cupy().zeros(a.shape, np.float32) for a in arrays[1:]]
    for tensor, buffer in zip(inputs[1:], buffers, strict=True):
        tensor.gradient_buffer = buffer
    y = apply(layer(), *inputs)
    cotangent = draw(*y.shape, dtype=np.float16)
    y.backward(on_gpu(cotangent))
    _, expected = gradients(layer, [a.astype(np.float64) for a in arrays], cotangent)
    for tensor, buffer, e in zip(inputs[1:], buffers, expected[2:], strict=True):
        assert tensor.grad is buffer
        assert_close(buffer, e, 2e-6)  # not rounded to half precision
    before = [cupy().asnumpy(b) for b in buffers]
    apply(layer(), *inputs).backward(on_gpu(cotangent))  # a second pass adds up
    for buffer, first in zip(buffers, before, strict=True):
        np.testing.assert_array_equal(cupy().asnumpy(buffer), 2 * first)


@pytest.mark.parametrize("shape", [(6, 3, 3, 3), (6, 1, 1, 3)])
def test_weight_gradient_is_written_where_it_is_wanted(shape):
    x, c = (on_gpu(draw(*s, dtype=np.float16)) for s in [(2, 4, 4, 3), (2, 4, 4, 6)])
    where, out = ((1, 1), (shape[1] // 2,) * 2), cupy().empty(shape, np.float32)
    _, columns = convolution.forward(x, on_gpu(draw(*shape, dtype=np.float16)), None, *where)
    assert convolution.weight_gradient(c, None, columns, shape, *where, out=out) is out
    rebuilt = convolution.weight_gradient(c, x, None, shape, *where)
    np.testing.assert_array_equal(cupy().asnumpy(rebuilt), cupy().asnumpy(out))
    with pytest.raises(ValueError, match="needs x or its columns"):
        convolution.weight_gradient(c, None, None, shape, *where)


def test_what_is_kept_for_the_backward_pass():
    x, weight = Tensor(on_gpu(draw(2, 4, 4, 8, dtype=np.float32))), draw(4, 3, 3, 8)
    weight = Tensor(on_gpu(weight.astype(np.float32)), requires_grad=True)
    trained, fixed, unrecorded = Conv2d(1, 1), Conv2d(1, 1), Conv2d(1, 1)
    apply(trained, x, weight)
    assert trained.columns.shape == (32, 72)
    assert trained.x is None
    apply(fixed, Tensor(x.data, requires_grad=True), weight.detach())
    with no_grad():
        apply(unrecorded, x, weight)
    for function in (fixed, unrecorded):
        assert function.columns is None
        assert function.x is None


@pytest.mark.parametrize(
    ("dtypes", "groups", "fast"),
    [
        ((np.float32, np.float32, np.float32), 1, True),
        ((np.float16, np.float16, np.float32), 1, True),
        ((np.float16, np.float32, np.float32), 1, False),
        ((np.float16, np.float16, np.float16), 1, False),
        ((np.float64, np.float64, np.float64), 1, False),
        ((np.float32, np.float32, np.float32), 2, False),
    ],
)
def test_what_takes_the_fast_path(dtypes, groups, fast):
    shapes = (2, 4, 4, 8), (6, 3, 3, 8 // groups), (6,)
    arrays = [draw(*s, dtype=d) for s, d in zip(shapes, dtypes, strict=True)]
    found, (y, *_) = gradients(
        lambda: Conv2d(1, 1, groups), [on_gpu(a) for a in arrays], lambda s: on_gpu(draw(*s))
    )
    assert found == fast
    expected = F.conv2d(*(Tensor(a.astype(np.float64)) for a in arrays), 1, 1, groups).data
    assert_close(y, expected, 1e-2)
    assert linear.takes_layer(*map(on_gpu, arrays)) == (fast or groups == 2)


def test_cotangents_of_any_layout():
    """A cotangent may be a view, or broadcast: a sum has one number for all."""
    x, w = draw(2, 4, 4, 8, dtype=np.float32), draw(5, 3, 3, 8, dtype=np.float32)
    found, expected = (
        [Tensor(move(a.astype(t)), requires_grad=True) for a in (x, w)]
        for move, t in ((on_gpu, np.float32), (np.asarray, np.float64))
    )
    for tensors in (found, expected):
        F.conv2d(*tensors, padding=1).transpose(3, 0, 2, 1)[1:].sum().backward()
    for f, e in zip(found, expected, strict=True):
        assert_close(f.grad, e.grad, 2e-6)
    y = apply(Linear(), Tensor(on_gpu(x), requires_grad=True), on_gpu(w[:, 0, 0]))
    with pytest.raises(TypeError, match="complex64 cotangent of a float32 operation"):
        y.backward(on_gpu(np.ones(y.shape, np.complex64)))


# -- graphs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TYPES)
def test_a_captured_step_is_the_eager_one_bit_for_bit(dtype):
    xp = cupy()
    shapes = {"conv1": (8, 3, 3, 3), "conv2": (16, 3, 3, 8), "conv3": (4, 1, 1, 16)}
    weights = {name: on_gpu(draw(*shape, dtype=dtype)) for name, shape in shapes.items()}
    weights["linear"] = on_gpu(draw(10, 36, dtype=dtype))
    biases = {name: on_gpu(draw(len(w), dtype=np.float32)) for name, w in weights.items()}
    x, cotangent = on_gpu(draw(2, 6, 6, 3, dtype=dtype)), on_gpu(draw(2, 10, dtype=dtype))

    def step():
        leaves = {}
        for name in weights:
            for array in (weights[name], biases[name]):
                leaf = leaves[name, array.ndim] = Tensor(array, requires_grad=True)
                leaf.gradient_buffer = xp.empty(array.shape, np.float32)
        image = leaves["x"] = Tensor(x, requires_grad=True)
        y = F.conv2d(image, leaves["conv1", 4], leaves["conv1", 1], padding=1)
        y = F.conv2d(y, leaves["conv2", 4], leaves["conv2", 1], stride=2, padding=1)
        y = F.conv2d(y, leaves["conv3", 4], leaves["conv3", 1])
        y = F.linear(y.reshape(2, -1), leaves["linear", 2], leaves["linear", 1])
        y.backward(cotangent)
        return [y.data, *(leaf.grad for leaf in leaves.values())]

    stream, pool = xp.cuda.Stream(non_blocking=True), xp.cuda.MemoryPool()
    with stream:
        eager = [a.get() for a in step()]
        with xp.cuda.using_allocator(pool.malloc):
            stream.begin_capture()
            captured = step()
            graph = stream.end_capture()
        graph.launch(stream)
        stream.synchronize()
        for found, expected in zip(captured, eager, strict=True):
            np.testing.assert_array_equal(found.get(), expected)
        x[...] = 2 * x  # the graph reads what is there when it is launched
        graph.launch(stream)
        stream.synchronize()
        for found, expected in zip(captured, step(), strict=True):
            np.testing.assert_array_equal(found.get(), expected.get())
    assert np.isfinite(eager[0]).all()
