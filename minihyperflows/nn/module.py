"""Modules: objects that hold parameters, buffers and other modules.

A module finds what it holds by looking through its own attributes (and the lists, tuples and
dictionaries among them, however deep), in the order in which they were set. There is no
registration to forget.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from minihyperflows.engine.backend import to_device, to_numpy, xp_of
from minihyperflows.engine.errors import DoubtfulResultWarning, ShapeError
from minihyperflows.engine.tensor import Tensor
from minihyperflows.nn.flattening import flattened_otherwise


class Parameter(Tensor):
    """A tensor that training changes.

    Args:
        array: the initial values.
        torch_axes: the order of axes that turns this layout into PyTorch's, which ``state_dict``
            uses; None where the two agree.
        role: "weight" for what the network computes with; other roles, as pruning has, are
            kept out of ``named_parameters`` and trained by an optimiser of their own.
    """

    def __init__(
        self, array: Any, torch_axes: tuple[int, ...] | None = None, role: str = "weight"
    ) -> None:
        super().__init__(array, requires_grad=True)
        self.torch_axes, self.role = torch_axes, role


class Buffer(Tensor):
    """State that is saved with a network but not trained, such as running statistics."""

    torch_axes = None

    def __init__(self, array: Any) -> None:
        super().__init__(array)


# What to do if a state and a network differ in parameters of a name: for those who add some.
HINTS: dict[str, str] = {}

CONTAINERS = (list, tuple, dict, set, frozenset)


class Module:
    """A part of a network: call it on a tensor to get a tensor."""

    training = True

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; what holds state is replaced only by what holds state, or None.

        Raises:
            TypeError: an array, a plain tensor or a number in the place of a parameter or buffer.
        """
        held = vars(self).get(name)
        if isinstance(held, Parameter | Buffer):
            _check_replacement(f"{type(self).__name__}.{name}", held, value)
        super().__setattr__(name, value)

    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} has no forward")

    def __call__(self, x: Tensor) -> Tensor:
        return self.forward(x if isinstance(x, Tensor) else Tensor(x))

    # -- what it holds ---------------------------------------------------------------------------

    def contents(self) -> Iterator[tuple[str, Any]]:
        """The attributes with their names; the items of lists, tuples and dictionaries singly, at
        any depth: ``blocks.0.1`` is ``self.blocks[0][1]``.

        Raises:
            TypeError: modules or parameters in a set, which has no order to name them by.
        """
        for name, value in vars(self).items():
            if isinstance(value, CONTAINERS):
                yield from _items(name, value, ())
            else:
                yield name, value

    def children(self) -> Iterator[tuple[str, Module]]:
        """The modules directly inside this one, with their names."""
        return ((name, item) for name, item in self.contents() if isinstance(item, Module))

    def named_modules(self) -> Iterator[tuple[str, Module]]:
        """This module and all modules inside it, each once, with its (first) dotted name."""
        return _walk(self, "", set())

    def named_tensors(self) -> dict[str, Parameter | Buffer]:
        """All parameters of every role, and all buffers: what ``state_dict`` saves.

        A tensor that several modules share (tied weights) is there under each of its names.

        Raises:
            ValueError: two tensors have the same name, so that one of them would be lost.
        """
        found: dict[str, Parameter | Buffer] = {}
        for path, module in self.named_modules():
            for name, value in module.contents():
                if isinstance(value, Parameter | Buffer):
                    full_name = f"{path}.{name}" if path else name
                    if found.setdefault(full_name, value) is not value:
                        raise ValueError(
                            f"two parameters or buffers are called {full_name}: choose keys that "
                            "differ as text and contain no dots"
                        )
        return found

    def named_parameters(self, role: str = "weight") -> dict[str, Parameter]:
        """The parameters of one role by dotted name, in the order of definition.

        A parameter that several modules share has one entry, its first name.
        """
        first_name: dict[Parameter, str] = {}
        for name, tensor in self.named_tensors().items():
            if isinstance(tensor, Parameter) and tensor.role == role:
                first_name.setdefault(tensor, name)
        return {name: parameter for parameter, name in first_name.items()}

    def parameters(self) -> list[Parameter]:
        """The values of :meth:`named_parameters`."""
        return list(self.named_parameters().values())

    # -- modes and devices -----------------------------------------------------------------------

    def train(self, mode: bool = True) -> Module:
        """Switch every module inside to training behaviour (batch statistics, for example)."""
        for _, module in self.named_modules():
            module.training = mode
        return self

    def eval(self) -> Module:
        """Switch every module inside to evaluation behaviour."""
        return self.train(False)

    def to(self, device: str) -> Module:
        """Move all parameters and buffers to "cpu" or "cuda", in place; gradients are dropped."""
        moved = {k: to_device(t.data, device) for k, t in self.named_tensors().items()}
        for name, tensor in self.named_tensors().items():
            tensor.data, tensor.grad = moved[name], None
        return self

    def zero_grad(self) -> None:
        """Forget the gradients of all parameters, of every role."""
        for tensor in self.named_tensors().values():
            tensor.grad = None

    # -- saving and loading ----------------------------------------------------------------------

    def state_dict(self) -> dict[str, np.ndarray]:
        """Copies of all values by name, in PyTorch's names and layouts (convolutions are OIHW)."""
        return {k: _to_torch_layout(t).copy() for k, t in self.named_tensors().items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the values of ``state``, as :meth:`state_dict` (or PyTorch's) returns them.

        Everything is checked before the first value changes. Values are converted to each
        tensor's dtype.

        One layout depends on more than the tensor: a linear layer behind ``Flatten`` reads a map
        in the order (H, W, C) here and (C, H, W) in PyTorch. The shapes agree, so a state cannot
        be told apart by them, and this method changes nothing: ``nn.from_torch_flatten`` does.

        Warns:
            DoubtfulResultWarning: a tensor of PyTorch's seems to be such a weight. (Arrays that
                were made of one do not show it.)

        Raises:
            KeyError: names are missing or unknown.
            ShapeError: a value has another shape than its tensor.
            TypeError: a value is of another kind, complex for real or real for integer.
            ValueError: different values for the names of one shared tensor.
        """
        tensors = self.named_tensors()
        _check_names(set(tensors), set(state))
        arrays = {k: np.asarray(state[k]) for k in tensors}
        for name, tensor in tensors.items():
            _check_fits(name, arrays[name], tensor)
        _check_ties(arrays, tensors)
        shapes = {name: t.shape for name, t in tensors.items() if isinstance(t, Parameter)}
        for warning in flattened_otherwise(state, shapes):
            warnings.warn(warning, DoubtfulResultWarning, stacklevel=2)
        for name, tensor in tensors.items():
            tensor.data = _from_torch_layout(arrays[name], tensor)


def _check_replacement(place: str, held: Parameter | Buffer, value: Any) -> None:
    if value is not None and not isinstance(value, Parameter | Buffer | Module):
        kind, attribute = type(held).__name__, place.rpartition(".")[2]
        raise TypeError(
            f"{place} is a {kind}: in its place {type(value).__name__} would not be trained or "
            f"saved; set its values with .{attribute}.data = ..., or assign an nn.{kind}"
        )


def _items(name: str, value: Any, around: tuple[Any, ...]) -> Iterator[tuple[str, Any]]:
    """``value``, or what a container holds, with names; ``around`` are the containers that it is
    in, which are not entered again."""
    if isinstance(value, list | tuple | dict):
        if not any(value is container for container in around):
            items = value.items() if isinstance(value, dict) else enumerate(value)
            for key, item in items:
                yield from _items(f"{name}.{key}", item, (*around, value))
        return
    if isinstance(value, set | frozenset) and any(isinstance(v, Module | Tensor) for v in value):
        raise TypeError(f"{name} is a set, whose modules have no order and no names: use a list")
    yield name, value


def _walk(module: Module, name: str, seen: set[int]) -> Iterator[tuple[str, Module]]:
    """``module``, called ``name``, and all modules inside it that were not seen before."""
    if id(module) in seen:
        return
    seen.add(id(module))
    yield name, module
    for child_name, child in module.children():
        yield from _walk(child, f"{name}.{child_name}" if name else child_name, seen)


def _to_torch_layout(tensor: Parameter | Buffer) -> np.ndarray:
    array = to_numpy(tensor.data)
    return array if tensor.torch_axes is None else array.transpose(tensor.torch_axes)


def _from_torch_layout(array: np.ndarray, like: Parameter | Buffer) -> Any:
    """``array`` in the layout, dtype and device of ``like``, in memory of its own."""
    if like.torch_axes is not None:
        array = array.transpose(np.argsort(like.torch_axes))
    return xp_of(like.data).array(array, dtype=like.dtype, order="C")


def _check_fits(name: str, array: np.ndarray, tensor: Parameter | Buffer) -> None:
    wanted = _to_torch_layout(tensor).shape
    if array.shape != wanted:
        raise ShapeError(f"{name} has shape {array.shape} where {wanted} is needed")
    if not np.can_cast(array.dtype, tensor.dtype, "same_kind"):
        raise TypeError(f"{name} holds {array.dtype} values where {tensor.dtype} is needed")


def _check_ties(arrays: dict[str, np.ndarray], tensors: dict[str, Parameter | Buffer]) -> None:
    """One tensor, one value: otherwise the last of its names would win, silently."""
    first_name: dict[int, str] = {}
    for name, tensor in tensors.items():
        first = first_name.setdefault(id(tensor), name)
        if first != name and not np.array_equal(arrays[first], arrays[name], equal_nan=True):
            raise ValueError(
                f"{first} and {name} are one tensor here, but the state has different values for "
                "them: make them equal, or load into a network that does not share it"
            )


def _check_names(wanted: set[str], given: set[str]) -> None:
    problems = []
    if missing := sorted(wanted - given):
        problems.append(f"missing {', '.join(missing)}")
    if unknown := sorted(given - wanted):
        problems.append(f"unknown {', '.join(unknown)}")
    ends = {name.rpartition(".")[2] for name in wanted ^ given}
    problems += [hint for end, hint in HINTS.items() if end in ends]
    if problems:
        raise KeyError(f"this state does not fit the network: {'; '.join(problems)}")
