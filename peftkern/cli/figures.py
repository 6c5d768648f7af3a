"""Figures of the reports, drawn by matplotlib, as data URIs."""

from __future__ import annotations

import base64
import io
from importlib.util import find_spec
from typing import Any

INK, GRID = "#334155", "#e2e8f0"


def can_draw() -> bool:
    """True where matplotlib is installed."""
    return find_spec("matplotlib") is not None


def whole_numbers(axis: Any) -> None:
    """Let the x axis have whole numbers alone."""
    from matplotlib.ticker import MaxNLocator

    axis.xaxis.set_major_locator(MaxNLocator(integer=True))


def figure(
    width: float, height: float, count: int, ratios: list[int], columns: bool = False
) -> tuple[Any, list[Any]]:
    """(a figure of ``width`` x ``height`` inches, its ``count`` axes), one below the other."""
    # not pyplot, which has global state and looks for a window system
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(width, height), layout="constrained")
    if columns:
        grid = drawn.add_gridspec(1, count, width_ratios=ratios)
    else:
        grid = drawn.add_gridspec(count, 1, height_ratios=ratios)
    axes = [drawn.add_subplot(grid[i]) for i in range(count)]
    for axis in axes:
        axis.grid(True, color=GRID, lw=0.8)
        axis.set_axisbelow(True)
        axis.tick_params(colors=INK, labelsize=9, length=0)
        axis.xaxis.label.set_color(INK)
        axis.yaxis.label.set_color(INK)
        for side in ("top", "right", "left"):
            axis.spines[side].set_visible(False)
        axis.spines["bottom"].set_color(GRID)
    return drawn, axes


def encode(drawn: Any, kind: str = "svg") -> str:
    """The figure as a data URI, "svg" or "png"; the same figure gives the same bytes."""
    import matplotlib

    buffer = io.BytesIO()
    # without a date and with fixed names of parts, so that the same run gives the same bytes
    metadata = {"Date": None} if kind == "svg" else None
    with matplotlib.rc_context({"svg.hashsalt": "peftkern"}):
        drawn.savefig(buffer, format=kind, dpi=150, metadata=metadata)
    mime = {"svg": "image/svg+xml", "png": "image/png"}[kind]
    return f"data:{mime};base64,{base64.b64encode(buffer.getvalue()).decode()}"
