"""Training on a GPU: all parameters in flat arrays, stepped by one kernel (chapter 14).

On the CPU a training step has a gate for each layer, then a step of each optimiser for each
parameter. On a GPU that would be thousands of small kernels. Here one kernel does it all, and at
the end writes the weights that the next step computes with: gated, and in half precision if asked.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from minihyperflows.engine.backend import Array, cupy, to_numpy
from minihyperflows.engine.tensor import Tensor
from minihyperflows.flows.gates import Gated, gated_layers
from minihyperflows.flows.gpu.update import (
    AS_IT_IS,
    Counter,
    FlatArrays,
    Place,
    PressureSetting,
    Rule,
    Setting,
    lay_out,
)
from minihyperflows.flows.recorder import LayerFlow
from minihyperflows.nn import Module, Parameter, Weighted, weight_groups
from minihyperflows.nn.optim import SGD, Adam, Optimizer

FIRST_SCALE = 2.0**14  # of the loss, in half precision
GROWTH_INTERVAL = 2000  # good steps after which the scale is doubled


class FlatTraining:
    """Steps the parameters of ``net``, on a GPU, as its optimisers would, in one launch.

    The parameters, and the state of the optimisers, become views of flat arrays. So they can be
    looked at and saved as ever; but until :meth:`release` only :meth:`step` may change them, or
    :meth:`refresh` must be called afterwards.

    Gradients come with a factor S, the loss scale, so that small ones do not vanish in half
    precision: call ``loss.backward(flat.scale)``. A step whose gradients are infinite is left out
    and S halved; S is doubled after 2000 good steps in a row. In single precision S is 1.

    Args:
        net: a network on the GPU.
        weights: the optimiser of the weights and everything else but the presences.
        presences: that of the presences; None for a network without gates.
        dtype: in which the network computes, float32 or float16.
    """

    def __init__(
        self, net: Module, weights: Optimizer, presences: Optimizer | None, dtype: Any
    ) -> None:
        self.weights, self.presences = weights, presences
        self._gated = gated_layers(net)
        self._growth_interval = 0 if np.dtype(dtype) == np.float32 else GROWTH_INTERVAL
        gated = list(self._gated.values())
        groups = list(weight_groups(net).values())  # layers that share a weight share its place
        groups.sort(key=lambda layers: layers[0] not in gated)
        first = [layers[0].weight for layers in groups]
        others = [p for p in weights.params if not any(p is w for w in first)]
        self._check(first, gated)
        places = lay_out(
            [layer.weight.size for layer in gated],
            [weight.size for weight in first[len(gated) :]],
            [p.size for p in others],
        )
        rules = _rule(weights), Rule.NONE if presences is None else _rule(presences)
        self.arrays = FlatArrays(
            places, rules, dtype, FIRST_SCALE if self._growth_interval else 1.0
        )
        self._move_in([*first, *others], places, gated)
        self._use(groups, places)
        self.refresh()

    def _check(self, first: list[Parameter], gated: list[Gated]) -> None:
        trained = {id(p) for p in self.weights.params}
        if any(id(w) not in trained for w in first):
            raise ValueError("the weights of every layer must be the weights' optimiser's")
        wanted = {id(layer.presence) for layer in gated}
        given = set() if self.presences is None else {id(p) for p in self.presences.params}
        if wanted != given:
            raise ValueError("the presences' optimiser must train the presences of every layer")

    # -- moving in and out -----------------------------------------------------------------------

    def _move_in(
        self, parameters: list[Parameter], places: list[Place], gated: list[Gated]
    ) -> None:
        arrays = self.arrays
        kept = (arrays.first, arrays.second)
        steps = _move_parameters(self.weights, parameters, places, arrays.theta, kept)
        _write(arrays.counters, Counter.WEIGHT_STEPS, steps)
        for parameter, place in zip(parameters, places, strict=True):
            if place.layer == AS_IT_IS:
                parameter.gradient_buffer = place.view(arrays.gradient, parameter.shape)
        if self.presences is not None:
            kept = (arrays.t_first, arrays.t_second)
            moved = [layer.presence for layer in gated]
            steps = _move_parameters(self.presences, moved, places[: len(moved)], arrays.t, kept)
            _write(arrays.counters, Counter.PRESENCE_STEPS, steps)

    def _use(self, groups: list[list[Weighted]], places: list[Place]) -> None:
        """Let the layers compute with ``in_use``, whose gradient goes to the flat one."""
        self._layers = [layer for layers in groups for layer in layers]
        for layers, place in zip(groups, places, strict=False):
            shape = layers[0].weight.shape
            leaf = Tensor(place.view(self.arrays.in_use, shape), requires_grad=True)
            leaf.gradient_buffer = place.view(self.arrays.gradient, shape)
            for layer in layers:
                layer.weight_in_use = leaf

    def release(self) -> None:
        """Give the network back to its optimisers, and to whoever wants to change it."""
        self.read_steps()
        for layer in self._layers:
            layer.weight_in_use = None
        for parameter in self.weights.params:
            parameter.gradient_buffer = parameter.grad = None

    def zero_grad(self) -> None:
        """Forget the gradients: the next ones overwrite them."""
        for layer in self._layers:
            assert layer.weight_in_use is not None
            layer.weight_in_use.grad = None
        for parameter in self.weights.params:
            parameter.grad = None

    def read_steps(self) -> None:
        """Tell the optimisers how many steps they have taken, which their state contains."""
        counters = to_numpy(self.arrays.counters)
        self.weights.steps = [int(counters[Counter.WEIGHT_STEPS])] * len(self.weights.params)
        if self.presences is not None:
            taken = int(counters[Counter.PRESENCE_STEPS])
            self.presences.steps = [taken] * len(self.presences.params)

    def refresh(self) -> None:
        """Take note of weights or presences that were changed from outside, and count anew."""
        self.arrays.write_in_use()
        self._forget_changes()

    # -- an epoch --------------------------------------------------------------------------------

    def set_rates(self, gamma: float, floor: float | None = None) -> None:
        """Let the next steps use the optimisers' present settings and the pressure ``gamma``.

        Args:
            gamma: in units of the mean of t.
            floor: t at or below it feel no pressure; None for no floor.
        """
        rows = np.zeros((3, len(Setting)), np.float32)
        rows[0] = _settings(self.weights)
        if self.presences is not None:
            rows[1] = _settings(self.presences)
        rows[2, PressureSetting.SHARE] = gamma / max(1, self.gated_weights)
        rows[2, PressureSetting.FLOOR] = -np.inf if floor is None else floor
        self.arrays.settings.set(rows)
        self.arrays.prepare()

    def begin_epoch(self, freeze_at_density: float | None = None) -> None:
        """Start counting anew: batches, losses, flips.

        Args:
            freeze_at_density: presences stop moving in the step that reaches it; None for never.
        """
        arrays = self.arrays
        self._forget_changes(freeze_at_density)
        for counter, value in ((Counter.SKIPPED, 0), (Counter.BATCHES, 0), (Counter.FIRST_BAD, -1)):
            _write(arrays.counters, counter, value)
        _write(arrays.counters, Counter.FROZEN, 0)
        arrays.position[...] = 0
        arrays.loss_sum[...] = 0
        arrays.flux[...] = 0
        arrays.observed[...] = 0

    @property
    def scale(self) -> Array:
        """The loss scale S, a () array: the cotangent of the loss."""
        return self.arrays.scale[0]

    def step(self, loss: Tensor, batch: int) -> None:
        """Step all parameters along the gradients that ``loss.backward(flat.scale)`` left.

        Args:
            loss: () of this batch.
            batch: how many samples it had.
        """
        self.arrays.step(loss.data, batch, self._growth_interval)

    # -- reports, for which the host waits -------------------------------------------------------

    @property
    def gated_weights(self) -> int:
        """How many weights have a gate."""
        return sum(layer.weight.size for layer in self._gated.values())

    @property
    def present(self) -> int:
        """How many gated weights are present now."""
        flips, regrowths = to_numpy(self.arrays.changes).astype(np.int64).sum(axis=0)
        return int(to_numpy(self.arrays.present)[0]) + 2 * int(regrowths) - int(flips)

    @property
    def density(self) -> float:
        """The fraction of the gated weights present now."""
        return self.present / self.gated_weights

    def counter(self, which: Counter) -> int:
        """One of the numbers that the steps count."""
        return int(to_numpy(self.arrays.counters)[which])

    def layer_flows(self) -> dict[str, LayerFlow]:
        """What each gated layer did since :meth:`begin_epoch`."""
        arrays = self.arrays
        changes, observed = to_numpy(arrays.changes), to_numpy(arrays.observed)
        with np.errstate(invalid="ignore"):  # no weights, no mean
            flux = to_numpy(arrays.flux) / observed
        return {
            name: LayerFlow(
                density=float((layer.presence.data >= 0).mean()),
                flips=int(changes[i, 0]),
                regrowths=int(changes[i, 1]),
                flux_present=float(flux[i, 0]),
                flux_removed=float(flux[i, 1]),
            )
            for i, (name, layer) in enumerate(self._gated.items())
        }

    # -- saving and loading ----------------------------------------------------------------------

    def state_dict(self) -> dict[str, float]:
        """What the next step depends on beside the parameters and the optimisers' state."""
        good = self.counter(Counter.GOOD_STEPS)
        return {"scale": float(to_numpy(self.arrays.scale)[0]), "good_steps": good}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continue with the loss scale of the training that wrote ``state``."""
        scale = np.array([state["scale"], 1 / state["scale"]], np.float32)
        self.arrays.scale.set(scale)
        _write(self.arrays.counters, Counter.GOOD_STEPS, int(state["good_steps"]))

    def _forget_changes(self, freeze_at_density: float | None = None) -> None:
        arrays, never = self.arrays, np.iinfo(np.int64).max
        gated = self._gated.values()
        present = sum(int((layer.presence.data >= 0).sum()) for layer in gated)
        freeze_at = never
        if freeze_at_density is not None:
            freeze_at = math.ceil(freeze_at_density * self.gated_weights - 1e-6)
        arrays.changes[...] = 0
        arrays.present.set(np.array([present, freeze_at], np.int64))


def _rule(optimizer: Optimizer) -> Rule:
    if type(optimizer) in (SGD, Adam):
        return Rule.SGD if type(optimizer) is SGD else Rule.ADAM
    raise ValueError(f"the GPU's kernel knows SGD and Adam, not {type(optimizer).__name__}")


def _settings(optimizer: Optimizer) -> list[float]:
    """A row of settings, in the order of :class:`Setting`."""
    row = dict.fromkeys(Setting, 0.0)
    row[Setting.LR], row[Setting.DECAY] = optimizer.lr, optimizer.weight_decay
    if isinstance(optimizer, Adam):
        row[Setting.MOMENTUM], row[Setting.SECOND_MOMENTUM] = optimizer.betas
        row[Setting.EPSILON] = optimizer.eps
    elif isinstance(optimizer, SGD):
        row[Setting.MOMENTUM] = optimizer.momentum
        row[Setting.NESTEROV] = float(optimizer.nesterov)
    return list(row.values())


def _move_parameters(
    optimizer: Optimizer,
    parameters: list[Parameter],
    places: list[Place],
    values: Array,
    kept: tuple[Array, Array],
) -> int:
    """Make parameters, and what the optimiser keeps of them, views of flat arrays; returns how
    many steps the optimiser has taken.

    Raises:
        ValueError: not the same number for all parameters.
    """
    number = {id(p): i for i, p in enumerate(optimizer.params)}
    steps = {optimizer.steps[number[id(p)]] for p in parameters}
    if len(steps) > 1:
        raise ValueError("parameters of one optimiser have taken different numbers of steps")
    for parameter, place in zip(parameters, places, strict=True):
        parameter.data = _moved(parameter.data, place, values)
        state = optimizer.state[number[id(parameter)]]
        for name, flat in zip(optimizer.slots, kept, strict=False):
            before = state.get(name)
            view = place.view(flat, parameter.shape)
            state[name] = view if before is None else _moved(before, place, flat)
    return steps.pop()


def _moved(array: Array, place: Place, flat: Array) -> Array:
    view = place.view(flat, array.shape)
    view[...] = cupy().asarray(array, dtype=view.dtype)
    return view


def _write(counters: Array, which: Counter, value: int) -> None:
    counters[int(which)] = value
