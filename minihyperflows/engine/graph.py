"""The recorded computation: operations, their order, and the backward pass through them.

A :class:`Function` is one operation that was applied. It knows its inputs, so the functions form
a directed acyclic graph that leads from the loss back to the leaves (the tensors that a user
made). Reverse-mode differentiation walks that graph once, from the loss, and applies the chain
rule at each function (chapter 01).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple, Protocol, runtime_checkable

from minihyperflows.engine import memory, numbers
from minihyperflows.engine.backend import Array, xp_of
from minihyperflows.engine.blas import one_blas_thread
from minihyperflows.engine.changes import Kept, Version, require_unchanged
from minihyperflows.engine.errors import GraphError, ShapeError
from minihyperflows.engine.threads import add, copy

_recording: ContextVar[bool] = ContextVar("recording", default=True)


def is_recording() -> bool:
    """False inside :func:`no_grad`."""
    return _recording.get()


@contextmanager
def no_grad() -> Iterator[None]:
    """Context in which operations are computed but not recorded, so they cannot be differentiated.

    Holds for the thread (or asynchronous task) that entered it, not for others. Also a decorator.
    """
    token = _recording.set(False)
    try:
        yield
    finally:
        _recording.reset(token)


class Intermediate(NamedTuple):
    """What the graph remembers of an input that a function made: not its values.

    The values live as long as somebody needs them, which is for ``forward`` and ``backward`` of
    the operations to say. A network's peak of memory is about half of what it would be otherwise.
    """

    creator: Function
    shape: tuple[int, ...]
    dtype: Any


class Function:
    """One differentiable operation: ``forward`` and, beside it, ``backward``.

    Both work on raw arrays. A subclass takes its parameters in the constructor, keeps what
    ``backward`` needs on ``self``, and is used through :func:`minihyperflows.apply`::

        class Square(Function):
            def forward(self, x):
                self.x = x
                return x * x

            def backward(self, cotangent):
                return 2 * self.x * cotangent

        y = apply(Square(), x)

    ``backward`` receives the gradient of the loss with respect to the output (the *cotangent*) and
    returns one gradient for each input: an array of that input's shape, or None where
    ``self.needs[i]`` is False. A single input may be answered by a bare array.

    ``backward`` must not write into the cotangent: other functions may hold the same array. It may
    return the cotangent itself, one array for several inputs, or views: whoever adds to a gradient
    makes sure that nobody else sees it. On complex arrays an operation is its analytic
    continuation: nothing is conjugated, and comparisons look at the real part. That is what the
    complex-step derivative needs.

    Attributes:
        arithmetic: which numbers it computes with; its inputs are converted accordingly
            (:mod:`minihyperflows.engine.numbers`). None: they come as they are.
    """

    arithmetic: numbers.Arithmetic | None = None
    rounds_to_half = False  # computes in float32 for inputs of float16
    inputs: tuple[Any, ...] = ()
    needs: tuple[bool, ...] = ()
    output_shape: tuple[int, ...] = ()
    kept: list[Kept]  # with versions: see changes.py
    versions: list[Version]
    freed = False

    def forward(self, *arrays: Array) -> Array:
        raise NotImplementedError(f"{self.name} has no forward")

    def backward(self, cotangent: Array) -> Array | tuple[Array | None, ...]:
        raise NotImplementedError(f"{self.name} has no backward")

    @property
    def name(self) -> str:
        return type(self).__name__

    def buffer_for(self, i: int) -> Array | None:
        """The array in which ``backward`` may write the gradient of input ``i``: the leaf's
        ``gradient_buffer``, if it has one that holds no gradient yet.

        A leaf that is an input twice has its buffer for the first one only.
        """
        x = self.inputs[i]
        empty = isinstance(x, Leaf) and x.grad is None
        first = all(other is not x for other in self.inputs[:i])
        return x.gradient_buffer if empty and first else None

    def parents(self) -> list[Function]:
        """The functions that made the inputs through which a gradient flows."""
        if self.freed:
            raise GraphError(
                "a part of this graph was freed by an earlier backward: run the forward pass again"
            )
        pairs = zip(self.inputs, self.needs, strict=True)
        return [x.creator for x, needed in pairs if needed and x.creator is not None]

    def free(self) -> None:
        """Forget the inputs and everything that ``forward`` saved."""
        self.__dict__.clear()
        self.freed = True


def reverse_topological_order(root: Function) -> list[Function]:
    """Every function that ``root`` depends on, each after all the functions that use its output.

    Iterative (Kahn's algorithm), so the depth of the graph is limited by memory, not by Python's
    recursion limit.
    """
    consumers: Counter[Function] = Counter()
    found, stack = {root}, [root]
    while stack:
        for parent in stack.pop().parents():
            consumers[parent] += 1
            if parent not in found:
                found.add(parent)
                stack.append(parent)

    order, ready = [], [root]
    while ready:
        function = ready.pop()
        order.append(function)
        for parent in function.parents():
            consumers[parent] -= 1
            if consumers[parent] == 0:
                ready.append(parent)
    return order


@one_blas_thread
def backpropagate(root: Function, cotangent: list[Array]) -> None:
    """Add the gradient of every leaf below ``root`` to its ``grad``, then free the graph.

    Each function hands its inputs' cotangents on; an input used several times receives their sum.

    Args:
        root: the function that made the loss.
        cotangent: the gradient of the loss with respect to the output of ``root``, in a list of
            its own, which is emptied: see :func:`~minihyperflows.engine.memory.held_once`.

    Raises:
        GraphError: an array that a function kept has changed since; no gradient has, then.
    """
    order = reverse_topological_order(root)
    for function in order:
        require_unchanged(function)
    waiting: dict[Function, list[Array]] = {root: cotangent}
    for function in order:
        gradients = input_gradients(function, waiting.pop(function).pop())
        inputs = function.inputs
        function.free()  # now nothing that it kept can be one of the gradients
        for i, tensor in enumerate(inputs):
            gradient, gradients[i] = [gradients[i]], None
            if gradient[0] is None:
                continue
            if tensor.creator is None:
                add_to_leaf(tensor, gradient)
            elif tensor.creator in waiting:
                waiting[tensor.creator] = [sum_of(waiting.pop(tensor.creator), gradient)]
            else:
                waiting[tensor.creator] = gradient


def input_gradients(function: Function, cotangent: Array) -> list[Array | None]:
    """``function.backward(cotangent)``, checked: one gradient of the right shape for each input."""
    answer = numbers.backward(function, cotangent)
    gradients = answer if isinstance(answer, tuple) else (answer,)
    if len(gradients) != len(function.inputs):
        raise GraphError(
            f"{function.name}.backward returned {len(gradients)} gradients "
            f"for {len(function.inputs)} inputs"
        )
    wanted = [g if n else None for g, n in zip(gradients, function.needs, strict=True)]
    for i, (needed, gradient) in enumerate(zip(function.needs, wanted, strict=True)):
        if not needed:
            continue
        if gradient is None or not hasattr(gradient, "shape"):
            found = "no gradient" if gradient is None else f"a {type(gradient).__name__}"
            raise GraphError(
                f"{function.name}.backward returned {found} where input {i} needs an array"
            )
        if gradient.shape != function.inputs[i].shape:
            raise ShapeError(
                f"{function.name}.backward returned shape {gradient.shape} "
                f"for input {i} of shape {function.inputs[i].shape}"
            )
        if isinstance(function.inputs[i], Intermediate):  # a leaf's is converted where it is kept
            wanted[i] = numbers.rounded(gradient, function.inputs[i].dtype)
    return wanted


@runtime_checkable
class Leaf(Protocol):
    """What the backward pass knows of a tensor that a user made: its array and how often it was
    changed, its gradient, and the memory that the gradient is to be written to (None: to a new
    array)."""

    data: Array
    version: int
    grad: Array | None
    gradient_buffer: Array | None


def sum_of(total: list[Array], gradient: list[Array]) -> Array:
    """``total[0] + gradient[0]``, in the memory of the first if nobody else can see it.

    ``backward`` of an operation may return what others hold: the cotangent itself, one array for
    two inputs (as ``a + b`` does), views. To write into one of those would change a gradient that
    is still on its way.
    """
    same_kind = total[0].dtype == gradient[0].dtype and total[0].shape != ()
    in_place = same_kind and memory.held_once(total)
    return add(total[0], gradient[0], out=total[0] if in_place else None)


def add_to_leaf(leaf: Leaf, gradient: list[Array]) -> None:
    """Add ``gradient[0]`` to ``leaf.grad``, which nobody but the leaf may hold.

    The first gradient is adopted as it is if nobody else can see its memory; else copied. A leaf
    with a ``gradient_buffer`` gets it there.
    """
    if leaf.gradient_buffer is not None:
        _add_to_buffer(leaf, leaf.gradient_buffer, gradient[0])
        return
    gradient = [_as_array(gradient.pop(), leaf.data.dtype)]
    if leaf.grad is None:
        leaf.grad = gradient.pop() if memory.held_once(gradient) else gradient[0].copy()
    else:
        total, leaf.grad = [leaf.grad], None
        leaf.grad = sum_of(total, gradient)


def _add_to_buffer(leaf: Leaf, buffer: Array, gradient: Array) -> None:
    if leaf.grad is not None:
        add(buffer, gradient, out=buffer)
    elif gradient is not buffer:
        copy(gradient, out=buffer)
    leaf.grad = buffer


def _as_array(gradient: Array, dtype: Any) -> Array:
    """``gradient`` as an array in the leaf's dtype; complex stays complex, for a real leaf too."""
    return xp_of(gradient).asarray(numbers.rounded(gradient, dtype))
