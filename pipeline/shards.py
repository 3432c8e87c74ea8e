"""Records <-> WebDataset shards, strictly.

A shard is an uncompressed USTAR archive (`webdataset.TarWriter`, mtime 0, uid and gid 0, no names), two members a
sample:

    00000123.json    canonical JSON {"attributes": [-1|0|1 ...], "label": int|null, "source": ..., "source_sha256": ...}
    00000123.png     8-bit PNG, grey or RGB, written with fixed settings; or 00000123.raw: uint8 [c, h, w]

The key is the sample's number in its split, eight digits. The archive ends in zero blocks up to a multiple of 10240
bytes. The same records give the same bytes under the same Pillow, zlib and webdataset. Tar readers, webdataset's
included, take a cut or damaged archive for a shorter one; `open_shard` refuses it.
"""

from __future__ import annotations

import contextlib
import io
import os
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from pipeline import tar
from pipeline.errors import DataError
from pipeline.storage import canonical_json, parse_json

PNG_SETTINGS: dict[str, Any] = {"format": "PNG", "compress_level": 6, "compress_type": 3}
"""The run-length strategy of zlib: two to three times as fast as its default, within 2 % of the size on photographs."""

FORMATS = ("PNG", "JPEG", "WEBP")
DAMAGE = (OSError, SyntaxError, ValueError, TypeError, IndexError, struct.error, Image.DecompressionBombError)
"""What Pillow raises where a file is not what it says."""

IMAGE_FIELDS = ("png", "jpg", "jpeg", "webp", "raw")
META_FIELDS = {"attributes", "label", "source", "source_sha256"}
RAW = "raw"
CURE = tar.CURE
SHALLOW = "pack the images anew: data prepare SOURCE DEST --convert keeps the upper 8 bits"
LONGEST = 256
"""Letters in the word for a class."""

HEADERS = 1 << 15
"""Bytes read at a time where headers are looked for: small samples have several in them."""

Ints = np.ndarray[Any, np.dtype[np.int64]]
Place = tuple[int, int]
"""(offset, length) of a member's bytes."""
Fields = dict[str, Place]


@dataclass(frozen=True, kw_only=True)
class Foreign:
    """How to read samples that others wrote: JSON fields that are attributes, and the words for the classes."""

    attributes: tuple[str, ...]
    labels: tuple[str, ...]

    def describe(self, meta: bytes, label: bytes) -> dict[str, Any]:
        """Attributes and label as our own metadata has them. true and 1 are present, null is unknown, else absent."""
        row, word = foreign_row(meta, label)
        if any(row.get(name, "") not in (True, False, None, -1) for name in self.attributes):
            raise ValueError("an attribute is not true, false, 1, 0, -1 or null")
        signs = [0 if row.get(name) is None else 1 if row[name] == 1 else -1 for name in self.attributes]
        return {"attributes": signs, "label": self.labels.index(word) if word in self.labels else None}


def foreign_row(meta: bytes, label: bytes) -> tuple[dict[str, Any], str]:
    """The JSON of a foreign sample and the word for its class: from its .cls, else the JSON's `label`, else nothing."""
    try:
        row = parse_json(meta) if meta else {}
        word = label.decode().strip()
    except ValueError as error:
        raise ValueError("the metadata is not JSON, or the class not text") from error
    if not isinstance(row, dict):
        raise ValueError(f"the metadata is {type(row).__name__}, not an object")
    named = row.get("label")
    word = word or (str(named) if isinstance(named, (int, str)) else "")
    if len(word) > LONGEST:
        raise ValueError(f"a class of {len(word)} letters")
    return row, word


@dataclass(frozen=True, kw_only=True)
class Record:
    """One sample on its way into a shard; `image` is a file, `label` an index into the manifest's labels."""

    key: str
    image: bytes
    attributes: tuple[int, ...]
    label: int | None
    source: str
    source_sha256: str


