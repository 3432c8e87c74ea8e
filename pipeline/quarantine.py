"""What happens to a shard that is not what the manifest says: the stream fails, or a neighbour stands in for it.

A stand-in is the next intact shard of the split, its rows repeated as needed: the position of every sample, and so
the order, stays as it is on every rank. Samples of damaged shards are counted, rows that stand in are tagged, and more
than one sample in a thousand, of all that any rank has found, is refused.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.cache import ShardCache
from pipeline.errors import DataError
from pipeline.shard_lines import Shard, Shards
from pipeline.shards import CURE, ShardIndex

Policy = Literal["fail", "quarantine"]
SHARE = 0.001
"""Of the samples of a split that may be missing."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Opened:
    """A shard that is open, or what stands in for it."""

    index: ShardIndex
    shard: Shard
    damaged: bool = False

    def read(self, row: int) -> tuple[bytes, dict[str, Any]]:
        """Image and metadata of a row."""
        return self.index.read(row % len(self.index) if self.damaged else row)


class Shelf:
    """The shards of a split by number, opened through the cache under a policy. May be used from many threads."""

    def __init__(self, cache: ShardCache, shards: Shards, policy: Policy) -> None:
        self._cache, self._shards, self._policy = cache, shards, policy
        self._lock = threading.Lock()
        self._damaged: dict[int, None] = {}

    @property
    def damaged(self) -> list[int]:
        """Numbers of the shards found damaged, here or elsewhere."""
        with self._lock:
            return list(self._damaged)

    @property
    def quarantined(self) -> int:
        """Samples in those."""
        return sum(self._shards[number].samples for number in self.damaged)

    def told(self, numbers: Iterable[int]) -> None:
        """Count what others found damaged, too; `DataError` where all of it is too much."""
        with self._lock:
            self._damaged |= dict.fromkeys(numbers)
        self._refuse_too_many("other workers found damaged shards, too")

    def open(self, number: int) -> Opened:
        """Open a shard, or its stand-in; `DataError` where the policy allows none. Give it back with `close`."""
        for place in range(number, number + len(self._shards)):
            other = place % len(self._shards)
            if other in self._damaged:
                continue
            try:
                return Opened(self._cache.open(self._shards[other]), self._shards[other], damaged=other != number)
            except DataError as error:
                if self._policy == "fail":
                    raise
                self._note(other, error)
        raise DataError("every shard is damaged", where=self._shards[number].file, cure="prepare the dataset again")

    def close(self, opened: Opened) -> None:
        """Let a shard go."""
        opened.index.close()
        self._cache.release(opened.shard)

    def _note(self, number: int, error: DataError) -> None:
        """Count a damaged shard; refuse it where it is one too many."""
        with self._lock:
            self._damaged[number] = None
        self._refuse_too_many(error.what, error.where)
        log.warning("quarantined %s samples: %s", self._shards[number].samples, error)

    def _refuse_too_many(self, what: str, where: str = "") -> None:
        found, total = self.quarantined, int(self._shards.samples.sum())
        if found > SHARE * total:
            where = where or self._shards[min(self.damaged)].file
            raise DataError(f"{what} ({found} of {total} samples damaged, {SHARE:.1%} may be)", where=where, cure=CURE)
