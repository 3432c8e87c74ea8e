"""The stream through a proxy that fails to order, in front of a real S3 server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from jobs.bench.faults import RULES
from jobs.stack.processes import free_ports
from pipeline.errors import RemoteError
from pipeline.order import Sequential
from pipeline.storage import open_storage
from tests.pipeline.tiny import BATCH, SHARDS, build, check, opened, taken
from tests.reliability import measured
from tests.running import jobs

FAULTS = Path(__file__).parents[2] / "jobs" / "stack" / "faults.py"
Order = Callable[..., list[int]]


@pytest.fixture
def order(s3: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Order]:
    """Order faults; answers how often each of the last ones struck. The environment points at the proxy."""
    port, backend = free_ports(1)[0], os.environ["AWS_ENDPOINT_URL"]
    process = subprocess.Popen([sys.executable, str(FAULTS), str(port), backend], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()

    def ordered(*rules: dict[str, object]) -> list[int]:
        body = json.dumps({"rules": rules}).encode()
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/__faults", body, timeout=30) as answer:
            return json.loads(answer.read())["hits"]

    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    try:
        yield ordered
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def get(shards: str, kind: str, **more: object) -> dict[str, object]:
    return {"match": f"GET .*faulty/train-0000{shards}", "kind": kind, **more}


def test_every_sample_comes_once_through_refusals_resets_stalls_and_cuts(s3: str, order: Order, tmp_path: Path) -> None:
    storage = open_storage(f"{s3}/faulty")
    build(storage)
    order(
        get("0[0-3]", "status", status=503, times=5),
        get("0[4-6]", "reset", after=3000, times=2),
        get("0[7-9]", "stall", after=3000, seconds=2, times=2),
        get("10", "short", after=5000, times=3),
        get("1[4-7]", "reset", times=2),
    )
    with opened(storage, tmp_path / "cache") as stream:
        epochs = 2 * stream.samples // BATCH
        batches = taken(stream.batches(0, BATCH), epochs)
        repeated = stream.figures()["data/requests_repeated"]
    for batch in batches:
        check(batch)
    seen = Counter(row for b in batches for row in zip(b.epochs.tolist(), b.samples.tolist(), strict=True))
    assert set(seen.values()) == {1}
    assert {(0, sample) for sample in range(sum(SHARDS))} <= set(seen)
    hits = order()
    assert hits == [5, 2, 2, 3, 2]
    assert repeated >= 12


def test_an_epoch_over_a_bad_network(s3: str, order: Order, tmp_path: Path) -> None:
    """What `bench faults` orders: every fifth request refused, bodies reset, cut, stalled for 2 s."""
    storage, counts = open_storage(f"{s3}/faulty-many"), (3,) * 96
    build(storage, counts)
    order(*({"match": r"GET .*\.tar", "times": 10_000, **rule, "after": 3000} for rule in RULES))
    with opened(storage, tmp_path / "cache", Sequential(counts)) as stream:
        batches = list(stream.batches(0, BATCH, stop=stream.samples))
        repeated = stream.figures()["data/requests_repeated"]
    for batch in batches:
        check(batch)
    assert [sample for batch in batches for sample in batch.samples.tolist()] == list(range(sum(counts)))
    hits = order()
    assert all(hits)
    assert hits[0] >= 96 // 5
    assert repeated > hits[0]
    measured("R10", "every 5th request of 96 shards refused, bodies reset, cut, stalled for 2 s: faults struck, every "
             "sample came once", sum(hits), "faults")  # fmt: skip


def test_a_service_that_is_away_for_good_is_one_line_and_exit_7(s3: str, order: Order, tmp_path: Path) -> None:
    storage = open_storage(f"{s3}/faulty")
    build(storage)
    with opened(storage, tmp_path / "cache") as stream:
        order(get("", "status", status=503, times=10_000))
        with pytest.raises(RemoteError, match=r"train-0000\d\d\.tar: no success in \d+ attempts.*; check") as caught:
            stream.fetch(np.arange(1))
    assert caught.value.exit_code == 7
    assert "\n" not in str(caught.value)
    refused = jobs("data", "verify", storage.url, "--deep", "--workers", "1")
    assert (refused.returncode, refused.stderr.count("\n")) == (7, 1), refused.stderr
    assert refused.stderr.startswith("error: ")
