"""Does a Function, or a Module, keep its contract?"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np

from minihyperflows.engine.graph import Function, no_grad
from minihyperflows.engine.tensor import Tensor
from minihyperflows.nn import Module
from minihyperflows.testing.compare import assert_close
from minihyperflows.testing.gradients import check_grad, check_problem
from minihyperflows.testing.problem import Problem, copy_of, is_float, keep_away

Array = np.ndarray


def check_function(
    factory: Callable[[], Function],
    *inputs: Any,
    rng: np.random.Generator | int = 0,
    away_from: float | None = None,
    rtol: float = 1e-6,
) -> None:
    """Check all that the engine expects of a :class:`~minihyperflows.Function`.

    ``backward`` returns one gradient of the right shape for each input, and None for one that is
    not needed; float32 and float64 keep their precision; neither pass writes into its arrays; two
    instances share nothing; the gradient is right (:func:`check_grad`). Example::

        class Square(mh.Function):
            def forward(self, x):
                self.x = x
                return x * x

            def backward(self, cotangent):
                return 2 * self.x * cotangent

        check_function(Square, (3, 4))
        check_function(lambda: Scale(2.0), (3, 4))        # parameters go in the constructor
        check_function(Logarithm, np.array([0.5, 2.0]))   # arrays, where normal draws do not fit

    Args:
        factory: makes a new instance; the class itself, if its constructor takes no arguments.
        inputs: one for each input of ``forward``: a shape, filled with standard normal draws, or
            an array.
        rng: seed or generator for the draws.
        away_from: where the function has a kink; inputs closer than 0.01 are moved away.
        rtol: the relative error allowed in the gradient.

    Raises:
        AssertionError: says which of these fails, and how.
    """
    rng = np.random.default_rng(rng)
    arrays = [_draw(spec, rng, away_from) for spec in inputs]
    name = _checked_instance(factory).name
    y = _Run(factory, arrays).output
    if not isinstance(y, np.ndarray | np.generic):
        raise AssertionError(f"{name}.forward returns a {type(y).__name__}, not an array")
    cotangent = rng.standard_normal(y.shape)

    _check_shapes(name, factory, arrays, cotangent)
    _check_needs(name, factory, arrays, cotangent)
    _check_dtypes(name, factory, arrays, cotangent)
    _check_memory_order(name, factory, arrays, cotangent)
    _check_sharing(name, factory, arrays, cotangent)
    check_grad(factory, *arrays, rng=rng, rtol=rtol)


class _Run:
    """One application on raw arrays, watched: neither pass may write into them."""

    def __init__(
        self,
        factory: Callable[[], Function],
        arrays: list[Array],
        needs: tuple[bool, ...] | None = None,
    ) -> None:
        self.function = factory()
        self.function.needs = needs or tuple(is_float(a) for a in arrays)
        self.arrays, self.before = arrays, [a.copy() for a in arrays]
        self.output = self.function.forward(*arrays)
        self.require_same(arrays, self.before, "forward writes into its inputs")

    def backward(self, cotangent: Array) -> tuple[Any, ...]:
        """The gradients: for each input an array or None."""
        before = cotangent.copy()
        answer = self.function.backward(cotangent)
        self.require_same(self.arrays, self.before, "backward writes into the inputs")
        self.require_same([cotangent], [before], "backward writes into its cotangent")
        return answer if isinstance(answer, tuple) else (answer,)

    def require_same(self, arrays: list[Array], before: list[Array], message: str) -> None:
        pairs = zip(arrays, before, strict=True)
        if not all(np.array_equal(a, b, equal_nan=is_float(a)) for a, b in pairs):
            raise AssertionError(
                f"{self.function.name}.{message}: other functions may hold the same array"
            )


def _draw(spec: Any, rng: np.random.Generator, away_from: float | None) -> Array:
    array = rng.standard_normal(spec) if isinstance(spec, tuple) else copy_of(spec)
    return array if away_from is None else keep_away(array, away_from)


def _checked_instance(factory: Callable[[], Function]) -> Function:
    function = factory()
    if not isinstance(function, Function):
        raise AssertionError(f"a Function is needed, but {factory!r} made {function!r}")
    if factory() is function:
        raise AssertionError(f"{factory!r} must make a new {function.name} at each call")
    return function


def _check_shapes(
    name: str, factory: Callable[[], Function], arrays: list[Array], c: Array
) -> None:
    gradients = _Run(factory, arrays).backward(c)
    if len(gradients) != len(arrays):
        raise AssertionError(
            f"{name}.backward returns {len(gradients)} gradients for {len(arrays)} inputs: it must "
            "return a tuple with one for each"
        )
    for i, (x, g) in enumerate(zip(arrays, gradients, strict=True)):
        if is_float(x) and not isinstance(g, np.ndarray | np.generic):
            raise AssertionError(f"{name}.backward returns a {type(g).__name__} for input {i}")
        if is_float(x) and g.shape != x.shape:
            raise AssertionError(
                f"{name}.backward returns shape {g.shape} for input {i} of shape {x.shape}: sum "
                "over the axes along which forward broadcast it"
            )


def _check_needs(name: str, factory: Callable[[], Function], arrays: list[Array], c: Array) -> None:
    full = _Run(factory, arrays).backward(c)
    for i, x in enumerate(arrays):
        if len(arrays) == 1 or not is_float(x):
            continue
        only = tuple(k == i for k in range(len(arrays)))
        gradients = _Run(factory, arrays, only).backward(c)
        if any(g is not None for k, g in enumerate(gradients) if k != i):
            raise AssertionError(
                f"{name}.backward computes gradients that nobody needs: return None for input k "
                "where self.needs[k] is False"
            )
        assert_close(gradients[i], full[i], what=f"{name}'s gradient of input {i}, needed alone,")


def _check_dtypes(
    name: str, factory: Callable[[], Function], arrays: list[Array], c: Array
) -> None:
    for dtype in (np.float32, np.float64):
        cast = [a.astype(dtype) if a.dtype.kind == "f" else a for a in arrays]
        run = _Run(factory, cast)
        found = [("forward", run.output)]
        found += [("backward", g) for g in run.backward(c.astype(dtype)) if g is not None]
        for where, array in found:
            if array.dtype != dtype and run.output.dtype.kind == "f":
                raise AssertionError(
                    f"{name}.{where} turns {np.dtype(dtype)} into {array.dtype}: compute with "
                    "Python numbers and arrays of the input's dtype"
                )


def _check_memory_order(
    name: str, factory: Callable[[], Function], arrays: list[Array], c: Array
) -> None:
    """A cotangent whose axes lie in memory in the opposite order is as good as any."""
    expected = _Run(factory, arrays).backward(c)
    found = _Run(factory, arrays).backward(np.array(c, order="F"))
    for i, (g, e) in enumerate(zip(found, expected, strict=True)):
        if g is not None:
            what = f"{name}'s gradient of input {i} from a cotangent in another memory order"
            assert_close(g, e, what=what)


def _check_sharing(
    name: str, factory: Callable[[], Function], arrays: list[Array], c: Array
) -> None:
    alone = _Run(factory, arrays).backward(c)
    first = _Run(factory, arrays)
    _Run(factory, [a[::-1].copy() if a.ndim and is_float(a) else a for a in arrays])
    for i, g in enumerate(first.backward(c)):
        if g is not None and not np.allclose(g, alone[i], equal_nan=True):
            raise AssertionError(
                f"a second {name} changes the first one's gradient of input {i}: keep what "
                "backward needs on self, not on the class or in a global"
            )


# -- modules -------------------------------------------------------------------------------------


def check_module(
    module: Module,
    *inputs: Any,
    rng: np.random.Generator | int = 0,
    away_from: float | None = None,
    rtol: float = 1e-6,
) -> None:
    """Check that a :class:`~minihyperflows.nn.Module` computes, learns and saves as it should.

    In this order: every parameter gets a gradient; the gradients of the input and of every
    parameter are right (in float64, in the module's present mode); in evaluation mode two calls
    give the same and change nothing; ``state_dict`` and ``load_state_dict`` restore it. The check
    works on copies, ``module`` itself is left as it is. Example::

        check_module(nn.Linear(4, 3, rng=rng), (5, 4))

    Args:
        module: what to check.
        inputs: the shape of the input, filled with standard normal draws, or an array.
        rng: seed or generator for the draws.
        away_from: where the module's input has a kink; see :func:`check_grad`.
        rtol: the relative error allowed in the gradients.

    Raises:
        AssertionError: says which of these fails, and how.
    """
    rng = np.random.default_rng(rng)
    arrays = [_draw(spec, rng, away_from) for spec in inputs]
    module = _in_float64(module)
    check_problem(_module_problem(module, arrays), rng, rtol=rtol)
    _check_evaluation(module, arrays)
    _check_saving(module, arrays, rng)


def _in_float64(module: Module) -> Module:
    module = copy.deepcopy(module)
    for tensor in module.named_tensors().values():
        if tensor.dtype.kind == "f":
            tensor.data = tensor.data.astype(np.float64)
    return module


def _module_problem(module: Module, arrays: list[Array]) -> Problem:
    """The module as a function of its inputs and all its parameters."""
    parameters = module.named_parameters()

    def run(values: list[Array], requires_grad: bool) -> tuple[list[Tensor], Tensor]:
        leaves = [Tensor(a, requires_grad and is_float(a)) for a in values[: len(arrays)]]
        for p, value in zip(parameters.values(), values[len(arrays) :], strict=True):
            p.data, p.grad = value, None
        output = module(*leaves)
        if not isinstance(output, Tensor):
            raise AssertionError(f"the module returns a {type(output).__name__}, not a Tensor")
        return [*leaves, *parameters.values()], output

    def evaluate(values: list[Array]) -> Array:
        with no_grad():
            return run(values, False)[1].data

    def gradients(values: list[Array], cotangent: Array) -> list[Array | None]:
        leaves, output = run(values, True)
        if not output.requires_grad:
            raise AssertionError("the module's output depends on nothing: is the graph cut?")
        output.backward(cotangent)
        return [leaf.grad for leaf in leaves]

    names = [f"input {i}" for i in range(len(arrays))] + [f"parameter {k}" for k in parameters]
    values = [*arrays, *(p.data for p in parameters.values())]
    return Problem(values, names, evaluate, gradients)


def _check_evaluation(module: Module, arrays: list[Array]) -> None:
    module.eval()
    before = module.state_dict()
    first = _outputs(module, arrays)
    assert_close(_outputs(module, arrays), first, 0, 0, "a second call in evaluation mode")
    assert_close(module.state_dict(), before, 0, 0, "the state after evaluation")


def _check_saving(module: Module, arrays: list[Array], rng: np.random.Generator) -> None:
    saved, output = module.state_dict(), _outputs(module, arrays)
    for tensor in module.named_tensors().values():
        if is_float(tensor.data):
            tensor.data = tensor.data + rng.uniform(0.1, 1.0, tensor.shape)
    module.load_state_dict(saved)
    assert_close(_outputs(module, arrays), output, what="the output after saving and loading")


def _outputs(module: Module, arrays: list[Array]) -> Array:
    with no_grad():
        return module(*map(Tensor, arrays)).data
