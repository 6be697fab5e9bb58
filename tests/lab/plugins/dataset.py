"""A data set: noise with a bright row, or a bright column. ``--set dataset=stripes``"""

import numpy as np

from minihyperflows import lab


@lab.register("dataset", "stripes")
def stripes(root=None):
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 200, (300, 8, 8, 1), np.uint8), rng.integers(0, 2, 300)
    for image, label, place in zip(x, y, rng.integers(0, 8, 300), strict=True):
        (image if label else image.swapaxes(0, 1))[place] = 255
    parts = x[:240], y[:240], x[240:], y[240:]
    return lab.Dataset("stripes", *parts, ("columns", "rows"), (0.4,), (0.25,))
