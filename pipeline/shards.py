"""Records <-> WebDataset shards, strictly.

A shard is an uncompressed USTAR archive (`webdataset.TarWriter`, mtime 0, uid and gid 0, no names), two members a
sample:

    00000123.json    canonical JSON {"attributes": [-1|0|1 ...], "label": int|null, "source": ..., "source_sha256": ...}
    00000123.png     8-bit PNG, grey or RGB, written with fixed settings

The key is the sample's number in its split, eight digits. The archive ends in zero blocks up to a multiple of 10240
bytes. The same records give the same bytes under the same Pillow, zlib and webdataset. Tar readers, webdataset's
included, take a cut or damaged archive for a shorter one; `open_shard` refuses it.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from pipeline.errors import DataError
from pipeline.storage import canonical_json

PNG_SETTINGS: dict[str, Any] = {"format": "PNG", "compress_level": 6, "compress_type": 3}
"""The run-length strategy of zlib: two to three times as fast as its default, within 2 % of the size on photographs."""

FORMATS = ("PNG", "JPEG", "WEBP")
IMAGE_FIELDS = ("png", "jpg", "jpeg", "webp")
META_FIELDS = {"attributes", "label", "source", "source_sha256"}
CURE = "fetch the shard again, or prepare the dataset again; `data verify` names every damaged shard"


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


def pack(records: Iterable[Record]) -> bytes:
    """Pack records into the bytes of one shard, in order. Every key without dots and once, or `DataError`."""
    from webdataset.writer import TarWriter

    buffer, seen = io.BytesIO(), set()
    with TarWriter(buffer, user="", group="", mode=0o444, mtime=0, compress=False, encoder=False) as writer:
        for record in records:
            if record.key in seen or "." in record.key or not record.key:
                raise DataError(f"duplicate or dotted key {record.key!r}", where=record.source)
            seen.add(record.key)
            meta = {name: getattr(record, name) for name in META_FIELDS}
            writer.write({"__key__": record.key, "png": record.image, "json": canonical_json(meta)})
    return buffer.getvalue()


@dataclass(frozen=True)
class Sample:
    """Where the two members of a sample lie in the archive: (offset, length) each."""

    image: tuple[int, int]
    meta: tuple[int, int]


class ShardIndex:
    """An open shard: samples by row. Reads are positional, so threads may share it; the file may be unlinked."""

    def __init__(self, file: BinaryIO, name: str, samples: list[Sample]) -> None:
        self.name, self.samples, self._file = name, samples, file

    def __len__(self) -> int:
        return len(self.samples)

    def __enter__(self) -> ShardIndex:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def read(self, row: int) -> tuple[bytes, dict[str, Any]]:
        """Return the image file and the metadata of a row; `DataError` where the metadata is not what we write."""
        sample = self.samples[row]
        meta = self._meta(self._bytes(*sample.meta), row)
        return self._bytes(*sample.image), meta

    def close(self) -> None:
        """Let the file go."""
        self._file.close()

    def _bytes(self, offset: int, length: int) -> bytes:
        data = os.pread(self._file.fileno(), length, offset)
        if len(data) != length:
            raise DataError(f"{len(data)} bytes at {offset}, expected {length}", where=self.name, cure=CURE)
        return data

    def _meta(self, data: bytes, row: int) -> dict[str, Any]:
        try:
            meta = json.loads(data)
        except ValueError as error:
            raise DataError(f"row {row}: the metadata is not JSON", where=self.name, cure=CURE) from error
        if not isinstance(meta, dict) or set(meta) != META_FIELDS:
            found = sorted(meta) if isinstance(meta, dict) else type(meta).__name__
            raise DataError(f"row {row}: metadata {found}, not {sorted(META_FIELDS)}", where=self.name, cure=CURE)
        return meta


def open_shard(path: Path, expected_samples: int, name: str = "") -> ShardIndex:
    """Open a shard and check its whole structure: every header, field and key, the padding, and the sample count.

    `name` stands for the path in messages. Payload bytes are proven by the manifest's sha256, not here.
    """
    name = name or path.name
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(path.open("rb"))
        samples = [_sample(key, fields, name) for key, fields in _grouped(_members(file, name), name)]
        if len(samples) != expected_samples:
            raise DataError(f"{len(samples)} samples, expected {expected_samples}", where=name, cure=CURE)
        stack.pop_all()
    return ShardIndex(file, name, samples)


def decode(data: bytes, size: int, channels: int) -> np.ndarray:
    """Decode an image file to uint8 [channels, size, size]; its header is checked before a pixel is decoded."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            mode = {1: "L", 3: "RGB"}[channels]
            if image.size != (size, size) or image.mode != mode:
                found = f"{image.width}x{image.height} {image.mode}"
                raise DataError(f"image is {found}, expected {size}x{size} {mode}", cure=CURE)
            pixels = np.asarray(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"image does not decode ({type(error).__name__})", cure=CURE) from error
    return np.ascontiguousarray(pixels.reshape(size, size, channels).transpose(2, 0, 1))


def _members(file: BinaryIO, name: str) -> list[tarfile.TarInfo]:
    """Every member of the archive; `tarfile` takes a bad header for the end, so what follows must be all zero."""
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            members = archive.getmembers()
    except (tarfile.TarError, OSError, ValueError) as error:
        raise DataError(f"not a tar archive ({type(error).__name__})", where=name, cure=CURE) from error
    last = members[-1] if members else None
    end = last.offset_data + -(-last.size // 512) * 512 if last else 0
    file.seek(end)
    rest = file.read()
    if len(rest) < 1024 or rest.count(0) != len(rest) or (end + len(rest)) % tarfile.RECORDSIZE:
        raise DataError(f"cut or damaged after {len(members)} members, at byte {end}", where=name, cure=CURE)
    return members


def _grouped(members: list[tarfile.TarInfo], name: str) -> Iterator[tuple[str, dict[str, tarfile.TarInfo]]]:
    """Collect neighbouring members of one key; a key that comes back, or comes twice with one field, is refused."""
    seen: dict[str, dict[str, tarfile.TarInfo]] = {}
    last = None
    for member in members:
        key, _, suffix = member.name.partition(".")
        if not member.isreg() or (key in seen and key != last) or suffix in seen.get(key, {}):
            raise DataError(f"duplicate key or odd member {member.name!r}", where=name, cure=CURE)
        seen.setdefault(key, {})[suffix] = member
        last = key
    yield from seen.items()


def _sample(key: str, fields: dict[str, tarfile.TarInfo], name: str) -> Sample:
    images = [suffix for suffix in fields if suffix in IMAGE_FIELDS]
    if len(images) != 1 or set(fields) != {*images, "json"}:
        found = f"sample {key!r} has {sorted(fields)}, expected 'json' and one image"
        raise DataError(f"{found} (a key must not hold dots)", where=name, cure=CURE)
    image, meta = fields[images[0]], fields["json"]
    return Sample((image.offset_data, image.size), (meta.offset_data, meta.size))
