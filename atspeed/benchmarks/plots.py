"""Plots of measurements as SVG files, equal in every byte for equal numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

_UNSTABLE_METADATA = {"Date": None, "Creator": None}  # None leaves a field out


def plotting() -> AbstractContextManager[None]:
    """Return the style that plots are drawn and saved in."""
    return mpl.rc_context({"svg.hashsalt": "atspeed", "font.size": 9})


def save(figure: Figure, path: Path) -> None:
    """Write a plot, and its folder where there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="svg", metadata=_UNSTABLE_METADATA)


def draw(path: Path, panels: Sequence[Callable[[Axes], None]]) -> None:
    """Write a plot of panels side by side, each drawn by its own function. The legend is that of the first panel."""
    with plotting():
        figure = Figure(figsize=(3.4 * len(panels) + 0.8, 3.0), layout="constrained")
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for draw_panel, axis in zip(panels, axes, strict=True):
            draw_panel(axis)
            axis.grid(visible=True, alpha=0.3)
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
        save(figure, path)


def line(axis: Axes, x: Sequence[float], y: Sequence[float], **style: Any) -> None:
    """Draw a line with a small marker at each point."""
    axis.plot(x, y, marker="o", markersize=3, **style)
