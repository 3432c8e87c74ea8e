"""Whole shards on a local disk, proven before use and bounded in bytes; processes share a folder without waiting.

A file's name is its sha256. It is written under a temporary name and renamed, so a name means whole content; it is
evicted by unlinking, which never hurts who has it open. Every process proves length and sha256 once before opening it.
"""

from __future__ import annotations

import fcntl
import logging
import os
import resource
import secrets
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import ConfigError, DataError
from pipeline.manifest import Shard, refuse_changed
from pipeline.shards import Foreign, ShardIndex, open_shard
from pipeline.storage import Storage

OPENINGS = 3
"""Tries to open a shard that another process may evict between its check and its opening."""

DOWNLOADS = 4
"""Shards fetched at a time."""

log = logging.getLogger(__name__)


class ShardCache:
    """The shards of one dataset prefix in a folder of at most `limit` bytes.

    The bound counts all files of the folder and this process's downloads under way. What this process holds open is
    never evicted by it; then goes what it used longest ago, last the files it does not know.
    """

    def __init__(self, storage: Storage, folder: Path, limit: int, foreign: Foreign | None = None) -> None:
        self._storage, self._folder, self._limit, self._foreign = storage, folder, limit, foreign
        self._lock = threading.Lock()
        self._held: Counter[str] = Counter()
        self._used: OrderedDict[str, None] = OrderedDict()
        self._verified: set[str] = set()
        self._incoming: dict[str, int] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _sweep(folder)
        except OSError as error:
            raise ConfigError(
                f"no cache folder ({error.strerror})", where=str(folder), cure="set data.cache"
            ) from error

    def open(self, shard: Shard) -> ShardIndex:
        """Fetch a shard if need be, prove it, open it and keep it until `release`. May be called from many threads.

        `DataError` where it is not what the manifest says, `RemoteError` where it cannot be fetched.
        """
        with self._lock:
            self._held[shard.sha256] += 1
        try:
            for _ in range(OPENINGS):
                with suppress(FileNotFoundError):
                    where = self._storage.where(shard.file)
                    return open_shard(self._ensured(shard), shard.samples, where, self._foreign)
            cure = "raise data.cache_gb, or give every process a folder of its own"
            raise ConfigError("other processes evict shards as fast as they come", where=str(self._folder), cure=cure)
        except BaseException:
            self.release(shard)
            raise

    def release(self, shard: Shard) -> None:
        """Let a shard be evicted when its turn comes."""
        with self._lock:
            self._held[shard.sha256] -= 1
            self._used[shard.sha256] = None
            self._used.move_to_end(shard.sha256)

    def _ensured(self, shard: Shard) -> Path:
        path = self._folder / shard.sha256
        if path.exists():
            try:
                if shard.sha256 not in self._verified:
                    refuse_changed(path, shard, str(path))
                self._verified.add(shard.sha256)
                return path
            except DataError as error:
                log.warning("%s: cached copy of %s is damaged (%s), fetching it again", path, shard.file, error.what)
                path.unlink(missing_ok=True)
        with self._room(shard), _temporary(self._folder) as temporary:
            self._storage.download(shard.file, temporary)
            refuse_changed(temporary, shard, self._storage.where(shard.file))
            temporary.replace(path)
        self._verified.add(shard.sha256)
        return path

    @contextmanager
    def _room(self, shard: Shard) -> Iterator[None]:
        """Evict until a shard fits, and count its bytes as taken inside the block."""
        with self._lock:
            present = _listed(self._folder)
            coming = sum(size for name, size in self._incoming.items() if name not in present)
            excess = sum(present.values()) + coming + shard.bytes - self._limit
            for name in self._evictable(present):
                if excess <= 0:
                    break
                (self._folder / name).unlink(missing_ok=True)
                self._used.pop(name, None)
                excess -= present[name]
            if excess > 0:
                found = f"{self._limit / 1e9:.3g} GB are full of shards in use"
                cure = f"set data.cache_gb to {(self._limit + excess) / 1e9:.3g} or more"
                raise ConfigError(found, where=str(self._folder), cure=cure)
            self._incoming[shard.sha256] = shard.bytes
        try:
            yield
        finally:
            with self._lock:
                self._incoming.pop(shard.sha256, None)

    def _evictable(self, present: dict[str, int]) -> list[str]:
        unknown = sorted(name for name in present if name not in self._used)
        return [name for name in [*self._used, *unknown] if name in present and self._held[name] <= 0]


@dataclass(kw_only=True)
class _Held:
    """A shard that is open, or on its way, and how many coming batches need it."""

    index: Future[ShardIndex]
    users: int = 0


class OpenShards:
    """The shards that coming batches need: fetched in the order of need, open until nobody needs them, and a few more.

    For one thread; the futures it gives may be waited for in any.
    """

    def __init__(self, cache: ShardCache, shards: Sequence[Shard], spare: int) -> None:
        self._cache, self._shards, self._spare = cache, shards, spare
        self._downloads = ThreadPoolExecutor(DOWNLOADS, thread_name_prefix="stream-fetch")
        self._held: dict[int, _Held] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()

    def __getitem__(self, shard: int) -> Future[ShardIndex]:
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
                self._held[shard] = _Held(index=self._downloads.submit(self._cache.open, self._shards[shard]))
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
        def closed(index: Future[ShardIndex]) -> None:
            if not index.cancelled() and index.exception() is None:
                index.result().close()
                self._cache.release(self._shards[shard])

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


def _listed(folder: Path) -> dict[str, int]:
    sizes = {}
    for entry in os.scandir(folder):
        with suppress(FileNotFoundError):
            if not entry.name.startswith("."):
                sizes[entry.name] = entry.stat().st_size
    return sizes


@contextmanager
def _temporary(folder: Path) -> Iterator[Path]:
    """A new file that is gone afterwards unless renamed; locked meanwhile, so that others know it is not left over."""
    while True:
        path = folder / f".{secrets.token_hex(8)}.tmp"
        with path.open("xb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not path.exists():
                continue  # a sweep came between opening and locking
            try:
                yield path
            finally:
                path.unlink(missing_ok=True)
            return


def _sweep(folder: Path) -> None:
    """Remove temporary files whose process is dead."""
    for path in folder.glob(".*.tmp"):
        with suppress(FileNotFoundError, BlockingIOError), path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
