"""The shards of a split as the manifest's lines name them, and whether a copy is what its line says."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import overload

import numpy as np

from pipeline.errors import DataError
from pipeline.storage import canonical_json, checked_key, sha256_file

CURE = "prepare the dataset again, or copy the prefix whole"
RESTORE = "restore the shard, or prepare the dataset again: a changed shard needs a new manifest"


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """One tar: its key, length, digest and how many samples it holds."""

    file: str
    bytes: int
    sha256: str
    samples: int


LINE = re.compile(rb'\{"bytes":(\d+),"file":"([^"\\]+)","samples":([1-9]\d*),"sha256":"([0-9a-f]{64})"\}\n')
"""A line of a part: a shard in canonical JSON."""


def line_of(shard: Shard) -> bytes:
    """A shard's line; `DataError` where no line could hold it: a name with quotes, or nothing in it."""
    line = canonical_json(asdict(shard))
    if not LINE.fullmatch(line):
        cure = "rename the file without quotes and backslashes"
        raise DataError("no manifest can name this shard", where=shard.file, cure=cure)
    return line


class Shards(Sequence[Shard]):
    """The shards of a split, in order, made of their lines when asked for: the lines and 32 bytes a shard are held."""

    def __init__(self, lines: bytes, where: str = "") -> None:
        found = ((m.start(), m.end(), int(m[1]), int(m[3])) for m in LINE.finditer(lines))
        table = np.fromiter(itertools.chain.from_iterable(found), dtype=np.int64).reshape(-1, 4)
        self._lines, self.bytes, self.samples = lines, table[:, 2], table[:, 3]
        self._starts, self._stops = table[:, 0], table[:, 1]
        if not np.array_equal(np.append(0, self._stops), np.append(self._starts, len(lines))):
            raise DataError("malformed shard line", where=where, cure=CURE)

    def __len__(self) -> int:
        return len(self.samples)

    @overload
    def __getitem__(self, index: int) -> Shard: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Shard, ...]: ...
    def __getitem__(self, index: int | slice) -> Shard | tuple[Shard, ...]:
        if isinstance(index, slice):
            return tuple(self[place] for place in range(*index.indices(len(self))))
        place = range(len(self))[index]
        shard = Shard(**json.loads(self._lines[self._starts[place] : self._stops[place]]))
        checked_key(shard.file)
        return shard

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Shards) and self._lines == other._lines

    def __hash__(self) -> int:
        return hash(self._lines)


def refuse_changed(path: Path, shard: Shard, where: str) -> None:
    """DataError where a local copy of a shard does not have the manifest's length and digest."""
    found = path.stat().st_size
    if found != shard.bytes:
        raise DataError(f"{found} bytes, expected {shard.bytes}", where=where, cure=RESTORE)
    digest = sha256_file(path)
    if digest != shard.sha256:
        raise DataError(f"sha256 {digest[:12]}, expected {shard.sha256[:12]}", where=where, cure=RESTORE)
