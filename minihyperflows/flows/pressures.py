"""The pressure: one global push on every presence parameter (chapter 07)."""

from __future__ import annotations

from minihyperflows.engine.backend import Array, xp_of
from minihyperflows.engine.graph import Function
from minihyperflows.engine.numbers import Arithmetic
from minihyperflows.engine.tensor import Tensor, apply
from minihyperflows.flows.gates import presences
from minihyperflows.nn import Module


class MeanPresence(Function):
    """P = 1/N sum of all t, over several arrays with N elements together;  dL/dt = c / N.

    With a floor b only t > b count, in the sum and in the gradient (N stays the number of all):
    the pressure lets go of weights that it has pushed down to b.
    """

    arithmetic = Arithmetic.FLOAT

    def __init__(self, floor: float | None = None) -> None:
        self.floor = floor

    def forward(self, *arrays: Array) -> Array:
        self.total = sum(t.size for t in arrays)
        self.shapes = [t.shape for t in arrays]
        if self.floor is None:
            return sum(t.sum() for t in arrays) / self.total
        self.counted = [t.real > self.floor for t in arrays]
        pairs = zip(arrays, self.counted, strict=True)
        return sum((t * counts).sum() for t, counts in pairs) / self.total

    def backward(self, c: Array) -> tuple[Array | None, ...]:
        share = c / self.total
        if self.floor is None:
            gradients = [xp_of(c).broadcast_to(share, shape) for shape in self.shapes]
        else:
            gradients = [share * counts for counts in self.counted]
        return tuple(g if n else None for g, n in zip(gradients, self.needs, strict=True))


def pressure(net: Module, floor: float | None = None) -> Tensor:
    """The mean of all presence parameters t of ``net``: the term that gamma multiplies in the loss.

    L = L_data + gamma P,  P = 1/N sum_i t_i  over all N gated weights of the whole network, so that
    dP/dt_i = 1/N for every weight, present or removed. Source: arXiv 2504.05349; the authors'
    code since 2025-01-24.

    Args:
        net: a network with gates (``flows.attach``).
        floor: count only t > floor. The authors' earlier experiments, among them the published
            curves of density against gamma, used -0.3 with Adam (and -0.0003 with SGD): a removed
            weight then stays within reach of regrowth.

    Raises:
        ValueError: the network has no gates.
    """
    parameters = presences(net).values()
    if not parameters:
        raise ValueError("this network has no gates: attach them first with flows.attach")
    return apply(MeanPresence(floor), *parameters)
