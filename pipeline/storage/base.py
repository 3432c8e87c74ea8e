"""What every storage promises."""

from __future__ import annotations

import errno
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import ConfigError, DataError

Keys = list[str]
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


class MissingError(DataError):
    """There is no object under this key."""


class FullDiskError(ConfigError):
    """There is no room for a file on this machine."""


@dataclass(frozen=True)
class Storage(ABC):
    """A prefix under which keys live. Cheap, picklable, connects when first used."""

    url: str

    @property
    def local(self) -> Path | None:
        """The folder, where this is one."""
        return None

    @property
    def retries(self) -> int:
        """How often this process had to repeat a request to the service so far."""
        return 0

    def sub(self, path: str) -> Storage:
        """Return the storage below `path`."""
        return type(self)(f"{self.url}/{checked_key(path)}")

    def where(self, key: str) -> str:
        """Name an object in a message."""
        return f"{self.url}/{key}"

    @abstractmethod
    def read(self, key: str) -> bytes:
        """Return the whole object; `MissingError` if there is none."""

    @abstractmethod
    def size(self, key: str) -> int:
        """Return the length in bytes; `MissingError` if there is no such object."""

    @abstractmethod
    def list(self, prefix: str = "") -> Keys:
        """Return every key below the folder `prefix`, at any depth, relative to this storage, sorted."""

    @abstractmethod
    def write(self, key: str, data: bytes) -> None:
        """Put `data` under `key`, replacing what is there; readers see the old or the new object, whole."""

    @abstractmethod
    def create(self, key: str, data: bytes) -> None:
        """Put `data` under `key` if nothing is there, else `ConflictError`; of many callers one wins.

        On S3 an answer lost on the way back makes the retry find the caller's own object: after a conflict compare
        contents where that matters.
        """

    @abstractmethod
    def download(self, key: str, path: Path) -> None:
        """Copy an object to a local file without holding it in memory."""

    @abstractmethod
    def upload(self, path: Path, key: str) -> None:
        """Copy a local file to `key` without holding it in memory, atomically like `write`."""

    @abstractmethod
    def remove(self, key: str) -> None:
        """Remove one object; one that is not there is fine."""

    def exists(self, key: str) -> bool:
        """Say whether there is an object under `key`."""
        try:
            self.size(key)
        except MissingError:
            return False
        return True

    def remove_tree(self, prefix: str) -> None:
        """Remove every object below the folder `prefix`."""
        for key in self.list(prefix):
            self.remove(key)


@contextmanager
def room_for(path: Path) -> Iterator[None]:
    """Inside, a disk without room for `path` is a `FullDiskError` that names it, and nobody else's fault."""
    try:
        yield
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        raise FullDiskError("no space left", where=str(path.parent), cure="make room there") from error


def checked_key(key: str) -> str:
    """Return `key`, or refuse one that could leave its prefix or name a temporary file."""
    parts = key.split("/")
    if any(part == "" or part.startswith(".") for part in parts) or "\\" in key or not key.isprintable():
        raise DataError("not a storage key", where=repr(key), cure="keys are relative, without '..' and dot names")
    return key
