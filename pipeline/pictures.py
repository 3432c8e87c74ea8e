"""Picture files -> pixels, the same for everybody: guarded, oriented, cropped and resized in one way."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

from pipeline import manifest
from pipeline.errors import DataError
from pipeline.shards import DAMAGE, deep
from pipeline.storage import sha256_hex

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "PPM")
CURE = "remove or replace the file"
MAX_PIXELS = 64 * 2**20
ORIENTATION = 0x0112
CONVERT = "--convert drops alpha on white, turns CMYK and palettes into RGB, and keeps the upper 8 of 16 bits"


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a picture file says of itself; `mode` is L, RGB or, with `plain` false, what must be converted."""

    sha256: str
    width: int
    height: int
    mode: str
    plain: bool


@dataclass(frozen=True, kw_only=True)
class Target:
    """What every picture becomes: `size` x `size` with 1 or 3 channels."""

    size: int
    channels: int


def inspect(data: bytes, where: str) -> Header:
    """Read a picture's header, and no pixel; `DataError` naming `where` if it is no picture we read."""
    with _opened(data, where) as image, _decoded(where):
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise DataError(f"{width}x{height} px, more than {MAX_PIXELS} in all", where=where, cure=CURE)
        frames = getattr(image, "n_frames", 1)
        if frames > 1:
            raise DataError(f"{frames} frames", where=where, cure=CURE)
        # A PNG's own getexif decodes the whole image to find what may come after it.
        if Image.Image.getexif(image).get(ORIENTATION, 1) in (5, 6, 7, 8):
            width, height = height, width
        opaque = "transparency" not in image.info
        mode = "RGB" if image.mode == "P" else "L" if image.mode == "1" else image.mode
        plain = mode in ("L", "RGB") and opaque and not deep(data)
        return Header(sha256=sha256_hex(data), width=width, height=height, mode=mode, plain=plain)


def load(data: bytes, target: Target, where: str) -> np.ndarray:
    """Decode to uint8 [size, size, 3] or [size, size]: EXIF orientation, centre crop to a square, Lanczos."""
    with _opened(data, where) as image, _decoded(where):
        image.load()
        picture = _converted(ImageOps.exif_transpose(image), "RGB" if target.channels == 3 else "L")
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    picture = picture.crop((left, top, left + side, top + side))
    if side != target.size:
        picture = picture.resize((target.size, target.size), Image.Resampling.LANCZOS)
    return np.asarray(picture)


def common_form(files: Mapping[str, Header], size: int, *, convert: bool) -> manifest.Image:
    """Find what all pictures become (`size` 0: as they are), or name one that does not fit."""
    modes, sides = {}, {}
    for file, header in files.items():
        if not header.plain and not convert:
            raise DataError(f"{header.mode} with alpha, CMYK or 16 bits", where=file, cure=CONVERT)
        modes.setdefault("L" if header.mode == "L" else "RGB", file)
        sides.setdefault((header.width, header.height), file)
    if len(modes) > 1 and not convert:
        raise DataError("grey, and others are in colour", where=modes["L"], cure="--convert makes all of them RGB")
    if not size and (len(sides) > 1 or any(width != height for width, height in sides)):
        (width, height), file = list(sides.items())[-1]
        what = f"{width}x{height} px, {'others differ' if len(sides) > 1 else 'not square'}"
        raise DataError(what, where=file, cure="--size N crops to a square and resizes")
    least = min(sides, key=min)
    size = size or least[0]
    if min(least) < size:
        what = f"{least[0]}x{least[1]} px is smaller than --size {size}"
        raise DataError(what, where=sides[least], cure=f"choose at most {min(least)}, or remove the file")
    resize = "none" if all(min(side) == size for side in sides) else "lanczos"
    crop = "none" if all(width == height for width, height in sides) else "center"
    return manifest.Image(size=size, channels=1 if set(modes) == {"L"} else 3, resize=resize, crop=crop)


def _opened(data: bytes, where: str) -> Image.Image:
    try:
        with warnings.catch_warnings(action="ignore", category=Image.DecompressionBombWarning):
            return Image.open(io.BytesIO(data), formats=FORMATS)
    except DAMAGE as error:
        raise DataError("not a picture we read", where=where, cure=f"formats: {', '.join(FORMATS)}") from error


@contextlib.contextmanager
def _decoded(where: str) -> Iterator[None]:
    """What Pillow stumbles over becomes a line."""
    try:
        yield
    except DAMAGE as error:
        raise DataError(f"does not decode ({error})", where=where, cure=CURE) from error


def _converted(image: Image.Image, mode: str) -> Image.Image:
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == mode else image.convert(mode)
