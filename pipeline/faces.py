"""How a toy face is drawn: flat shapes back to front over a backdrop, soft light, sensor grain.

Shapes are drawn at four times the size (twice, above 128 px) and averaged down. Lengths are in units of the image's
side; y points down.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

STYLES = ("gradient", "horizon", "spotlight", "stripes")
"""Backdrops: the class labels of the toy set."""

GRAIN = 2.0
"""Standard deviation of the sensor grain, in 1/255: without it a file compressor would win on flat areas."""

Color = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class Face:
    """Everything the renderer is told. `present` names the CelebA attributes the face shows."""

    present: tuple[str, ...]
    style: str
    skin: Color
    hair: Color
    shirt: Color
    hat: Color
    iris: Color
    background: tuple[Color, Color]
    shift: tuple[float, float]
    width: float
    gaze: float
    light: float
    phase: float

    def has(self, attribute: str) -> bool:
        """Say whether the face shows a CelebA attribute."""
        return attribute in self.present


def render(face: Face, size: int, grain: np.random.Generator | None = None) -> np.ndarray:
    """Render a face as uint8 [size, size, 3]; with a generator, under sensor grain."""
    over = 4 if size <= 128 else 2
    backdrop = _background(face, size)
    canvas = Image.fromarray(np.rint(backdrop).astype(np.uint8)).resize(
        (size * over, size * over), Image.Resampling.BILINEAR
    )
    pen = Pen(ImageDraw.Draw(canvas), size * over, face.shift)
    for part in PARTS:
        part(pen, face)
    light = canvas.reduce(over)
    pixels = np.asarray(light, dtype=np.float64) * _light(face, size)
    if grain is not None:
        pixels = pixels + GRAIN * grain.standard_normal(pixels.shape)
    return np.rint(pixels.clip(0, 255)).astype(np.uint8)


class Pen:
    """Draws filled shapes given in units of the image's side, about the (shifted) middle of the head."""

    def __init__(self, draw: ImageDraw.ImageDraw, side: int, shift: tuple[float, float]) -> None:
        self.draw, self.side, self.shift = draw, side, shift

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Pixel of a point given by its offset from the vertical axis and its height in the image."""
        return (0.5 + x + self.shift[0]) * self.side, (y + self.shift[1]) * self.side

    def box(self, x: float, y: float, rx: float, ry: float) -> tuple[float, float, float, float]:
        """Pixel corners of the box about (x, y)."""
        (left, top), (right, bottom) = self.at(x - rx, y - ry), self.at(x + rx, y + ry)
        return left, top, right, bottom

    def ellipse(self, x: float, y: float, rx: float, ry: float, fill: Color) -> None:
        self.draw.ellipse(self.box(x, y, rx, ry), fill=fill)

    def ring(self, x: float, y: float, radius: float, width: float, fill: Color) -> None:
        self.draw.ellipse(self.box(x, y, radius, radius), outline=fill, width=round(width * self.side))

    def chord(self, x: float, y: float, rx: float, ry: float, span: tuple[float, float], fill: Color) -> None:
        """Fill the part of an ellipse cut off between two angles (degrees, clockwise from the right)."""
        self.draw.chord(self.box(x, y, rx, ry), *span, fill=fill)

    def slab(self, x: float, y: float, rx: float, ry: float, radius: float, fill: Color) -> None:
        """Fill a box with round corners."""
        self.draw.rounded_rectangle(self.box(x, y, rx, ry), radius * self.side, fill=fill)

    def shape(self, points: Sequence[tuple[float, float]], fill: Color) -> None:
        self.draw.polygon([self.at(x, y) for x, y in points], fill=fill)

    def stroke(self, points: Sequence[tuple[float, float]], width: float, fill: Color) -> None:
        pixels = [self.at(x, y) for x, y in points]
        self.draw.line(pixels, fill=fill, width=max(1, round(width * self.side)), joint="curve")

    def arc(
        self, x: float, y: float, rx: float, ry: float, span: tuple[float, float], width: float, fill: Color
    ) -> None:
        self.draw.arc(self.box(x, y, rx, ry), *span, fill=fill, width=max(1, round(width * self.side)))


def _hair_behind(pen: Pen, face: Face) -> None:
    dark = shade(face.hair, 0.82)
    if not face.has("Wavy_Hair"):
        pen.ellipse(0, 0.47, face.width + 0.045, 0.29, dark)
        return
    for side in (-1, 1):
        for y in (0.46, 0.57, 0.68, 0.79):
            pen.ellipse(side * (face.width + 0.005), y, 0.085, 0.085, dark)
    pen.slab(0, 0.62, face.width + 0.02, 0.2, 0.05, dark)
    pen.ellipse(0, 0.45, face.width + 0.065, 0.29, dark)


def _body(pen: Pen, face: Face) -> None:
    pen.ellipse(0, 1.09, 0.43, 0.225, face.shirt)
    shadow = between(face.skin, (128, 68, 52), 0.34)
    pen.slab(0, 0.82, 0.085, 0.09, 0.03, shadow)
    pen.ellipse(0, 0.895, 0.1, 0.045, shadow)
    pen.arc(0, 0.885, 0.115, 0.065, (0, 180), 0.016, shade(face.shirt, 0.72))


def _head(pen: Pen, face: Face) -> None:
    for side in (-1, 1):
        pen.ellipse(side * (face.width + 0.005), 0.535, 0.03, 0.05, between(face.skin, (128, 68, 52), 0.22))
    pen.ellipse(0, 0.525, face.width, 0.275, face.skin)
    for side in (-1, 1):
        pen.ellipse(side * 0.12, 0.615, 0.042, 0.03, between(face.skin, (226, 108, 96), 0.22))


def _beard(pen: Pen, face: Face) -> None:
    if face.has("No_Beard"):
        return
    beard = shade(face.hair, 0.92)
    pen.chord(0, 0.53, face.width + 0.006, 0.29, (8, 172), beard)
    pen.ellipse(0, 0.575, face.width * 0.76, 0.105, face.skin)
    pen.chord(0, 0.665, 0.095, 0.045, (180, 360), beard)


def _mouth(pen: Pen, face: Face) -> None:
    lips = (196, 30, 62) if face.has("Wearing_Lipstick") else between(face.skin, (150, 56, 52), 0.55)
    thick = 0.02 if face.has("Wearing_Lipstick") else 0.011
    if face.has("Smiling"):
        pen.chord(0, 0.66, 0.095 + thick / 2, 0.062 + thick, (0, 180), lips)
        pen.chord(0, 0.667, 0.08, 0.044, (0, 180), (250, 248, 244))
    else:
        pen.ellipse(0, 0.69, 0.066, 0.01 + thick * 0.7, lips)
        pen.stroke([(-0.062, 0.69), (0.062, 0.69)], 0.007, shade(lips, 0.62))


def _nose(pen: Pen, face: Face) -> None:
    pen.arc(0, 0.588, 0.03, 0.022, (10, 170), 0.013, between(face.skin, (110, 56, 44), 0.5))


def _eyes(pen: Pen, face: Face) -> None:
    for side in (-1, 1):
        x = side * 0.095
        pen.ellipse(x, 0.505, 0.044, 0.03, (250, 250, 250))
        pen.ellipse(x + face.gaze, 0.506, 0.024, 0.026, face.iris)
        pen.ellipse(x + face.gaze, 0.506, 0.012, 0.013, (20, 16, 18))
        pen.ellipse(x + face.gaze - 0.008, 0.498, 0.006, 0.006, (255, 255, 255))
        pen.arc(x, 0.507, 0.048, 0.036, (195, 345), 0.011, (44, 32, 32))


def _eyebrows(pen: Pen, face: Face) -> None:
    width = 0.034 if face.has("Bushy_Eyebrows") else 0.012
    color = shade(face.hair, 0.62)
    for side in (-1, 1):
        points = [(side * x, y) for x, y in ((0.05, 0.438), (0.1, 0.43), (0.148, 0.442))]
        pen.stroke(points, width, color)


def _hair_above(pen: Pen, face: Face) -> None:
    reach = face.width + (0.062 if face.has("Wavy_Hair") else 0.042)
    pen.chord(0, 0.43, reach, 0.27, (196, 344), face.hair)
    if face.has("Bangs"):
        pen.chord(0, 0.5, face.width + 0.01, 0.28, (196, 344), face.hair)
        for x in (-0.135, -0.045, 0.045, 0.135):
            pen.ellipse(x, 0.4, 0.052, 0.034, face.hair)
    else:
        pen.ellipse(0.0, 0.392, face.width * 0.7, 0.058, face.skin)
    for side in (-1, 1):
        pen.ellipse(side * (face.width - 0.002), 0.43, 0.036, 0.1, face.hair)
    pen.arc(-0.03, 0.4, reach - 0.075, 0.19, (215, 300), 0.02, between(face.hair, (255, 255, 255), 0.16))


def _glasses(pen: Pen, face: Face) -> None:
    if not face.has("Eyeglasses"):
        return
    frame = (30, 28, 36)
    for side in (-1, 1):
        pen.ring(side * 0.1, 0.51, 0.077, 0.017, frame)
        pen.stroke([(side * 0.172, 0.5), (side * (face.width + 0.01), 0.488)], 0.015, frame)
    pen.arc(0, 0.512, 0.032, 0.024, (185, 355), 0.016, frame)


def _hat(pen: Pen, face: Face) -> None:
    if not face.has("Wearing_Hat"):
        return
    pen.slab(0, 0.185, 0.2, 0.135, 0.045, face.hat)
    pen.slab(0, 0.275, 0.2, 0.034, 0.0, shade(face.hat, 0.62))
    pen.slab(0, 0.318, 0.315, 0.03, 0.03, shade(face.hat, 0.9))


PARTS: tuple[Callable[[Pen, Face], None], ...] = (
    _hair_behind,
    _body,
    _head,
    _beard,
    _mouth,
    _nose,
    _eyes,
    _eyebrows,
    _hair_above,
    _glasses,
    _hat,
)
"""Back to front."""


def _background(face: Face, size: int) -> np.ndarray:
    """The backdrop as float [size, size, 3]: two colours mixed in one of four styles."""
    y, x = _grid(size)
    if face.style == "gradient":
        mix = y + 0.15 * face.light * (x - 0.5)
    elif face.style == "horizon":
        mix = 1 / (1 + np.exp(-40 * (y - 0.4 - 0.12 * face.phase - 0.25 * face.light * (x - 0.5))))
    elif face.style == "spotlight":
        mix = 1.5 * np.hypot(x - 0.5, y - 0.4)
    else:
        mix = 0.5 + 0.25 * np.sin(2 * math.pi * (3 * (x + 0.4 * y) + face.phase))
    first, second = (np.array(color, dtype=np.float64) for color in face.background)
    return first + mix.clip(0, 1)[..., None] * (second - first)


def _light(face: Face, size: int) -> np.ndarray:
    """Soft light from one side, a little brighter on the face: factor [size, size, 1]."""
    y, x = _grid(size)
    middle = 0.46 + 0.08 * face.light
    spot = np.exp(-(((x - middle) / 0.28) ** 2) - ((y - 0.45) / 0.34) ** 2)
    return (0.93 + 0.1 * face.light * (x - 0.5) + 0.1 * spot)[..., None]


def _grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows [size, 1] and columns [1, size] of pixel centres in units of the side."""
    centres = (np.arange(size) + 0.5) / size
    return centres[:, None], centres[None, :]


def shade(color: Color, factor: float) -> Color:
    red, green, blue = (min(255, round(factor * value)) for value in color)
    return red, green, blue


def between(first: Color, second: Color, mix: float) -> Color:
    red, green, blue = (round(a + mix * (b - a)) for a, b in zip(first, second, strict=True))
    return red, green, blue
