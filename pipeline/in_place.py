"""A manifest for shards that others wrote (`webdataset.ShardWriter`, img2dataset), which stay as they are.

Every shard is read strictly once: its digest, every sample's image in full, its class and JSON. Shards go to a split as
a whole, by their names (`train`, `val`, `test` ...) or by a rule. What a stream needs must hold of all images: one
size, one mode, one format.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.errors import DataError
from pipeline.manifest import IN_PLACE, Counts, Image, Origin, Root, Shard
from pipeline.pictures import inspect
from pipeline.prepare import tool
from pipeline.scratch import scratch
from pipeline.shards import decode
from pipeline.sources.item import FREE, Item, refuse_odd_names, refuse_stray
from pipeline.sources.tables import split_name
from pipeline.sources.webdataset import class_names, is_sign, samples
from pipeline.splits import assign, named_rule
from pipeline.storage import Storage, canonical_json, sha256_file, sha256_hex
from pipeline.workers import OrderedMap

MAGIC = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpg", b"RIFF": "webp"}
CURE = "pack the images anew: data prepare SOURCE DEST --size N, with --convert where alpha or 16 bits must go"


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What one shard holds; `signs` counts 1 and -1 of every JSON field that may be an attribute."""

    shard: Shard
    form: Image
    labels: Counter[str]
    signs: Mapping[str, tuple[int, int]]


def survey(
    storage: Storage, split: str, seed: int, licence: str, mapped: OrderedMap, report: Callable[[int], None]
) -> tuple[Root, dict[str, tuple[Counts, Sequence[Shard]]]]:
    """Read every tar under a prefix; the root of their manifest and their splits, ready to be written."""
    keys = [key for key in storage.list() if key.endswith(".tar")]
    if not keys:
        raise DataError("no .tar here", where=storage.url, cure="--in-place takes a prefix of WebDataset shards")
    found = {}
    for key, own in zip(keys, mapped(partial(_read, storage), keys), strict=True):
        found[key] = own
        report(own.shard.samples)
    image = _common(storage, found)
    names, labels = _names(list(found.values())), class_names({word for own in found.values() for word in own.labels})
    items = [Item(file=Path(key), source=key, split=split_name(Path(key).name)) for key in keys]
    refuse_odd_names((*names, *labels), storage.url)
    refuse_stray(items)
    splits = {
        name: _split([found[item.source] for item in sorted(chosen, key=lambda item: item.source)], names, labels)
        for name, chosen in _assigned(items, split, seed).items()
    }
    digests = canonical_json([asdict(own.shard) for own in found.values()])
    origin = Origin(kind=IN_PLACE, inputs=sha256_hex(digests), split=named_rule(items, split), seed=seed)
    root = Root(
        image=image,
        attributes=names,
        labels=labels,
        license=licence or "unknown",
        redistribution=licence in FREE,
        origin=origin,
        tool=tool(),
    )
    return root, splits


def _read(storage: Storage, key: str) -> Survey:
    """Fetch one shard and read all of it."""
    with scratch() as folder:
        path = folder / Path(key).name
        storage.download(key, path)
        form, labels, rows = None, Counter(), []
        for item, row in samples(path.parent, path, storage.where(key)):
            data = item.read()
            form = form or _form(data, f"{storage.where(key)}: {item.source}")
            try:
                decode(data, form.size, form.channels)
            except DataError as error:
                where = f"{storage.where(key)}: {item.source}"
                raise DataError(error.what, where=where, cure=CURE) from error
            rows.append(row)
            labels.update([item.label] if item.label else [])
        if form is None:
            raise DataError("a shard without samples", where=storage.where(key), cure="remove it")
        shard = Shard(file=key, bytes=path.stat().st_size, sha256=sha256_file(path), samples=len(rows))
        return Survey(shard=shard, form=form, labels=labels, signs=_signs(rows))


def _form(data: bytes, where: str) -> Image:
    """What an image is; those that every decoder would read in its own way are refused."""
    header = inspect(data, where)
    if header.width != header.height or not header.plain:
        found = f"{header.width}x{header.height} {header.mode}{'' if header.plain else ' with alpha, CMYK or 16 bits'}"
        raise DataError(f"{found}, expected a square L or RGB of 8 bits", where=where, cure=CURE)
    encoding = next((name for magic, name in MAGIC.items() if data.startswith(magic)), "")
    if not encoding:
        raise DataError("not PNG, JPEG or WebP", where=where, cure=CURE)
    channels = 1 if header.mode == "L" else 3
    return Image(size=header.width, channels=channels, encoding=encoding, lossless=encoding == "png")


def _common(storage: Storage, found: Mapping[str, Survey]) -> Image:
    """The form of all images, or the name of a shard that differs."""
    key, first = next(iter(found.items()))
    for other, own in found.items():
        if own.form != first.form:
            what = f"{_said(own.form)}, and {key} {_said(first.form)}"
            raise DataError(what, where=storage.where(other), cure=CURE)
    return first.form


def _said(form: Image) -> str:
    return f"holds {form.encoding} of {form.size} px with {form.channels} channels"


def _assigned(items: list[Item], split: str, seed: int) -> dict[str, list[Item]]:
    """Shards by split; what names say nothing of is all for training, unless a rule is given."""
    if split == "auto" and not any(item.split for item in items):
        return {"train": items}
    return assign(items, split, seed)


def _signs(rows: Sequence[Mapping[str, Any]]) -> dict[str, tuple[int, int]]:
    columns = {name: [row.get(name, "") for row in rows] for name in rows[0] if name != "label"}
    return {
        name: (sum(value == 1 for value in column), sum(value is not None and value != 1 for value in column))
        for name, column in columns.items()
        if all(map(is_sign, column))
    }


def _names(found: Sequence[Survey]) -> tuple[str, ...]:
    """Fields that are an attribute in every shard, and known somewhere."""
    first = found[0].signs
    return tuple(
        name for name in first if all(name in own.signs for own in found) and any(sum(own.signs[name]) for own in found)
    )


def _split(found: Sequence[Survey], names: Sequence[str], labels: Sequence[str]) -> tuple[Counts, Sequence[Shard]]:
    counts = Counts(
        positive=tuple(sum(own.signs[name][0] for own in found) for name in names),
        negative=tuple(sum(own.signs[name][1] for own in found) for name in names),
        labels=tuple(sum(own.labels[word] for own in found) for word in labels),
    )
    return counts, [own.shard for own in found]
