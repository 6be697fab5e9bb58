"""Imported before NumPy and PyTorch: in the tests their libraries compute on one thread.

Tests run side by side on all cores (``pytest -n auto``). There a library's threads, which spin,
would keep each other off the cores. What is set in the environment stays as it is.
"""

import os

VARIABLES = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS")

for name in (*VARIABLES, "VECLIB_MAXIMUM_THREADS"):
    os.environ.setdefault(name, "1")
