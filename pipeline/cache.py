"""Whole shards on a local disk, proven before use and bounded in bytes; processes share a folder without waiting.

A file's name is its sha256. It is written under a temporary name and renamed, so a name means whole content; it is
evicted by unlinking, which never hurts who has it open. Every process proves length and sha256 once before opening it.
"""

from __future__ import annotations

import fcntl
import logging
import os
import secrets
import shutil
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipeline.errors import ConfigError, DataError
from pipeline.shard_lines import Shard, refuse_changed
from pipeline.shards import Foreign, ShardIndex, open_shard
from pipeline.storage import FullDiskError, Storage, room_for

OPENINGS = 3
"""Tries to open a shard that another process may evict between its check and its opening."""

ROOMIER = "make room there, or set data.cache to a folder on a larger disk"

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
        self.fetches = 0
        """Shards fetched so far."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _sweep(folder)
        except OSError as error:
            raise ConfigError(
                f"no cache folder ({error.strerror})", where=str(folder), cure="set data.cache"
            ) from error

    def refuse_small_disk(self, needed: int) -> None:
        """ConfigError where the disk could not hold so many bytes of shards, those that are here among them."""
        free = shutil.disk_usage(self._folder).free + sum(_listed(self._folder).values())
        if free < needed:
            found = f"{free / 1e9:.3g} GB of disk for shards of {needed / 1e9:.3g} GB that are read at a time"
            raise FullDiskError(found, where=str(self._folder), cure=ROOMIER)

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
        while not self._fetched(shard, path):
            log.warning("%s is full: shards in use by nobody here made way for %s", self._folder, shard.file)
        self._verified.add(shard.sha256)
        return path

    def _fetched(self, shard: Shard, path: Path) -> bool:
        """Fetch a shard and prove it; False where a full disk made room first; `FullDiskError` where it cannot."""
        try:
            with self._room(shard), _temporary(self._folder) as temporary:
                self._storage.download(shard.file, temporary)
                self.fetches += 1
                refuse_changed(temporary, shard, self._storage.where(shard.file))
                temporary.replace(path)
        except FullDiskError as error:
            if not self._gave_way(shard.bytes):
                found = f"no space left for {shard.file} of {shard.bytes / 1e6:.3g} MB"
                raise FullDiskError(found, where=str(self._folder), cure=ROOMIER) from error
            return False
        return True

    @contextmanager
    def _room(self, shard: Shard) -> Iterator[None]:
        """Evict until a shard fits, and count its bytes as taken inside the block."""
        with self._lock:
            present = _listed(self._folder)
            coming = sum(size for name, size in self._incoming.items() if name not in present)
            excess = sum(present.values()) + coming + shard.bytes - self._limit
            excess -= self._evicted(present, excess)
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

    def _gave_way(self, wanted: int) -> bool:
        """Evict as much as is wanted, or all that may be; whether that was anything."""
        with self._lock:
            return self._evicted(_listed(self._folder), wanted) > 0

    def _evicted(self, present: dict[str, int], wanted: int) -> int:
        """Evict what was used longest ago until so many bytes are gone; how many are."""
        gone = 0
        for name in self._evictable(present):
            if gone >= wanted:
                break
            (self._folder / name).unlink(missing_ok=True)
            self._used.pop(name, None)
            gone += present[name]
        return gone

    def _evictable(self, present: dict[str, int]) -> list[str]:
        unknown = sorted(name for name in present if name not in self._used)
        return [name for name in [*self._used, *unknown] if name in present and self._held[name] <= 0]


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
        with room_for(path), path.open("xb") as file:
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
