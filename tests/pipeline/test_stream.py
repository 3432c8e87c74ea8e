"""Promises of the stream: every batch is what order and manifest say, whatever threads, ranks, cache and faults do."""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch

from pipeline.cache import ShardCache
from pipeline.errors import ConfigError, DataError, RemoteError
from pipeline.manifest import Image, open_manifest
from pipeline.order import Order, Sequential
from pipeline.shards import pack
from pipeline.storage import Folder, open_storage
from pipeline.stream import Batch, Stream
from tests.pipeline.tiny import BATCH, ROOM, SHARDS, SIZE, build, check, opened, record_of, taken


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("data")
    build(open_storage(str(folder)))
    return str(folder)


@pytest.fixture
def stream(prefix: str, tmp_path: Path) -> Iterator[Stream]:
    with opened(open_storage(prefix), tmp_path / "cache") as stream:
        yield stream


def same(one: Batch, other: Batch) -> bool:
    names = ("pixels", "labels", "attributes", "epochs", "samples")
    return one.position == other.position and all(torch.equal(getattr(one, n), getattr(other, n)) for n in names)


def rows(batches: list[Batch]) -> list[tuple[int, int]]:
    return [row for batch in batches for row in zip(batch.epochs.tolist(), batch.samples.tolist(), strict=True)]


def test_every_sample_comes_once_an_epoch_as_it_is(stream: Stream) -> None:
    count = 3 * stream.samples // BATCH
    found = taken(stream.batches(0, BATCH), count)
    for number, batch in enumerate(found):
        check(batch)
        assert batch.position == number * BATCH
        assert len(batch) == BATCH
    seen = Counter(rows(found))
    assert set(seen.values()) == {1}
    assert {(epoch, sample) for epoch in (0, 1) for sample in range(stream.samples)} <= set(seen)


def test_types_and_shapes(stream: Stream) -> None:
    batch = next(stream.batches(0, BATCH))
    assert (batch.pixels.dtype, tuple(batch.pixels.shape)) == (torch.uint8, (BATCH, 3, SIZE, SIZE))
    assert (batch.labels.dtype, batch.epochs.dtype, batch.samples.dtype) == (torch.int64,) * 3
    assert (batch.attributes.dtype, tuple(batch.attributes.shape)) == (torch.int8, (BATCH, 2))
    assert batch.pixels.is_contiguous()


