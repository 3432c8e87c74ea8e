"""A Ray cluster of several nodes on this machine, whose nodes come and go as real ones do."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil

from jobs.cluster import ENVIRONMENT
from jobs.stack.processes import Process, belonging, end, free_ports, inherited, spawn

STARTS = 4
"""A raylet gives its agent 15 s to start and then breaks off: on a busy machine it may take another try."""

START_SECONDS = 240


class Nodes:
    """A head that does no work, and nodes with a CPU each; `environment` is what a driver needs."""

    def __init__(self, folder: Path, more: Mapping[str, str]) -> None:
        self.folder, self._more, self._count = folder, more, 0
        self._port, self._jobs = free_ports(2)
        self.address, self.job_server = f"127.0.0.1:{self._port}", f"http://127.0.0.1:{self._jobs}"
        (folder / "token").write_text(secrets.token_hex(32))
        self.environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / "token")}
        self.running: dict[str, Process] = {}

    def start_head(self, *, job_server: bool = False) -> None:
        """Start the head, or start it again on the same ports."""
        dashboard = ["--dashboard-host=127.0.0.1", f"--dashboard-port={self._jobs}"] if job_server else []
        with_it = f"--include-dashboard={str(job_server).lower()}"
        self._start("head", "--head", f"--port={self._port}", "--num-cpus=0", with_it, *dashboard)

    def add(self, count: int = 1) -> None:
        """Start so many nodes, all at once: n1, n2, ..."""
        names = [f"n{self._count + number}" for number in range(1, count + 1)]
        self._count += count
        with ThreadPoolExecutor(count) as pool:
            list(pool.map(lambda name: self._start(name, f"--address={self.address}", "--num-cpus=1"), names))

    def kill(self, name: str) -> None:
        """Let a node vanish: SIGKILL to all its processes, workers included."""
        for _ in range(10):  # what is being killed may have started more
            if not end(belonging([self.running[name]], ""), signal.SIGKILL, 5):
                break
        del self.running[name]

    def announce_end(self, name: str, seconds: int) -> None:
        """Tell Ray that a node will be taken away in so many seconds, as a cloud's notice does."""
        command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", f"--address={self.address}"]
        reason = ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=taken away"]
        command += [f"--node-id={self._id(name)}", *reason, f"--deadline-remaining-seconds={seconds}"]
        done = subprocess.run(command, env={**os.environ, **self.environment}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    def pause_workers(self) -> None:
        """Hold the training processes where they are, for good: what ends them is the end of their group."""
        for process in belonging(self.running.values(), ""):
            if psutil.Process(process.pid).name().startswith("ray::RayTrainWo"):
                os.kill(process.pid, signal.SIGSTOP)

    def _id(self, name: str) -> str:
        """What Ray calls a node: an argument of its raylet."""
        lines = [psutil.Process(process.pid).cmdline() for process in belonging([self.running[name]], "")]
        return next(word.partition("=")[2] for line in lines for word in line if word.startswith("--node_id="))

    def _start(self, name: str, *words: str) -> None:
        command = [
            sys.executable, "-m", "ray.scripts.scripts", "start", "--node-ip-address=127.0.0.1",
            "--object-store-memory=100000000", "--disable-usage-stats", "--block",
            f"--temp-dir={self.folder / name}", f"--dashboard-agent-listen-port={free_ports(1)[0]}", *words,
        ]  # fmt: skip
        quick = {"RAY_health_check_failure_threshold": "3", "TMPDIR": str(self.folder)}
        environment = {**inherited(), **self._more, **self.environment, **ENVIRONMENT, **quick}
        environment["PYTHONPATH"] = str(Path(__file__).parents[2])
        for attempt in range(STARTS):
            log = self.folder / f"{name}-{attempt}.log"
            process = self.running[name] = spawn(command, log, environment)
            deadline = time.monotonic() + START_SECONDS
            while process.alive and time.monotonic() < deadline:
                if "block forever" in log.read_text():
                    return
                time.sleep(0.2)
            self.kill(name)
        raise AssertionError(f"{name} did not start: {log.read_text()}")


@contextlib.contextmanager
def nodes(more: Mapping[str, str] | None = None) -> Iterator[Nodes]:
    """A cluster whose nodes see `more` variables, not started; nothing of it is left afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="gn-", dir="/tmp"))
    cluster = Nodes(folder, more or {})
    try:
        yield cluster
    finally:
        for name in list(cluster.running):
            cluster.kill(name)
        shutil.rmtree(folder, ignore_errors=True)
