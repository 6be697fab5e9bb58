"""Linear layers on the GPU (chapter 14)."""

from __future__ import annotations

import numpy as np

from minihyperflows.engine import ops
from minihyperflows.engine.backend import Array, xp_of
from minihyperflows.engine.gpu.bias import add_bias, bias_gradient
from minihyperflows.engine.gpu.gemm import multiply
from minihyperflows.engine.gpu.launch import takes
from minihyperflows.engine.gpu.scratch import as_kernels_take, float32_buffer, is_float32
from minihyperflows.engine.twins import on_gpu


def takes_layer(x: Array, weight: Array, bias: Array | None = None) -> bool:
    """Whether the kernels compute a layer with these arrays: x and the weight in one dtype, float32
    or float16, and the bias in float32."""
    fit = takes(x, weight) and x.dtype == weight.dtype and is_float32(bias)
    return fit and 0 not in (x.size, weight.size)


@on_gpu(ops.Linear)
class Linear(ops.Linear):
    """y = x W^T + b by cuBLAS;  dL/dx = c W,  dL/dW = c^T x,  dL/db = sum of c."""

    def takes(self, x: Array, weight: Array, bias: Array | None = None) -> bool:
        return takes_layer(x, weight, bias)

    def forward(self, x: Array, weight: Array, bias: Array | None = None) -> Array:
        self.check(x, weight, bias)
        self.x, self.weight = x, weight
        return forward(x, weight, bias)

    def backward(self, c: Array) -> tuple[Array | None, ...]:
        c = as_kernels_take(c, self.weight.dtype)
        dx = input_gradient(c, self.weight) if self.needs[0] else None
        dw = db = None
        if self.needs[1]:
            dw = weight_gradient(c, self.x, float32_buffer(self.buffer_for(1)))
        if any(self.needs[2:]):
            db = bias_gradient(c, float32_buffer(self.buffer_for(2)))
        return (dx, dw, db)[: len(self.needs)]


# The functions below take contiguous float32 or float16 arrays of the GPU.


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
