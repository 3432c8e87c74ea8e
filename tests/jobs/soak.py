"""Faults for a soak, struck in an order a seed decides, and the bookkeeping of what they do to memory."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from jobs.stack import faults
from jobs.stack.processes import free_ports, inherited, listening, spawn
from tests.jobs.runs import MARK
from tests.pipeline.test_outages import Server

ALWAYS = 1_000_000
SMALL_DISK = """
mount -t tmpfs -o size=64m tmpfs "$0"
exec "$@"
"""
"""Runs a command that alone sees a disk of 64 MB, mounted at the first argument."""


@dataclass
class Soak:
    """What can fail, and what has; every fault is over when its method returns."""

    mlflow: Server
    proxy: str
    disk: Path
    chance: random.Random
    pid: int = 0
    """The command under test."""
    struck: dict[str, int] = field(default_factory=dict)

    @property
    def kinds(self) -> dict[str, Callable[[], None]]:
        return {"worker": self.kill_worker, "S3": self.break_s3, "MLflow": self.break_mlflow,
                "disk": self.fill_disk, "driver": self.kill_driver}  # fmt: skip

    def order(self) -> Iterator[str]:
        """Kinds for ever: all of them in a random order, then again."""
        while True:
            yield from self.chance.sample(sorted(self.kinds), len(self.kinds))

    def strike(self, kind: str) -> None:
        """Let something fail for a while; nothing where there is no worker to fail just now."""
        with contextlib.suppress(psutil.Error, IndexError):
            self.kinds[kind]()
            self.struck[kind] = self.struck.get(kind, 0) + 1

    def workers(self) -> list[psutil.Process]:
        return [process for process in psutil.Process(self.pid).children(recursive=True)
                if process.name().startswith("ray::RayTrainWo")]  # fmt: skip

    def kill_worker(self) -> None:
        """SIGKILL to one of the workers."""
        self.chance.choice(self.workers()).kill()

    def kill_driver(self) -> None:
        """SIGKILL to the command itself; what Ray started ends by itself."""
        psutil.Process(self.pid).kill()

    def break_s3(self) -> None:
        """Refusals, resets and stalls for some seconds, for a fifth of what is asked and more."""
        kinds = ({"kind": "status", "status": 503, "times": 20}, {"kind": "reset", "times": 5},
                 {"kind": "stall", "seconds": 2, "times": 10})  # fmt: skip
        self._s3(*({"match": ".", **kind} for kind in self.chance.sample(kinds, 3)))
        time.sleep(8)
        self._s3()

    def break_mlflow(self) -> None:
        """Gone, failing or silent for some seconds."""
        fault = self.chance.choice((None, {"kind": "status", "status": 500}, {"kind": "stall"}))
        self.mlflow.fail(**fault) if fault else self.mlflow.kill_proxy()
        time.sleep(8)
        self.mlflow.fail() if fault else self.mlflow.start_proxy()

    def fill_disk(self) -> None:
        """No room where shards are cached, none of them there any more, and a worker that has to begin anew."""
        disk = Path(f"/proc/{self.workers()[0].pid}/root{self.disk}")
        for path in disk.rglob("*.tar"):
            path.unlink(missing_ok=True)
        filler = disk / "filler"
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while file.write(b"\0" * (1 << 20)):
                pass
        self.kill_worker()
        time.sleep(8)
        filler.unlink(missing_ok=True)

    def _s3(self, *rules: dict[str, object]) -> None:
        body = json.dumps({"rules": rules}).encode()
        urllib.request.urlopen(f"{self.proxy}/__faults", body, timeout=60).close()


@contextlib.contextmanager
def soak(folder: Path, endpoint: str, seed: int) -> Iterator[Soak]:
    """MLflow, and a proxy before the S3 server at `endpoint`; both gone afterwards."""
    (port,) = free_ports(1)
    command = [sys.executable, "-P", faults.__file__, str(port), endpoint]
    proxy = spawn(command, folder / "faults.out", inherited(), end_with_parent=True)
    mlflow = Server(folder)
    (folder / "disk").mkdir(exist_ok=True)
    try:
        mlflow.start()
        while not listening(port):
            time.sleep(0.1)
        yield Soak(mlflow, f"http://127.0.0.1:{port}", folder / "disk", random.Random(seed))
    finally:
        mlflow.stop()
        os.kill(proxy.pid, signal.SIGKILL)
        os.waitpid(proxy.pid, 0)


def on_small_disk(disk: Path, command: list[str]) -> list[str]:
    """The command, in a namespace of its own in which `disk` is a small one."""
    return ["unshare", "--mount", "--map-root-user", "sh", "-c", SMALL_DISK, str(disk), *command]


def memory() -> int:
    """Bytes of the largest training worker, its own alone: how many there are does not matter."""
    return max(worker_sizes().values(), default=0)


def worker_sizes() -> dict[int, int]:
    """Bytes of every training worker by its pid."""
    sizes = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.name().startswith("ray::RayTrainWo") and MARK in process.environ():
                sizes[process.pid] = process.memory_info().rss
    return sizes
