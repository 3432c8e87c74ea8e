"""Exactly once an epoch in real processes that are killed and come back in other numbers; what each node fetches.

The S3 server is the stack's own program, Ceph RGW, started by the stack's code (`jobs/stack/ceph.py`); it is the very
server of the stack where the session has one. The loop itself does the same under torchrun in tests/jobs/test_train.py.
"""

from __future__ import annotations

import json
import multiprocessing
import time
from collections import Counter
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest

from pipeline.order import Order
from pipeline.storage import open_storage, sha256_hex
from tests.pipeline.tiny import BATCH, SHARDS, build, opened, pixels_of
from tests.reliability import measured

COMMITTED = 3
"""Batches from one place where a group may go on to the next."""

Line = tuple[int, int, str]
"""Epoch, sample and the digest of its pixels."""


def rank_reads(url: str, folder: str, rank: int, world: int, start: int, stop: int, step: Barrier) -> None:
    """What one rank does: read its rows from S3 and write them down, a line a batch, in step with the others."""
    own = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
    with (
        opened(open_storage(url), Path(folder, f"cache-{rank}")) as stream,
        Path(folder, f"seen-{rank}.jsonl").open("w", buffering=1) as seen,
    ):
        for batch in stream.batches(start, BATCH, own, stop):
            digests = [sha256_hex(pixels.permute(1, 2, 0).contiguous().numpy().tobytes()) for pixels in batch.pixels]
            rows = list(zip(batch.epochs.tolist(), batch.samples.tolist(), digests, strict=True))
            print(json.dumps(rows), file=seen)
            step.wait()


def lines(path: Path) -> list[list[Line]]:
    """Whole lines; a killed process may leave a part of one."""
    text = path.read_text() if path.exists() else ""
    return [[tuple(row) for row in json.loads(line)] for line in text.split("\n")[:-1]]


@dataclass(frozen=True, kw_only=True)
class Group:
    """Ranks at work in a folder, and what keeps them in step."""

    ranks: list[BaseProcess]
    folder: Path
    step: Barrier


def group(url: str, folder: Path, world: int, start: int, stop: int) -> Group:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.pipeline.test_elastic", "s3fs", "aiobotocore.session"])
    folder.mkdir()
    step = context.Barrier(world)
    arguments = [(url, str(folder), rank, world, start, stop, step) for rank in range(world)]
    ranks = [context.Process(target=rank_reads, args=each, daemon=True) for each in arguments]
    for process in ranks:
        process.start()
    return Group(ranks=ranks, folder=folder, step=step)


def killed(group: Group, victim: int, batches: int) -> list[list[Line]]:
    """Kill one rank after so many batches, then the others, as a cluster does; the batches that all had read."""
    while len(lines(group.folder / f"seen-{victim}.jsonl")) < batches:
        assert group.ranks[victim].is_alive()
        time.sleep(0.005)
    for process in (group.ranks[victim], *group.ranks):
        process.kill()
    return joined(group)


def joined(group: Group) -> list[list[Line]]:
    """Wait for the ranks to end; the batches that all of them have written down whole."""
    for process in group.ranks:
        process.join(120)
        assert process.exitcode is not None
    shares = [lines(group.folder / f"seen-{rank}.jsonl") for rank in range(len(group.ranks))]
    return [[line for share in batch for line in share] for batch in zip(*shares, strict=False)]


def test_every_sample_once_over_kills_and_other_numbers_of_ranks(s3: str, tmp_path: Path) -> None:
    """2 ranks, then 3, then 1: the history that survives is the stream of a run that never stopped."""
    storage = open_storage(f"{s3}/elastic")
    build(storage)
    samples = sum(SHARDS)
    stop, history = 10 * samples, list[list[Line]]()
    for attempt, (world, victim, batches) in enumerate([(2, 1, 8), (3, 0, 10)]):
        found = killed(group(storage.url, tmp_path / str(attempt), world, len(history) * BATCH, stop), victim, batches)
        assert COMMITTED < len(found) < stop // BATCH
        history += found[: len(found) // COMMITTED * COMMITTED]
    history += joined(group(storage.url, tmp_path / "last", 1, len(history) * BATCH, stop))
    epoch, _, _ = zip(*(line for batch in history for line in batch), strict=True)
    assert Counter(epoch) == dict.fromkeys(range(10), samples)
    assert len({line[:2] for batch in history for line in batch}) == stop
    measured("R7", "2, 3, 1 ranks and two kills: samples that came once", stop, f"of {stop} in 10 epochs")
    assert all(digest == sha256_hex(pixels_of(sample).tobytes()) for batch in history for _, sample, digest in batch)
    order, position = Order(SHARDS, BATCH, 5), 0
    for batch in history:
        epochs, shard, row = order.locate(range(position, position + len(batch)))
        expected = list(zip(epochs.tolist(), order.sample(shard, row).tolist(), strict=True))
        assert [line[:2] for line in batch] == expected
        position += len(batch)


MANY, GLOBAL = (3,) * 72, 16
"""72 shards and a batch of 16 make 8 lanes."""


@pytest.mark.parametrize("nodes", [1, 2, 4, 8])
def test_a_node_fetches_its_own_lanes(s3: str, tmp_path: Path, nodes: int) -> None:
    """Each shard at most 1 + C / shards times an epoch, over all nodes; and once while nothing is evicted."""
    storage = open_storage(f"{s3}/nodes")
    build(storage, MANY)
    order, fetches, seen = Order(MANY, GLOBAL, 5), [], Counter[int]()
    assert order.lanes == 8
    for node in range(nodes):
        own = slice(node * GLOBAL // nodes, (node + 1) * GLOBAL // nodes)
        with opened(storage, tmp_path / f"node-{node}", order, room=1 << 24) as stream:
            for batch in stream.batches(0, GLOBAL, own, stream.samples):
                seen.update(batch.samples.tolist())
            fetches.append(stream.figures()["data/shards_fetched"])
    assert set(seen.values()) == {1}
    assert len(seen) == stream.samples
    assert sum(fetches) <= len(MANY) * (1 + order.lanes / len(MANY))
    assert sum(fetches) <= len(MANY) + nodes - 1
    assert max(fetches) <= len(MANY) / nodes + 2
