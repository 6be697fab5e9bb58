"""What computes on a GPU: twins of the engine's operations, and the kernels that they launch.

:mod:`minihyperflows.engine.twins` says how an operation finds its twin. It imports this package
when the first array of a GPU comes, so each module with twins is named here.
"""

from minihyperflows.engine.gpu import convolution, elementwise, linear, loss, norm, pooling

__all__ = ["convolution", "elementwise", "linear", "loss", "norm", "pooling"]
