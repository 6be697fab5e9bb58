"""Optimisers: SGD with momentum, and Adam.

Each rule is written twice. The plain function is the formula; the class runs the same arithmetic
in place, block by block (``engine.threads``). A test holds the two equal.

Parameters in half precision are stepped in float32, and so is what is kept of them between steps:
float16 ends at 6e-8, below which Adam's eps and most squares of gradients would be zero.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np

from minihyperflows.engine.backend import Array, to_device, to_numpy, xp_of
from minihyperflows.engine.errors import ShapeError
from minihyperflows.engine.memory import empty
from minihyperflows.engine.numbers import computing_dtype
from minihyperflows.engine.tensor import Tensor
from minihyperflows.engine.threads import elementwise
from minihyperflows.nn.module import Module, Parameter

# A decaying mean that gets no new gradients, such as a removed weight's, ends among the subnormal
# numbers, where arithmetic is many times slower (and stays there: 0.9 times the smallest number
# rounds to itself). Every so many steps what is about to get there is set to zero, if it is so
# small that it cannot matter: see ``flush_decayed``.
FLUSH_EVERY = 64
FLUSH_MARGIN = 2.0**10  # at most so many times the smallest normal number


def sgd_rule(
    theta: Array,
    gradient: Array,
    velocity: Array | None,
    lr: float,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
) -> tuple[Array, Array]:
    """One step of SGD, as in PyTorch: the new parameters and the new velocity.

    g <- g + weight_decay theta;  v <- momentum v + g  (v <- g at the first step);
    theta <- theta - lr v,  or with Nesterov  theta <- theta - lr (g + momentum v).
    """
    gradient = gradient + weight_decay * theta
    velocity = gradient if velocity is None else momentum * velocity + gradient
    direction = gradient + momentum * velocity if nesterov else velocity
    return theta - lr * direction, velocity


def adam_rule(
    theta: Array,
    gradient: Array,
    m: Array,
    v: Array,
    step: int,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> tuple[Array, Array, Array]:
    """Step number ``step`` (from 1) of Adam: the new parameters, first and second moments.

    g <- g + weight_decay theta;  m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2;
    theta <- theta - lr (m / (1 - b1^step)) / (sqrt(v / (1 - b2^step)) + eps).

    Source: Kingma & Ba 2015, algorithm 1.
    """
    b1, b2 = betas
    gradient = gradient + weight_decay * theta
    m = b1 * m + (1 - b1) * gradient
    v = b2 * v + (1 - b2) * gradient * gradient
    m_hat, v_hat = m / (1 - b1**step), v / (1 - b2**step)
    return theta - lr * m_hat / (v_hat**0.5 + eps), m, v


class Optimizer:
    """Steps a list of parameters along their gradients; those without a gradient stay put.

    Args:
        params: the parameters to train, each once.
        lr: the learning rate; may be changed between steps (``opt.lr = ...``).
        weight_decay: adds weight_decay times the parameter to its gradient.

    Parameters in half precision are stepped in single precision and rounded once; the arrays that
    are kept for them are float32. (Half precision has no 1e-8, and the square of 1e-4 is 0 in it.)

    Attributes:
        state: for each parameter the arrays kept between steps, by the names in ``slots``; empty
            before the first step.
        steps: how many steps each parameter has taken.
    """

    slots: tuple[str, ...] = ()  # names of the arrays kept for each parameter

    def __init__(self, params: Iterable[Parameter], lr: float, weight_decay: float = 0.0) -> None:
        self.params = _parameters(params)
        self.lr = finite("lr", lr)
        self.weight_decay = finite("weight_decay", weight_decay)
        if self.lr < 0 or self.weight_decay < 0:
            raise ValueError(f"lr ({lr}) and weight_decay ({weight_decay}) must not be negative")
        self.state: list[dict[str, Array]] = [{} for _ in self.params]
        self.steps = [0 for _ in self.params]

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for p in self.params:
            p.grad = None

    def step(self) -> None:
        """Move every parameter that has a gradient, in place."""
        for i, p in enumerate(self.params):
            if p.grad is not None:
                self.steps[i] += 1
                self._update(p, self.state[i], self.steps[i])
                p.version += 1

    def _update(self, p: Parameter, state: dict[str, Array], step: int) -> None:
        """Update ``p.data`` and ``state`` block by block."""
        xp = xp_of(p.data)
        p.data = xp.asarray(p.data, order="C")  # a no-op but for odd user arrays
        dtype = computing_dtype(p.dtype)
        for name in self.slots:
            if name not in state:
                state[name] = xp.zeros(p.shape, dtype=dtype)
            state[name] = to_device(state[name], p.device)  # it follows its parameter
        arrays = [p.data, p.grad, *(state[name] for name in self.slots)]
        flat = [a.reshape(-1) for a in arrays]  # views, except a gradient in another order

        def work(theta: Array, gradient: Array, *slots: Array) -> None:
            scratch = empty(xp, (2, theta.size), dtype)
            wide = theta.astype(dtype, copy=False)
            gradient = gradient.astype(computing_dtype(gradient.dtype), copy=False)
            self.update_block(wide, gradient, list(slots), step, scratch)
            if wide is not theta:
                theta[...] = wide

        elementwise(work, *flat)
        if step % FLUSH_EVERY == 0:
            for name, (decay, most) in self._decays(np.finfo(dtype)).items():
                flush_decayed(state[name], decay, most)

    def _decays(self, kind: np.finfo) -> dict[str, tuple[float, float]]:
        """For each kept array, whose dtype ``kind`` describes, the factor by which it shrinks in a
        step without a gradient, and a size below which a number of it changes no step by more than
        its round-off."""
        return {}

    def update_block(
        self, theta: Array, gradient: Array, slots: list[Array], step: int, scratch: Array
    ) -> None:
        """The rule of an optimiser, for a block of one parameter: override this.

        Args:
            theta: (K,) the parameters, to be changed in place.
            gradient: (K,) of the same; to be left as it is.
            slots: the arrays kept between steps, (K,) each, in the order of ``slots``, 0 before the
                first step; to be changed in place.
            step: the number of the step, from 1.
            scratch: (2, K) to compute in.
        """
        raise NotImplementedError

    # -- saving and loading ----------------------------------------------------------------------

    def state_dict(self) -> dict[str, np.ndarray]:
        """The step count and the kept arrays of every parameter, ``"<its number>.<name>"``."""
        state = {}
        for i, slots in enumerate(self.state):
            state[f"{i}.step"] = np.array(self.steps[i])
            state |= {f"{i}.{name}": to_numpy(array).copy() for name, array in slots.items()}
        return state

    def load_state_dict(self, state: Mapping[str, np.ndarray]) -> None:
        """Continue where the optimiser that wrote ``state`` stopped.

        Raises:
            KeyError, ShapeError: the state is not of this optimiser and its parameters; nothing
                has changed then.
        """
        self._check(state)
        for i, p in enumerate(self.params):
            self.steps[i] = int(state[f"{i}.step"])
            kept = {name: state[f"{i}.{name}"] for name in self.slots if f"{i}.{name}" in state}
            self.state[i] = {
                name: to_device(np.array(array, dtype=computing_dtype(p.dtype)), p.device)
                for name, array in kept.items()
            }

    def _check(self, state: Mapping[str, np.ndarray]) -> None:
        wanted: dict[str, tuple[int, ...]] = {f"{i}.step": () for i in range(len(self.params))}
        for i, p in enumerate(self.params):
            if f"{i}.step" in state and int(state[f"{i}.step"]):
                wanted |= {f"{i}.{name}": p.shape for name in self.slots}
        if wrong := sorted(set(wanted) ^ set(state)):
            raise KeyError(
                f"this state does not fit the optimiser: {', '.join(wrong)} missing or unknown"
            )
        for name, shape in wanted.items():
            if state[name].shape != shape:
                raise ShapeError(f"{name} has shape {state[name].shape} where {shape} is needed")


class SGD(Optimizer):
    """Stochastic gradient descent with momentum; the formula is :func:`sgd_rule`."""

    slots = ("velocity",)

    def __init__(
        self,
        params: Iterable[Parameter],
        lr: float,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
    ) -> None:
        super().__init__(params, lr, weight_decay)
        self.momentum, self.nesterov = finite("momentum", momentum), bool(nesterov)
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must lie in [0, 1), not {momentum}")
        if nesterov and not momentum:
            raise ValueError("nesterov needs a momentum above 0")

    def _decays(self, kind: np.finfo) -> dict[str, tuple[float, float]]:
        return {"velocity": (self.momentum, np.inf)}

    def update_block(
        self, theta: Array, gradient: Array, slots: list[Array], step: int, scratch: Array
    ) -> None:
        xp, (velocity,), (g, s) = xp_of(theta), slots, scratch
        xp.multiply(theta, self.weight_decay, out=g)
        g += gradient
        velocity *= self.momentum  # zero at the first step, so that v = g there
        velocity += g
        direction = velocity
        if self.nesterov:
            xp.multiply(velocity, self.momentum, out=s)
            g += s
            direction = g
        xp.multiply(direction, float(self.lr), out=s)
        theta -= s


class Adam(Optimizer):
    """Adam; the formula is :func:`adam_rule`.

    Keeps m / (1 - b1) and v / (1 - b2), which are plain decaying sums, and puts the two factors
    back together with the bias corrections: three passes over memory fewer.
    """

    slots = ("m", "v")

    def __init__(
        self,
        params: Iterable[Parameter],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, lr, weight_decay)
        if not isinstance(betas, Sequence) or len(betas) != 2:
            raise ValueError(f"betas are two numbers in [0, 1), not {betas}")
        b1, b2 = (finite("a beta", b) for b in betas)
        if not (0 <= b1 < 1 and 0 <= b2 < 1):
            raise ValueError(f"betas must lie in [0, 1), not {betas}")
        self.betas, self.eps = (b1, b2), finite("eps", eps)
        if self.eps < 0:
            raise ValueError(f"eps must not be negative, not {eps}")

    def _decays(self, kind: np.finfo) -> dict[str, tuple[float, float]]:
        """A step is lr m / (sqrt(v) + eps) (corrections are nearer to 1 than these bounds need).

        With u the round-off, an m below u eps changes it by less than lr u, the rounding of a step
        of lr; a v below (u eps)^2 changes sqrt(v) + eps by less than the rounding of eps. Without
        an eps nothing is too small to matter.
        """
        size = float(kind.eps) / 2 * self.eps
        return {"m": (self.betas[0], size), "v": (self.betas[1], size * size)}

    def update_block(
        self, theta: Array, gradient: Array, slots: list[Array], step: int, scratch: Array
    ) -> None:
        xp, (m, v), (g, s) = xp_of(theta), slots, scratch
        b1, b2 = self.betas
        if self.weight_decay:
            xp.multiply(theta, self.weight_decay, out=g)
            g += gradient
            gradient = g
        m *= b1
        m += gradient
        xp.multiply(gradient, gradient, out=s)
        v *= b2
        v += s
        correct_m, correct_v = (1 - b1) / (1 - b1**step), ((1 - b2) / (1 - b2**step)) ** 0.5
        xp.sqrt(v, out=s)
        s += self.eps / correct_v
        xp.divide(m, s, out=s)
        s *= float(self.lr) * correct_m / correct_v
        theta -= s


def flush_decayed(array: Array, decay: float, most: float = np.inf) -> None:
    """Set to zero what ``FLUSH_EVERY`` more factors of ``decay`` would make subnormal, if it is
    too small to matter: |x| < min(tiny max(decay^64, 2^-10)^-1, most).

    tiny, the smallest normal number, is 1e-38 in float32 and 2e-308 in float64.

    That it does no harm: what is erased is below 2^10 tiny, 1.2e-35 in float32, at any decay. A
    velocity x would have moved its parameter by lr x / (1 - decay) in all later steps together,
    which at a decay of 0.999 is 1e-32 lr: less than the rounding of any parameter above 1e-25 lr.
    (Without the bound of 2^-10 a decay of 0.3 would erase all below 3e-5.) ``most`` is for state
    that is divided by something small.

    That it does what it is for: at a decay from 0.9 on (0.9^64 > 2^-10) nothing ever becomes
    subnormal between two calls. At a smaller decay a number may pass through the subnormal ones,
    once, in less than ``FLUSH_EVERY`` steps, and does not stay.
    """
    if 0 < decay < 1:
        xp = xp_of(array)
        limit = xp.finfo(array.dtype).tiny / max(decay**FLUSH_EVERY, 1 / FLUSH_MARGIN)
        array[abs(array) < min(limit, most)] = 0


def finite(name: str, value: Any) -> float:
    """``value`` as a float.

    Raises:
        TypeError: it is not a real number.
        ValueError: it is NaN or infinite.
    """
    if not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, not {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{name} ({value}) must be finite")
    return float(value)


def _parameters(params: Any) -> list[Parameter]:
    """What an optimiser is given to train, as a list; see :class:`Optimizer`."""
    if isinstance(params, Mapping):
        raise TypeError("pass the parameters themselves: named_parameters().values()")
    if isinstance(params, Module):
        raise TypeError("pass the network's parameters, net.parameters(), not the network")
    if isinstance(params, Tensor) or not isinstance(params, Iterable):
        raise TypeError(f"pass a list of parameters, not one {type(params).__name__}")
    listed = list(params)
    if not all(isinstance(p, Parameter) for p in listed):
        raise TypeError("an optimiser trains nn.Parameter objects only")
    if not listed:
        raise ValueError("an optimiser needs at least one parameter")
    if len({id(p) for p in listed}) < len(listed):
        raise ValueError("a parameter is listed twice: it would be stepped twice")
    return listed


__all__ = ["SGD", "Adam", "Optimizer", "adam_rule", "sgd_rule"]