@pytest.mark.parametrize("world", [2, 3, 7])
def test_ranks_and_threads_do_not_change_content(prefix: str, tmp_path: Path, world: int) -> None:
    storage, count = open_storage(prefix), 15
    with opened(storage, tmp_path / "whole", threads=1) as stream:
        whole = taken(stream.batches(0, BATCH), count)
    cuts = [rank * BATCH // world for rank in range(world + 1)]
    for rank in range(world):
        own = slice(cuts[rank], cuts[rank + 1])
        with opened(storage, tmp_path / "shared", threads=3) as stream:
            for batch, part in zip(whole, stream.batches(0, BATCH, own), strict=False):
                assert part.position == batch.position
                assert torch.equal(part.samples, batch.samples[own])
                assert torch.equal(part.pixels, batch.pixels[own])


@pytest.mark.parametrize("start", [12, 84, 108, 1200])
def test_resuming_equals_not_stopping(prefix: str, tmp_path: Path, start: int) -> None:
    with opened(open_storage(prefix), tmp_path / "cache") as stream:
        whole = stream.batches(0, BATCH)
        for _ in range(start // BATCH):
            next(whole)
        again = opened(open_storage(prefix), tmp_path / "cache")
        with again:
            assert all(same(next(whole), part) for part in taken(again.batches(start, BATCH), 5))


def test_fetching_positions_is_the_same_stream(stream: Stream) -> None:
    batch = next(stream.batches(24, BATCH))
    assert same(stream.fetch(np.arange(24, 24 + BATCH)), batch)
    scattered = stream.fetch(np.array([300, 2, 77]))
    check(scattered)
    assert scattered.epochs.tolist() == [2, 0, 0]


def test_reading_to_a_stop_in_natural_order(prefix: str, tmp_path: Path) -> None:
    total = sum(SHARDS)
    with opened(open_storage(prefix), tmp_path / "cache", Sequential(SHARDS)) as stream:
        for stop in (total, total - 3, 5, BATCH):
            found = list(stream.batches(0, BATCH, stop=stop))
            assert [row[1] for row in rows(found)] == list(range(stop))
            tails = [list(stream.batches(0, BATCH, own, stop)) for own in (slice(0, 7), slice(7, BATCH))]
            assert [len(tail) for tail in tails] == [len(found)] * 2
            together = sorted(rows(tails[0]) + rows(tails[1]))
            assert together == rows(found)


# The cache


class Counted(Folder):
    """A folder that counts downloads."""

    downloads: ClassVar[Counter[str]] = Counter()

    def download(self, key: str, path: Path) -> None:
        self.downloads[key] += 1
        super().download(key, path)


def folder_bytes(folder: Path) -> int:
    """Bytes in a folder whose files come and go meanwhile."""
    total = 0
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


def test_each_shard_is_fetched_once_while_it_fits(prefix: str, tmp_path: Path) -> None:
    Counted.downloads.clear()
    for _ in range(2):  # the second process finds it all there
        with opened(Counted(prefix), tmp_path / "cache") as stream:
            taken(stream.batches(0, BATCH), 2 * stream.samples // BATCH)
    assert set(Counted.downloads.values()) == {1}
    names = {path.name: path for path in (tmp_path / "cache").iterdir()}
    assert all(hashlib.sha256(path.read_bytes()).hexdigest() == name for name, path in names.items())


@pytest.mark.parametrize("lanes", [1, 2])
def test_the_cache_keeps_its_bound_and_each_shard_comes_once_an_epoch(prefix: str, tmp_path: Path, lanes: int) -> None:
    manifest = open_manifest(open_storage(prefix))
    largest = max(shard.bytes for shard in manifest.split("train").shards)
    order = Order(SHARDS, BATCH if lanes == 2 else 11, 5)
    assert order.lanes == lanes
    room = 2 * order.window * lanes * largest
    if room >= sum(shard.bytes for shard in manifest.split("train").shards):
        room = sum(shard.bytes for shard in manifest.split("train").shards) - 1
        order.window = 3
    Counted.downloads.clear()
    with opened(Counted(prefix), tmp_path / "cache", order, room) as stream:
        batches = stream.batches(0, order.batch)
        for _ in range(2 * stream.samples // order.batch):
            check(next(batches))
            assert folder_bytes(tmp_path / "cache") <= room
            assert len(stream._shards._held) <= 2 * order.window * lanes
    assert max(Counted.downloads.values()) <= 2 + lanes


def test_a_cache_too_small_is_refused_with_the_figure(prefix: str, tmp_path: Path) -> None:
    with opened(open_storage(prefix), tmp_path / "cache", room=40_000) as stream:
        with pytest.raises(ConfigError, match=r"data\.cache_gb"):
            next(stream.batches(0, BATCH))
        check(stream.fetch(np.arange(1)))
        with pytest.raises(ConfigError, match="in use"):
            stream.fetch(np.arange(stream.samples))
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(ConfigError, match=r"set data\.cache"):
        opened(open_storage(prefix), blocked / "cache")


def test_a_damaged_cached_copy_is_fetched_again_loudly(
    prefix: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with opened(open_storage(prefix), tmp_path / "cache") as stream:
        taken(stream.batches(0, BATCH), 10)
    for path in (tmp_path / "cache").iterdir():
        data = bytearray(path.read_bytes())
        data[600] ^= 1
        path.write_bytes(data)
    with opened(open_storage(prefix), tmp_path / "cache") as stream:
        for batch in taken(stream.batches(0, BATCH), 10):
            check(batch)
    assert "is damaged (sha256" in caplog.text


def test_two_streams_share_a_small_folder(prefix: str, tmp_path: Path) -> None:
    storage = open_storage(prefix)
    with opened(storage, tmp_path, room=340_000) as one, opened(storage, tmp_path, Sequential(SHARDS), 340_000) as two:
        for first, second in zip(one.batches(0, BATCH), two.batches(0, BATCH, stop=3 * two.samples), strict=False):
            check(first)
            check(second)


def test_what_a_killed_process_left_is_swept(prefix: str, tmp_path: Path) -> None:
    left = tmp_path / ".0123456789abcdef.tmp"
    left.write_bytes(b"half a shard")

    class Interfering(Folder):
        def download(self, key: str, path: Path) -> None:
            super().download(key, path)
            ShardCache(self, tmp_path, ROOM)  # another process starts meanwhile
            assert path.exists()

    with opened(Interfering(prefix), tmp_path) as stream:
        assert not left.exists()
        check(next(stream.batches(0, BATCH)))


# Faults


def spoil(data: bytes, kind: str) -> bytes:
    middle = len(data) // 2
    return {
        "truncated": data[:middle],
        "cut at a sample": data[: data.rindex(b"00000") // 512 * 512],
        "flipped": data[:middle] + bytes([data[middle] ^ 16]) + data[middle + 1 :],
        "zeroed header": bytes(512) + data[512:],
        "replaced": pack([record_of(1)]),
        "longer": data + bytes(512),
    }[kind]


@pytest.mark.parametrize("kind", ["truncated", "cut at a sample", "flipped", "zeroed header", "replaced", "longer"])
def test_a_changed_shard_is_named_before_a_sample_of_it_is_used(tmp_path: Path, kind: str) -> None:
    storage = open_storage(str(tmp_path / "data"))
    build(storage)
    storage.write("train-000003.tar", spoil(storage.read("train-000003.tar"), kind))
    with opened(storage, tmp_path / "cache", Sequential(SHARDS)) as stream:
        batches = stream.batches(0, 6)
        for batch in taken(batches, 3):  # the three shards before
            check(batch)
        with pytest.raises(DataError, match=r"train-000003\.tar.*expected.*prepare"):
            next(batches)
        check(stream.fetch(np.arange(3)))
    assert not list((tmp_path / "cache").glob(".*"))


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path / "data"))
    build(storage)
    storage.remove("train-000000.tar")
    with (
        opened(storage, tmp_path / "cache", Sequential(SHARDS)) as stream,
        pytest.raises(DataError, match=r"train-000000\.tar"),
    ):
        next(stream.batches(0, BATCH))


def test_a_manifest_that_miscounts_is_found_out(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path / "data"))
    build(storage)
    first = open_manifest(storage).split("train").shards[0]
    cache = ShardCache(storage, tmp_path / "cache", ROOM)
    with pytest.raises(DataError, match="7 samples, expected 6"):
        cache.open(replace(first, samples=6))


class Away(Folder):
    """A storage that stops answering for one shard."""

    answering: ClassVar[bool] = False

    def download(self, key: str, path: Path) -> None:
        if key == "train-000002.tar" and not self.answering:
            raise RemoteError("no success in 3 attempts", where=self.where(key))
        super().download(key, path)


def test_a_remote_that_does_not_answer_passes_through_and_may_come_back(prefix: str, tmp_path: Path) -> None:
    with opened(Away(prefix), tmp_path, Sequential(SHARDS)) as stream:
        batches = stream.batches(0, 6)
        taken(batches, 2)
        with pytest.raises(RemoteError, match=r"train-000002\.tar"):
            next(batches)
        Away.answering = True
        check(next(stream.batches(12, 6)))
        Away.answering = False


def test_records_that_contradict_the_manifest_are_refused(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path / "data"))
    build(storage)
    for name, value in [("labels", ("cat",)), ("attributes", ("Smiling",)), ("image", Image(size=8, channels=3))]:
        manifest = open_manifest(storage)
        object.__setattr__(manifest, name, value)
        split = manifest.split("train")
        with (
            Stream(storage, manifest, split, Sequential(SHARDS), tmp_path / "cache", ROOM) as stream,
            pytest.raises(DataError, match=r"train-000000\.tar row \d"),
        ):
            stream.fetch(np.arange(3))


# Nothing is left


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_closing_leaves_no_thread_descriptor_or_temporary_file(prefix: str, tmp_path: Path) -> None:
    threads, before = threading.active_count(), descriptors()
    stream = opened(open_storage(prefix), tmp_path / "cache")
    batches = stream.batches(0, BATCH)
    taken(batches, 3)
    stream.close()
    stream.close()
    batches.close()  # type: ignore[attr-defined]
    assert (threading.active_count(), descriptors()) == (threads, before)
    assert not list((tmp_path / "cache").glob(".*"))


def test_batches_may_be_abandoned_and_begun_again(stream: Stream) -> None:
    first = stream.batches(0, BATCH)
    one = next(first)
    first.close()  # type: ignore[attr-defined]
    assert same(next(stream.batches(0, BATCH)), one)
    assert len(stream._shards._held) <= len(SHARDS)


def test_what_is_open_stays_bounded_over_epochs(stream: Stream) -> None:
    batches = stream.batches(0, BATCH)
    taken(batches, 10)
    before = descriptors()
    taken(batches, 3 * stream.samples // BATCH)
    assert descriptors() <= before + 2
    assert len(stream._shards._held) <= 2 * 4 * 2


def test_over_s3_it_is_the_same_stream(s3: str, prefix: str, tmp_path: Path) -> None:
    storage = open_storage(f"{s3}/stream")
    build(storage)
    with opened(storage, tmp_path / "s3") as remote, opened(open_storage(prefix), tmp_path / "local") as local:
        for one, other in zip(taken(remote.batches(0, BATCH), 12), local.batches(0, BATCH), strict=False):
            assert same(one, other)
