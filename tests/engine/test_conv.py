"""Convolution and pooling against their definitions, on odd shapes."""

from functools import partial

import numpy as np
import pytest

from minihyperflows import ShapeError, Tensor
from minihyperflows import functional as F
from minihyperflows.engine.conv import (
    WAYS,
    Conv2d,
    can_winograd,
    choose_way,
    conv2d_im2col,
    conv2d_loop,
    conv2d_winograd,
)
from minihyperflows.engine.im2col import col2im, im2col

# image, weight, stride, padding, groups
CASES = [
    ((2, 5, 6, 3), (4, 3, 3, 3), 1, 1, 1),
    ((1, 7, 5, 2), (3, 3, 2, 2), (2, 1), (0, 1), 1),
    ((2, 6, 6, 4), (6, 2, 2, 2), 2, 0, 2),
    ((2, 4, 5, 3), (3, 3, 3, 1), 1, 1, 3),  # depthwise
    ((2, 3, 3, 5), (2, 1, 1, 5), 1, 0, 1),  # pointwise
    ((2, 5, 5, 3), (2, 1, 1, 3), 2, 0, 1),  # pointwise, strided
    ((1, 1, 1, 3), (2, 3, 3, 3), 1, 1, 1),  # one pixel
    ((3, 7, 5, 5), (4, 3, 3, 5), 1, 1, 1),  # odd sides: tiles stick out
    ((2, 2, 2, 4), (4, 3, 3, 4), 1, 1, 1),
    ((1, 8, 8, 2), (3, 3, 3, 2), 1, 0, 1),
    ((1, 4, 7, 2), (3, 3, 3, 2), 1, (2, 0), 1),
    ((1, 4, 4, 1), (1, 4, 4, 1), 3, 0, 1),  # one window
]


def draw(case, dtype=np.float64):
    rng = np.random.default_rng(0)
    shape, weight_shape, stride, padding, groups = case
    x, w = (rng.standard_normal(s).astype(dtype) for s in (shape, weight_shape))
    b = rng.standard_normal(weight_shape[0]).astype(dtype)
    return x, w, b, stride, padding, groups


# The ways against the loop: the largest difference allowed, relative to the largest number. One
# sum of a thousand products has an error of some 1e-6 in float32; Winograd's matrices, whose
# entries are larger than 1 and cancel, make it larger: more so for larger tiles.
TOLERANCE = {
    ("im2col", np.float64): 1e-14,
    ("winograd2", np.float64): 1e-14,
    ("winograd4", np.float64): 1e-13,
    ("im2col", np.float32): 2e-6,
    ("winograd2", np.float32): 4e-6,
    ("winograd4", np.float32): 1e-5,
}


def ways(case):
    _, weight, stride, _, groups = case
    stride = stride if isinstance(stride, tuple) else (stride, stride)
    return WAYS if can_winograd(weight, stride, groups) else WAYS[:1]


BY_WAY = [pytest.param(case, way, id=f"{case}-{way}") for case in CASES for way in ways(case)]


def assert_close(found, expected, tolerance):
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize(("case", "way"), BY_WAY)
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_every_way_is_the_loop(case, way, dtype):
    x, w, b, *settings = draw(case, dtype)
    y = Conv2d(*settings, way=way).forward(x, w, b)
    expected = conv2d_loop(x, w, b, *settings)
    assert y.dtype == expected.dtype == dtype
    assert_close(y, expected, TOLERANCE[way, dtype])


