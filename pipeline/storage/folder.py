"""Storage in a folder: a file under a temporary name, made durable, then renamed."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from pipeline.errors import ConfigError, ConflictError
from pipeline.storage.base import Keys, MissingError, Storage, checked_key, room_for


class Folder(Storage):
    """Storage in a folder of this machine or of a shared file system."""

    @property
    def local(self) -> Path:
        return Path(self.url)

    def read(self, key: str) -> bytes:
        with self._translated(key):
            return self._path(key).read_bytes()

    def size(self, key: str) -> int:
        path = self._path(key)
        with self._translated(key):
            if path.is_dir():
                raise IsADirectoryError
            return path.stat().st_size

    def list(self, prefix: str = "") -> Keys:
        top = self._path(prefix) if prefix else self.local
        keys = []
        for folder, names, files in os.walk(top):
            names[:] = [name for name in names if not name.startswith(".")]
            keys += [Path(folder, file).relative_to(self.local) for file in files if not file.startswith(".")]
        return sorted(key.as_posix() for key in keys)

    def write(self, key: str, data: bytes) -> None:
        with self._translated(key), self._temporary(key) as temporary:
            _write_durably(temporary, data)
            self._publish(temporary, key)

    def create(self, key: str, data: bytes) -> None:
        with self._translated(key), self._temporary(key) as temporary:
            _write_durably(temporary, data)
            os.link(temporary, self._path(key))
            _sync_folder(temporary.parent)

    def download(self, key: str, path: Path) -> None:
        with self._translated(key), room_for(path):
            shutil.copyfile(self._path(key), path)

    def upload(self, path: Path, key: str) -> None:
        with self._translated(key), self._temporary(key) as temporary:
            with path.open("rb") as source, temporary.open("xb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
                target.flush()
                os.fsync(target.fileno())
            self._publish(temporary, key)

    def remove(self, key: str) -> None:
        with self._translated(key):
            self._path(key).unlink(missing_ok=True)

    def remove_tree(self, prefix: str) -> None:
        with self._translated(prefix):
            shutil.rmtree(self._path(prefix), ignore_errors=not self._path(prefix).exists())

    def _path(self, key: str) -> Path:
        return self.local / checked_key(key)

    def _publish(self, temporary: Path, key: str) -> None:
        temporary.replace(self._path(key))
        _sync_folder(temporary.parent)

    @contextlib.contextmanager
    def _temporary(self, key: str) -> Iterator[Path]:
        """Name a file beside `key` that is gone afterwards, whatever happens."""
        path = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
        try:
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _translated(self, key: str) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, IsADirectoryError) as error:
            raise MissingError("no such object", where=self.where(key)) from error
        except FileExistsError as error:
            raise ConflictError("exists already", where=self.where(key)) from error
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise ConfigError(reason, where=self.where(key), cure="check the folder's rights and free space") from error


def _write_durably(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Make a rename durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
