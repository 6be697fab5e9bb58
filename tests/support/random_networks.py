"""Random networks, and what is known of them from how they were built.

:func:`build` draws a program of a few steps: plain and depthwise convolutions, batch norms,
residual sums, attention maps by broadcasting, layers and norms that are used twice, tied weights,
constants, weights that are computed from others, and a head that may end in log_softmax. While it
draws, a :class:`Facts` writes down by its own means which channels belong together and how often
each weight is used, so that a test can compare. Everything follows from the seed.

:func:`seeds` says how many to try: few, or many by hand with ``HYPOTHESIS_PROFILE=large``; with
``FUZZ_CASES=N`` so many, and with ``FUZZ_START=S`` those from seed S on.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

from minihyperflows import functional as F
from minihyperflows import nn
from minihyperflows.engine.tensor import Tensor


def seeds(few: int, many: int = 2_000) -> range:
    """The seeds to try."""
    large = os.environ.get("HYPOTHESIS_PROFILE") == "large"
    start = int(os.environ.get("FUZZ_START", "0"))
    return range(start, start + int(os.environ.get("FUZZ_CASES", str(many if large else few))))


@contextmanager
def named(seed: int) -> Iterator[None]:
    """An error says which seed it is of."""
    try:
        yield
    except BaseException as error:
        error.add_note(f"seed {seed}: FUZZ_START={seed} FUZZ_CASES=1 tries it alone")
        raise


class Use(NamedTuple):
    """One use of a layer: so many output pixels, each from a kernel of so many."""

    layer: str
    pixels: int
    kernel: int


class Facts:
    """What the builder knows: spaces of channels, joined by union-find, and the uses of layers."""

    def __init__(self) -> None:
        self.parent: list[int] = []
        self.fixed: set[int] = set()
        self.stretched: set[int] = set()
        self.made: dict[str, int] = {}  # the space of a layer's or norm's outputs
        self.read: dict[str, tuple[int, int]] = {}  # the space a layer reads, inputs per channel
        self.depthwise: set[str] = set()
        self.norms: set[str] = set()
        self.tied: dict[str, str] = {}  # a layer and the earlier one whose weight it has
        self.uses: list[Use] = []

    def space(self) -> int:
        self.parent.append(len(self.parent))
        return self.parent[-1]

    def root(self, i: int) -> int:
        return i if self.parent[i] == i else self.root(self.parent[i])

    def join(self, a: int, b: int) -> None:
        self.parent[self.root(a)] = self.root(b)

    def groups(self) -> set[tuple[Any, ...]]:
        """(outputs, depthwise, norms, inputs, removable, stretched, tied) of every group."""
        roots = {self.root(i) for i in self.made.values()}
        roots |= {self.root(i) for i, _ in self.read.values()}
        fixed, stretched = ({self.root(i) for i in s} for s in (self.fixed, self.stretched))
        found = set()
        for root in roots:
            made = [n for n, i in self.made.items() if self.root(i) == root]
            outputs = tuple(n for n in made if n not in self.norms)
            found.add(
                (
                    outputs,
                    tuple(n for n in outputs if n in self.depthwise),
                    tuple(n for n in made if n in self.norms),
                    frozenset((n, k) for n, (i, k) in self.read.items() if self.root(i) == root),
                    root not in fixed,
                    root in stretched,
                    tuple(n for n in outputs if n in self.tied),
                )
            )
        return found


# -- the program -----------------------------------------------------------------------------------


class Step(NamedTuple):
    """One operation on earlier values, by number, with the layer that it uses, if it does."""

    kind: str
    inputs: tuple[int, ...]
    layer: str = ""
    option: Any = None


def conv(layer: Any, x: Tensor, option: Any) -> Tensor:
    return layer(x)


def computed(layer: Any, x: Tensor, factor: Any) -> Tensor:
    """A weight that was computed from the layer's: the first input is not the parameter."""
    weight = factor * layer.effective_weight()
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight, layer.bias)
    return F.conv2d(x, weight, layer.bias, layer.stride, layer.padding, layer.groups)