@pytest.mark.parametrize(("case", "way"), BY_WAY)
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_every_ways_gradients_are_the_loops_adjoint(case, way, dtype):
    """<loop(v, w), c> = <v, dx> and <loop(x, u), c> = <u, dw> for every image v and filter u.

    The unit images and filters give the whole gradients: one column of a matrix each.
    """
    x, w, _, *settings = draw(case, dtype)
    function = Conv2d(*settings, way=way)
    y = function.forward(x, w)
    function.needs = (True, True)
    c = np.random.default_rng(1).standard_normal(y.shape).astype(dtype)
    dx, dw = function.backward(c)
    rng = np.random.default_rng(2)
    for _ in range(3):
        v, u = rng.standard_normal(x.shape), rng.standard_normal(w.shape)
        along_x = (conv2d_loop(v, w, None, *settings) * c).sum()
        along_w = (conv2d_loop(x, u, None, *settings) * c).sum()
        scale_x = np.linalg.norm(v) * np.linalg.norm(dx)
        scale_w = np.linalg.norm(u) * np.linalg.norm(dw)
        assert abs((v * dx).sum() - along_x) <= TOLERANCE[way, dtype] * scale_x
        assert abs((u * dw).sum() - along_w) <= TOLERANCE[way, dtype] * scale_w


@pytest.mark.parametrize("way", WAYS)
def test_many_channels_and_blocks(way):
    """As in a network: more than one block of images, 64 channels; float32 against float64."""
    rng = np.random.default_rng(3)
    x, w = rng.standard_normal((24, 9, 8, 64)), rng.standard_normal((72, 3, 3, 64))
    c = rng.standard_normal((24, 9, 8, 72))
    results = []
    for dtype, how in ((np.float32, way), (np.float64, "im2col")):
        function = Conv2d(padding=1, way=how)
        y = function.forward(x.astype(dtype), w.astype(dtype))
        function.needs = (True, True)
        results.append([y, *function.backward(c.astype(dtype))])
    for found, expected in zip(*results, strict=True):
        assert_close(found, expected, TOLERANCE[way, np.float32])


def test_the_functions_of_one_signature_agree():
    x, w, b, *settings = draw(CASES[0])
    expected = conv2d_loop(x, w, b, *settings)
    for function in (conv2d_im2col, conv2d_winograd, partial(conv2d_winograd, m=2)):
        np.testing.assert_allclose(function(x, w, b, *settings), expected, atol=1e-12)
    y = F.conv2d(Tensor(x), Tensor(w), Tensor(b), *settings)
    np.testing.assert_allclose(y.numpy(), expected, atol=1e-12)


@pytest.mark.parametrize(
    ("x", "weight", "stride", "groups", "dtype", "way"),
    [
        ((64, 32, 32, 64), (64, 3, 3, 64), 1, 1, np.float32, "winograd4"),
        ((64, 4, 4, 512), (512, 3, 3, 512), 1, 1, np.float32, "winograd2"),
        ((64, 2, 2, 512), (512, 3, 3, 512), 1, 1, np.float32, "winograd2"),
        ((64, 1, 1, 512), (512, 3, 3, 512), 1, 1, np.float32, "im2col"),
        ((64, 32, 32, 3), (64, 3, 3, 3), 1, 1, np.float32, "im2col"),
        ((64, 32, 32, 64), (64, 3, 3, 64), 2, 1, np.float32, "im2col"),
        ((64, 32, 32, 64), (64, 3, 3, 2), 1, 32, np.float32, "im2col"),
        ((64, 32, 32, 64), (256, 1, 1, 64), 1, 1, np.float32, "im2col"),
        ((64, 32, 32, 64), (64, 3, 3, 64), 1, 1, np.float16, "im2col"),
    ],
)
def test_the_choice(x, weight, stride, groups, dtype, way):
    padding = (weight[1] // 2,) * 2
    assert choose_way(x, weight, (stride, stride), padding, groups, np.dtype(dtype)) == way


def test_a_way_that_does_not_exist():
    x, w = np.zeros((1, 4, 4, 2)), np.zeros((2, 3, 3, 2))
    with pytest.raises(ValueError, match="im2col, winograd2, winograd4"):
        Conv2d(way="fft")
    with pytest.raises(ValueError, match="stride 1"):
        Conv2d(stride=2, way="winograd4").forward(x, w)


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
