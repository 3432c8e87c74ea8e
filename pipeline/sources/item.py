"""One picture of a source, wherever its bytes lie, and all that is known of a source before a picture is opened."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from unicodedata import category

import numpy as np

from pipeline.errors import DataError

FREE = ("CC0-1.0", "CC-BY-4.0", "CC-BY-3.0", "CC-BY-2.0", "CC-BY-SA-4.0", "MIT", "Apache-2.0", "public domain")
"""Licences under which prepared shards may be handed on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """One picture: where it is, its path within the source, attributes (-1, 0 unknown, 1), class and split if known.

    It is a whole file, or `length` bytes of one from `offset` on: a picture file, or, where `shape` says so, raw
    pixels [h, w, c], or [c, h, w] if `planar`.
    """

    file: Path
    source: str
    attributes: tuple[int, ...] = ()
    label: str | None = None
    split: str = ""
    partition: str = ""
    """Its split by CelebA's own partition, where that is known."""
    offset: int = 0
    length: int = -1
    shape: tuple[int, ...] = ()
    planar: bool = False

    @property
    def where(self) -> str:
        """Name it in a message."""
        return str(self.file) if self.length < 0 else self.source

    def read(self) -> bytes:
        """Return its picture file; raw pixels become a binary PPM or PGM, which holds the very same values."""
        try:
            with self.file.open("rb") as file:
                file.seek(self.offset)
                data = file.read(self.length)
        except OSError as error:
            raise DataError(error.strerror or "cannot be read", where=self.where, cure="fetch it again") from error
        if self.length >= 0 and len(data) != self.length:
            raise DataError(f"{len(data)} bytes, expected {self.length}", where=self.where, cure="fetch it again")
        return _netpbm(data, self.shape, self.planar) if self.shape else data


@dataclass(frozen=True, kw_only=True)
class Source:
    """Everything known of a source before a picture is opened. `notes` are for people."""

    kind: str
    items: tuple[Item, ...]
    attributes: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    """Class names in their own order, where the source fixes one."""
    license: str = "unknown"
    notes: tuple[str, ...] = ()

    @property
    def labels(self) -> tuple[str, ...]:
        """Class names, the source's or sorted; a label's number is its place here."""
        return self.classes or tuple(sorted({item.label for item in self.items if item.label is not None}))

    @property
    def redistribution(self) -> bool:
        """Whether the licence is one under which the pictures may be handed on."""
        return self.license in FREE

    def licensed(self, name: str) -> Source:
        """The same under another licence; an empty one changes nothing."""
        return replace(self, license=name or self.license)


def refuse_stray(items: Sequence[Item]) -> None:
    """DataError where some items bring a split and others none: they would be in no split anybody reads."""
    stray, placed = ([item for item in items if bool(item.split) is known] for known in (False, True))
    if stray and placed:
        what = f"in no split, and others are (e.g. {placed[0].source} in {placed[0].split})"
        cure = "begin all names, or folders at the top, with train, val or test, or none of them"
        raise DataError(what, where=stray[0].where, cure=cure)


def refuse_odd_names(names: Iterable[str], where: str) -> None:
    """DataError where a name of an attribute, class or file is empty, no UTF-8, or would break the lines of a card."""
    for name in names:
        if not name or (not name.isprintable() and any(category(letter) in ("Cc", "Cs") for letter in name)):
            raise DataError(f"odd name {name!r}", where=where, cure="rename it: UTF-8 without control characters")


def _netpbm(data: bytes, shape: tuple[int, ...], planar: bool) -> bytes:
    pixels = np.frombuffer(data, np.uint8).reshape(shape)
    height, width, channels = (shape[1], shape[2], shape[0]) if planar else shape
    if planar:
        pixels = pixels.transpose(1, 2, 0)
    return b"P%d %d %d 255\n" % (6 if channels == 3 else 5, width, height) + pixels.tobytes()
