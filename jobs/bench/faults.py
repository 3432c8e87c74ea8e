"""`bench faults`: what a bad network costs a batch.

An epoch is read through a proxy in front of S3, in turn as it is and with every fifth request refused, bodies reset,
cut, and stalled for 2 s; where a training step would be there is a pause. Every sample must come once.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from jobs.bench.data import faces, opened_stream, versions
from jobs.bench.rows import Measurement, Row
from jobs.stack.processes import free_ports
from pipeline.errors import PipelineError, UsageError
from pipeline.manifest import Manifest

RULES = (
    {"kind": "status", "status": 503, "every": 5},
    {"kind": "reset", "after": 20_000, "every": 13},
    {"kind": "short", "after": 20_000, "every": 17},
    {"kind": "stall", "after": 20_000, "seconds": 2, "every": 23},
)
"""What the proxy does to GETs of shards; the first that strikes counts."""


def faults(options: argparse.Namespace) -> Measurement:
    """Time of a batch with and without faults."""
    if not options.to.startswith("s3://"):
        raise ValueError("--to is s3://bucket/prefix: faults are of a network")
    what = f"{options.images} toy faces of {options.size} px, batch {options.batch}, {options.pause} ms a step"
    return {"headline": f"{what}; {versions()}"}, lambda: _faulty_rows(options)


def _faulty_rows(options: argparse.Namespace) -> list[Row]:
    seconds: dict[str, list[float]] = {"as it is": [], "faults": []}
    repeated = dict.fromkeys(seconds, 0)
    with contextlib.closing(faces(options, ["png"])) as one, proxied() as order:
        manifest = next(one)
        for _ in range(options.rounds):
            for row, rules in zip(seconds, ((), RULES), strict=True):
                order(rules)
                before = manifest.storage.retries
                seconds[row] += _timed(manifest, options.batch, options.pause / 1000)
                repeated[row] += manifest.storage.retries - before
        order(())
    clean = statistics.median(seconds["as it is"])
    return [
        {
            "row": row,
            "batch_ms": 1000 * statistics.median(found),
            "x_clean": statistics.median(found) / clean,
            "p95_ms": 1000 * float(np.quantile(found, 0.95)),
            "worst_ms": 1000 * max(found),
            "repeated": repeated[row],
        }
        for row, found in seconds.items()
    ]


def _timed(manifest: Manifest, batch: int, pause: float) -> list[float]:
    """Seconds from batch to batch over an epoch, the first left out; every sample must come once."""
    seconds: list[float] = []
    seen: Counter[int] = Counter()
    with opened_stream(manifest, batch, threads=2) as stream:
        start = time.monotonic()
        for found in stream.batches(0, batch, stop=stream.samples):
            seen.update(found.samples.tolist())
            time.sleep(pause)
            seconds.append(time.monotonic() - start)
            start = time.monotonic()
        if (len(seen), seen.total()) != (stream.samples, stream.samples):
            raise PipelineError(f"{seen.total()} rows of {len(seen)} samples in an epoch of {stream.samples}")
    return seconds[1:]


@contextlib.contextmanager
def proxied() -> Iterator[Callable[[Sequence[Row]], None]]:
    """A proxy in front of S3 that this process's storage goes through; orders faults."""
    backend, port = os.environ.get("AWS_ENDPOINT_URL", ""), free_ports(1)[0]
    if not backend:
        raise UsageError("no S3 server to stand in front of", cure="set AWS_ENDPOINT_URL (the stack's env file does)")
    address, program = f"http://127.0.0.1:{port}", Path(__file__).parents[1] / "stack" / "faults.py"
    process = subprocess.Popen([sys.executable, str(program), str(port), backend], stdout=subprocess.PIPE)

    def order(rules: Sequence[Row]) -> None:
        rules = [{"match": r"GET .*\.tar", "times": 1 << 30, **rule} for rule in rules]
        body = json.dumps({"rules": rules}).encode()
        urllib.request.urlopen(f"{address}/__faults", body, timeout=30).close()

    try:
        assert process.stdout is not None
        process.stdout.readline()
        os.environ["AWS_ENDPOINT_URL"] = address
        yield order
    finally:
        os.environ["AWS_ENDPOINT_URL"] = backend
        process.kill()
        process.communicate()
