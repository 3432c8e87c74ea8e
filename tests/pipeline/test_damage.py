"""The corruption matrix: what is not as the manifest says reaches no batch, and is never passed over in silence."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import DataError
from pipeline.manifest import Manifest, open_manifest
from pipeline.order import Sequential
from pipeline.shards import open_shard
from pipeline.storage import canonical_json, open_storage, sha256_hex
from pipeline.verify import problems
from tests.pipeline.tiny import ROOM, build, check, opened, pixels_of
from tests.reliability import measured

COUNTS = (3, 2, 3)
SHARD = "train-000001.tar"
READABLE = r"train-000001\.tar: .*(expected|should).*(prepare|fetch)"
"""A message names the shard, what was found and expected, and the cure."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return build(open_storage(str(tmp_path_factory.mktemp("whole"))), COUNTS)


def damages(data: bytes) -> Iterator[tuple[str, bytes]]:
    """Everything that is done to a small shard."""
    for cut in range(0, len(data), 512):
        yield f"cut at {cut}", data[:cut]
    for block in range(0, 10 * 512, 512):
        if any(data[block : block + 512]):
            yield f"block {block} zeroed", data[:block] + bytes(512) + data[block + 512 :]
            for bit in (3, 130, 500):
                place = block + bit
                yield f"byte {place} flipped", data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :]
    yield "a block lost", data[:1024] + data[1536:]
    yield "a block twice", data[:1024] + data[512:]
    yield "something appended", data + bytes(10240)


def test_no_damage_of_a_shard_is_silent(whole: Manifest, tmp_path: Path) -> None:
    """Digests first; structure, which proves less, on its own."""
    storage, path = open_storage(str(tmp_path / "data")), tmp_path / "x.tar"
    build(storage, COUNTS)
    good, cases = storage.read(SHARD), 0
    for name, data in damages(good):
        storage.write(SHARD, data)
        with (
            opened(storage, tmp_path / "cache", Sequential(COUNTS)) as stream,
            pytest.raises(DataError, match=READABLE) as caught,
        ):
            stream.fetch(np.arange(8))
        assert "\n" not in str(caught.value), name
        cases += 1
        path.write_bytes(data)
        if name.startswith("cut") or (name.endswith("zeroed") and data[257:262] != b"ustar"):
            with pytest.raises(DataError, match=r"cut or damaged|samples, expected|has .'"):
                open_shard(path, 2)
    assert cases > 50
    measured("R11", "damages of a shard refused before a sample of it came", cases, f"of {cases}")
    storage.write(SHARD, good)
    with opened(storage, tmp_path / "cache", Sequential(COUNTS)) as stream:
        check(stream.fetch(np.arange(8)))


def test_shards_that_changed_places_are_found(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path / "data"))
    build(storage, COUNTS)
    one, other = storage.read("train-000000.tar"), storage.read("train-000002.tar")
    storage.write("train-000000.tar", other)
    storage.write("train-000002.tar", one)
    found = list(problems(open_manifest(storage), deep=True))
    assert [str(error).partition(": ")[0].rpartition("/")[2] for error in found] == [
        "train-000000.tar",
        "train-000002.tar",
    ]
    with (
        opened(storage, tmp_path / "cache", Sequential(COUNTS)) as stream,
        pytest.raises(DataError, match=r"train-000000\.tar: sha256 \w{12}, expected \w{12}; restore the shard"),
    ):
        stream.fetch(np.arange(3))


def edited(value: object, path: tuple[str | int, ...], change: object) -> None:
    *steps, last = path
    for step in steps:
        value = value[step]  # type: ignore[index]
    value[last] = change  # type: ignore[index]


@pytest.mark.parametrize(
    ("path", "change"),
    [
        (("splits", "train", "samples"), 9),
        (("splits", "train", "shards"), 2),
        (("splits", "train", "parts", 0, "sha256"), "0" * 64),
        (("splits", "train", "parts", 0, "bytes"), 1),
        (("splits", "train", "parts", 0, "shards"), 2),
        (("splits", "train", "parts", 0, "file"), "shards-001.jsonl"),
        (("splits", "train", "parts"), []),
        (("splits", "train", "counts", "positive"), [1]),
        (("image", "size"), 8),
        (("image", "channels"), 1),
        (("image", "encoding"), "raw"),
        (("attributes",), ["Smiling"]),
        (("labels",), ["cat"]),
        (("window",), 0),
        (("origin", "kind"), "webdataset in place"),
        (("schema",), 2),
    ],
)
def test_no_edit_of_the_root_is_silent(tmp_path: Path, path: tuple[str | int, ...], change: object) -> None:
    storage = open_storage(str(tmp_path / "data"))
    build(storage, COUNTS)
    root = json.loads(storage.read("manifest.json"))
    edited(root, path, change)
    storage.write("manifest.json", canonical_json(root))
    with pytest.raises(DataError), opened(storage, tmp_path / "cache", Sequential(COUNTS)) as stream:
        stream.fetch(np.arange(8))


