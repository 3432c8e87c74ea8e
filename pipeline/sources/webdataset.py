"""Another WebDataset: tars with an image a key, and `.json` or `.cls` beside it; ours too, by their manifest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.errors import DataError
from pipeline.manifest import ROOT, Manifest, Shard, open_manifest
from pipeline.shard_lines import refuse_changed
from pipeline.shards import RAW, described, foreign_row, grouped, open_shard, place_foreign
from pipeline.sources.item import Item, Source
from pipeline.sources.tables import split_name
from pipeline.storage import open_storage


def looks(root: Path) -> bool:
    """Whether there are tars."""
    return (root / ROOT).is_file() or bool(_files(root))


def read(root: Path, scratch: Path) -> Source:
    """List the samples of every tar; fields of the JSON that are true, false, 1, 0, -1 or null are attributes."""
    if (root / ROOT).is_file():
        return _read_ours(open_manifest(open_storage(str(root))), root)
    items: list[Item] = []
    rows: list[dict[str, Any]] = []
    for path in _files(root):
        for item, row in samples(root, path, str(path)):
            items.append(item)
            rows.append(row)
    names = attribute_names(rows)
    described = tuple(
        replace(item, attributes=tuple(_sign(row.get(name)) for name in names))
        for item, row in zip(items, rows, strict=True)
    )
    classes = class_names({item.label for item in items if item.label is not None})
    return Source(kind="webdataset", items=described, attributes=names, classes=classes)


def attribute_names(rows: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    """Fields that every row has, with true, false, 1, 0, -1 or null, and not null in all."""
    first = rows[0] if rows else {}
    return tuple(
        name
        for name in first
        if name != "label"
        and all(is_sign(row.get(name, "")) for row in rows)
        and any(row[name] is not None for row in rows)
    )


def is_sign(value: Any) -> bool:
    """Whether a JSON value may be an attribute's: true, false, 1, 0, -1, or null for unknown."""
    return value is None or value in (True, False, -1)


def class_names(words: set[str]) -> tuple[str, ...]:
    """Words for classes in order: numbers by value, then text."""
    return tuple(sorted(words, key=lambda word: (not word.isdecimal(), int(word) if word.isdecimal() else 0, word)))


def _files(root: Path) -> list[Path]:
    return sorted(root.rglob("*.tar"))


def samples(root: Path, path: Path, where: str) -> Iterator[tuple[Item, dict[str, Any]]]:
    """Every sample of a tar with its JSON; `where` names the tar in messages."""
    relative = path.relative_to(root).as_posix()
    with path.open("rb") as file:
        for key, fields in grouped(file, where, foreign=True):
            image, *others = place_foreign(key, fields, where)
            try:
                row, word = foreign_row(*(_bytes(file, place) for place in others))
            except ValueError as error:
                raise DataError(f"sample {key!r}: {error}", where=where, cure="mend or remove the sample") from error
            item = Item(
                file=path,
                source=f"{relative}/{key}",
                label=word or None,
                split=split_name(path.name) or split_name(relative),
                offset=image[0],
                length=image[1],
            )
            yield item, row


def _bytes(file: Any, place: tuple[int, int]) -> bytes:
    file.seek(place[0])
    return file.read(place[1])


def _sign(value: Any) -> int:
    return 0 if value is None else 1 if value == 1 else -1


def _read_ours(manifest: Manifest, root: Path) -> Source:
    """A dataset of ours: its own splits, names and licence; pictures are named as they were in its source."""
    if manifest.foreign is not None:
        raise DataError("shards of others, used in place", where=str(root), cure="give their folder without manifest")
    items = [
        item
        for split in manifest.splits
        for shard in manifest.split(split).shards
        for item in _our_items(manifest, root / shard.file, split, shard)
    ]
    return Source(
        kind="webdataset",
        items=tuple(items),
        attributes=manifest.attributes,
        classes=manifest.labels,
        license=manifest.license,
    )


def _our_items(manifest: Manifest, path: Path, split: str, shard: Shard) -> Iterator[Item]:
    size, channels, raw = manifest.size, manifest.channels, manifest.image.encoding == RAW
    refuse_changed(path, shard, str(path))
    with open_shard(path, shard.samples, str(path)) as index:
        for row in range(len(index)):
            _, meta = index.read(row)
            try:
                label, signs = described(meta, manifest.labels, manifest.attributes)
            except DataError as error:
                raise DataError(f"row {row}: {error.what}", where=index.name, cure=error.cure) from error
            offset, length = index.places[row][0].tolist()
            yield Item(
                file=path,
                source=f"{split}/{meta['source']}",
                attributes=tuple(signs),
                label=None if label is None else manifest.labels[label],
                split=split,
                offset=offset,
                length=length,
                shape=(channels, size, size) if raw else (),
                planar=True,
            )
