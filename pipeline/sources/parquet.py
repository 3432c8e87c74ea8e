"""Parquet files with image bytes, as the `datasets` library writes them: SPLIT-00000-of-00001.parquet.

The image column is a struct of `bytes` and `path`, or binary. Booleans and columns of 1, 0 and -1 are attributes, a
column `label` is the class, with the names that the file's own metadata gives. Pages are compressed, so the pictures
are unpacked once, one file a file, into the scratch folder.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.errors import DataError
from pipeline.sources.folder import TABLES
from pipeline.sources.item import Item, Source
from pipeline.sources.tables import LABELS, attribute_columns, opened_parquet, split_name
from pipeline.storage import parse_json

ROWS = 64
"""Rows decoded at a time."""


def looks(root: Path) -> bool:
    """Whether there are parquet files other than tables of attributes."""
    return bool(_files(root))


def read(root: Path, scratch: Path) -> Source:
    """Unpack the pictures of every file, and list them."""
    files = _files(root)
    items: list[Item] = []
    columns: dict[str, list[Any]] = {}
    with opened_parquet(files[0]) as first:
        schema = first.schema_arrow
    image, label, others = _columns(schema, str(files[0]))
    names = _class_names(schema, label)
    for number, path in enumerate(files):
        _refuse_other(path, schema, image, files[0])
        own, values = _unpacked(root, path, scratch / f"{number:05d}.bin", image, label, others)
        items += [replace(item, label=_class(item.label, names, path)) for item in own]
        for name in others:
            columns.setdefault(name, []).extend(values[name])
    kept = attribute_columns(columns)
    attributes = zip(*kept.values(), strict=True) if kept else ((),) * len(items)
    items = [replace(item, attributes=tuple(row)) for item, row in zip(items, attributes, strict=True)]
    aside = [name for name in schema.names if name not in (image, label, *kept)]
    notes = (f"left aside the columns {', '.join(aside)}",) if aside else ()
    return Source(kind="parquet", items=tuple(items), attributes=tuple(kept), classes=names, notes=notes)


def _files(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*.parquet") if path.name not in TABLES)


def _columns(schema: Any, where: str) -> tuple[str, str, list[str]]:
    """The image column, the label column or nothing, and the columns that may be attributes."""
    import pyarrow

    images = [field.name for field in schema if _pictures(field.type)]
    if len(images) != 1:
        raise DataError(f"{len(images)} columns of image bytes ({schema.names}), expected one", where=where)
    label = next((name for name in LABELS if name in schema.names), "")
    small = [field.name for field in schema if pyarrow.types.is_boolean(field.type) or _integer(field.type)]
    return images[0], label, [name for name in small if name != label]


def _refuse_other(path: Path, schema: Any, image: str, first: Path) -> None:
    """DataError where a file does not have the columns of the first one."""
    with opened_parquet(path) as table:
        own = table.schema_arrow
    if set(own.names) != set(schema.names) or not _pictures(own.field(image).type):
        what = f"columns {sorted(own.names)}, and {first.name} has {sorted(schema.names)}"
        raise DataError(what, where=str(path), cure="give all files the same columns")


def _pictures(kind: Any) -> bool:
    """Whether a column of this type holds files: bytes, or a struct with `bytes`."""
    import pyarrow

    if pyarrow.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _pictures(kind.field("bytes").type)
    return pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind)


def _integer(kind: Any) -> bool:
    import pyarrow

    return pyarrow.types.is_integer(kind)


def _class_names(schema: Any, label: str) -> tuple[str, ...]:
    """Class names as the `datasets` library notes them in the schema."""
    try:
        info = parse_json((schema.metadata or {})[b"huggingface"])
        return tuple(map(str, info["info"]["features"][label]["names"]))
    except (KeyError, TypeError, ValueError):
        return ()


def _class(label: str | None, names: tuple[str, ...], path: Path) -> str | None:
    if not names or label is None:
        return label
    if not label.isdecimal() or len(label) > 9 or int(label) >= len(names):
        return None if label == "-1" else _refused(label, names, path)
    return names[int(label)]


def _refused(label: str, names: tuple[str, ...], path: Path) -> str:
    raise DataError(f"label {label}, {len(names)} classes are named", where=str(path), cure="fetch the file again")


def _unpacked(
    root: Path, path: Path, out: Path, image: str, label: str, others: list[str]
) -> tuple[list[Item], dict[str, list[Any]]]:
    """Write a file's pictures one after the other; its items, and the columns that may be attributes."""
    relative = path.relative_to(root)
    split = split_name(path.name) or next((name for part in relative.parts[:-1] if (name := split_name(part))), "")
    items: list[Item] = []
    values: dict[str, list[Any]] = {name: [] for name in others}
    with out.open("wb") as file:
        for row in _rows(path, [image, *([label] if label else []), *others]):
            data = row[image]["bytes"] if isinstance(row[image], dict) else row[image]
            if not data:
                raise DataError(f"row {len(items)} holds no image bytes", where=str(path), cure="embed the images")
            source, begin = f"{relative.as_posix()}/{len(items):06d}", file.tell()
            word = None if not label or row[label] is None else str(row[label])
            items.append(Item(file=out, source=source, label=word, split=split, offset=begin, length=len(data)))
            file.write(data)
            for name in others:
                values[name].append(row[name])
    return items, values


def _rows(path: Path, columns: list[str]) -> Iterator[dict[str, Any]]:
    import pyarrow

    with opened_parquet(path) as table:
        try:
            for batch in table.iter_batches(ROWS, columns=columns):
                yield from batch.to_pylist()
        except (pyarrow.ArrowException, OSError, KeyError) as error:
            what = f"does not read ({str(error).splitlines()[0]})"
            raise DataError(what, where=str(path), cure="fetch the file again") from error
