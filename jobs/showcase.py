"""The demo's pictures and report: what a champion draws and is worth, each file naming the artifact it is about."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from pipeline.grids import BACKGROUND, Column, sample_grid, temperature_columns

if TYPE_CHECKING:
    from pipeline.ledger import Entry
    from pipeline.model import LoadedModel
    from pipeline.report import Report

ROWS = 5
TEMPERATURES, TEMPERATURE = (0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0), 0.6
ASKED = {
    "hat": "+Wearing_Hat",
    "blond": "+Blond_Hair,-Black_Hair,-Brown_Hair",
    "black hair": "+Black_Hair,-Blond_Hair,-Brown_Hair",
    "darker skin": "-Pale_Skin",
    "smile": "+Smiling",
    "beard": "-No_Beard",
    "glasses": "+Eyeglasses",
}
"""Columns of samples.png for faces: what is asked for, over each seed's own attributes."""


def samples(champion: LoadedModel) -> Image.Image:
    """Rows are seeds, columns what is asked for; below, the first seed at rising temperature."""
    asked = ASKED if {"Wearing_Hat", "No_Beard"} <= set(champion.config.editable) else {}
    seeds = plain_seeds(champion, list(asked.values()))
    columns = [Column("as it comes", champion.condition(seeds))]
    columns += [Column(title, champion.condition(seeds, request)) for title, request in asked.items()]
    if not asked:
        names = enumerate(champion.config.labels)
        columns = [Column(name, champion.condition(seeds, label=number)) for number, name in names]
    bits, first = champion.config.bits, champion.condition(seeds[:1])
    grid = sample_grid(champion.model, bits, seeds, columns, TEMPERATURE, f"T = {TEMPERATURE:g}")
    strip = sample_grid(champion.model, bits, seeds[:1], temperature_columns(TEMPERATURES, first), TEMPERATURE)
    canvas = Image.new("RGB", (max(grid.width, strip.width), grid.height + strip.height), BACKGROUND)
    canvas.paste(grid, (0, 0))
    canvas.paste(strip, (canvas.width - strip.width, grid.height))
    return canvas


def plain_seeds(champion: LoadedModel, requests: Sequence[str]) -> list[int]:
    """The seeds that the requests change most: their own images have least of what is asked for."""
    seeds = range(len(champion.golden["labels"]))
    _, own = champion.condition(seeds)
    if own is None:
        return list(seeds[:ROWS])
    met = torch.zeros(len(seeds))
    for request in requests:
        _, wanted = champion.condition(seeds, request)
        met += (wanted == own).all(1)
    return sorted(torch.argsort(met, stable=True)[:ROWS].tolist())


def keep_picture(path: Path, champion: LoadedModel) -> None:
    """Write `samples` as a PNG that says which artifact it was drawn from."""
    note, data = PngInfo(), io.BytesIO()
    note.add_text("artifact", champion.digest)
    samples(champion).save(data, "PNG", pnginfo=note)
    _replace(path, data.getvalue())


def keep_report(path: Path, champion: LoadedModel, found: Report, entries: Sequence[Entry]) -> None:
    """Write a review with the gates that the champion passed, by the ledger, as a page and as JSON beside it."""
    from pipeline.gates import Result
    from pipeline.page import as_html
    from pipeline.report import as_json
    from pipeline.storage import canonical_json

    entry = next(entry for entry in reversed(entries) if entry.digest == champion.digest)
    lineage = {**found.lineage, "artifact": champion.digest, "version": str(entry.version)}
    full = replace(found, gates=[Result(**result) for result in entry.gates], lineage=lineage)
    _replace(path, as_html(full).encode())
    _replace(path.with_suffix(".json"), canonical_json(as_json(full)))  # last: it says that the page is there


def artifact_in(path: Path) -> str:
    """The artifact a picture was drawn from; '' where there is no such picture."""
    if not path.exists():
        return ""
    with Image.open(path) as picture:
        return str(picture.info.get("artifact", ""))


def artifact_of(path: Path) -> str:
    """The artifact a report is about; '' where there is no report."""
    return json.loads(path.read_bytes())["lineage"].get("artifact", "") if path.exists() else ""


def _replace(path: Path, data: bytes) -> None:
    """Write a file so that it is there whole or not at all."""
    from pipeline.storage import open_storage

    open_storage(str(path.parent)).write(path.name, data)