@pytest.mark.parametrize(
    ("line", "field", "change"),
    [
        (0, "sha256", "0" * 64),
        (0, "bytes", 10),
        (0, "samples", 2),
        (0, "file", "train-000002.tar"),
        (0, "file", "../x.tar"),
        (0, "more", 1),
        (0, "samples", "3"),
        (0, "samples", 0),
    ],
)
def test_no_edit_of_a_part_is_silent_even_with_its_digest_mended(
    tmp_path: Path, line: int, field: str, change: object
) -> None:
    storage = open_storage(str(tmp_path / "data"))
    build(storage, COUNTS)
    lines = [json.loads(text) for text in storage.read("shards-000.jsonl").splitlines()]
    lines[line][field] = change
    data = b"".join(map(canonical_json, lines))
    root = json.loads(storage.read("manifest.json"))
    root["splits"]["train"]["parts"][0] |= {"bytes": len(data), "sha256": sha256_hex(data)}
    storage.write("shards-000.jsonl", data)
    storage.write("manifest.json", canonical_json(root))
    with pytest.raises(DataError), opened(storage, tmp_path / "cache", Sequential(COUNTS)) as stream:
        stream.fetch(np.arange(8))


# Quarantine

MANY = (1, *[64] * 16)
"""One sample of 1025 may be lost."""


def test_a_damaged_shard_is_quarantined_counted_and_tagged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    storage = open_storage(str(tmp_path / "data"))
    build(storage, MANY)
    storage.write("train-000000.tar", bytes(10240))
    with opened(storage, tmp_path / "cache", Sequential(MANY), ROOM * 8, damaged="quarantine") as stream:
        for _ in range(2):
            batch = stream.fetch(np.arange(6))
            assert batch.samples.tolist() == [0, 1, 2, 3, 4, 5]
            assert batch.stand_ins.tolist() == [True, False, False, False, False, False]
            assert np.array_equal(batch.pixels[0].permute(1, 2, 0).numpy(), pixels_of(1))
        assert stream.figures()["data/samples_quarantined"] == 1
    assert "quarantined 1 samples" in caplog.text


def test_every_damage_is_quarantined(tmp_path: Path) -> None:
    """The whole matrix: a neighbour stands in for the only sample of the shard, tagged and counted."""
    storage = open_storage(str(tmp_path / "data"))
    build(storage, MANY)
    for name, data in damages(storage.read("train-000000.tar")):
        storage.write("train-000000.tar", data)
        with opened(storage, tmp_path / "cache", Sequential(MANY), ROOM * 8, damaged="quarantine") as stream:
            batch = stream.fetch(np.arange(3))
            assert batch.stand_ins.tolist() == [True, False, False], name
            assert np.array_equal(batch.pixels[0].permute(1, 2, 0).numpy(), pixels_of(1)), name
            assert stream.figures()["data/samples_quarantined"] == 1, name


def test_more_than_one_in_a_thousand_is_refused(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path / "data"))
    build(storage, MANY)
    storage.remove("train-000003.tar")
    with (
        opened(storage, tmp_path / "cache", Sequential(MANY), ROOM * 8, damaged="quarantine") as stream,
        pytest.raises(DataError, match=r"train-000003\.tar: .*64 of 1025 samples damaged, 0\.1% may be"),
    ):
        stream.fetch(np.arange(300))


def test_what_ranks_find_apart_counts_together(tmp_path: Path) -> None:
    """One sample of 1026 may be lost: two ranks that lost one each have lost too much, and say the same."""
    samples = (1, 64, 1, *[64] * 15)
    storage = open_storage(str(tmp_path / "data"))
    build(storage, samples)
    for number in (0, 2):
        storage.write(f"train-{number:06d}.tar", bytes(10240))
    with contextlib.ExitStack() as left:
        ranks = [
            left.enter_context(
                opened(storage, tmp_path / f"{rank}", Sequential(samples), ROOM * 8, damaged="quarantine")
            )
            for rank in (0, 1)
        ]
        for position, stream in zip((0, 65), ranks, strict=True):
            stream.fetch(np.array([position]))
            stream.told(stream.damaged)
            assert stream.figures()["data/samples_quarantined"] == 1
        found = [number for stream in ranks for number in stream.damaged]
        for stream in ranks:
            with pytest.raises(DataError, match=r"train-000000\.tar: .*2 of 1026 samples damaged, 0\.1% may be"):
                stream.told(found)