KINDS: dict[str, Callable[..., Tensor]] = {
    "layer": conv,
    "computed": computed,
    "relu": lambda layer, x, o: F.relu(x),
    "tanh": lambda layer, x, o: F.tanh(x),
    "sigmoid": lambda layer, x, o: F.sigmoid(x),
    "normalised": lambda layer, x, o: layer.then_relu(x),
    "add": lambda layer, a, b, o: a + b,
    "multiply": lambda layer, a, b, o: a * b,
    "times": lambda layer, x, o: x * o,
    "times tensor": lambda layer, x, o: Tensor(o) * x,
    "minus": lambda layer, x, o: o - x,
    "max pool": lambda layer, x, o: F.max_pool2d(x, 2),
    "avg pool": lambda layer, x, o: F.avg_pool2d(x, 2),
    "mean": lambda layer, x, o: x.mean(axis=(1, 2)),
    "as map": lambda layer, x, o: x.reshape(x.shape[0], 1, 1, x.shape[-1]),
    "flatten": lambda layer, x, o: F.flatten(x),
    "softmax": lambda layer, x, o: F.softmax(x),
    "log_softmax": lambda layer, x, o: F.log_softmax(x),
}


class Program(nn.Module):
    """A network that does the steps one after another; the last value is the output."""

    def __init__(self) -> None:
        self.steps: list[Step] = []

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for step in self.steps:
            layer = getattr(self, step.layer) if step.layer else None
            inputs = [values[i] for i in step.inputs]
            values.append(KINDS[step.kind](layer, *inputs, step.option))
        return values[-1]


class Value(NamedTuple):
    """A value of the program: rows and columns, channels, their space, entries per channel."""

    number: int
    size: tuple[int, int]
    channels: int
    space: int
    repeats: int = 1


class Case(NamedTuple):
    """A random network with everything that is known of it."""

    net: Program
    image: tuple[int, int, int]
    facts: Facts
    dtype: Any
    classes: int
    log_softmax: bool

    def batch(self, n: int, seed: int = 0) -> np.ndarray:
        return np.random.default_rng(seed).standard_normal((n, *self.image)).astype(self.dtype)


