"""Convolution and pooling against their definitions, on odd shapes."""

import numpy as np
import pytest

from minihyperflows import ShapeError, Tensor
from minihyperflows import functional as F
from minihyperflows.engine.conv import col2im, conv2d_loop, im2col

# image, weight, stride, padding, groups
CASES = [
    ((2, 5, 6, 3), (4, 3, 3, 3), 1, 1, 1),
    ((1, 7, 5, 2), (3, 3, 2, 2), (2, 1), (0, 1), 1),
    ((2, 6, 6, 4), (6, 2, 2, 2), 2, 0, 2),
    ((2, 4, 5, 3), (3, 3, 3, 1), 1, 1, 3),  # depthwise
    ((2, 3, 3, 5), (2, 1, 1, 5), 1, 0, 1),  # pointwise
    ((2, 5, 5, 3), (2, 1, 1, 3), 2, 0, 1),  # pointwise, strided
    ((1, 1, 1, 3), (2, 3, 3, 3), 1, 1, 1),  # one pixel
    ((1, 4, 4, 1), (1, 4, 4, 1), 3, 0, 1),  # one window
]


def draw(case, dtype=np.float64):
    rng = np.random.default_rng(0)
    shape, weight_shape, stride, padding, groups = case
    x, w = (rng.standard_normal(s).astype(dtype) for s in (shape, weight_shape))
    b = rng.standard_normal(weight_shape[0]).astype(dtype)
    return x, w, b, stride, padding, groups


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-12), (np.float32, 1e-5)])
def test_the_fast_convolution_is_the_loop(case, dtype, tolerance):
    x, w, b, *settings = draw(case, dtype)
    y = F.conv2d(Tensor(x), Tensor(w), Tensor(b), *settings)
    expected = conv2d_loop(x, w, b, *settings)
    assert y.dtype == expected.dtype == dtype
    np.testing.assert_allclose(y.numpy(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_gradients_are_the_loops_adjoint(case):
    """The loop is linear in x and in w, so <loop(v, w), c> = <v, dx> for any v, and so for w."""
    x, w, _, *settings = draw(case)
    leaf_x, leaf_w = Tensor(x, requires_grad=True), Tensor(w, requires_grad=True)
    y = F.conv2d(leaf_x, leaf_w, None, *settings)
    rng = np.random.default_rng(1)
    c, v, u = (rng.standard_normal(s) for s in (y.shape, x.shape, w.shape))
    y.backward(c)
    along_x = (conv2d_loop(v, w, None, *settings) * c).sum()
    along_w = (conv2d_loop(x, u, None, *settings) * c).sum()
    assert (v * leaf_x.grad).sum() == pytest.approx(along_x, rel=1e-10)
    assert (u * leaf_w.grad).sum() == pytest.approx(along_w, rel=1e-10)


@pytest.mark.parametrize("groups", [1, 2])
def test_col2im_is_the_adjoint_of_im2col(groups):
    rng = np.random.default_rng(2)
    x = rng.standard_normal((2, 6, 5, 4))
    columns = im2col(x, (3, 2), (2, 1), groups)
    c = rng.standard_normal(columns.shape)
    back = col2im(c, x.shape, (3, 2), (2, 1))
    assert (columns * c).sum() == pytest.approx((x * back).sum(), rel=1e-12)


def test_a_pointwise_convolution_copies_nothing():
    x = np.arange(24.0).reshape(1, 2, 3, 4)
    assert np.shares_memory(im2col(x, (1, 1), (1, 1)), x)


@pytest.mark.parametrize(("pool", "reduce"), [(F.max_pool2d, np.max), (F.avg_pool2d, np.mean)])
@pytest.mark.parametrize(("size", "stride"), [(2, None), (3, 2), ((2, 3), (1, 2))])
def test_pooling_is_its_definition(pool, reduce, size, stride):
    x = np.random.default_rng(3).standard_normal((2, 7, 6, 3))
    y = pool(Tensor(x), size, stride).numpy()
    kh, kw = (size, size) if isinstance(size, int) else size
    s, t = (kh, kw) if stride is None else (stride, stride) if isinstance(stride, int) else stride
    assert y.shape == (2, (7 - kh) // s + 1, (6 - kw) // t + 1, 3)
    for n, i, j, c in np.ndindex(*y.shape):
        window = x[n, i * s : i * s + kh, j * t : j * t + kw, c]
        assert y[n, i, j, c] == pytest.approx(reduce(window), rel=1e-14)


def test_in_a_tie_the_first_maximum_takes_the_gradient():
    x = Tensor(np.ones((1, 2, 2, 1)), requires_grad=True)
    F.max_pool2d(x, 2).backward(np.full((1, 1, 1, 1), 5.0))
    np.testing.assert_array_equal(x.grad.ravel(), [5, 0, 0, 0])


@pytest.mark.parametrize(
    ("x", "w", "groups", "message"),
    [
        ((1, 4, 4, 3), (2, 3, 3, 4), 1, "do not fit"),
        ((1, 4, 4, 4), (3, 3, 3, 2), 2, "do not fit"),
        ((1, 2, 2, 3), (2, 3, 3, 3), 1, "larger than the image"),
        ((4, 4, 3), (2, 3, 3, 3), 1, "must be"),
    ],
)
def test_misuse_names_both_shapes(x, w, groups, message):
    with pytest.raises(ShapeError, match=message) as error:
        F.conv2d(Tensor(np.zeros(x)), Tensor(np.zeros(w)), groups=groups)
    assert str(x) in str(error.value)
    assert str(w) in str(error.value)
