"""Hyperflows: gates, pressure, and the dynamics between them."""

from minihyperflows.flows.gates import (
    KAPPA,
    attach,
    density,
    detach,
    gate,
    layer_density,
    presences,
    to_dense,
)
from minihyperflows.flows.law import PowerLaw, fit_power_law
from minihyperflows.flows.pressures import pressure
from minihyperflows.flows.recorder import FlowRecorder, LayerFlow
from minihyperflows.flows.scheduler import PressureScheduler, density_trajectory
from minihyperflows.flows.stages import Timeline, land

__all__ = [
    "KAPPA",
    "FlowRecorder",
    "LayerFlow",
    "PowerLaw",
    "PressureScheduler",
    "Timeline",
    "attach",
    "density",
    "density_trajectory",
    "detach",
    "fit_power_law",
    "gate",
    "land",
    "layer_density",
    "presences",
    "pressure",
    "to_dense",
]
