"""A measurement and the rows it gives: what every module of the bench offers, and how it is printed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

Row = dict[str, Any]
Measurement = tuple[dict[str, Any], Callable[[], list[Row]]]
"""What is measured (its "headline" is a line of text), and how."""

COLUMNS = {
    "channels": "C", "coupling": "", "row": "", "K": "K", "nets": "nets", "n": "n", "ms": "ms/step",
    "ms_least": "least", "peak_mib": "peak MiB", "ratio": "x plain", "images_per_s": "images/s", "mfu": "MFU",
    "gradients_mib": "gradients", "saved_mib": "saved MiB", "maps_a_step": "maps/step", "round_trip": "round trip",
    "gradient": "gradient error", "dense": "dense", "lu": "LU", "per_core": "images/s a core",
    "x_loop": "x bare loop", "x_wds": "x webdataset", "x_up": "x up", "cpu_ms": "CPU ms",
    "x_up_cpu": "x up", "resident": "MiB after epochs 2 to 10", "batch_ms": "ms/batch", "x_clean": "x as it is",
    "p95_ms": "p95", "worst_ms": "worst", "repeated": "repeated", "step_cpu_ms": "CPU ms/step",
    "cpu_ratio": "x overlap", "wall_ms": "ms/step", "wall_ratio": "x overlap", "at": "at images",
    "first": "then from", "seconds": "s to it",
}  # fmt: skip
"""Keys of rows and the heads of their columns, from left to right."""


def table(rows: Sequence[Row]) -> str:
    """Rows as aligned text."""
    names = [name for name in COLUMNS if any(row.get(name) is not None for row in rows)]
    cells = [[COLUMNS[name] for name in names]]
    cells += [[_cell(name, row.get(name)) for name in names] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])
        for line in cells
    )


def _cell(name: str, value: str | float | None) -> str:
    if value is None or isinstance(value, str | int):
        return "" if value is None else str(value)
    if name in ("round_trip", "gradient"):
        return f"{value:.0e}"
    if name in ("maps_a_step", "dense", "lu", "cpu_ratio", "wall_ratio"):
        return f"{value:.3f}"
    return f"{value:.2f}" if name == "ratio" or value < 100 else f"{value:.0f}"


def numbers(words: str, flag: str) -> list[int]:
    """Numbers of 2 or more from "4,16,32"."""
    found = [int(word) if word.strip().isdecimal() else 0 for word in words.split(",")]
    if min(found) < 2:
        raise ValueError(f"{flag} takes numbers of 2 or more, separated by commas: {words!r}")
    return found
