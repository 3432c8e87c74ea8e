"""What a process learns or exports by: the code, its commit, what is installed beside it, and the job it belongs to."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import subprocess
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from pipeline.storage import sha256_file, sha256_hex

ROOT = Path(__file__).parents[1]
JOB, REVISION = "GLOW_JOB", "GLOW_REVISION"
"""Environment of a submitted job: its id, and the commit it was packed from."""


def origin() -> dict[str, Any]:
    """What is known of this process without torch; all of it for people but `code`, which decides what is learned."""
    commit, changed = revision()
    return {
        "code": code_digest(),
        "commit": commit,
        "dirty": changed,
        "job": os.environ.get(JOB, ""),
        "packages": packages_digest(),
        "python": platform.python_version(),
    }


@functools.cache
def code_digest() -> str:
    """sha256 over the names and contents of all that learns and exports: glow/ and pipeline/."""
    listing = hashlib.sha256()
    for path in sorted([*ROOT.glob("glow/**/*.py"), *ROOT.glob("pipeline/**/*.py")]):
        listing.update(f"{path.relative_to(ROOT).as_posix()} {sha256_file(path)}\n".encode())
    return listing.hexdigest()


@functools.cache
def packages_digest() -> str:
    """sha256 over name==version of every installed distribution, a sorted line each."""
    return sha256_hex("".join(sorted({f"{one.name}=={one.version}\n" for one in distributions()})).encode())


def revision() -> tuple[str, bool]:
    """(commit of the program's source, whether it was changed since): as git says, else as GLOW_REVISION does.

    An image and a cluster's nodes have no git; there it is COMMIT or COMMIT-dirty.
    """
    if commit := _git("rev-parse", "HEAD"):
        return commit, bool(_git("status", "--porcelain"))
    told = os.environ.get(REVISION, "")
    return told.removesuffix("-dirty"), told.endswith("-dirty")


def _git(*arguments: str) -> str:
    """What git says about the program's source; empty where it is not in a repository."""
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
