"""The demo's pictures: what a champion draws, and the note in each file of the artifact it was made from."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from pipeline.grids import BACKGROUND, Column, attribute_columns, sample_grid, temperature_columns

if TYPE_CHECKING:
    from pipeline.model import LoadedModel
    from pipeline.sampling import Condition

SEEDS, TEMPERATURES, TEMPERATURE = (1, 2, 3, 4, 5), (0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0), 0.6
ASKED = ("+Wearing_Hat", "+Blond_Hair", "+Black_Hair", "-Pale_Skin", "+Smiling", "-No_Beard", "+Eyeglasses")
"""Columns of samples.png, where the dataset has these attributes."""


def samples(champion: LoadedModel) -> Image.Image:
    """Rows are seeds, columns what is asked for; below, the same seeds at rising temperature."""
    config, bits = champion.config, champion.config.bits
    base = champion.condition(SEEDS)
    if config.editable and config.model.attributes > 0:
        asked = ["", *(word for word in ASKED if word[1:] in config.editable)]
        columns = attribute_columns(config.model, config.editable, base, asked)
    else:
        columns = [Column(name, champion.condition(SEEDS, label=number)) for number, name in enumerate(config.labels)]
    grid = sample_grid(champion.model, bits, SEEDS, columns, TEMPERATURE, f"T = {TEMPERATURE:g}")
    strip = sample_grid(champion.model, bits, SEEDS[:1], temperature_columns(TEMPERATURES, _first(base)), TEMPERATURE)
    canvas = Image.new("RGB", (max(grid.width, strip.width), grid.height + strip.height), BACKGROUND)
    canvas.paste(grid, (0, 0))
    canvas.paste(strip, (0, grid.height))
    return canvas


def _first(condition: Condition) -> Condition:
    label, attributes = condition
    return label if label is None else label[:1], attributes if attributes is None else attributes[:1]


def png(picture: Image.Image, artifact: str) -> bytes:
    """PNG bytes that say which artifact they were drawn from."""
    note, data = PngInfo(), io.BytesIO()
    note.add_text("artifact", artifact)
    picture.save(data, "PNG", pnginfo=note)
    return data.getvalue()


def artifact_in(path: Path) -> str:
    """The artifact a picture was drawn from; '' where there is no such picture."""
    if not path.exists():
        return ""
    with Image.open(path) as picture:
        return str(picture.info.get("artifact", ""))


def artifact_of(path: Path) -> str:
    """The artifact a report is about; '' where there is no report."""
    return json.loads(path.read_bytes())["lineage"].get("artifact", "") if path.exists() else ""
