"""A real S3 server for tests: the stack's own, ending with this process, gone with its context."""

from __future__ import annotations

import secrets
import shutil
import signal
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from jobs.stack import ceph
from jobs.stack.processes import Process, end, free_ports, inherited, spawn
from jobs.stack.state import aws_environment


@dataclass(frozen=True, kw_only=True)
class Server:
    """A running server, and the variables by which AWS clients find it and the account on it."""

    endpoint: str
    environment: dict[str, str]


@contextmanager
def s3_server() -> Iterator[Server]:
    """Run a server; `ConfigError` where its programs are not installed."""
    ceph.refuse_missing()
    folder = Path(tempfile.mkdtemp(prefix="s3-", dir="/tmp"))
    daemons: list[Process] = []

    def start(name: str, command: Sequence[str | Path]) -> Process:
        daemons.append(spawn(command, folder / f"{name}.out", inherited(), end_with_parent=True))
        return daemons[-1]

    port, access_key, secret_key = free_ports(1)[0], secrets.token_hex(10).upper(), secrets.token_hex(20)
    endpoint = f"http://127.0.0.1:{port}"
    try:
        ceph.start(folder, port, access_key, secret_key, start)
        yield Server(endpoint=endpoint, environment=aws_environment(endpoint, access_key, secret_key))
    finally:
        # Its data is in memory and ends with it, so nothing is lost by haste.
        end(daemons, signal.SIGKILL, 10)
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    with s3_server() as running:
        for name, value in running.environment.items():
            print(f"export {name}={value}", flush=True)
        signal.pause()
