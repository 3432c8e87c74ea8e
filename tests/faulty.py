"""Faults on real parts, planted for the doctor to find: a full disk, other versions, a store without conditions."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from jobs.cluster import ENVIRONMENT
from jobs.stack.processes import Process, belonging, end, free_ports, spawn
from jobs.stack.services import ray_folder
from jobs.stack.state import RAY_PORTS, Stack

STARTS = 4
"""A raylet gives its agent 15 s to start and then breaks off: on a busy machine it may take another try."""

MOUNT = """
set -e
mount -t tmpfs -o size=$1k tmpfs "$0"
shift
"""
FILL = """
dd if=/dev/zero of="$0/everything" bs=4k 2>/dev/null || true
"""
"""Run a command that alone sees a file system, mounted at the first argument; with no room left."""


def with_small_disk(folder: Path, kib: int, command: list[str], filling: str = "") -> list[str]:
    """The command, in a namespace of its own in which `folder` is a small disk; the mount goes with it."""
    folder.mkdir(exist_ok=True)
    script = f'{MOUNT}{filling}exec "$@"'
    return ["unshare", "--mount", "--map-root-user", "sh", "-c", script, str(folder), str(kib), *command]


def with_full_disk(folder: Path, command: list[str]) -> list[str]:
    """The same with a disk that is full."""
    return with_small_disk(folder, 256, command, FILL)


def cannot_mount(folder: Path) -> str:
    """Why this machine lets no disk be filled; empty where it does."""
    try:
        done = subprocess.run(with_full_disk(folder, ["true"]), capture_output=True, text=True)
    except FileNotFoundError:
        return "no unshare (util-linux) on this machine"
    return done.stderr.strip() if done.returncode else ""


def claims(folder: Path, **versions: str) -> str:
    """A PYTHONPATH on which packages say they are of other versions than they are."""
    for name, version in versions.items():
        info = folder / f"{name}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    return str(folder)


@contextlib.contextmanager
def ill_node(stack: Stack, folder: Path, faults: Mapping[str, str], *, full_disk: bool) -> Iterator[None]:
    """One more Ray node that offers a GPU it has not, with these variables, its temporary folder on a full disk."""
    ports = [f"--{name}-port={port}" for name, port in zip(RAY_PORTS, free_ports(len(RAY_PORTS)), strict=True)]
    command = [
        sys.executable, "-m", "ray.scripts.scripts", "start", f"--address=127.0.0.1:{stack.state.ports['gcs']}",
        "--node-ip-address=127.0.0.1", "--num-cpus=0", "--num-gpus=1", "--object-store-memory=100000000",
        "--disable-usage-stats", "--block", f"--temp-dir={ray_folder(stack, 'ray-ill')}", *ports,
    ]  # fmt: skip
    environment = {**stack.environment("s3", "mlflow", "ray"), **ENVIRONMENT, **faults}
    if full_disk:
        command = with_full_disk(folder / "full", command)
        environment["TMPDIR"] = str(folder / "full")
    started: list[Process] = []
    try:
        assert any(_joins(command, folder / f"node-{number}.log", environment, started) for number in range(STARTS))
        yield
    finally:
        left = end(belonging(started, ""), signal.SIGTERM, 20)
        end(left | belonging(started, ""), signal.SIGKILL, 10)


def _joins(command: list[str], log: Path, environment: Mapping[str, str], started: list[Process]) -> bool:
    """Start a node; whether it comes to belong to the cluster."""
    started.append(process := spawn(command, log, environment))
    while process.alive:
        if "block forever" in log.read_text():
            return True
        time.sleep(0.5)
    return False


@contextlib.contextmanager
def careless_store(backend: str, access: Mapping[str, str]) -> Iterator[str]:
    """An S3 server that knows no conditions: passes on what it is asked, signed anew, without If-None-Match."""
    from botocore.auth import S3SigV4Auth
    from botocore.awsrequest import AWSRequest
    from botocore.credentials import Credentials

    signer = S3SigV4Auth(Credentials(access["AWS_ACCESS_KEY_ID"], access["AWS_SECRET_ACCESS_KEY"]), "s3", "us-east-1")

    class Front(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # whose clients may wait to be told that they may send

        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            asked = AWSRequest(self.command, backend + self.path, data=body)
            signer.add_auth(asked)
            request = urllib.request.Request(asked.url, body, dict(asked.headers), method=self.command)
            try:
                with urllib.request.urlopen(request, timeout=30) as answer:
                    self.reply(answer.status, answer.headers, answer.read())
            except urllib.error.HTTPError as error:
                self.reply(error.code, error.headers, error.read())

        def reply(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
            self.send_response(status)
            for name, value in headers.items():
                if name.lower() not in ("connection", "transfer-encoding", "date", "server"):
                    self.send_header(name, value)
            self.end_headers()
            self.wfile.write(b"" if self.command == "HEAD" else body)

        do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = answer  # noqa: N815 - the names that http.server calls

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Front)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
