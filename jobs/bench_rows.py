"""The rows of a bench: which there are for what flags ask, and how they are printed."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from typing import Any

from jobs.workload import Setup, Variant

COLUMNS = {
    "channels": "C",
    "coupling": "",
    "row": "",
    "K": "K",
    "nets": "nets",
    "n": "n",
    "ms": "ms/step",
    "ms_least": "least",
    "peak_mib": "peak MiB",
    "ratio": "x plain",
    "images_per_s": "images/s",
    "mfu": "MFU",
    "gradients_mib": "gradients",
    "saved_mib": "saved MiB",
    "maps_a_step": "maps/step",
    "round_trip": "round trip",
    "gradient": "gradient error",
    "dense": "dense",
    "lu": "LU",
    "per_core": "images/s a core",
    "x_loop": "x bare loop",
    "x_wds": "x webdataset",
    "x_up": "x up",
    "cpu_ms": "CPU ms",
    "x_up_cpu": "x up",
    "resident": "MiB after 3 epochs",
    "batch_ms": "ms/batch",
    "x_clean": "x as it is",
    "worst_ms": "worst",
    "repeated": "repeated",
    "step_cpu_ms": "CPU ms/step",
    "cpu_ratio": "x overlap",
    "wall_ms": "ms/step",
    "wall_ratio": "x overlap",
    "at": "at images",
    "first": "then from",
    "seconds": "s to it",
}


def table(rows: Sequence[dict[str, Any]]) -> str:
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


KINDS = ("plain", "checkpointed", "compiled", "ours")


def variants_of(asked: str, anchors: str, steps: int) -> list[Variant]:
    """The rows for `--rows` and `--anchors`, in the order asked for."""
    known = [f"{kind}{nets}" for nets in ("", "-bfloat16") for kind in KINDS]
    names = known if asked == "all" else [word.strip() for word in asked.split(",")]
    if strange := [name for name in names if name not in known]:
        raise ValueError(f"--rows knows {', '.join(known)} and all, not {strange[0]!r}")
    found: list[Variant] = []
    for name in names:
        kind, _, nets = name.partition("-")
        found += _ours(anchors, steps, bool(nets)) if kind == "ours" else [_plain(kind, bool(nets))]
    return found


def _plain(kind: str, bfloat16: bool) -> Variant:
    name = ("plain" if kind == "plain" else f"plain, {kind}") + (", bfloat16 channels_last" if bfloat16 else "")
    return Variant(
        name=name, plain=True, bfloat16=bfloat16, checkpointed=kind == "checkpointed", compiled=kind == "compiled"
    )


def _ours(anchors: str, steps: int, bfloat16: bool) -> list[Variant]:
    """A row an anchor setting."""
    words = [word.strip() for word in anchors.split(",")]
    if any(word != "K" and not word.isdecimal() for word in words):
        raise ValueError(f"--anchors takes numbers and K, separated by commas: {anchors!r}")
    settings = dict.fromkeys(steps if word == "K" else int(word) for word in words)
    nets = ", bfloat16 nets" if bfloat16 else ""
    return [
        Variant(
            name=f"ours, anchor {n}{' (K)' if n == steps else ''}{nets}",
            plain=False,
            bfloat16=bfloat16,
            anchor_every=n,
        )
        for n in settings
    ]


def without_impossible(setup: Setup, variants: Sequence[Variant]) -> list[Variant]:
    """Rows that can be measured here; says which are left out."""
    compiler = setup.cuda or any(shutil.which(name) for name in ("c++", "g++", "clang++"))
    kept = [variant for variant in variants if compiler or not variant.compiled]
    if len(kept) < len(variants):
        print("left out: compiled rows, torch.compile finds no c++, g++ or clang++ here", file=sys.stderr)
    if setup.steps is None and any(variant.checkpointed for variant in kept):
        print("left out: checkpointed rows, the plain RealNVP is not cut into steps", file=sys.stderr)
        kept = [variant for variant in kept if not variant.checkpointed]
    return kept
