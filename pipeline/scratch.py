"""Temporary folders that do not outlive their owners: those of killed processes go when the next one is wanted."""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

PREFIX = "glow-scratch-"


@contextmanager
def scratch() -> Iterator[Path]:
    """A new folder, gone afterwards; until then a lock says that it has an owner, and ends with that in any case."""
    place = Path(tempfile.gettempdir())
    _sweep(place)
    folder, lock = _owned(place)
    with lock:
        try:
            (folder / "files").mkdir()
            yield folder / "files"
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _owned(place: Path) -> tuple[Path, BinaryIO]:
    while True:
        folder = place / f"{PREFIX}{secrets.token_hex(8)}"
        folder.mkdir(mode=0o700)
        with suppress(FileNotFoundError, BlockingIOError):  # a sweep came between making and locking
            return folder, _locked(folder)


def _locked(folder: Path) -> BinaryIO:
    """The lock of a folder; BlockingIOError where somebody holds it, FileNotFoundError where the folder has gone."""
    lock = (folder / "lock").open("ab")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.stat(folder / "lock")
        return lock
    except OSError:
        lock.close()
        raise


def _sweep(place: Path) -> None:
    """Remove the folders whose owners are dead."""
    for folder in place.glob(f"{PREFIX}*"):
        with suppress(FileNotFoundError, BlockingIOError, PermissionError), _locked(folder):
            shutil.rmtree(folder, ignore_errors=True)
