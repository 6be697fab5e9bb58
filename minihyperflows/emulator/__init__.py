"""A GPU for those who have none: the project's kernels run on the CPU, slowly but really.

Inside :func:`emulated_gpu` there is a GPU: ``net.to("cuda")`` works, and so does everything after
it. Three parts play CuPy and CUDA:

- ``array.py``, ``module.py`` and ``streams.py``: CuPy, played by NumPy. Mixing its arrays with
  NumPy's own is an error, as on a GPU, and so is everything that a GPU cannot do while it records
  a graph.
- ``compilation.py``: the package's kernels and anyone else's, compiled by the machine's
  C++ compiler behind ``shim.h``. The types of the arguments are checked against the kernel's.
- ``cublas.cpp``: the functions of cuBLAS that the engine calls, by the definition.

It reports threads that part at a barrier and writes just outside an array; reads there give NaN.
What it cannot show: the speed, races between threads or blocks that run at the same time, shared
memory read before it is written, the last bits of cuBLAS's sums and of functions such as the
exponential.
"""

from minihyperflows.emulator.compilation import CompilerMissingError, compiler
from minihyperflows.emulator.device import emulated_gpu

__all__ = ["CompilerMissingError", "compiler", "emulated_gpu"]
