"""The bench's pictures: memory against depth, log-determinant against channels. matplotlib loads when one is drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIZE = (6.4, 4.0)
Row = Mapping[str, Any]


def memory_plot(path: Path, rows: Sequence[dict[str, Any]], title: str) -> None:
    """Peak memory of a step, gradients aside, over steps a level; a line a variant."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        lines.setdefault(row["row"], []).append((row["K"], row["peak_mib"] - row["gradients_mib"]))
    axes = _drawn(lines, "steps a level (K)", "MiB above parameters and gradients", title)
    axes.set_yscale("log")
    axes.set_xticks(sorted({row["K"] for row in rows}), labels=[str(k) for k in sorted({row["K"] for row in rows})])
    _save(axes, path)


def log_det_plot(path: Path, rows: Sequence[dict[str, Any]], slopes: Mapping[str, float]) -> None:
    """Milliseconds of log|det| and its gradient over channels, with the fitted exponents."""
    lines = {
        f"{name}: grows as C^{slopes[name]:.1f}": [(row["channels"], row[name]) for row in rows] for name in slopes
    }
    axes = _drawn(lines, "channels (C)", "ms, forward and backward", "log-determinant of a mixing")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks([row["channels"] for row in rows], labels=[str(row["channels"]) for row in rows])
    axes.set_xticks([], minor=True)
    _save(axes, path)


def kills_plot(path: Path, calm: Sequence[Row], struck: Sequence[Row], kills: Sequence[float]) -> None:
    """The loss of a run over one with kills; what was learned again after a kill is drawn again."""
    from matplotlib.figure import Figure

    axes = Figure(figsize=SIZE, layout="constrained").add_subplot()
    for rows, style in ((calm, {"lw": 7, "color": "0.75", "label": "left alone"}),
                        (struck, {"lw": 1.2, "color": "C3", "label": f"{len(kills)} workers killed"})):  # fmt: skip
        axes.plot([row["images"] for row in rows], [row["train/bits_per_dim"] for row in rows], **style)
    for number, at in enumerate(kills):
        axes.axvline(at, color="C0", lw=1, ls=":", label="SIGKILL" if number == 0 else None)
    axes.set(xlabel="images", ylabel="bits/dim of training", title="the same losses, whatever is killed")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    _save(axes, path)


def _drawn(lines: Mapping[str, Sequence[tuple[float, float]]], x: str, y: str, title: str) -> Axes:
    from matplotlib.figure import Figure

    axes = Figure(figsize=SIZE, layout="constrained").add_subplot()
    for name, points in lines.items():
        axes.plot(*zip(*sorted(points), strict=True), marker="o", label=name)
    axes.set(xlabel=x, ylabel=y, title=title)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return axes


def _save(axes: Axes, path: Path) -> None:
    figure = axes.figure
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, metadata={"Software": None})  # type: ignore[union-attr]
