"""Draw the Jacobians that the laws check: `python -m tests.glow.heatmaps docs/pictures/jacobians.png`.

Dark is large, light is small, grey may be anything but is 0 here, white must be 0 and is.
"""

from __future__ import annotations

import sys

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from tests.glow.table import ROWS, Row

SHOWN = (
    "actnorm",
    "mixing lu",
    "mixing reverse",
    "coupling additive",
    "coupling affine",
    "split prior",
    "step",
    "glow affine",
    "squeeze",
    "ordered squeeze",
    "relayout",
    "logit",
    "batch norm",
    "coupling by even fields",
    "coupling by odd fields",
    "coupling by first channels",
    "coupling by last channels",
    "realnvp",
)
ACROSS, SIDE, TITLE, GAP = 6, 160, 24, 14


def jacobian(function: torch.nn.Module, x: Tensor, condition: Tensor | None) -> Tensor:
    """d out / d in of one sample by autograd, [D, D]."""

    def flat(v: Tensor) -> Tensor:
        out = function(v.view_as(x), condition)
        return (out[0] if isinstance(out, tuple) else out).flatten()

    return torch.autograd.functional.jacobian(flat, x.flatten())  # type: ignore[return-value]


def checked_jacobian(row: Row) -> Tensor:
    """The Jacobian of a row's bijection, [D, D]; AssertionError where it leaves its declared pattern."""
    bijection = row.build()
    x, condition = row.inputs(1)
    entries = jacobian(bijection, x, condition)
    assert not entries[~row.pattern(row.shape)].any()
    if row.permutation:
        assert ((entries == 0) | (entries == 1)).all()
        assert (entries.sum(0) == 1).all()
        assert (entries.sum(1) == 1).all()
        assert bijection(x, condition)[1].item() == 0.0
    return entries


def heatmap(row: Row) -> Image.Image:
    """One Jacobian, rows are outputs."""
    entries, allowed = checked_jacobian(row), row.pattern(row.shape)
    strength = (1 + entries.abs().clamp_min(1e-4).log10() / 4).clamp(0, 1)
    ink = torch.stack([225 - 205 * strength, 228 - 158 * strength, 234 - 84 * strength], dim=-1)
    ink[~allowed] = 255.0
    return Image.fromarray(ink.numpy().astype(np.uint8)).resize((SIDE, SIDE), Image.Resampling.NEAREST)


def sheet() -> Image.Image:
    """All that are shown, with their names."""
    down = -(-len(SHOWN) // ACROSS)
    canvas = Image.new("RGB", (ACROSS * (SIDE + GAP) + GAP, down * (SIDE + TITLE + GAP) + GAP), (246, 246, 243))
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=12)
    rows = {row.name: row for row in ROWS}
    for index, name in enumerate(SHOWN):
        x, y = GAP + index % ACROSS * (SIDE + GAP), GAP + index // ACROSS * (SIDE + TITLE + GAP)
        pen.text((x, y + 3), name, (28, 28, 30), font)
        canvas.paste(heatmap(rows[name]), (x, y + TITLE))
    return canvas


if __name__ == "__main__":
    sheet().save(sys.argv[1], optimize=True)
