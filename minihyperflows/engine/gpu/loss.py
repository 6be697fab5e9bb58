"""The cross-entropy on a GPU (kernels: ``cross_entropy.cu``)."""

from __future__ import annotations

from itertools import product

from minihyperflows.engine import ops
from minihyperflows.engine.backend import Array, cupy
from minihyperflows.engine.gpu.launch import C_TYPES, Source, blocks_for, c_type, takes
from minihyperflows.engine.gpu.scratch import arrivals, as_kernels_take, is_integer
from minihyperflows.engine.twins import on_gpu

LABEL_TYPES = {"int32": "int", "int64": "long long"}
COTANGENTS = (("float", "float"), ("__half", "float"), ("__half", "__half"))
THREADS = 128  # as in cross_entropy.cu
PER_THREAD = 4  # logits, about

SOURCE = Source(
    "cross_entropy.cu",
    [
        *(f"cross_entropy<{t}, {k}>" for t, k in product(C_TYPES.values(), LABEL_TYPES.values())),
        *(
            f"cross_entropy_gradient<{t}, {c}, {k}>"
            for (t, c), k in product(COTANGENTS, LABEL_TYPES.values())
        ),
    ],
)


@on_gpu(ops.CrossEntropy)
class CrossEntropy(ops.CrossEntropy):
    """L = -1/N sum_n sum_k q_nk ln p_nk;  dL/dlogits = (p - q) / N.

    The kernels do not tell whether all labels lie in [0, K): the loss is NaN if not.
    """

    def takes(self, logits: Array) -> bool:
        labelled = self.labels is not None and is_integer(self.labels, *LABEL_TYPES)
        return labelled and takes(logits) and logits.size > 0

    def forward(self, logits: Array) -> Array:
        ops.check_labels_fit(self.labels, logits.shape)
        self.logits = logits
        loss, self.normalisers = cross_entropy(logits, self.labels, self.label_smoothing)
        return loss

    def backward(self, c: Array) -> Array:
        saved = (self.logits, self.labels, self.normalisers, self.label_smoothing)
        return cross_entropy_gradient(c, *saved)


# -- the kernels -----------------------------------------------------------------------------------


def cross_entropy(logits: Array, labels: Array, label_smoothing: float) -> tuple[Array, Array]:
    """The loss, () float32, and what :func:`cross_entropy_gradient` needs, (2, N) float32: of each
    row the largest logit and the sum of the exponentials of the differences from it.

    A label out of range makes the loss NaN: to look for one here would mean to wait for the GPU.
    """
    xp, (rows, classes) = cupy(), logits.shape
    lanes = min(THREADS, 1 << (-(-classes // PER_THREAD) - 1).bit_length())
    columns = THREADS // lanes
    loss, normalisers = xp.empty((), "float32"), xp.empty((2, rows), "float32")
    SOURCE.launch(
        f"cross_entropy<{c_type(logits)}, {LABEL_TYPES[labels.dtype.name]}>",
        -(-rows // columns),
        (columns, lanes),
        *(logits, labels, rows, classes, float(label_smoothing)),
        *(normalisers, xp.empty(rows, "float32"), arrivals(1), loss),
    )
    return loss, normalisers


def cross_entropy_gradient(
    cotangent: Array, logits: Array, labels: Array, normalisers: Array, label_smoothing: float
) -> Array:
    """dlogits = cotangent (p - q) / N; the cotangent is an array of shape ()."""
    if not takes(cotangent) or cotangent.dtype.itemsize > logits.dtype.itemsize:
        cotangent = as_kernels_take(cotangent, "float32")
    rows, classes = logits.shape
    dlogits = cupy().empty(logits.shape, logits.dtype)
    types = f"{c_type(logits)}, {c_type(cotangent)}, {LABEL_TYPES[labels.dtype.name]}"
    SOURCE.launch(
        f"cross_entropy_gradient<{types}>",
        blocks_for(logits.size, THREADS),
        THREADS,
        *(cotangent, logits, labels, normalisers, rows, classes, float(label_smoothing), dlogits),
    )
    return dlogits
