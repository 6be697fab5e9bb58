"""Figures of a run, drawn from its records and nothing else."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from minihyperflows.flows.stages import DENSE, PRUNING, REGROWTH
from minihyperflows.lab.training import EpochRecord

# Okabe and Ito's palette, which colour-blind readers can tell apart.
BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#777777"
STAGE_SHADES = {DENSE: "#ffffff", PRUNING: "#fdf0e6", REGROWTH: "#e9f5f0"}


def run_figures(records: Sequence[EpochRecord]) -> dict[str, Figure]:
    """All figures of a run by name."""
    return {
        "accuracy_density": accuracy_and_density(records),
        "pressure": pressure(records),
        "flips": flips(records),
        "layers": layer_densities(records),
    }


def accuracy_and_density(records: Sequence[EpochRecord]) -> Figure:
    """Test accuracy above, density against the trajectory it should follow below."""
    figure = Figure(figsize=(7, 4.6), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True)
    epochs = [r.epoch for r in records]
    top.plot(epochs, [100 * r.test_accuracy for r in records], color=BLUE)
    top.set_ylabel("test accuracy (%)")
    aims = [(r.epoch, 100 * r.expected_density) for r in records if r.expected_density is not None]
    if aims:
        bottom.plot(*zip(*aims, strict=True), color=GREY, ls="--", label="aimed at")
    bottom.plot(epochs, [100 * r.density for r in records], color=ORANGE, label="measured")
    _log_scale(bottom, [r.density for r in records])
    bottom.set_ylabel("weights present (%)")
    bottom.set_xlabel("epoch")
    bottom.legend(frameon=False, loc="lower left")
    for axes in (top, bottom):
        shade_stages(axes, records, label=axes is top)
    return figure


def pressure(records: Sequence[EpochRecord]) -> Figure:
    """gamma over the epochs."""
    figure, axes = _one_panel("pressure γ (unit: mean of t)")
    axes.step([r.epoch for r in records], [r.gamma for r in records], where="mid", color=PURPLE)
    shade_stages(axes, records)
    return figure


def flips(records: Sequence[EpochRecord]) -> Figure:
    """How often weights left or came back, per epoch."""
    figure, axes = _one_panel("flips per epoch")
    gated = [r for r in records if r.stage != DENSE]
    returned = [sum(layer.regrowths for layer in r.layers.values()) for r in gated]
    epochs = [r.epoch for r in gated]
    axes.plot(epochs, [r.flips for r in gated], color=BLUE, label="all")
    axes.plot(epochs, returned, color=GREEN, label="weights that came back")
    axes.set_yscale("symlog", linthresh=1)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    shade_stages(axes, records)
    return figure


def layer_densities(records: Sequence[EpochRecord]) -> Figure:
    """The density of every layer at the end, and over the epochs if there are few layers."""
    last = records[-1].layers
    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.subplots()
    axes.bar(range(len(last)), [100 * layer.density for layer in last.values()], color=ORANGE)
    axes.axhline(100 * records[-1].density, color=GREY, ls="--", label="whole network")
    many = len(last) > 12
    axes.set_xticks(
        range(len(last)), list(last), rotation=90 if many else 0, fontsize=6 if many else 9
    )
    _log_scale(axes, [layer.density for layer in last.values()])
    axes.set_ylabel("weights present (%)")
    axes.legend(frameon=False)
    return figure


def shade_stages(axes: Axes, records: Sequence[EpochRecord], label: bool = True) -> None:
    """Tint the background by stage, and name the stages along the top."""
    for stage, shade in STAGE_SHADES.items():
        epochs = [r.epoch for r in records if r.stage == stage]
        if not epochs:
            continue
        axes.axvspan(epochs[0] - 0.5, epochs[-1] + 0.5, color=shade, zorder=-1, lw=0)
        if label:
            middle = (epochs[0] + epochs[-1]) / 2
            place = axes.get_xaxis_transform()
            axes.text(middle, 1.02, stage, transform=place, ha="center", fontsize=9, color=GREY)
    axes.set_xlim(records[0].epoch - 0.5, records[-1].epoch + 0.5)


def _log_scale(axes: Axes, values: Sequence[float]) -> None:
    """A logarithmic axis, unless there is nothing with a logarithm: under a high pressure no weight
    may be left."""
    if any(value > 0 for value in values):
        axes.set_yscale("log")


def _one_panel(ylabel: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7, 2.8), layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel("epoch")
    axes.set_ylabel(ylabel)
    return figure, axes
