"""A disk that is too small for the cache: what can make way does, and what cannot ends in one line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.storage import open_storage
from tests.faulty import cannot_mount, with_small_disk
from tests.pipeline.tiny import build
from tests.reliability import measured

ROOT = Path(__file__).parents[2]
COUNTS = (6,) * 40
"""Shards of 20 KiB: 8 of them, two windows of the only lane, are open at a time."""

FRAME = """
import logging, sys
from pathlib import Path
from pipeline.errors import PipelineError
from pipeline.order import Order
from pipeline.storage import open_storage
from tests.pipeline.tiny import check, opened

logging.basicConfig(format="%(message)s")
order, seen = Order((6,) * 40, 11, 5), []
cache = Path(sys.argv[2])
try:
    with opened(open_storage(sys.argv[1]), cache, order, room=1 << 30) as stream:
        {body}
except PipelineError as error:
    print(f"error: {{error}}", file=sys.stderr)
    sys.exit(error.exit_code)
"""

EPOCH = FRAME.format(
    body="""
        for batch in stream.batches(0, 11, stop=stream.samples):
            check(batch)
            seen += batch.samples.tolist()
        assert sorted(seen) == list(range(240))
"""
)

FILLED = FRAME.format(
    body="""
        stream.fetch(np.arange(60))
        with (cache.parent / "of somebody else").open("wb", buffering=0) as other:
            while shutil.disk_usage(cache).free:
                other.write(bytes(4096))
        stream._cache._held.update(path.name for path in cache.iterdir())
        stream.fetch(np.arange(200, 240))
"""
)
FILLED = f"import shutil\nimport numpy as np\n{FILLED}"


NODE = FRAME.replace("(6,) * 40, 11, 5)", "(6,) * 40, 10, 5)").replace("1 << 30)", "1 << 30, beside=int(sys.argv[3]))")
NODE = NODE.format(body="next(stream.batches(0, 10, slice(0, 2)))")
"""A rank's lane, one of five."""


@pytest.fixture(params=["folder", "s3"])
def where(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    url = str(tmp_path / "data") if request.param == "folder" else f"{request.getfixturevalue('s3')}/small"
    build(open_storage(url), COUNTS)
    return url


def on_a_disk_of(kib: int, disk: Path, program: str, where: str, *words: str) -> subprocess.CompletedProcess[str]:
    command = with_small_disk(disk, kib, [sys.executable, "-c", program, where, str(disk / "cache"), *words])
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_a_full_disk_evicts_and_goes_on_or_ends_in_a_line(where: str, tmp_path: Path) -> None:
    """The cache may take a gigabyte; its disk has room for 12 shards, for 6, and for none but those in use."""
    disk = tmp_path / "disk"
    if unmountable := cannot_mount(disk):
        pytest.skip(f"no small disk can be made here ({unmountable})")
    done = on_a_disk_of(240, disk, EPOCH, where)
    assert done.returncode == 0, done.stderr
    assert "is full: shards in use by nobody here made way for train-0000" in done.stderr
    evicted = done.stderr.count("made way for")
    measured("R13", "an epoch of 40 shards on a disk for 12: the cache made room, every sample came", evicted, "times")
    small = on_a_disk_of(120, disk, EPOCH, where)
    assert (small.returncode, small.stderr.count("\n")) == (3, 1), small.stderr
    assert "GB of disk for shards of 0.000164 GB that are read at a time; make room there, or set" in small.stderr
    filled = on_a_disk_of(400, disk, FILLED, where)
    assert filled.returncode == 3, filled.stderr
    assert "no space left for train-0000" in filled.stderr.splitlines()[-1]
    assert filled.stderr.splitlines()[-1].endswith("make room there, or set data.cache to a folder on a larger disk")


def test_a_disk_too_small_for_all_processes_of_a_node_is_refused(tmp_path: Path) -> None:
    """Room for 12 shards: a process opens 8 at a time, five together 40."""
    build(open_storage(str(tmp_path / "data")), COUNTS)
    disk = tmp_path / "disk"
    if unmountable := cannot_mount(disk):
        pytest.skip(f"no small disk can be made here ({unmountable})")
    node = on_a_disk_of(240, disk, NODE, str(tmp_path / "data"), "5")
    assert (node.returncode, node.stderr.count("\n")) == (3, 1), node.stderr
    assert "GB of disk for shards of 0.000819 GB that are read at a time" in node.stderr
