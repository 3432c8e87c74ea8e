"""The shards that coming batches need: fetched ahead of need, held open while needed, let go soon after."""

from __future__ import annotations

import resource
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from pipeline.errors import ConfigError
from pipeline.quarantine import Opened, Shelf

DOWNLOADS = 4
"""Shards fetched at a time."""


@dataclass(kw_only=True)
class _Held:
    """A shard that is open, or on its way, and how many coming batches need it."""

    index: Future[Opened]
    users: int = 0


class OpenShards:
    """The shards that coming batches need: fetched in the order of need, open until nobody needs them, and a few more.

    For one thread; the futures it gives may be waited for in any.
    """

    def __init__(self, shelf: Shelf, spare: int) -> None:
        self._shelf, self._spare = shelf, spare
        self._downloads = ThreadPoolExecutor(DOWNLOADS, thread_name_prefix="stream-fetch")
        self._held: dict[int, _Held] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()

    def __getitem__(self, shard: int) -> Future[Opened]:
        return self._held[shard].index

    def make_way(self, needs: Sequence[int], most: int) -> bool:
        """Let spare shards go until no more than `most` would be open with these; False where that is not enough."""
        total = len(self._held.keys() | set(needs))
        spare = [shard for shard in self._idle if shard not in needs]
        for shard in spare[: max(0, total - most)]:
            self._close(shard)
        return total - len(spare) <= most

    def take(self, needs: Sequence[int]) -> None:
        """A batch that needs these shards is coming."""
        for shard in needs:
            if shard not in self._held:
                self._held[shard] = _Held(index=self._downloads.submit(self._shelf.open, shard))
            self._held[shard].users += 1
            self._idle.pop(shard, None)

    def give(self, needs: Sequence[int]) -> None:
        """A batch that needed these shards is done, or will not come."""
        for held, shard in ((self._held[shard], shard) for shard in needs if shard in self._held):
            held.users -= 1
            if held.users == 0:
                self._idle[shard] = None
                if held.index.done() and (held.index.cancelled() or held.index.exception()):
                    self._close(shard)  # the next batch that needs it tries again
        while len(self._idle) > self._spare:
            self._close(next(iter(self._idle)))

    def close(self) -> None:
        """Let every shard go; what is being fetched is finished, or fails, first."""
        self._downloads.shutdown(cancel_futures=True)
        for shard in list(self._held):
            self._close(shard)

    def _close(self, shard: int) -> None:
        def closed(index: Future[Opened]) -> None:
            if not index.cancelled() and index.exception() is None:
                self._shelf.close(index.result())

        self._idle.pop(shard, None)
        index = self._held.pop(shard).index
        index.cancel()
        index.add_done_callback(closed)


def allow_open_files(count: int) -> None:
    """Raise this process's own limit where many lanes hold many shards open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = count + 512
    if soft < needed <= hard or (soft < needed and hard == resource.RLIM_INFINITY):
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
    elif soft < needed:
        raise ConfigError(f"{count} shards are read at a time, {hard} files may be open", cure="raise ulimit -n")
