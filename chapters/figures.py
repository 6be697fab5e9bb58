"""Drawings for the chapters: computation graphs, values of several seeds. Nothing here is needed to
understand them.

Every chapter imports this. So this is also where its kernel begins to compute a chapter's own
matrix products on one thread, as the engine does with its own: a second thread gains little for
their sizes, and where other programs want the cores it makes them many times slower.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.text import Text

from minihyperflows.engine.blas import keep_one_blas_thread

BLUE, RED, GREEN, AMBER, PURPLE, GREY = (
    *("#1f5fa8", "#d1495b", "#2a9d6f"),
    *("#e09f3e", "#7b5ea7", "#6c757d"),
)
keep_one_blas_thread()

BEND = 0.12  # how far an arrow bulges, as a fraction of its length


def dots(ax: Axes, values: Sequence[Sequence[float]], color: str, start: float = 0) -> None:
    """A row for each sequence, from the height ``start`` on: a dot for every value, a tick at their
    mean."""
    for place, row in enumerate(values):
        ax.plot(row, [start + place] * len(row), "o", color=color, ms=3.5, alpha=0.5)
        ax.plot(np.mean(row), start + place, "|", color=color, ms=12, mew=2)


def draw_graph(
    ax: Axes,
    nodes: Mapping[str, tuple[float, float, str, str]],
    edges: Sequence[tuple[str, str, str]],
    cotangents: Mapping[str, str] | None = None,
) -> None:
    """Draw a computation: values flow along blue arrows, cotangents back along red ones.

    Args:
        nodes: name -> (column, row, formula, value).
        edges: (from, to, factor), where the factor is what the cotangent is multiplied with on its
            way back from ``to`` to ``from``; "" draws none.
        cotangents: name -> text in red at the node; left out, only the forward pass is drawn.
    """
    targets = {end for _, end, _ in edges}
    boxes = {name: _box(ax, *node, leaf=name not in targets) for name, node in nodes.items()}
    _frame(ax, [node[:2] for node in nodes.values()])
    ax.figure.draw_without_rendering()  # from here on the boxes know their sizes
    for start, end, factor in edges:
        _arrow(ax, boxes[start], boxes[end], BLUE)
        if cotangents:
            _arrow(ax, boxes[end], boxes[start], RED)
            _factor(ax, boxes[start], boxes[end], factor)
    for name, text in (cotangents or {}).items():
        _beside(ax, boxes[name], text)


def _box(ax: Axes, x: float, y: float, formula: str, value: str, leaf: bool) -> Text:
    style = {"boxstyle": "round,pad=0.45", "fc": "#eef3f9" if leaf else "white", "ec": BLUE}
    text = f"{formula}\n{value}" if value else formula
    return ax.text(x, y, text, ha="center", va="center", fontsize=10, bbox=style, zorder=2)


def _arrow(ax: Axes, start: Text, end: Text, color: str) -> None:
    style = {"arrowstyle": "-|>", "color": color, "lw": 1.4, "shrinkA": 3, "shrinkB": 3}
    patches = {"patchA": start.get_bbox_patch(), "patchB": end.get_bbox_patch()}
    ax.annotate(
        "",
        xy=end.get_position(),
        xytext=start.get_position(),
        arrowprops=style | patches | {"connectionstyle": f"arc3,rad={-BEND}"},
        zorder=3,  # above the boxes, which know where they are only once they are drawn
    )


def _factor(ax: Axes, start: Text, end: Text, factor: str) -> None:
    """``factor`` beside the middle of the red arrow from ``end`` to ``start``."""
    a, b = (ax.transData.transform(t.get_position()) for t in (start, end))
    along = (b - a) / np.hypot(*(b - a))
    right = np.array([along[1], -along[0]])  # the side on which the red arrow bulges
    pixels = right * (BEND / 2 * np.hypot(*(b - a)) + 9 * ax.figure.dpi / 72)
    x, y = ax.transData.inverted().transform((a + b) / 2 + pixels)
    ax.text(x, y, factor, ha="center", va="center", fontsize=9, color=RED, zorder=4)


def _beside(ax: Axes, box: Text, text: str) -> None:
    """``text`` below the box; above it in the top row, where arrows arrive from below."""
    x, y = box.get_position()
    frame = box.get_bbox_patch().get_window_extent()
    above = y == max(other.get_position()[1] for other in ax.texts if other.get_bbox_patch())
    edge = ax.transData.inverted().transform((0, frame.y1 if above else frame.y0))[1]
    offset = {"xytext": (0, 4 if above else -4), "textcoords": "offset points", "ha": "center"}
    va = "bottom" if above else "top"
    ax.annotate(text, (x, edge), fontsize=10, color=RED, va=va, zorder=4, **offset)


def _frame(ax: Axes, places: list[tuple[float, float]]) -> None:
    columns, rows = zip(*places, strict=True)
    ax.set_xlim(min(columns) - 0.4, max(columns) + 0.5)
    ax.set_ylim(min(rows) - 0.5, max(rows) + 0.5)
    ax.axis("off")
