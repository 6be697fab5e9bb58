"""Winograd's matrices."""

import numpy as np
import pytest

from minihyperflows.engine.winograd import winograd_matrices


@pytest.mark.parametrize("m", [2, 4])
def test_they_compute_a_convolution(m):
    """A^T [(G w) * (B^T d)] = the m outputs of 3 taps along m + 2 numbers, in one dimension."""
    a_t, g, b_t = winograd_matrices(m)
    assert (a_t.shape, g.shape, b_t.shape) == ((m, m + 2), (m + 2, 3), (m + 2, m + 2))
    rng = np.random.default_rng(0)
    d, w = rng.standard_normal(m + 2), rng.standard_normal(3)
    np.testing.assert_allclose(a_t @ ((g @ w) * (b_t @ d)), np.correlate(d, w), rtol=1e-12)


@pytest.mark.parametrize("m", [2, 4])
def test_no_element_grows(m):
    """Rows of B^T are scaled to a largest entry of 1."""
    assert np.abs(winograd_matrices(m)[2]).max(axis=1) == pytest.approx(1)


def test_other_tiles_need_other_points():
    with pytest.raises(ValueError, match="7 points"):
        winograd_matrices(6)
