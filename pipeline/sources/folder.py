"""A folder of images: train/ and val/ are splits, folders below them classes, a table adds attributes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from pipeline.errors import DataError
from pipeline.sources.item import Item, Source
from pipeline.sources.tables import Row, attribute_columns, read_rows, same_names, split_name

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".pgm")
TABLES = tuple(f"{name}.{kind}" for name in ("attributes", "metadata") for kind in ("csv", "jsonl", "parquet"))
FILE_COLUMNS = ("file_name", "image", "file", "path")
SPLIT_FOLDER = re.compile(r"(train|val|valid|validation|test)(_\d+x\d+)?")


def read(root: Path, scratch: Path) -> Source:
    """List the images of a folder at any depth, with what folders and a table say of them."""
    files = images(root)
    items = [_item(root, path) for path in files]
    tables = [root / name for name in TABLES if (root / name).exists()]
    if len(tables) > 1:
        raise DataError("more than one attribute table", where=str(tables[1]), cure="keep one")
    names, items = _with_table(tables[0], items) if tables else ((), items)
    return Source(kind="folder", items=tuple(items), attributes=names, notes=_ignored(root, files, tables))


def images(root: Path) -> list[Path]:
    """Every image file below a folder, sorted."""
    return sorted(path for path in visible(root) if path.suffix.lower() in SUFFIXES)


def visible(root: Path) -> Iterable[Path]:
    """Files below a folder, without names that start with a dot."""
    for path in root.rglob("*"):
        if not any(part.startswith(".") for part in path.relative_to(root).parts) and path.is_file():
            yield path


def _item(root: Path, path: Path) -> Item:
    parts = path.relative_to(root).parts
    split = split_name(parts[0]) if len(parts) > 1 and SPLIT_FOLDER.fullmatch(parts[0]) else ""
    classes = parts[1:-1] if split else parts[:-1]
    return Item(file=path, source="/".join(parts), label=classes[0] if classes else None, split=split)


def _ignored(root: Path, files: list[Path], tables: list[Path]) -> tuple[str, ...]:
    known = {*files, *tables, root / "LICENSE", root / "LICENSE.txt"}
    others = sorted(path for path in visible(root) if path not in known)
    return (f"left aside {len(others)} files that are not images, e.g. {others[0].name}",) if others else ()


def _with_table(path: Path, items: list[Item]) -> tuple[tuple[str, ...], list[Item]]:
    """Give every item the attributes (and the class, from a column `label`) of its row."""
    rows = read_rows(path)
    names = tuple(dict.fromkeys(name for row in rows for name in row))
    column = next((name for name in FILE_COLUMNS if name in names), None)
    if column is None:
        raise DataError(f"no column names the file: {', '.join(FILE_COLUMNS)}", where=str(path))
    lost = next((number for number, row in enumerate(rows, start=1) if not row.get(column)), None)
    if lost is not None:
        raise DataError(f"row {lost} has no {column}", where=str(path), cure="name the file in every row")
    by_name = {row[column]: row for row in rows}
    twice = [name for name, times in Counter(row[column] for row in rows).items() if times > 1]
    if twice:
        raise DataError(f"two rows for {twice[0]}", where=str(path))
    same_names(by_name, [item.source for item in items], str(path))
    names = tuple(name for name in names if name not in (column, "label"))
    own = [by_name[item.source] for item in items]
    columns = attribute_columns({name: [row.get(name, "") for row in own] for name in names})
    if len(columns) < len(names):
        raise _no_attribute(next(name for name in names if name not in columns), items, own, path)
    values = zip(*columns.values(), strict=True) if names else ((),) * len(items)
    return names, [
        replace(item, attributes=tuple(signed), label=row.get("label") or item.label)
        for item, row, signed in zip(items, own, values, strict=True)
    ]


def _no_attribute(name: str, items: list[Item], rows: list[Row], path: Path) -> DataError:
    """Name the first row whose value no attribute can have."""

    def odd(row: Mapping[str, str]) -> bool:
        return not attribute_columns({name: [row.get(name, "")]})

    item, row = next((item, row) for item, row in zip(items, rows, strict=True) if odd(row))
    what = f"row of {item.source}: {row.get(name)!r} is not 1, 0, -1, true, false or empty"
    return DataError(what, where=str(path))
