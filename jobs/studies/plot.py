"""Plots of studies as PNG files: curves of bits/dim in small multiples, and bars of shares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Points = Sequence[tuple[float, float]]

COLORS = ("#1b6ca8", "#d1783b", "#3f8f55", "#8a5aa8", "#a33c48")
INK, FAINT = "#1c1c1e", "#8e8e92"


@dataclass(frozen=True)
class Panel:
    """One set of axes: a title and named curves."""

    title: str
    lines: Mapping[str, Points]


def draw_lines(panels: Sequence[Panel], path: Path) -> None:
    """Curves of held-out bits/dim over images seen, without the untrained start."""
    figure, axes = _axes(len(panels), wide=4.6, high=3.2)
    for panel, ax in zip(panels, axes, strict=True):
        for color, (name, points) in zip(COLORS, panel.lines.items(), strict=False):
            if later := [point for point in points if point[0] > 0]:
                ax.plot(*zip(*later, strict=True), color=color, marker="o", markersize=3, linewidth=1.5, label=name)
        ax.set_title(panel.title, fontsize=10, color=INK)
        ax.set_xlabel("images seen", fontsize=8)
        ax.set_ylabel("bits/dim, held-out", fontsize=8)
        if ax.lines:
            ax.legend(fontsize=8, frameon=False)
    _write(figure, path)


def draw_bars(shares: Mapping[str, Sequence[float]], names: Sequence[str], mark: float, path: Path) -> None:
    """Horizontal bars: for every row of `shares` one bar a name, from 0 to 1, with a line at `mark`."""
    figure, (ax,) = _axes(1, wide=7.5, high=0.8 + 0.42 * len(shares))
    thick = 0.8 / len(names)
    for number, name in enumerate(names):
        at = [row + (number - (len(names) - 1) / 2) * thick for row in range(len(shares))]
        ax.barh(at, [values[number] for values in shares.values()], thick, color=COLORS[number], label=name)
    ax.axvline(mark, color=FAINT, linewidth=1, linestyle="--")
    ax.set_yticks(range(len(shares)), list(shares), fontsize=8)
    ax.set_xlim(0, 1)
    ax.set_xlabel("share of faces whose attribute changes", fontsize=8)
    ax.invert_yaxis()
    ax.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    _write(figure, path)


def _axes(count: int, wide: float, high: float) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    columns = min(count, 2)
    rows = -(-count // columns)
    figure = Figure(figsize=(wide * columns, high * rows), layout="constrained", dpi=110)
    axes = [figure.add_subplot(rows, columns, number + 1) for number in range(count)]
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=8, colors=INK)
        ax.grid(axis="both", color="#ececec", linewidth=0.8)
        ax.set_axisbelow(True)
    return figure, axes


def _write(figure: Figure, path: Path) -> None:
    """The picture, whole or not at all."""
    unfinished = path.with_suffix(".unfinished.png")
    figure.savefig(unfinished)
    unfinished.replace(path)
