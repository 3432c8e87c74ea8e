"""What a training step costs while MLflow is up, killed, hung or answering 500: a row a state, each a process.

One MLflow server stands behind a proxy a row. Every process trains the same small model and records every step; once
all have reached MLflow, the proxies begin to fail, and the processes take turns, a few steps each, so that a busy
machine disturbs them alike. Wall time says whether a step waits, process CPU time what the thread beside it costs.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import signal
import statistics
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

from jobs.bench.rows import Measurement, Row
from jobs.stack import faults
from jobs.stack.processes import Process, belonging, end, free_ports, inherited, listening, spawn
from pipeline.scratch import scratch

STATES: dict[str, dict[str, object] | None] = {
    "up": {},
    "killed": None,
    "hung": {"kind": "stall"},
    "answering 500": {"kind": "status", "status": 500},
}
"""What a row's proxy does to every request; None is no proxy any more."""

START_SECONDS = 240


class Outages:
    """A server and proxies in front of it that fail to order, all ended with the context."""

    def __init__(self, folder: Path, backend: str) -> None:
        self._folder, self._backend = folder, backend
        self._running: dict[int, Process] = {}

    def start(self, port: int = 0) -> int:
        """Start a proxy on a port, free by default."""
        port = port or free_ports(1)[0]
        command = [sys.executable, "-P", faults.__file__, str(port), self._backend]
        output = self._folder / f"proxy-{port}.out"
        self._running[port] = spawn(command, output, inherited(), end_with_parent=True)
        until(lambda: listening(port))
        return port

    def kill(self, port: int) -> None:
        """Refuse connections from now on."""
        end([self._running.pop(port)], signal.SIGKILL, 10)

    def fail(self, port: int, **rule: object) -> None:
        """Let every request through a proxy fail so; none without a rule."""
        rules = [{"match": ".", "times": 1_000_000, **rule}] if rule else []
        body = json.dumps({"rules": rules}).encode()
        urllib.request.urlopen(f"http://127.0.0.1:{port}/__faults", body, timeout=30).close()

    def close(self) -> None:
        """End every proxy."""
        end(list(self._running.values()), signal.SIGKILL, 10)


@contextmanager
def mlflow_server(folder: Path) -> Iterator[str]:
    """An MLflow server on sqlite in a folder; gives its address."""
    port = free_ports(1)[0]
    command = [
        sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
        "--allowed-hosts", "*", "--backend-store-uri", f"sqlite:///{folder}/mlflow.db",
        "--artifacts-destination", str(folder / "served"),
    ]  # fmt: skip
    quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    server = spawn(command, folder / "server.out", {**inherited(), **quiet}, end_with_parent=True)
    try:
        until(lambda: listening(port))
        yield f"http://127.0.0.1:{port}"
    finally:
        end(belonging([server], ""), signal.SIGKILL, 10)


def until(ready: Callable[[], object], seconds: float = START_SECONDS) -> None:
    """Wait for something to become true; TimeoutError if it does not."""
    limit = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > limit:
            raise TimeoutError("an MLflow server or a proxy did not start, or was not reached")
        time.sleep(0.05)


def tracking(options: argparse.Namespace) -> Measurement:
    """What the bench measures, and how."""
    import torch

    if min(options.rounds, options.steps) < 1:
        raise ValueError("--rounds and --steps are 1 or more")
    about = f"a step of a small Glow that records itself in MLflow, {options.rounds} rounds of {options.steps} steps"
    headline = f"{about}, CPU, 1 thread, torch {torch.__version__}"
    return {"headline": headline}, lambda: outage_rows(options.rounds, options.steps)


def outage_rows(rounds: int, steps: int) -> list[Row]:
    """Median milliseconds a step of every state, and their ratio to a server that is up, round by round."""
    with scratch() as folder, mlflow_server(folder) as backend:
        proxies = Outages(folder, backend)
        try:
            ports = {state: proxies.start() for state in STATES}
            with _workers({state: f"http://127.0.0.1:{port}" for state, port in ports.items()}, folder) as workers:
                for state, rule in STATES.items():
                    proxies.kill(ports[state]) if rule is None else proxies.fail(ports[state], **rule)
                return _rows([{s: _asked(worker, steps) for s, worker in workers.items()} for _ in range(rounds + 1)])
        finally:
            proxies.close()


def _rows(rounds: list[dict[str, tuple[float, float]]]) -> list[Row]:
    """(wall, CPU) seconds a step of every state and round -> rows; the first round does not count."""
    first, *rounds = rounds
    return [
        {
            "row": state,
            "ms": 1e3 * statistics.median(each[state][0] for each in rounds),
            "x_up": statistics.median(each[state][0] / each["up"][0] for each in rounds),
            "cpu_ms": 1e3 * statistics.median(each[state][1] for each in rounds),
            "x_up_cpu": statistics.median(each[state][1] / each["up"][1] for each in rounds),
        }
        for state in first
    ]


@contextmanager
def _workers(addresses: dict[str, str], folder: Path) -> Iterator[dict[str, Connection]]:
    """A process a state, each of which has reached MLflow."""
    context = multiprocessing.get_context("spawn")
    found: dict[str, Connection] = {}
    processes = []
    for number, (state, uri) in enumerate(addresses.items()):
        found[state], theirs = context.Pipe()
        processes.append(context.Process(target=_work, args=(theirs, uri, f"{folder}/run-{number}"), daemon=True))
        processes[-1].start()
    try:
        for pipe in found.values():
            pipe.recv()
        yield found
    finally:
        for process in processes:
            process.kill()
            process.join()


def _asked(worker: Connection, steps: int) -> tuple[float, float]:
    worker.send(steps)
    return worker.recv()


def _work(pipe: Connection, uri: str, folder: str) -> None:
    """Train a few steps whenever asked, recording every one; answers (wall, CPU) seconds a step."""
    import torch

    from glow import Glow, GlowConfig
    from pipeline.config import TrackingConfig
    from pipeline.storage import open_storage
    from pipeline.tracking import Tracker

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = Glow(GlowConfig(size=32, channels=3, levels=3, steps=4, width=64, classes=-1, attributes=-1))
    x = torch.rand(8, 3, 32, 32) - 0.5
    model.initialize([x])
    optimizer = torch.optim.Adam(model.parameters(), 1e-4)
    run = open_storage(folder)
    tracker = Tracker(run, TrackingConfig(uri=uri), "bench")
    tracker.start({})
    until(lambda: b'"run_id"' in run.read("run.json") if run.exists("run.json") else False)
    pipe.send("ready")
    images = 0
    while True:
        steps, wall, cpu = pipe.recv(), time.perf_counter(), time.process_time()
        for _ in range(steps):
            loss = -model.log_prob(x).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            images += len(x)
            tracker.log(images, {"train/bits_per_dim": float(loss.detach()), "train/lr": 1e-4})
        pipe.send(((time.perf_counter() - wall) / steps, (time.process_time() - cpu) / steps))
