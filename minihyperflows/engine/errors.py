"""The engine's own errors: one sentence each, naming what was wrong and what to do."""

from __future__ import annotations


class ShapeError(ValueError):
    """Arrays whose shapes an operation cannot combine."""


class DeviceError(ValueError):
    """Arrays on different devices, or a device that is not there."""


class GraphError(RuntimeError):
    """A backward pass that cannot run: nothing to differentiate, or a graph already freed."""


class NonFiniteLossError(ArithmeticError):
    """A loss that is NaN or infinite, found before its gradient could do harm."""


class DoubtfulResultWarning(UserWarning):
    """What was computed is right, and probably not what was meant."""
