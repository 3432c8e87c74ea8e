"""Tracking over HTTP to an MLflow with logins: one that lets nobody in, and one that hangs, is never waited for."""

from __future__ import annotations

import contextlib
import json
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from pipeline.config import TrackingConfig
from pipeline.storage import open_storage
from pipeline.tracking import Tracker
from tests.pipeline.test_tracking import history, wait_for
from tests.running import RunningStack


@contextlib.contextmanager
def hung(stack: RunningStack) -> Iterator[None]:
    """The stack's MLflow accepts connections and answers none."""
    leader = psutil.Process(stack.stack.state.processes["mlflow"].pid)
    tree = [leader, *leader.children(recursive=True)]
    try:
        for process in tree:
            process.send_signal(signal.SIGSTOP)
        yield
    finally:
        for process in tree:
            process.send_signal(signal.SIGCONT)


def test_all_points_arrive_once_and_in_order_at_an_mlflow_that_refuses_us_and_hangs(
    stack: RunningStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {**stack.stack.access["mlflow"], "MLFLOW_HTTP_REQUEST_TIMEOUT": "2"}.items():
        monkeypatch.setenv(name, value)
    run, uri, logged = open_storage(str(tmp_path)), stack.stack.url("mlflow"), 0

    def log(tracker: Tracker) -> None:
        nonlocal logged
        for _ in range(50):
            tracker.log(logged, {"train/bits_per_dim": logged})
            logged += 1

    def told(event: bytes, times: int) -> None:
        wait_for(lambda: run.read("events.jsonl").count(event) == times)

    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "wrong")
    tracker = Tracker(run, TrackingConfig(uri=uri), "outage")
    tracker.start({"seed": "0"})
    log(tracker)
    told(b"mlflow unreachable", 1)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", stack.stack.credentials["mlflow_password"])
    told(b"mlflow reachable", 1)
    with hung(stack):
        log(tracker)
        told(b"mlflow unreachable", 2)
    told(b"mlflow reachable", 2)
    tracker.close(timeout=240)
    assert stack.stack.credentials["mlflow_password"].encode() not in run.read("events.jsonl")
    run_id = json.loads(run.read("run.json"))["run_id"]
    assert history(uri, run_id, "train/bits_per_dim") == [(step, float(step)) for step in range(logged)]
