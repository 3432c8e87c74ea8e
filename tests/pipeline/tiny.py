"""A dataset of tiny shards of unequal length, whose every sample is a function of its number."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from pipeline.manifest import Counts, Image, Manifest, Origin, Root, Shard, open_manifest, write_manifest
from pipeline.order import Order, Sequential
from pipeline.prepare import tool
from pipeline.quarantine import Policy
from pipeline.shards import Record, encode_png, pack
from pipeline.storage import Storage, sha256_hex
from pipeline.stream import Batch, Stream

SIZE, ATTRIBUTES, LABELS = 4, ("Smiling", "Bangs"), ("cat", "dog")
BATCH, ROOM = 12, 1 << 20
SHARDS = (7, 5, 6, 6, 7, 1, 6, 6, 6, 6, 6, 6, 6, 6, 6, 6, 6, 6)


def pixels_of(sample: int) -> np.ndarray:
    return np.random.default_rng(sample).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)


def record_of(sample: int) -> Record:
    label = None if sample % 3 == 2 else sample % 3
    return Record(
        key=f"{sample:08d}",
        image=encode_png(pixels_of(sample)),
        attributes=(sample % 3 - 1, 1),
        label=label,
        source=f"{sample}.png",
        source_sha256="0" * 64,
    )


def build(storage: Storage, counts: tuple[int, ...] = SHARDS) -> Manifest:
    """Write the dataset."""
    starts = np.cumsum([0, *counts]).tolist()
    shards = []
    for number, (first, count) in enumerate(zip(starts, counts, strict=False)):
        data = pack(record_of(sample) for sample in range(first, first + count))
        file = f"train-{number:06d}.tar"
        storage.write(file, data)
        shards.append(Shard(file=file, bytes=len(data), sha256=sha256_hex(data), samples=count))
    root = Root(
        image=Image(size=SIZE, channels=3),
        attributes=ATTRIBUTES,
        labels=LABELS,
        license="CC0-1.0",
        redistribution=True,
        origin=Origin(kind="test", inputs="0" * 64, split="all", seed=0),
        tool=tool(),
    )
    return write_manifest(storage, root, {"train": (Counts(positive=(1, 1), negative=(1, 0), labels=(1, 1)), shards)})


def opened(
    storage: Storage,
    cache: Path,
    order: Sequential | None = None,
    room: int = ROOM,
    threads: int = 2,
    damaged: Policy = "fail",
    beside: int = 1,
) -> Stream:
    manifest = open_manifest(storage)
    train = manifest.split("train")
    return Stream(storage, manifest, train, order or Order(SHARDS, BATCH, 5), cache, room, threads, damaged, beside)


def check(batch: Batch) -> None:
    """Every row is the sample it says it is."""
    for pixels, label, attributes, sample in zip(
        batch.pixels, batch.labels.tolist(), batch.attributes.tolist(), batch.samples.tolist(), strict=True
    ):
        assert np.array_equal(pixels.permute(1, 2, 0).numpy(), pixels_of(sample))
        assert label == (-1 if sample % 3 == 2 else sample % 3)
        assert attributes == [sample % 3 - 1, 1]


def taken(batches: Iterator[Batch], count: int) -> list[Batch]:
    return [next(batches) for _ in range(count)]
