"""A real PostgreSQL on loopback: where its programs are, whom it runs as, its folder, its databases."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from jobs.stack.processes import as_user, inherited
from jobs.stack.state import write_private
from pipeline.errors import ConfigError, PipelineError

INSTALL = "apt-get install -y --no-install-recommends postgresql"
USER = "glow"
"""The one user of the database, not of the machine."""

SETTINGS = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
    "dynamic_shared_memory_type": "mmap",  # files of its folder, gone with it
    "shared_buffers": "32MB",
    "max_connections": "100",  # MLflow's pools (runs, models, users, ...) may take 15 each
    "fsync": "off",  # what is lost with the machine is a stack for trying things
}


def program(name: str) -> Path:
    """One of PostgreSQL's programs, of the newest version installed; Debian keeps them out of the PATH."""
    versions = [path for path in Path("/usr/lib/postgresql").glob("*/bin") if path.parent.name.isdigit()]
    folders = sorted(versions, key=lambda path: -int(path.parent.name))
    for folder in folders:
        if (folder / name).exists():
            return folder / name
    found = shutil.which(name)
    if found is None:
        raise ConfigError("no PostgreSQL server on this machine", cure=INSTALL)
    return Path(found)


def owner() -> str:
    """Which of the machine's users it runs as, this one where it is empty: it refuses root."""
    if os.geteuid() != 0:
        return ""
    names = {entry.pw_name for entry in pwd.getpwall()}
    return "postgres" if "postgres" in names else "nobody"


def initialise(data: Path, password: str) -> None:
    """Make its folder, unless it is there."""
    if (data / "PG_VERSION").exists():
        return
    user, file = owner(), data.with_name("password")
    write_private(file, password)
    data.mkdir(mode=0o700, exist_ok=True)
    if user:
        known = pwd.getpwnam(user)
        for path in (file, data):
            os.chown(path, known.pw_uid, known.pw_gid)
    command = [
        program("initdb"), "-D", data, "-U", USER, "--auth=scram-sha-256", f"--pwfile={file}",
        "--encoding=UTF8", "--locale=C", "--no-sync",
    ]  # fmt: skip
    try:
        done = subprocess.run(command, capture_output=True, env=inherited(), cwd="/", **as_user(user))
    finally:
        file.unlink()
    if done.returncode:
        raise PipelineError(f"initdb: {done.stderr.decode(errors='replace')[-300:]}", where=str(data))


def server(data: Path, port: int) -> Sequence[str | Path]:
    """The command that serves a folder."""
    settings = {**SETTINGS, "port": str(port)}
    return [program("postgres"), "-D", data, *(word for pair in settings.items() for word in ("-c", "=".join(pair)))]


def answers(port: int) -> bool:
    """Whether it takes work; after a crash it listens long before that."""
    ask = [program("pg_isready"), "--quiet", "--host=127.0.0.1", f"--port={port}"]
    return subprocess.run(ask, env=inherited()).returncode == 0


def create(database: str, port: int, password: str) -> None:
    """Make a database, unless it is there."""
    command = [program("createdb"), "-h", "127.0.0.1", "-p", str(port), "-U", USER, database]
    done = subprocess.run(command, capture_output=True, env={**inherited(), "PGPASSWORD": password})
    if done.returncode and b"already exists" not in done.stderr:
        raise PipelineError(f"createdb: {done.stderr.decode(errors='replace')}", where=f"127.0.0.1:{port}")
