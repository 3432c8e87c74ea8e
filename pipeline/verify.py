"""Is a dataset prefix what its manifest says? Every finding, not only the first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from pipeline.errors import DataError
from pipeline.manifest import CURE, ROOT, Counts, Manifest, Root, Shard
from pipeline.scratch import scratch
from pipeline.shard_lines import refuse_changed
from pipeline.shards import ShardIndex, decode, described, open_shard
from pipeline.storage import Storage
from pipeline.workers import ordered_map

Report = Callable[[int], None]


def problems(
    manifest: Manifest, *, deep: bool = False, workers: int = 1, report: Report | None = None
) -> Iterator[DataError]:
    """Yield what is wrong: shards missing or of another length; deep: digests, structure, every image, all counts."""
    root = Root(**{name: getattr(manifest, name) for name in Root.__dataclass_fields__})
    check = partial(_check_deep, manifest.storage, root) if deep else partial(_check_length, manifest.storage)
    for name, summary in manifest.splits.items():
        shards, counted = manifest.split(name).shards, []
        for shard, finding in zip(shards, ordered_map(check, shards, workers), strict=True):
            if report is not None:
                report(shard.samples)
            if isinstance(finding, DataError):
                yield finding
            elif finding is not None:
                counted.append(finding)
        if deep and len(counted) == len(shards) and _total(root, counted) != summary.counts:
            where = manifest.storage.where(ROOT)
            yield DataError(
                f"split {name!r} counts other attributes or classes than its shards", where=where, cure=CURE
            )


def _check_length(storage: Storage, shard: Shard) -> DataError | None:
    try:
        length = storage.size(shard.file)
    except DataError as error:
        return error
    if length == shard.bytes:
        return None
    return DataError(f"{length} bytes, expected {shard.bytes}", where=storage.where(shard.file), cure=CURE)


def _check_deep(storage: Storage, root: Root, shard: Shard) -> DataError | Counts:
    """Fetch a shard, prove its bytes, read it strictly and decode every image; count what it holds."""
    where = storage.where(shard.file)
    with scratch() as folder:
        path = folder / "shard.tar"
        try:
            storage.download(shard.file, path)
            refuse_changed(path, shard, where)
            with open_shard(path, shard.samples, where, root.foreign) as index:
                return _count(root, [_checked(root, index, row, where) for row in range(len(index))])
        except DataError as error:
            return error


def _checked(root: Root, index: ShardIndex, row: int, where: str) -> dict[str, Any]:
    """Read a row whole and return its metadata."""
    image, meta = index.read(row)
    try:
        decode(image, root.size, root.channels, root.image.encoding)
        described(meta, root.labels, root.attributes)
    except DataError as error:
        raise DataError(f"row {row}: {error.what}", where=where, cure=CURE) from error
    return meta


def _count(root: Root, metas: list[dict[str, Any]]) -> Counts:
    return Counts(
        positive=tuple(sum(meta["attributes"][i] == 1 for meta in metas) for i in range(len(root.attributes))),
        negative=tuple(sum(meta["attributes"][i] == -1 for meta in metas) for i in range(len(root.attributes))),
        labels=tuple(sum(meta["label"] == i for meta in metas) for i in range(len(root.labels))),
    )


def _total(root: Root, counted: list[Counts]) -> Counts:
    def summed(rows: list[tuple[int, ...]], width: int) -> tuple[int, ...]:
        return tuple(map(sum, zip(*rows, strict=True))) if rows else (0,) * width

    return Counts(
        positive=summed([counts.positive for counts in counted], len(root.attributes)),
        negative=summed([counts.negative for counts in counted], len(root.attributes)),
        labels=summed([counts.labels for counts in counted], len(root.labels)),
    )
