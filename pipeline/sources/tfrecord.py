"""The released `celeba-tfr` TFRecords, without TensorFlow: the only source of Glow's 27 000 / 3 000 split.

A record is its length (u64), a masked crc32c of that, an Example (protobuf), a masked crc32c of it. An Example holds
features `data` (raw uint8 [h, w, c]), `shape`, and where there are any `label` and `attr`. Both checksums are checked.
"""

from __future__ import annotations

import math
import mmap
import re
import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.errors import DataError
from pipeline.sources.celeba import HQ_LICENSE
from pipeline.sources.crc import crc32c, masked
from pipeline.sources.item import Item, Source
from pipeline.sources.tables import attribute_columns, split_name
from pipeline.toy import CELEBA_ATTRIBUTES

NAME = re.compile(r"(\w+)-r(\d\d)-s-\d+-of-(\d+)\.tfrecords?")
CURE = "fetch the file again"


def looks(root: Path) -> bool:
    """Whether there are files named like the released ones."""
    return bool(_files(root))


def read(root: Path, scratch: Path) -> Source:
    """List the pictures of the largest resolution that is there; every checksum is checked."""
    files = _files(root)
    finest = max(level for level, _ in files.values())
    chosen = {path: count for path, (level, count) in files.items() if level == finest}
    there = Counter((split_name(path.name), count) for path, count in chosen.items())
    for (split, count), found in there.items():
        if found != count:
            raise DataError(f"{found} of {count} files of {split}", where=str(root), cure="fetch the others")
    items = [item for path in sorted(chosen) for item in _items(root, path)]
    return _source(items)


def _files(root: Path) -> dict[Path, tuple[int, int]]:
    """Files by path: (resolution as a power of two, how many of its split there should be)."""
    matched = ((path, NAME.fullmatch(path.name)) for path in root.rglob("*.tfrecord*"))
    return {path: (int(match[2]), int(match[3])) for path, match in matched if match}


def _items(root: Path, path: Path) -> Iterator[Item]:
    source, split = path.relative_to(root).as_posix(), split_name(path.name)
    if not path.stat().st_size:
        raise DataError("an empty file", where=str(path), cure=CURE)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for number, (start, stop) in enumerate(_records(data, str(path))):
            try:
                fields = dict(_features(data, start, stop))
                (first, last), shape = fields["data"][0], tuple(fields["shape"])
                if math.prod(shape) != last - first or len(shape) != 3 or shape[2] not in (1, 3) or min(shape) < 1:
                    raise ValueError
            except (KeyError, IndexError, TypeError, ValueError) as error:
                raise DataError(f"record {number} holds no raw picture", where=str(path), cure=CURE) from error
            yield Item(
                file=path,
                source=f"{source}/{number:06d}",
                attributes=tuple(fields.get("attr", ())),
                label=str(*fields.get("label", ())[:1]) or None,
                split=split,
                offset=first,
                length=last - first,
                shape=shape,
            )


def _source(items: list[Item]) -> Source:
    """Give the attributes CelebA's names and signs; a class that never varies is none."""
    names = CELEBA_ATTRIBUTES if items and items[0].attributes else ()
    if any(len(item.attributes) != len(names) for item in items):
        raise DataError(f"a record has other than {len(names)} attributes", where=items[0].where, cure=CURE)
    columns = attribute_columns({name: [item.attributes[i] for item in items] for i, name in enumerate(names)})
    if len(columns) != len(names):
        raise DataError("attributes other than 1, 0 and -1", where=items[0].where, cure=CURE)
    values = zip(*columns.values(), strict=True) if names else ((),) * len(items)
    varied = len({item.label for item in items}) > 1
    described = tuple(
        replace(item, attributes=tuple(signed), label=item.label if varied else None)
        for item, signed in zip(items, values, strict=True)
    )
    return Source(kind="celeba-tfr", items=described, attributes=names, license=HQ_LICENSE)


def _records(data: mmap.mmap, where: str) -> Iterator[tuple[int, int]]:
    """(start, stop) of the Example in every record."""
    position = 0
    while position < len(data):
        head = data[position : position + 12]
        length, check = struct.unpack("<QI", head) if len(head) == 12 else (0, -1)
        start, stop = position + 12, position + 12 + length
        if check != masked(crc32c(head[:8])) or stop + 4 > len(data):
            raise DataError(f"cut or damaged record at byte {position}", where=where, cure=CURE)
        found, expected = masked(crc32c(data[start:stop])), struct.unpack("<I", data[stop : stop + 4])[0]
        if found != expected:
            what = f"record at byte {position}: crc32c {found:08x}, expected {expected:08x}"
            raise DataError(what, where=where, cure=CURE)
        yield start, stop
        position = stop + 4


def _features(data: mmap.mmap, start: int, stop: int) -> Iterator[tuple[str, list]]:
    """Features of an Example by name: numbers, or (start, stop) of byte strings."""
    for _, features in _fields(data, start, stop):
        for _, entry in _fields(data, *features):
            pair = dict(_fields(data, *entry))
            for kind, holder in _fields(data, *pair[2]):
                values = list(_fields(data, *holder))
                found = [value for _, value in values] if kind == 1 else _numbers(data, values)
                yield data[slice(*pair[1])].decode(), found


def _numbers(data: mmap.mmap, values: list[tuple[int, Any]]) -> list[int]:
    """int64 values, packed in one string or each on its own."""
    numbers = []
    for _, value in values:
        position, stop = value if isinstance(value, tuple) else (0, 0)
        numbers += [] if isinstance(value, tuple) else [value]
        while position < stop:
            number, position = _varint(data, position)
            numbers.append(number)
    return [number - (number >> 63 << 64) for number in numbers]


def _fields(data: mmap.mmap, position: int, stop: int) -> Iterator[tuple[int, Any]]:
    """(field number, value) of a protobuf message; the value of a string is its (start, stop)."""
    while position < stop:
        key, position = _varint(data, position)
        if key & 7 == 0:
            value, position = _varint(data, position)
            yield key >> 3, value
        elif key & 7 == 2:
            length, position = _varint(data, position)
            if position + length > stop:
                raise ValueError("a string beyond its message")
            yield key >> 3, (position, position + length)
            position += length
        else:
            position += {1: 8, 5: 4}[key & 7]


def _varint(data: mmap.mmap, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        value, shift, position = value | (byte & 127) << shift, shift + 7, position + 1
        if byte < 128:
            return value, position
        if shift > 63:
            raise ValueError("a number of more than 64 bits")
