"""Linear layers on the GPU (chapter 14), and what convolutions share with them.

All functions but :func:`fits` take contiguous float32 or float16 arrays of the GPU.
"""

from __future__ import annotations

import numpy as np

from minihyperflows.engine.backend import Array, xp_of
from minihyperflows.engine.gpu.bias import add_bias
from minihyperflows.engine.gpu.gemm import multiply
from minihyperflows.engine.gpu.launch import takes
from minihyperflows.engine.gpu.scratch import is_float32


def fits(x: Array, weight: Array, bias: Array | None) -> bool:
    """Whether the kernels compute a layer with these arrays: x and the weight in one dtype, float32
    or float16, and the bias in float32."""
    return takes(x, weight) and x.dtype == weight.dtype and x.size > 0 and is_float32(bias)


def cotangent_like(c: Array, dtype: np.dtype) -> Array:
    """The cotangent as the kernels need it: c itself if it is contiguous and has that dtype."""
    if c.dtype.kind == "c":
        raise TypeError(f"a {c.dtype} cotangent of a {dtype} layer: make its inputs {c.dtype} too")
    return xp_of(c).ascontiguousarray(c, dtype=dtype)


def float32_buffer(buffer: Array | None) -> Array | None:
    """``buffer`` if a gradient can be written there, else None."""
    return buffer if is_float32(buffer) else None


def forward(x: Array, weight: Array, bias: Array | None = None) -> Array:
    """y = x W^T + b with x (..., in), W (out, in), b (out,)."""
    y = xp_of(x).empty((*x.shape[:-1], len(weight)), x.dtype)
    multiply(_rows(x), weight, _rows(y), transpose_b=True)
    return y if bias is None else add_bias(y, bias)


def input_gradient(c: Array, weight: Array) -> Array:
    """dL/dx = c W (..., in), in the dtype of c (..., out)."""
    dx = xp_of(c).empty((*c.shape[:-1], weight.shape[1]), c.dtype)
    multiply(_rows(c), weight, _rows(dx))
    return dx


def weight_gradient(c: Array, x: Array, out: Array | None = None) -> Array:
    """dL/dW = c^T x (out, in) in float32, written to ``out`` if given."""
    out = xp_of(c).empty((c.shape[-1], x.shape[-1]), np.float32) if out is None else out
    return multiply(_rows(c), _rows(x), out, transpose_a=True)


def _rows(x: Array) -> Array:
    """(..., C) as a matrix."""
    return x.reshape(-1, x.shape[-1])
