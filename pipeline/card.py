"""A dataset for people to look at: its data card and its contact sheet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from pipeline.manifest import Counts, Root


def card(root: Root) -> str:
    """Write the README.md of a dataset prefix."""
    image, channels = root.image, "grey" if root.channels == 1 else "RGB"
    shared = "may be handed on" if root.redistribution else "must not be handed on"
    lines = [
        "# Dataset",
        "",
        f"{sum(s.samples for s in root.splits.values())} images of {root.size}x{root.size} px, {channels}, 8 bits, "
        f"{'lossless' if root.lossless else 'lossy: bits/dim on them compare with nothing'} {image.encoding.upper()}.",
        "",
        f"- Licence: {root.license}; these shards {shared}.",
        f"- Source: {root.origin.kind}; crop: {image.crop}; resize: {image.resize}; splits: {root.origin.split}.",
        f"- Written by {root.tool.name} {root.tool.version}, Pillow {root.tool.pillow}, zlib {root.tool.zlib}, "
        f"webdataset {root.tool.webdataset}.",
        "- The dataset's digest is the sha256 of manifest.json. The shards are WebDataset tars.",
        "",
        *_table(("split", "images", "shards"), [(n, s.samples, s.shards) for n, s in root.splits.items()]),
    ]
    if root.labels:
        rows = [(name, *(s.counts.labels[i] for s in root.splits.values())) for i, name in enumerate(root.labels)]
        lines += ["", *_table(("class", *root.splits), rows)]
    if root.attributes:
        rows = [(name, *(s.counts.positive[i] for s in root.splits.values())) for i, name in enumerate(root.attributes)]
        kept = [row for row in rows if row[0] in root.editable]
        constant = len(rows) - len(kept)
        lines += ["", *_table(("attribute present in", *root.splits), kept)]
        lines += ["", f"{constant} further attributes never vary: nothing can be learned of them."] if constant else []
    return "\n".join(lines) + "\n"


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    lines = [f"| {' | '.join(map(str, cells))} |" for cells in (head, ["---"] * len(head), *rows)]
    return lines


def contact_sheet(root: Root, counts: Counts, images: Sequence[np.ndarray]) -> Image.Image:
    """Lay out images (uint8 [c, h, w]) in a square grid, with a bar an editable attribute beneath."""
    columns, cell, names = max(1, math.isqrt(len(images))), max(64, root.size), root.editable
    width, height = max(columns * cell, 360), -(-len(images) // columns) * cell
    sheet = Image.new("RGB", (width, height + (18 * len(names) + 12 if names else 0)), "white")
    for number, pixels in enumerate(images):
        picture = Image.fromarray(pixels.transpose(1, 2, 0).squeeze()).resize((cell, cell), Image.Resampling.NEAREST)
        sheet.paste(picture, (number % columns * cell, number // columns * cell))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for line, name in enumerate(names):
        index = root.attributes.index(name)
        share = counts.positive[index] / max(1, counts.positive[index] + counts.negative[index])
        top, right = height + 8 + 18 * line, 150 + share * (width - 200)
        draw.rectangle((150, top + 2, right, top + 14), fill=(84, 120, 176))
        draw.text((6, top), name, fill="black", font=font)
        draw.text((right + 6, top), f"{share:.0%}", fill="black", font=font)
    return sheet
