"""MLflow over HTTP, gone, hung and failing during a run: nobody waits, everything arrives once and in order."""

from __future__ import annotations

import contextlib
import json
import signal
import socketserver
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from jobs import train
from jobs.stack import faults
from jobs.stack.processes import Process, belonging, end, free_ports, inherited, listening, spawn
from pipeline.config import TrackingConfig
from pipeline.errors import DataError, RemoteError
from pipeline.storage import open_storage
from pipeline.tracking import Tracker
from tests.mlflow_db import MLFLOW_NOISE, fresh_database
from tests.pipeline.test_tracking import history, only_run, sent, wait_for
from tests.reliability import measured

pytestmark = MLFLOW_NOISE
ALWAYS = 1_000_000


class Server:
    """An MLflow server on sqlite behind a proxy that fails to order; `uri` is the proxy's."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.database = folder, fresh_database(folder)
        self._backend, self._port = free_ports(2)
        self.uri = f"http://127.0.0.1:{self._port}"
        self._server: list[Process] = []
        self._proxy: list[Process] = []

    def start(self) -> None:
        """Start both."""
        command = [
            sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self._backend),
            "--workers", "1", "--allowed-hosts", "*", "--backend-store-uri", self.database,
            "--artifacts-destination", str(self.folder / "served"),
        ]  # fmt: skip
        quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        self._server = [spawn(command, self.folder / "server.out", {**inherited(), **quiet}, end_with_parent=True)]
        wait_for(lambda: listening(self._backend), 240)
        self.start_proxy()

    def start_proxy(self) -> None:
        """Start the proxy: the server is there again."""
        command = [sys.executable, "-P", faults.__file__, str(self._port), f"http://127.0.0.1:{self._backend}"]
        self._proxy = [spawn(command, self.folder / "proxy.out", inherited(), end_with_parent=True)]
        wait_for(lambda: listening(self._port))

    def kill_proxy(self) -> None:
        """Refuse connections from now on."""
        end(self._proxy, signal.SIGKILL, 10)

    def stop(self) -> None:
        """Stop both, and what the server started."""
        end(belonging([*self._proxy, *self._server], ""), signal.SIGKILL, 10)

    def fail(self, **rule: object) -> None:
        """Let every request fail so; none without a rule."""
        rules = [{"match": ".", "times": ALWAYS, **rule}] if rule else []
        request = urllib.request.Request(f"{self.uri}/__faults", json.dumps({"rules": rules}).encode())
        urllib.request.urlopen(request, timeout=30).close()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path)
    try:
        yield server
    finally:
        server.stop()


@pytest.mark.timeout(900)
def test_an_mlflow_that_comes_and_goes_is_never_waited_for_and_misses_nothing(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")  # a hung server is given up three times before it is said
    run, config = open_storage(str(tmp_path / "run")), TrackingConfig(uri=server.uri)
    logged = 0

    def log(tracker: Tracker, rows: int) -> None:
        """Record rows and a picture while nobody can answer: that this returns says that nobody is waited for."""
        nonlocal logged
        before = sent(server.database)
        for _ in range(rows):
            tracker.log(logged, {"train/bits_per_dim": logged, "train/grad_norm": logged / 2})
            logged += 1
        tracker.image("t0.70", logged, Image.new("RGB", (4, 4)))
        assert sent(server.database) == before

    def arrived() -> bool:
        return sent(server.database) == 2 * logged

    first = Tracker(run, config, "outages")
    first.start({"seed": "0"})
    log(first, 50)  # nobody listens there yet
    first.close(timeout=0.1)
    assert b'"kind":"unsent","rows":50' in run.read("events.jsonl")

    server.start()
    tracker = Tracker(run, config, "outages")
    tracker.start({"seed": "0"})
    wait_for(arrived, 240)
    for number, fault in enumerate(({"kind": "stall"}, {"kind": "status", "status": 500}, None), 1):
        server.fail(**fault) if fault else server.kill_proxy()
        log(tracker, 50)
        wait_for(lambda number=number: run.read("events.jsonl").count(b"mlflow unreachable") == number, 240)
        server.fail() if fault else server.start_proxy()
        wait_for(lambda number=number: run.read("events.jsonl").count(b"mlflow reachable") == number, 240)
        assert arrived()
    tracker.close(timeout=240)
    run_id = only_run(server.uri)
    for key, share in (("train/bits_per_dim", 1.0), ("train/grad_norm", 0.5)):
        assert history(server.uri, run_id, key) == [(step, share * step) for step in range(logged)]
    assert len(list((tmp_path / "served").rglob("*.png"))) == 4
    measured("R12", "points of four outages that arrived, each once and in order", 2 * logged, f"of {2 * logged}")


class Never(socketserver.BaseRequestHandler):
    """Says a byte a second and never comes to an end."""

    def handle(self) -> None:
        with contextlib.suppress(OSError):
            for _ in range(60):
                self.request.sendall(b"H")
                time.sleep(1)


class Other(socketserver.BaseRequestHandler):
    """No HTTP server."""

    def handle(self) -> None:
        self.request.sendall(b"220 welcome\r\n")


def test_an_mlflow_that_is_dead_at_the_start_is_exit_7_unless_offline(tmp_path: Path) -> None:
    """Promise R12, in 10 s: nobody there, one who never has done with answering, and somebody else."""
    words = ["toy32", "--data.prefix", str(tmp_path / "none"), "--tracking.uri"]
    with contextlib.ExitStack() as left:
        ports = [9]
        for kind in (Never, Other):
            server = left.enter_context(socketserver.ThreadingTCPServer(("127.0.0.1", 0), kind))
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, daemon=True).start()
            left.callback(server.shutdown)
            ports.append(server.server_address[1])
        for port in ports:
            start = time.monotonic()
            with pytest.raises(RemoteError, match="MLflow does not answer") as caught:
                train.main([*words, f"http://127.0.0.1:{port}"])
            seconds = time.monotonic() - start
            measured("R12", "MLflow dead at the start: to the line, exit 7", seconds, "s")
            assert seconds < 10
            assert caught.value.exit_code == 7
            assert "--offline" in caught.value.cure
    with pytest.raises(DataError, match="no dataset here"):
        train.main([*words, "http://127.0.0.1:9", "--offline"])
