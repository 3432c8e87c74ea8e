"""Tar archives read with suspicion: plain files under plain names, whole to the last zero block, or a refusal.

Tar readers take a cut or damaged archive for a shorter one, follow links, and believe sizes and paths that extension
headers give. Nothing here allocates by what an archive claims.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from pipeline.errors import DataError

BLOCK, RECORD = 512, 10240
PAX_BYTES = 1 << 16
PAX_KEYS = {"mtime", "atime", "ctime", "uid", "gid", "uname", "gname", "path", "comment"}
"""What a pax header may say; `path` replaces the name."""
MAGICS = (b"ustar\x0000", b"ustar  \x00")
CURE = "fetch the shard again, or prepare the dataset again; `data verify` names every damaged shard"


@dataclass(frozen=True, slots=True)
class Member:
    """A plain file in an archive."""

    name: str
    offset: int
    size: int


def members(file: BinaryIO, where: str, *, foreign: bool = False) -> Iterator[Member]:
    """Yield every member, in order, and prove that the archive ends as it should.

    Ours hold plain files alone; those of others (`foreign`) also folders and small pax headers. `DataError` naming
    `where` for anything else.
    """
    length, position, count, name = os.fstat(file.fileno()).st_size, 0, 0, ""
    while True:
        file.seek(position)
        header = file.read(BLOCK)
        if header.count(0) == BLOCK:
            break
        kind, given, size = _parsed(header, f"{where}: header {count} at byte {position}")
        data, position = position + BLOCK, position + BLOCK + -(-size // BLOCK) * BLOCK
        if position > length:
            what = f"cut or damaged: member {given!r} ends at byte {position}, the archive at {length}"
            raise DataError(what, where=where, cure=CURE)
        if kind == b"x" and foreign and size <= PAX_BYTES:
            name = _pax_path(os.pread(file.fileno(), size, data), where)
            continue
        if kind not in (b"0", b"\x00") and not (kind == b"5" and foreign):
            what = f"odd member {given!r} of type {kind!r}, expected plain files"
            raise DataError(what, where=where, cure="a shard holds no links, devices or extension headers")
        if kind != b"5":
            yield Member(_plain(name or given, where), data, size)
            count += 1
        name = ""
    _refuse_rest(file, position, length, count, where)


def _parsed(header: bytes, where: str) -> tuple[bytes, str, int]:
    """(type, name, size) of a header block."""
    try:
        found, expected = sum(header) - sum(header[148:156]) + 8 * 32, _octal(header[148:156])
        if len(header) < BLOCK or found != expected or header[257:265] not in MAGICS:
            raise ValueError(f"checksum {found}, expected {expected}")
        prefix = header[345:500].rstrip(b"\0").decode() if header[257:265] == MAGICS[0] else ""
        name = header[:100].rstrip(b"\0").decode()
        return header[156:157], f"{prefix}/{name}" if prefix else name, _octal(header[124:136])
    except ValueError as error:
        raise DataError(f"cut or damaged, no tar header ({error})", where=where, cure=CURE) from error


def _octal(field: bytes) -> int:
    """A number of a header: octal digits, blanks, NUL. Binary ones (negative, or over 8 GB) are refused."""
    digits = field.strip(b" \0")
    if not digits.isdigit():
        raise ValueError(f"number {field!r}")
    return int(digits, 8)


def _pax_path(data: bytes, where: str) -> str:
    """The path of a pax header's `LENGTH KEY=VALUE` records; others than of names and times are refused."""
    path, position = "", 0
    while position < len(data):
        digits, _, _ = data[position : position + 8].partition(b" ")
        size = int(digits) if digits.isdigit() else 0
        key, equals, value = data[position + len(digits) + 1 : position + size].decode(errors="replace").partition("=")
        if size <= len(digits) or position + size > len(data) or not equals or key not in PAX_KEYS:
            raise DataError(f"odd pax header {key[:40]!r}", where=where, cure="write the archive as plain ustar")
        path = value.rstrip("\n") if key == "path" else path
        position += size
    return path


def _plain(name: str, where: str) -> str:
    """Refuse names that point out of a folder, or hide something."""
    bare = name.removeprefix("./")
    if not bare or not bare.isprintable() or "\\" in bare or any(p in ("", ".", "..") for p in bare.split("/")):
        raise DataError(f"odd member {name!r}", where=where, cure="names are relative, printable and without '..'")
    return bare


def _refuse_rest(file: BinaryIO, end: int, length: int, count: int, where: str) -> None:
    """Two zero blocks at least, zeros to the end, and whole records: else something was cut off or zeroed."""
    zero, position = length - end >= 2 * BLOCK and length % RECORD == 0, end
    while zero and position < length:
        piece = os.pread(file.fileno(), 1 << 20, position)
        zero = bool(piece) and piece.count(0) == len(piece)
        position += len(piece)
    if not zero:
        what = f"cut or damaged after {count} members: byte {end} of {length} should begin the zero blocks of its end"
        raise DataError(what, where=where, cure=CURE)
