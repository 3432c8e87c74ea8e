"""The ways in and out that the latents' commands share: models and pictures in, files out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import tyro

from pipeline.errors import UsageError

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from pipeline.model import LoadedModel

Model = Annotated[str, tyro.conf.arg(metavar="MODEL")]
Pictures = Annotated[tuple[str, ...], tyro.conf.arg(metavar="PICTURE")]
Several = tyro.conf.UseAppendAction[tuple[str, ...]]


def opened(model: str, pictures: Sequence[str], uri: str) -> tuple[LoadedModel, list[str], Tensor]:
    """The model, and the names and pixels of pictures; everything is checked before anything is computed."""
    from pipeline.registry import load_model
    from pipeline.workbench import read_pictures

    loaded = load_model(model, uri)
    return loaded, *read_pictures(loaded, pictures)


def draw(out: str, columns: Sequence[Tensor], titles: Sequence[str], rows: Sequence[str], what: str) -> None:
    """One grid, or for a GIF a frame a column."""
    from pipeline.grids import grid

    frames = [([column], [title]) for column, title in zip(columns, titles, strict=True)]
    whole = [(columns, titles)]
    pictures = [grid(part, heads, rows) for part, heads in (frames if out.endswith(".gif") else whole)]
    write_picture(out, pictures, what)


def refuse_other_pictures(out: str) -> None:
    """UsageError for a file that is neither a PNG nor a GIF, or at no address."""
    from pipeline.storage import open_file

    if not out.endswith((".png", ".gif")):
        raise UsageError(f"{out} is neither .png nor .gif", cure="name the picture so")
    open_file(out)


def write_picture(out: str, frames: Sequence[Image], what: str) -> None:
    """Write the one frame as a PNG, or all of them as a GIF, by the name of the file."""
    from pipeline.grids import gif_bytes, png_bytes

    write(out, gif_bytes(frames) if out.endswith(".gif") else png_bytes(frames[0]))
    print(f"{out}: {what}")


def write(out: str, data: bytes) -> None:
    """Write a file, here or at an s3:// address, so that it is there whole or not at all."""
    from pipeline.storage import open_file

    home, key = open_file(out)
    home.write(key, data)
