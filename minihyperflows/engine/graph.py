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

from minihyperflows.engine import numbers
from minihyperflows.engine.backend import Array, xp_of
from minihyperflows.engine.errors import GraphError, ShapeError
from minihyperflows.engine.gpu import elementwise as gpu_elementwise
from minihyperflows.engine.gpu.launch import takes
from minihyperflows.engine.memory import owns_memory
from minihyperflows.engine.threads import add

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

    ``backward`` must not write into the cotangent: other functions may hold the same array. On
    complex arrays an operation is its analytic continuation: nothing is conjugated, and
    comparisons look at the real part. That is what the complex-step derivative needs.

    Attributes:
        arithmetic: which numbers it computes with; its inputs are converted accordingly
            (:mod:`minihyperflows.engine.numbers`). None: they come as they are.
    """

    arithmetic: numbers.Arithmetic | None = None
    rounds_to_half = False  # computes in float32 for inputs of float16
    inputs: tuple[Any, ...] = ()
    needs: tuple[bool, ...] = ()
    output_shape: tuple[int, ...] = ()
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
        ``gradient_buffer``, if it has one that holds no gradient yet."""
        x = self.inputs[i]
        empty = isinstance(x, Leaf) and x.grad is None
        return x.gradient_buffer if empty else None

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


def backpropagate(root: Function, cotangent: Array) -> None:
    """Add the gradient of every leaf below ``root`` to its ``grad``, then free the graph.

    Each function hands its inputs' cotangents on; an input used several times receives their sum.
    """
    waiting: dict[Function, Array] = {root: cotangent}
    leaves = LeafGradients(cotangent)
    for function in reverse_topological_order(root):
        gradients = input_gradients(function, waiting.pop(function))
        for tensor, gradient in zip(function.inputs, gradients, strict=True):
            if gradient is None:
                continue
            if tensor.creator is None:
                leaves.add(tensor, gradient)
            elif tensor.creator in waiting:
                waiting[tensor.creator] = add(waiting[tensor.creator], gradient)
            else:
                waiting[tensor.creator] = gradient
        function.free()


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
    """What the backward pass knows of a tensor that a user made: its array, its gradient, and the
    memory that the gradient is to be written to (None: to a new array)."""

    data: Array
    grad: Array | None
    gradient_buffer: Array | None


class LeafGradients:
    """Adds gradients to leaves such that every leaf owns the memory of its ``grad``.

    ``backward`` of an operation may hand on the cotangent itself, or a view (``a + b`` gives both
    inputs the same array). An array is adopted as it is if nobody else can hold it; else copied. A
    leaf with a ``gradient_buffer`` gets its gradient there.
    """

    def __init__(self, cotangent: Array) -> None:
        self._kept = [cotangent]  # references, so that no id is reused while this object lives
        self._ids = {id(cotangent)}

    def add(self, leaf: Leaf, gradient: Array) -> None:
        if leaf.gradient_buffer is not None:
            _add_to_buffer(leaf, leaf.gradient_buffer, gradient)
            return
        gradient = _as_array(gradient, leaf.data.dtype)
        if leaf.grad is None:
            if not owns_memory(gradient) or id(gradient) in self._ids:
                gradient = gradient.copy()
            leaf.grad = gradient
        elif gradient.shape == ():
            leaf.grad = leaf.grad + gradient
        else:
            made_here = id(leaf.grad) in self._ids  # nobody has seen it yet
            in_place = made_here and leaf.grad.dtype == gradient.dtype
            leaf.grad = add(leaf.grad, gradient, out=leaf.grad if in_place else None)
        self._kept.append(leaf.grad)
        self._ids.add(id(leaf.grad))


def _add_to_buffer(leaf: Leaf, buffer: Array, gradient: Array) -> None:
    if leaf.grad is not None:
        add(buffer, gradient, out=buffer)
    elif takes(buffer, gradient):
        if gradient is not buffer:
            gpu_elementwise.convert(gradient, buffer)
    elif gradient is not buffer:
        buffer[...] = gradient
    leaf.grad = buffer


def _as_array(gradient: Array, dtype: Any) -> Array:
    """``gradient`` as an array in the leaf's dtype; complex stays complex, for a real leaf too."""
    return xp_of(gradient).asarray(numbers.rounded(gradient, dtype))
