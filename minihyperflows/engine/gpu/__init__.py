"""The fast paths of the GPU: one Python function for each kernel in ``kernels``.

Operations of the engine compute with NumPy's functions, which CuPy has too, so they run on a GPU as
they are. Where speed counts they ask :func:`~minihyperflows.engine.gpu.launch.takes` first, and
hand large float arrays to the functions here, which launch the project's own kernels and cuBLAS.
"""
