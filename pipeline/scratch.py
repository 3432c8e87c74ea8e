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

PREFIX = "glow-tmp-"


@contextmanager
def scratch(place: str = "") -> Iterator[Path]:
    """A new folder, gone afterwards; until then a lock says that it has an owner, and ends with that in any case.

    It is in the folder for temporary files, or at `place`; its own name takes 20 characters.
    """
    there = Path(place or tempfile.gettempdir())
    _sweep(there)
    folder, lock = _owned(there)
    with lock:
        try:
            (folder / "f").mkdir()
            yield folder / "f"
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _owned(place: Path) -> tuple[Path, BinaryIO]:
    while True:
        folder = place / f"{PREFIX}{secrets.token_hex(4)}"
        with suppress(FileExistsError, FileNotFoundError, BlockingIOError):  # or a sweep came before the lock
            folder.mkdir(mode=0o700)
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
