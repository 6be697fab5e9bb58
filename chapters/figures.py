"""Drawings of computation graphs for the chapters. Nothing here is needed to understand them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes

BLUE, RED, GREEN, AMBER, PURPLE, GREY = (
    "#1f5fa8",
    "#d1495b",
    "#2a9d6f",
    "#e09f3e",
    "#7b5ea7",
    "#6c757d",
)


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
            way back from ``to`` to ``from``; "" draws no factor.
        cotangents: name -> text in red below the node; left out, only the forward pass is drawn.
    """
    for start, end, factor in edges:
        a, b = nodes[start][:2], nodes[end][:2]
        _arrow(ax, a, b, BLUE, bend=0.13 if cotangents else 0.0)
        if cotangents:
            _arrow(ax, b, a, RED, bend=0.13)
            _factor(ax, a, b, factor)
    for name, (x, y, formula, value) in nodes.items():
        text = f"{formula}\n{value}" if value else formula
        box = {"boxstyle": "round,pad=0.45", "fc": "white", "ec": BLUE, "lw": 1.2}
        ax.text(x, y, text, ha="center", va="center", fontsize=10, bbox=box, zorder=3)
        if cotangents and name in cotangents:
            lines = text.count("\n") + 1
            ax.annotate(
                cotangents[name],
                (x, y),
                xytext=(0, -10 - 8.5 * lines),
                textcoords="offset points",
                ha="center",
                va="top",
                fontsize=10,
                color=RED,
                zorder=4,
            )
    _frame(ax, [node[:2] for node in nodes.values()])


def _arrow(
    ax: Axes, a: tuple[float, float], b: tuple[float, float], color: str, bend: float
) -> None:
    style = {
        "arrowstyle": "-|>",
        "color": color,
        "lw": 1.4,
        "shrinkA": 24,
        "shrinkB": 24,
        "connectionstyle": f"arc3,rad={-bend}",
    }
    ax.annotate("", xy=b, xytext=a, arrowprops=style, zorder=2)


def _factor(ax: Axes, a: tuple[float, float], b: tuple[float, float], factor: str) -> None:
    """``factor`` beside the middle of the red arrow from b to a, on its outer side."""
    (x0, y0), (x1, y1) = ax.transData.transform(a), ax.transData.transform(b)
    del x0, y0, x1, y1
    middle = ((a[0] + b[0]) / 2, (a[1] + b[1]) / 2)
    ax.annotate(
        factor,
        middle,
        xytext=(0, -14),
        textcoords="offset points",
        ha="center",
        va="top",
        fontsize=9,
        color=RED,
        bbox={"fc": "white", "ec": "none", "pad": 0.8},
        zorder=2.5,
    )


def _frame(ax: Axes, places: list[tuple[float, float]]) -> None:
    columns, rows = zip(*places, strict=True)
    ax.set_xlim(min(columns) - 0.6, max(columns) + 0.6)
    ax.set_ylim(min(rows) - 0.75, max(rows) + 0.5)
    ax.axis("off")
