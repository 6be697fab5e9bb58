"""Which Functions there are: in the package, and behind a tensor."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator

import minihyperflows as mh
from minihyperflows.engine.graph import Function, reverse_topological_order


def functions_of_the_package() -> set[type[Function]]:
    """Every subclass of Function that the package defines; not their twins for a GPU."""
    for module in pkgutil.walk_packages(mh.__path__, "minihyperflows."):
        if not module.name.endswith("__main__"):
            try:
                importlib.import_module(module.name)
            except ModuleNotFoundError as error:
                if error.name != "torch":  # which the networks to compare with need, and no more
                    raise
    ours = {f for f in subclasses(Function) if f.__module__.startswith("minihyperflows.")}
    return {f for f in ours if not f.__module__.startswith("minihyperflows.engine.gpu.")}


def subclasses(cls: type) -> Iterator[type]:
    for subclass in cls.__subclasses__():
        yield subclass
        yield from subclasses(subclass)


def functions_behind(y: mh.Tensor) -> set[type[Function]]:
    """What ``y`` was computed by."""
    return {type(function) for function in reverse_topological_order(y.creator)}
