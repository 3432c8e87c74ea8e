"""The manifest: its golden bytes, its refusals, its conditional write."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.errors import ConflictError, DataError, UsageError
from pipeline.manifest import (
    PART_SHARDS,
    Counts,
    Image,
    Manifest,
    Origin,
    Root,
    Shard,
    Tool,
    open_manifest,
    write_manifest,
)
from pipeline.storage import MissingError, Storage, canonical_json, open_storage, sha256_hex

ROOT = Root(
    image=Image(size=8, channels=3),
    attributes=("Smiling", "Young"),
    labels=("day", "night"),
    license="CC0-1.0",
    redistribution=True,
    origin=Origin(kind="folder", inputs="0" * 64, split="glow-like", seed=0),
    tool=Tool(name="glow-pipeline data prepare", version="1", pillow="1", zlib="2", webdataset="3"),
)
SPLITS = {
    "val": (
        Counts(positive=(1, 0), negative=(0, 1), labels=(1, 0)),
        [Shard(file="val-000000.tar", bytes=10240, sha256="b" * 64, samples=1)],
    ),
    "train": (
        Counts(positive=(2, 0), negative=(1, 3), labels=(1, 2)),
        [
            Shard(file="train-000000.tar", bytes=20480, sha256="a" * 64, samples=2),
            Shard(file="train-000001.tar", bytes=10240, sha256="c" * 64, samples=1),
        ],
    ),
}
GOLDEN_ROOT = (
    '{"attributes":["Smiling","Young"],"image":{"channels":3,"crop":"none","encoding":"png","lossless":true,'
    '"resize":"none","size":8},"labels":["day","night"],"license":"CC0-1.0","origin":{"inputs":"' + "0" * 64 + '",'
    '"kind":"folder","seed":0,"split":"glow-like"},"redistribution":true,"schema":1,"splits":{"train":{"counts":'
    '{"labels":[1,2],"negative":[1,3],"positive":[2,0]},"parts":[{"bytes":260,"file":"shards-000.jsonl","sha256":'
    '"637b7067aec95d7d13430cc233666b5398f26fd086c464601c15d988feca4c36","shards":2}],"samples":3,"shards":2},"val":{"counts":{"labels":[1,0],"negative":[0,1],"positive":'
    '[1,0]},"parts":[{"bytes":128,"file":"shards-001.jsonl","sha256":'
    '"3a33b6754e5f4881627e982dcf666455bd3bd926e1e9ea6798f16746b9cb501f","shards":1}],"samples":1,"shards":1}},'
    '"tool":{"name":"glow-pipeline data prepare","pillow":"1","version":"1","webdataset":"3","zlib":"2"},"window":4}\n'
)


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return open_storage(str(tmp_path))


@pytest.fixture
def manifest(storage: Storage) -> Manifest:
    return write_manifest(storage, ROOT, SPLITS)


def test_golden_bytes(storage: Storage, manifest: Manifest) -> None:
    """These bytes are the format: a change here is a new schema."""
    assert storage.read("manifest.json").decode() == GOLDEN_ROOT
    assert storage.read("shards-000.jsonl").decode() == (
        '{"bytes":20480,"file":"train-000000.tar","samples":2,"sha256":"' + "a" * 64 + '"}\n'
        '{"bytes":10240,"file":"train-000001.tar","samples":1,"sha256":"' + "c" * 64 + '"}\n'
    )
    assert manifest.digest == sha256_hex(GOLDEN_ROOT.encode())
    assert storage.list() == ["README.md", "manifest.json", "shards-000.jsonl", "shards-001.jsonl"]


def test_what_was_written_is_opened(storage: Storage, manifest: Manifest) -> None:
    opened = open_manifest(storage)
    assert opened == manifest
    assert (opened.size, opened.channels, opened.lossless, opened.editable) == (8, 3, True, ("Smiling",))
    train = opened.split("train")
    assert (train.name, train.samples, tuple(train.shards)) == ("train", 3, tuple(SPLITS["train"][1]))
    with pytest.raises(UsageError, match="splits here: train, val"):
        opened.split("test")


def test_a_prefix_without_manifest_is_no_dataset(storage: Storage) -> None:
    storage.write("train-000000.tar", b"")
    with pytest.raises(MissingError, match="no dataset here"):
        open_manifest(storage)


def test_the_same_dataset_again_is_fine_another_is_a_conflict(storage: Storage, manifest: Manifest) -> None:
    assert write_manifest(storage, ROOT, SPLITS) == manifest
    before = {key: storage.read(key) for key in storage.list()}
    with pytest.raises(ConflictError, match="another dataset is here; choose another prefix"):
        write_manifest(storage, replace(ROOT, license="MIT"), SPLITS)
    assert {key: storage.read(key) for key in storage.list()} == before


def test_the_card_is_for_people(storage: Storage, manifest: Manifest) -> None:
    text = storage.read("README.md").decode()
    for words in (
        "4 images of 8x8 px, RGB",
        "CC0-1.0",
        "| train | 3 | 2 |",
        "| Smiling | 2 | 1 |",
        "| night | 2 | 0 |",
    ):
        assert words in text
    assert "Young" not in text


def changed_root(**changes: object) -> bytes:
    return canonical_json(json.loads(GOLDEN_ROOT) | changes)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"{", "not JSON"),
        (b"[]", "schema None"),
        (changed_root(schema=2), "schema 2, this program reads 1"),
        (changed_root(windows=4), "windows: Unexpected"),
        (changed_root(window="4"), "window: Input should be a valid integer"),
        (changed_root(attributes=["Smiling"]), "counts of split 'train' do not fit"),
        (json.dumps(json.loads(GOLDEN_ROOT)).encode(), "not in canonical form"),
        (b"[" * 200_000, "not JSON"),
        (GOLDEN_ROOT.replace('"samples":1', '"samples":0').encode(), "split 'val' with 0 samples"),
        (GOLDEN_ROOT.replace('"train":', '"":').encode(), "split '' with 3 samples"),
    ],
)
def test_malformed_roots_are_refused(storage: Storage, data: bytes, message: str) -> None:
    storage.write("manifest.json", data)
    with pytest.raises(DataError, match=message) as caught:
        open_manifest(storage)
    assert "manifest.json" in str(caught.value)


@pytest.mark.parametrize("splits", [{"": SPLITS["val"]}, {"train": (SPLITS["val"][0], [])}], ids=["no name", "empty"])
def test_empty_splits_are_not_written(storage: Storage, splits: dict) -> None:
    with pytest.raises(DataError, match=r"manifest\.json: split '(train)?' with \d samples"):
        write_manifest(storage, ROOT, splits)
    assert storage.list() == []


@pytest.mark.parametrize("change", [{"file": 'a"b.tar'}, {"samples": 0}], ids=["quote", "empty shard"])
def test_a_shard_that_could_not_be_read_again_is_not_written(storage: Storage, change: dict) -> None:
    counts, (shard,) = SPLITS["val"]
    with pytest.raises(DataError, match="no manifest can name this shard; rename"):
        write_manifest(storage, ROOT, {"train": (counts, [shard, replace(shard, **change)])})
    assert storage.list() == []


def test_a_part_that_leaves_the_prefix_is_refused(storage: Storage) -> None:
    storage.write("manifest.json", GOLDEN_ROOT.replace("shards-000.jsonl", "../shards.jsonl").encode())
    with pytest.raises(DataError, match="not a storage key"):
        open_manifest(storage)


@pytest.mark.parametrize("position", range(0, 260, 20))
def test_every_changed_byte_of_a_part_is_found(storage: Storage, manifest: Manifest, position: int) -> None:
    data = bytearray(storage.read("shards-000.jsonl"))
    data[position] ^= 1
    storage.write("shards-000.jsonl", bytes(data))
    with pytest.raises(DataError, match=r"shards-000\.jsonl: 260 bytes with sha256"):
        open_manifest(storage).split("train")
    assert open_manifest(storage).split("val").samples == 1


MEASURED = """
import resource, sys, time
from pipeline.manifest import open_manifest
from pipeline.storage import open_storage
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = time.process_time()
shards = open_manifest(open_storage(sys.argv[1])).split("train").shards
print(time.process_time() - start, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, len(shards))
"""


def test_two_hundred_thousand_shards_open_at_once(storage: Storage) -> None:
    count = 200_000
    lines = [
        b'{"bytes":104857600,"file":"train-%06d.tar","samples":512,"sha256":"%064x"}\n' % (n, n) for n in range(count)
    ]
    parts = []
    for number in range(count // PART_SHARDS):
        data = b"".join(lines[number * PART_SHARDS : (number + 1) * PART_SHARDS])
        storage.write(f"shards-{number:03d}.jsonl", data)
        part = {"file": f"shards-{number:03d}.jsonl", "bytes": len(data), "sha256": sha256_hex(data)}
        parts.append({**part, "shards": PART_SHARDS})
    root = json.loads(GOLDEN_ROOT)
    root["splits"] = {"train": {**root["splits"]["train"], "samples": 512 * count, "shards": count, "parts": parts}}
    storage.write("manifest.json", canonical_json(root))
    done = subprocess.run([sys.executable, "-c", MEASURED, storage.url], capture_output=True, text=True, check=True)
    seconds, megabytes, opened = map(float, done.stdout.split())
    assert opened == count
    assert megabytes < 100
    assert seconds < 5 * 2


def test_many_shards_are_cut_into_parts(storage: Storage) -> None:
    count = PART_SHARDS + 5
    shards = [Shard(file=f"train-{n:06d}.tar", bytes=n, sha256=f"{n:064x}", samples=2) for n in range(count)]
    counts = Counts(positive=(0, 0), negative=(0, 0), labels=(0, 0))
    manifest = write_manifest(storage, ROOT, {"train": (counts, shards), "val": (counts, shards[:1])})
    assert [part.file for part in manifest.splits["train"].parts] == ["shards-000.jsonl", "shards-001.jsonl"]
    assert [part.file for part in manifest.splits["val"].parts] == ["shards-002.jsonl"]
    opened = open_manifest(storage).split("train")
    assert (opened.samples, tuple(opened.shards)) == (2 * count, tuple(shards))