def encode_png(pixels: np.ndarray) -> bytes:
    """Encode uint8 [h, w, 3] or [h, w] as PNG under the fixed settings."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, **PNG_SETTINGS)
    return buffer.getvalue()


def encode_raw(pixels: np.ndarray) -> bytes:
    """The values themselves, [c, h, w]."""
    return (pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)).tobytes()


ENCODERS = {"png": encode_png, RAW: encode_raw}
"""Lossless forms in which we write images, by the name of the field."""


def pack(records: Iterable[Record], encoding: str = "png") -> bytes:
    """Pack records into the bytes of one shard, in order. Every key without dots and once, or `DataError`."""
    from webdataset.writer import TarWriter

    buffer, seen = io.BytesIO(), set()
    with TarWriter(buffer, user="", group="", mode=0o444, mtime=0, compress=False, encoder=False) as writer:
        for record in records:
            if record.key in seen or "." in record.key or not record.key:
                raise DataError(f"duplicate or dotted key {record.key!r}", where=record.source)
            seen.add(record.key)
            meta = {name: getattr(record, name) for name in META_FIELDS}
            writer.write({"__key__": record.key, encoding: record.image, "json": canonical_json(meta)})
    return buffer.getvalue()


class ShardIndex:
    """An open shard: samples by row. Reads are positional, so threads may share it; the file may be unlinked.

    `places` [samples, fields, 2] holds offset and length of each field: 32 bytes a sample, 48 of foreign shards.
    """

    def __init__(self, file: BinaryIO, name: str, places: Ints, foreign: Foreign | None) -> None:
        self.name, self.places, self._file, self._foreign = name, places, file, foreign

    def __len__(self) -> int:
        return len(self.places)

    def __enter__(self) -> ShardIndex:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def read(self, row: int) -> tuple[bytes, dict[str, Any]]:
        """Return the image file and the metadata of a row; `DataError` where the metadata is not what we write."""
        places = self.places[row].tolist()
        own = self._foreign is None
        image, meta, *label = self._neighbours(*places) if own else [self._bytes(*place) for place in places]
        try:
            described = _meta(meta) if self._foreign is None else self._foreign.describe(meta, label[0])
        except ValueError as error:
            raise DataError(f"row {row}: {error}", where=self.name, cure=CURE) from error
        return image, described

    def close(self) -> None:
        """Let the file go."""
        self._file.close()

    def _neighbours(self, image: Place, meta: Place) -> list[bytes]:
        """Image and metadata of one of our own samples, by one read: in its shard they lie side by side."""
        start = min(image[0], meta[0])
        data = self._bytes(start, max(sum(image), sum(meta)) - start)
        return [data[offset - start : offset - start + length] for offset, length in (image, meta)]

    def _bytes(self, offset: int, length: int) -> bytes:
        data = os.pread(self._file.fileno(), length, offset)
        if len(data) != length:
            raise DataError(f"{len(data)} bytes at {offset}, expected {length}", where=self.name, cure=CURE)
        return data


def open_shard(path: Path, expected_samples: int, name: str = "", foreign: Foreign | None = None) -> ShardIndex:
    """Open a shard and check its whole structure: every header, field and key, the padding, and the sample count.

    `name` stands for the path in messages; `foreign` says how to read what others wrote. Payload bytes are proven by
    the manifest's sha256, not here.
    """
    name = name or path.name
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(path.open("rb", buffering=HEADERS))
        place = _own if foreign is None else place_foreign
        found = [place(key, fields, name) for key, fields in grouped(file, name, foreign=foreign is not None)]
        if len(found) != expected_samples:
            raise DataError(f"{len(found)} samples, expected {expected_samples}", where=name, cure=CURE)
        stack.pop_all()
    return ShardIndex(file, name, np.array(found, dtype=np.int64).reshape(len(found), -1, 2), foreign)


def decode(data: bytes, size: int, channels: int, encoding: str = "png") -> np.ndarray:
    """Decode an image to uint8 [channels, size, size]; its length, or its header, is checked before a pixel is."""
    if encoding == RAW:
        if len(data) != channels * size * size:
            raise DataError(f"image is {len(data)} bytes, expected {channels * size * size}", cure=CURE)
        return np.frombuffer(data, np.uint8).reshape(channels, size, size)
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            mode = {1: "L", 3: "RGB"}[channels]
            if image.size != (size, size) or image.mode != mode:
                found = f"{image.width}x{image.height} {image.mode}"
                raise DataError(f"image is {found}, expected {size}x{size} {mode}", cure=CURE)
            if deep(data):
                raise DataError("image has 16 bits a channel, expected 8", cure=SHALLOW)
            pixels = np.asarray(image)
    except DAMAGE as error:
        raise DataError(f"image does not decode ({type(error).__name__})", cure=CURE) from error
    return pixels.reshape(size, size, channels).transpose(2, 0, 1)


def described(
    meta: Mapping[str, Any], labels: Sequence[str], attributes: Sequence[str]
) -> tuple[int | None, list[int]]:
    """Class and attributes of a sample that was read; `DataError` where they do not fit the manifest's names."""
    label, signs = meta["label"], meta["attributes"]
    if label is not None and not 0 <= label < len(labels):
        raise DataError(f"label {label}, the manifest names {len(labels)} classes", cure=CURE)
    if len(signs) != len(attributes):
        raise DataError(f"{len(signs)} attributes, the manifest names {len(attributes)}", cure=CURE)
    return label, signs


