"""What happens to the weights: flux, flips and regrowths, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass

from minihyperflows.engine.backend import Array, xp_of
from minihyperflows.flows.gates import count_present, gated_layers, is_present
from minihyperflows.nn import Module


@dataclass
class LayerFlow:
    """What one layer's weights did since the last :meth:`FlowRecorder.take`.

    Attributes:
        density: the fraction present now.
        flips: how often a weight was removed or came back, summed over the steps observed.
        regrowths: how often a removed weight came back; flips - regrowths is how often one left.
        flux_present: mean of |kappa w dL/dw'| over the weights present, averaged over the steps
            at which flux was observed; NaN if there were none.
        flux_removed: the same over the removed weights.
    """

    density: float
    flips: int
    regrowths: int
    flux_present: float
    flux_removed: float


class _Layer:
    """Running totals of one layer."""

    def __init__(self, mask: Array) -> None:
        self.mask = mask
        self.clear()

    def clear(self) -> None:
        self.flips = self.regrowths = 0
        # pairs [sum over steps of the mean |flux|, number of steps]
        self.flux_present, self.flux_removed = [0.0, 0], [0.0, 0]


class FlowRecorder:
    """Watches the presence parameters of ``net`` during training.

    Call :meth:`observe_flux` between ``backward`` and the optimisers' steps (as often as wanted),
    :meth:`observe_step` after every step, and :meth:`take` whenever a report is due.

    With m_s the mask after step s, a step has sum |m_s - m_{s-1}| flips, of which
    sum m_s (1 - m_{s-1}) are regrowths.
    """

    def __init__(self, net: Module) -> None:
        self._gated = gated_layers(net)
        if not self._gated:
            raise ValueError("this network has no gates: attach them first with flows.attach")
        self._weights = sum(layer.weight.size for layer in self._gated.values())
        self._layers = {
            name: _Layer(is_present(layer.presence.data)) for name, layer in self._gated.items()
        }
        self._present = sum(count_present(layer.presence.data) for layer in self._gated.values())

    def observe_flux(self, gamma: float = 0.0, floor: float | None = None) -> None:
        """Read the flux out of the presence gradients of the last backward pass.

        dL/dt_i = flux_i + gamma / N, so flux_i = dL/dt_i - gamma / N (with a floor, the pressure
        acts only on t above it). A layer that the loss does not depend on has no gradient: its flux
        is 0. That of a frozen presence is not known, and not observed.

        Args:
            gamma, floor: of the pressure term that was in the loss; 0 if there was none.

        Raises:
            ValueError: no presence has a gradient, so there was no backward pass.
        """
        if all(layer.presence.grad is None for layer in self._gated.values()):
            raise ValueError("no presence has a gradient: observe flux after backward")
        share = gamma / self._weights
        for name, layer in self._gated.items():
            t, gradient = layer.presence.data, layer.presence.grad
            if gradient is None:
                if not layer.presence.requires_grad:
                    continue
                flux = xp_of(t).zeros_like(t)
            else:
                flux = gradient - share if floor is None else gradient - share * (t > floor)
            totals, mask = self._layers[name], is_present(t)
            _add_mean(totals.flux_present, abs(flux[mask]))
            _add_mean(totals.flux_removed, abs(flux[~mask]))

    def observe_step(self) -> None:
        """Count the weights whose presence the last step changed."""
        for name, layer in self._gated.items():
            totals, mask = self._layers[name], is_present(layer.presence.data)
            xp, changed = xp_of(mask), mask ^ totals.mask
            flips = int(xp.count_nonzero(changed))
            if flips:
                regrowths = int(xp.count_nonzero(changed & mask))
                totals.flips += flips
                totals.regrowths += regrowths
                self._present += 2 * regrowths - flips
                totals.mask = mask

    @property
    def density(self) -> float:
        """The fraction of all gated weights that was present at the last :meth:`observe_step`."""
        return self._present / self._weights

    def take(self) -> dict[str, LayerFlow]:
        """The report by layer since the last call; the counts start again from zero."""
        report = {
            name: LayerFlow(
                density=float(totals.mask.mean()),
                flips=totals.flips,
                regrowths=totals.regrowths,
                flux_present=_mean(totals.flux_present),
                flux_removed=_mean(totals.flux_removed),
            )
            for name, totals in self._layers.items()
        }
        for totals in self._layers.values():
            totals.clear()
        return report


def _add_mean(total: list, values: Array) -> None:
    if values.size:
        total[0] += float(values.mean())
        total[1] += 1


def _mean(total: list) -> float:
    return total[0] / total[1] if total[1] else float("nan")
