"""The spool: JSON lines beside a run that survive a kill, and a cursor that reads behind the writer."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.storage import canonical_json

if TYPE_CHECKING:
    from torch import Tensor

Row = dict[str, Any]

SPOOL_BYTES = 1 << 26
"""Bound of one spool file: 64 MiB, a quarter of a million status lines."""

PORTION = 1 << 18
"""Bytes of a spool that are in memory at a time."""


class Spool:
    """An append-only file of JSON lines, cut back to its last whole line when it is opened.

    Rows survive a kill of the process (they are handed to the system one write a row, before `append` returns). It is
    bounded: a row that would make it longer than `limit` bytes is refused.
    """

    def __init__(self, path: Path, limit: int = SPOOL_BYTES) -> None:
        self.path, self._limit = path, limit
        self._lock = threading.Lock()
        self._file = path.open("ab", buffering=0)
        self._length = path.read_bytes().rfind(b"\n") + 1
        self._file.truncate(self._length)

    def append(self, row: Mapping[str, Any]) -> bool:
        """Add one row; False where there is no room for it, on a full disk too. Threads may call this at once."""
        data = canonical_json(dict(row))
        with self._lock:
            if self._length + len(data) > self._limit or not self._written(data):
                return False
            self._length += len(data)
            return True

    def _written(self, data: bytes) -> bool:
        """Whether all of it went out; what did not leaves no torn line."""
        try:
            whole = self._file.write(data) == len(data)
        except OSError:
            whole = False
        if not whole:
            self._file.truncate(self._length)
        return whole

    def rows(self) -> Iterator[Row]:
        """Every row so far."""
        cursor = Cursor(self)
        while rows := cursor.pending():
            yield from rows
            cursor.advance(rows)

    def close(self) -> None:
        """Append no more; reading goes on."""
        with self._lock:
            self._file.close()


class Cursor:
    """A place in a spool: what lies before it has been dealt with."""

    def __init__(self, spool: Spool) -> None:
        self._path, self._offset = spool.path, 0
        self.count = 0
        """Rows before the cursor."""

    def pending(self) -> list[Row]:
        """The next rows behind the cursor, oldest first, about `PORTION` bytes; none is one still being written."""
        with self._path.open("rb") as file:
            file.seek(self._offset)
            data = file.read(PORTION)
            return parse_rows(data if b"\n" in data else data + file.readline())

    def left(self, *kinds: str) -> int:
        """How many rows lie behind the cursor, of some kinds or of all."""
        marks = [f'"kind":"{kind}"'.encode() for kind in kinds] or [b""]
        with self._path.open("rb") as file:
            file.seek(self._offset)
            return sum(line.endswith(b"\n") and any(mark in line for mark in marks) for line in file)

    def advance(self, rows: list[Row]) -> None:
        """Move behind `rows`, the oldest of those pending."""
        self._offset += sum(len(canonical_json(row)) for row in rows)
        self.count += len(rows)


def parse_rows(data: bytes) -> list[Row]:
    """The rows of a spool file; a torn last line is not one of them."""
    return [json.loads(line) for line in data.splitlines(keepends=True) if line.endswith(b"\n")]


def last_positions(rows: Iterable[Row]) -> dict[str, int]:
    """Metric rows -> the last position (images seen) at which each key was recorded."""
    return {key: row["images"] for row in rows for key in row["metrics"]}


class Means:
    """Running means that stay on the device: `add` never waits for it, `take` transfers once."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor | float] = {}
        self._counts: dict[str, int] = {}

    def add(self, values: Mapping[str, Tensor | float]) -> None:
        """Add one observation of each key: a scalar tensor, or a number."""
        for key, value in values.items():
            self._sums[key] = self._sums.get(key, 0.0) + value
            self._counts[key] = self._counts.get(key, 0) + 1

    def take(self) -> dict[str, float]:
        """The means since the last call, as numbers; starts afresh."""
        means = {key: float(total) / self._counts[key] for key, total in self._sums.items()}
        self._sums, self._counts = {}, {}
        return means