class Builder:
    """Draws a program and keeps the facts."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.net, self.facts = Program(), Facts()
        self.dtype = self.rng.choice([np.float64, np.float64, np.float32])
        self.image = (*self.rng.integers(4, 7, 2).tolist(), int(self.rng.integers(1, 4)))
        self.number = 0
        self.first = Value(0, self.image[:2], self.image[2], self.facts.space())
        self.facts.fixed.add(self.first.space)

    def step(self, kind: str, inputs: list[Value], value: Value, **more: Any) -> Value:
        self.net.steps.append(Step(kind, tuple(v.number for v in inputs), **more))
        return value._replace(number=len(self.net.steps))

    def name(self) -> str:
        """Of the next layer; now and then one that means something else."""
        self.number += 1
        free = not hasattr(self.net, "input")
        return "input" if free and self.rng.random() < 0.05 else f"l{self.number}"

    def chance(self, p: float) -> bool:
        return bool(self.rng.random() < p)

    # -- layers ------------------------------------------------------------------------------------

    def conv(self, x: Value, channels: int | None = None, depthwise: bool = False) -> str:
        """The name of a new convolution that fits x."""
        name, size = self.name(), int(self.rng.choice([1, 3]))
        channels = int(self.rng.integers(1, 6)) if channels is None else channels
        layer = nn.Conv2d(
            x.channels, channels, size, padding=size // 2, bias=self.chance(0.5),
            groups=x.channels if depthwise else 1, rng=self.rng, dtype=self.dtype,
        )  # fmt: skip
        setattr(self.net, name, layer)
        self.facts.made[name] = self.facts.space()
        if depthwise:
            self.facts.depthwise.add(name)
        return name

    def linear(self, x: Value, features: int) -> str:
        name = self.name()
        layer = nn.Linear(x.channels * x.repeats, features, rng=self.rng, dtype=self.dtype)
        setattr(self.net, name, layer)
        self.facts.made[name] = self.facts.space()
        return name

    def use(self, name: str, x: Value) -> Value:
        """x through the layer ``name``, perhaps with a weight that is computed from the layer's."""
        layer, facts = getattr(self.net, name), self.facts
        kernel = layer.weight[0, ..., 0].size
        pixels = x.size[0] * x.size[1]
        if name in facts.depthwise:
            facts.join(facts.made[name], x.space)
        else:
            facts.join(facts.read.setdefault(name, (x.space, x.repeats))[0], x.space)
        facts.uses.append(Use(name, pixels, kernel))
        made = Value(0, x.size, layer.weight.shape[0], facts.made[name])
        if not self.chance(0.15):
            return self.step("layer", [x], made, layer=name)
        factor: Any = float(self.rng.uniform(0.5, 2))
        if self.chance(0.3):
            factor = self.rng.uniform(0.5, 2, layer.weight.shape).astype(self.dtype)
            if factor.size > 1:
                facts.fixed |= {x.space, facts.made[name]}
        return self.step("computed", [x], made, layer=name, option=factor)

    def norm(self, x: Value, name: str = "") -> Value:
        """x through a batch norm, a new one or the one called ``name``."""
        if not name:
            name = f"n{len(self.net.steps)}"
            norm = nn.BatchNorm2d(x.channels, dtype=self.dtype)
            for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
                tensor.data = self.rng.uniform(0.5, 1.5, x.channels).astype(self.dtype)
            setattr(self.net, name, norm)
            self.facts.made[name] = self.facts.space()
            self.facts.norms.add(name)
        self.facts.join(self.facts.made[name], x.space)
        return self.step(str(self.rng.choice(["layer", "normalised"])), [x], x, layer=name)

    def activation(self, x: Value) -> Value:
        return self.step(str(self.rng.choice(["relu", "tanh", "sigmoid"])), [x], x)

    def both(self, a: Value, b: Value) -> Value:
        """The sum or product of two values of one shape."""
        self.facts.join(a.space, b.space)
        value = b if a.number == 0 else a
        return self.step(str(self.rng.choice(["add", "multiply"])), [a, b], value)

    # -- blocks ------------------------------------------------------------------------------------

    def plain(self, x: Value) -> Value:
        return self.after(self.use(self.conv(x), x))

    def after(self, x: Value) -> Value:
        """Perhaps a norm, perhaps an activation."""
        x = self.norm(x) if self.chance(0.5) else x
        return self.activation(x) if self.chance(0.6) else x

    def filtered(self, x: Value) -> Value:
        if x.number == 0 or x.channels == 1:  # that would be an ordinary convolution
            return self.plain(x)
        return self.after(self.use(self.conv(x, x.channels, depthwise=True), x))

    def residual(self, x: Value) -> Value:
        """x or another convolution of it, plus a bottleneck of one or two layers."""
        inner = self.plain(x) if self.chance(0.6) else x
        last = self.use(self.conv(inner, x.channels), inner)
        last = self.norm(last) if self.chance(0.5) else last
        side = self.use(self.conv(x, x.channels), x) if self.chance(0.3) else x
        return self.both(side, last)

    def attention(self, x: Value) -> Value:
        """x times a map of one channel."""
        single = self.use(self.conv(x, 1), x)
        single = self.step("sigmoid", [single], single)
        if x.number == 0:
            return single
        if x.channels > 1:
            self.facts.stretched.add(x.space)
        else:
            self.facts.join(single.space, x.space)
        pair = [x, single] if self.chance(0.5) else [single, x]
        return self.step(str(self.rng.choice(["add", "multiply"])), pair, x)

    def excitation(self, x: Value) -> Value:
        """x times a factor for each channel, computed from its mean."""
        if x.number == 0:
            return self.plain(x)
        mean = self.step("mean", [x], x._replace(size=(1, 1)))
        hidden = self.activation(self.use(self.linear(mean, int(self.rng.integers(1, 4))), mean))
        factors = self.use(self.linear(hidden, x.channels), hidden)
        factors = self.step("sigmoid", [factors], factors)
        factors = self.step("as map", [factors], factors)
        self.facts.join(factors.space, x.space)
        return self.step("multiply", [x, factors], x)

    def twice(self, x: Value) -> Value:
        """One convolution used two or three times, perhaps with one norm behind all of them."""
        name, norm = self.conv(x, x.channels), ""
        for _ in range(int(self.rng.integers(2, 4))):
            x = self.use(name, x)
            if norm or self.chance(0.5):
                x = self.norm(x, norm)
                norm = self.net.steps[-1].layer
        return x

    def tied(self, x: Value) -> Value:
        """Two convolutions with one weight, one after the other or side by side."""
        chain = self.chance(0.5)
        first = self.conv(x, x.channels if chain else None)
        second = self.name()
        weighted = getattr(self.net, first)
        other = nn.Conv2d(
            x.channels, weighted.weight.shape[0], weighted.weight.shape[1:3],
            padding=weighted.padding, bias=self.chance(0.5), rng=self.rng, dtype=self.dtype,
        )  # fmt: skip
        other.weight = weighted.weight
        setattr(self.net, second, other)
        facts = self.facts
        facts.made[second], facts.tied[second] = facts.made[first], first
        a = self.use(first, x)
        facts.read[second] = facts.read[first]
        return self.use(second, a) if chain else self.both(a, self.use(second, x))

    def constant(self, x: Value) -> Value:
        """Something fixed: a number, one entry for each pixel, or one for each channel."""
        if x.number == 0:
            return self.plain(x)
        kind = str(self.rng.choice(["times", "times tensor", "minus"]))
        shapes: list[tuple[int, ...]] = [(), (*x.size, 1), (x.channels,), (*x.size, x.channels)]
        shape = shapes[int(self.rng.integers(4))]
        array = self.rng.uniform(0.5, 2, shape).astype(self.dtype)
        if shape and shape[-1] > 1:
            self.facts.fixed.add(x.space)
        elif shape and kind == "times tensor":  # as if it were another image
            (self.facts.fixed if x.channels == 1 else self.facts.stretched).add(x.space)
        return self.step(kind, [x], x, option=array)

    def softmax(self, x: Value) -> Value:
        if x.number == 0:
            return self.plain(x)
        self.facts.fixed.add(x.space)
        return self.step("softmax", [x], x)

    def pool(self, x: Value) -> Value:
        if x.number == 0 or min(x.size) < 2:
            return self.plain(x)
        size = (x.size[0] // 2, x.size[1] // 2)
        kind = str(self.rng.choice(["max pool", "avg pool"]))
        return self.step(kind, [x], x._replace(size=size))

    def reread(self, x: Value) -> Value:
        """Another look at the images, scaled: a second constant."""
        if x.number == 0 or x.size != self.first.size:
            return self.plain(x)
        scaled = self.step("times", [self.first], self.first._replace(space=self.facts.space()))
        self.net.steps[-1] = self.net.steps[-1]._replace(option=2.0)
        self.facts.fixed.add(scaled.space)
        return self.both(x, self.use(self.conv(scaled, x.channels), scaled))

    # -- all of it ---------------------------------------------------------------------------------

    def head(self, x: Value, classes: int, log_softmax: bool) -> None:
        if self.chance(0.5):
            x = self.step("mean", [x], x._replace(size=(1, 1)))
        else:
            pixels = x.size[0] * x.size[1]
            x = self.step("flatten", [x], x._replace(size=(1, 1), repeats=x.repeats * pixels))
        if self.chance(0.5):
            x = self.activation(self.use(self.linear(x, int(self.rng.integers(1, 6))), x))
        x = self.use(self.linear(x, classes), x)
        self.facts.fixed.add(x.space)
        if log_softmax:
            self.step("log_softmax", [x], x)


BLOCKS = (
    *(Builder.plain, Builder.plain, Builder.filtered, Builder.residual, Builder.residual),
    *(Builder.attention, Builder.excitation, Builder.twice, Builder.tied, Builder.constant),
    *(Builder.softmax, Builder.pool, Builder.reread),
)


def build(seed: int) -> Case:
    """The network of this seed."""
    builder = Builder(seed)
    x = builder.plain(builder.first) if builder.chance(0.7) else builder.first
    for _ in range(int(builder.rng.integers(1, 5))):
        x = BLOCKS[int(builder.rng.integers(len(BLOCKS)))](builder, x)
    if x.number == 0:
        x = builder.plain(x)
    classes, log_softmax = int(builder.rng.integers(2, 5)), builder.chance(0.3)
    builder.head(x, classes, log_softmax)
    return Case(builder.net, builder.image, builder.facts, builder.dtype, classes, log_softmax)
