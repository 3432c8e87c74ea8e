"""Pictures for people: labelled sample grids and temperature strips, drawn the same way wherever they appear."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from glow import Flow, FlowConfig
from pipeline.config import TrainConfig
from pipeline.sampling import Condition, Temperature, condition_of, sample

BACKGROUND, INK, FAINT = (250, 250, 248), (28, 28, 30), (110, 110, 114)
GAP = 4

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass(frozen=True)
class Column:
    """One column of a grid: a title, the condition of every row, and the temperature where it is not the grid's."""

    title: str
    condition: Condition = (None, None)
    temperature: Temperature | None = None


def sample_grid(
    model: Flow, bits: int, seeds: Sequence[int], columns: Sequence[Column], temperature: Temperature, caption: str = ""
) -> Image.Image:
    """Draw samples: a row a seed, a column a condition (or a temperature)."""
    drawn = [
        sample(model, bits, seeds, temperature if column.temperature is None else column.temperature, column.condition)
        for column in columns
    ]
    return grid(drawn, [column.title for column in columns], [f"seed {seed}" for seed in seeds], caption)


def attribute_columns(
    config: FlowConfig, editable: Sequence[str], base: Condition, asked: Sequence[str], label: int = -1
) -> list[Column]:
    """Columns for requests such as "+Smiling,-Eyeglasses" laid over the rows' own conditions; "" asks for nothing."""
    return [
        Column(
            text.replace("_", " ").replace(",", "\n") or "as it comes",
            condition_of(config, editable, base, text, label),
        )
        for text in asked
    ]


def temperature_columns(temperatures: Sequence[float], condition: Condition) -> list[Column]:
    """Columns that differ in temperature alone."""
    return [Column(f"T = {temperature:g}", condition, temperature) for temperature in temperatures]


def training_grid(
    model: Flow, config: TrainConfig, temperature: float, condition: Condition = (None, None)
) -> Image.Image:
    """The grid drawn while training: `evaluate.rows` rows of eight seeds, under the conditions of real images."""
    seeds = range(8 * config.evaluate.rows)
    label, attributes = (None if part is None else _cycled(part, len(seeds)) for part in condition)
    pixels = sample(model, config.data.bits, seeds, temperature, (label, attributes))
    return grid([pixels[column::8] for column in range(8)], [], [])


def grid(columns: Sequence[Tensor], titles: Sequence[str], rows: Sequence[str], caption: str = "") -> Image.Image:
    """Images uint8, one tensor [rows, c, h, w] a column -> one picture with titles above and names at the left.

    Small images are enlarged by a whole factor without smoothing, so that every pixel is seen as it is.
    """
    count, _, height, width = columns[0].shape
    scale = max(1, round(128 / height))
    cell_w, cell_h = width * scale, height * scale
    font = ImageFont.load_default(size=max(12, min(18, cell_w // 9)))
    titles = [_wrapped(title, font, cell_w) for title in titles]
    left = GAP + max((round(font.getlength(name)) + 10 for name in rows), default=0)
    top = GAP + _text_height(font, titles) + _text_height(font, [caption] if caption else [])
    size = left + len(columns) * (cell_w + GAP), top + count * (cell_h + GAP)
    canvas = Image.new("RGB", size, BACKGROUND)
    pen = ImageDraw.Draw(canvas)
    if caption:
        pen.text((left, GAP), caption, FAINT, font)
    for x, pixels in enumerate(columns):
        corner = left + x * (cell_w + GAP)
        if titles:
            pen.multiline_text((corner + cell_w / 2, top - 4), titles[x], INK, font, anchor="md", align="center")
        for y, image in enumerate(pixels):
            canvas.paste(_enlarged(image, scale), (corner, top + y * (cell_h + GAP)))
    for y, name in enumerate(rows):
        pen.text((left - 8, top + y * (cell_h + GAP) + cell_h / 2), name, FAINT, font, anchor="rm")
    return canvas


def as_picture(image: Tensor) -> Image.Image:
    """An image uint8 [c, h, w] as a picture, grey or in colour."""
    pixels = np.ascontiguousarray(image.permute(1, 2, 0).numpy())
    return Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels)


def png_bytes(picture: Image.Image) -> bytes:
    """The picture as a PNG file."""
    data = io.BytesIO()
    picture.save(data, "PNG")
    return data.getvalue()


def gif_bytes(frames: Sequence[Image.Image], milliseconds: int = 120) -> bytes:
    """An endless GIF there and back again, waiting a little at both ends."""
    there = [frame.quantize(dither=Image.Dither.NONE) for frame in frames]
    again = there + there[-2:0:-1]
    pauses = [milliseconds * (5 if frame in (there[0], there[-1]) else 1) for frame in again]
    data = io.BytesIO()
    again[0].save(data, "GIF", save_all=True, append_images=again[1:], duration=pauses, loop=0, optimize=False)
    return data.getvalue()


def _enlarged(image: Tensor, scale: int) -> Image.Image:
    picture = as_picture(image).convert("RGB")
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def _text_height(font: Font, texts: Sequence[str]) -> int:
    lines = max((text.count("\n") + 1 for text in texts), default=0)
    return round(lines * (font.getbbox("Ag")[3] + 5)) + 6 if lines else 0


def _wrapped(title: str, font: Font, width: int) -> str:
    """Break lines at blanks so that each fits the width where its words do."""
    lines = [""]
    for word in title.replace("\n", " \n ").split(" "):
        longer = f"{lines[-1]} {word}".strip(" ")
        if word == "\n":
            lines.append("")
        elif not lines[-1] or font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return "\n".join(lines)


def _cycled(part: Tensor, count: int) -> Tensor:
    return part[[index % len(part) for index in range(count)]]