def deep(data: bytes) -> bool:
    """Say whether this is a PNG of 16 bits a channel: Pillow drops the lower 8 of a coloured one without a word."""
    return data[24:25] == b"\x10" and data.startswith(b"\x89PNG\r\n\x1a\n")


def grouped(file: BinaryIO, name: str, *, foreign: bool) -> Iterator[tuple[str, Fields]]:
    """Collect neighbouring members of one key; a key that comes back, or comes twice with one field, is refused."""
    seen: dict[str, Fields] = {}
    last = None
    for member in tar.members(file, name, foreign=foreign):
        folder, slash, base = member.name.rpartition("/")
        stem, _, suffix = base.partition(".")
        key = folder + slash + stem
        if (key in seen and key != last) or suffix in seen.get(key, {}):
            raise DataError(f"duplicate key or odd member {member.name!r}", where=name, cure=CURE)
        seen.setdefault(key, {})[suffix] = (member.offset, member.size)
        last = key
    yield from seen.items()


def _own(key: str, fields: Fields, name: str) -> list[Place]:
    """(offset, length) of image and metadata."""
    images = [suffix for suffix in fields if suffix in IMAGE_FIELDS]
    if len(images) != 1 or set(fields) != {*images, "json"}:
        found = f"sample {key!r} has {sorted(fields)}, expected 'json' and one image"
        raise DataError(f"{found} (a key must not hold dots)", where=name, cure=CURE)
    return [fields[images[0]], fields["json"]]


def place_foreign(key: str, fields: Fields, name: str) -> list[Place]:
    """(offset, length) of image, JSON and class, zeros for what is not there."""
    images = [suffix for suffix in fields if suffix.lower() in IMAGE_FIELDS]
    if len(images) != 1:
        what = f"sample {key!r} has {sorted(fields)}, expected one image ({', '.join(IMAGE_FIELDS)})"
        raise DataError(what, where=name, cure="keep one image a sample, or pack the images anew with data prepare")
    return [fields[images[0]], fields.get("json", (0, 0)), fields.get("cls", (0, 0))]


def _meta(data: bytes) -> dict[str, Any]:
    try:
        meta = parse_json(data)
    except ValueError as error:
        raise ValueError("the metadata is not JSON") from error
    if not isinstance(meta, dict) or set(meta) != META_FIELDS:
        found = sorted(meta) if isinstance(meta, dict) else type(meta).__name__
        raise ValueError(f"metadata {found}, not {sorted(META_FIELDS)}")
    signs = meta["attributes"]
    if not isinstance(signs, list) or not set(map(type, signs)) <= {int} or not {-1, 0, 1}.issuperset(signs):
        raise ValueError("attributes are no list of -1, 0, 1")
    if meta["label"] is not None and type(meta["label"]) is not int:
        raise ValueError(f"label {str(meta['label'])[:40]!r}")
    return meta
