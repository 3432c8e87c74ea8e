"""What people have -> items to prepare: image folders, and CelebAMask-HQ as it is distributed.

`open_source` recognises the kind by looking. A source is local; its items carry paths relative to it, so that the same
pictures give the same dataset wherever they lie. Refusals name the file.
"""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.errors import DataError, UsageError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".pgm")
SPLIT_FOLDERS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
TABLES = ("attributes.csv", "attributes.jsonl", "metadata.csv", "metadata.jsonl")
FILE_COLUMNS = ("file_name", "image", "file", "path")
CELEBA_TABLE = "CelebAMask-HQ-attribute-anno.txt"
CELEBA_IMAGES = "CelebA-HQ-img"
CELEBA_LICENSE = "CelebAMask-HQ agreement: non-commercial research and education only"
FREE = ("CC0-1.0", "CC-BY-4.0", "CC-BY-3.0", "CC-BY-2.0", "CC-BY-SA-4.0", "MIT", "Apache-2.0", "public domain")
"""Licences under which prepared shards may be handed on."""


@dataclass(frozen=True, kw_only=True)
class Item:
    """One picture: where it is, its path within the source, attributes (-1, 0 unknown, 1), class and split if known."""

    file: Path
    source: str
    attributes: tuple[int, ...] = ()
    label: str | None = None
    split: str = ""


@dataclass(frozen=True, kw_only=True)
class Source:
    """Everything known of a source before a picture is opened. `notes` are for people."""

    kind: str
    items: tuple[Item, ...]
    attributes: tuple[str, ...] = ()
    license: str = "unknown"
    notes: tuple[str, ...] = ()

    @property
    def labels(self) -> tuple[str, ...]:
        """Class names, sorted; a label's number is its place here."""
        return tuple(sorted({item.label for item in self.items if item.label is not None}))

    @property
    def redistribution(self) -> bool:
        """Whether the licence is one under which the pictures may be handed on."""
        return self.license in FREE


def open_source(where: str, kind: str = "auto") -> Source:
    """List a source, recognising its kind unless `kind` says it: celebamask-hq or folder."""
    root = Path(where).expanduser()
    if "://" in where or not root.is_dir():
        raise UsageError("not a local folder", where=where, cure="give a folder of images; copy remote ones first")
    if kind == "auto":
        kind = "celebamask-hq" if (root / CELEBA_IMAGES).is_dir() or _celeba_root(root) else "folder"
    if kind not in READERS:
        raise UsageError(f"no format {kind!r}", cure=f"formats: auto, {', '.join(sorted(READERS))}")
    source = READERS[kind](root)
    if not source.items:
        raise DataError("no images here", where=where, cure=f"looked for {', '.join(SUFFIXES)}")
    return replace(source, license=_license(root) or source.license)


def read_celeba(root: Path) -> Source:
    """Read CelebAMask-HQ: N.jpg (or N.png, lossless) in CelebA-HQ-img/ and the table of 40 attributes.

    A `labels.csv` (image,label) beside the table adds classes.
    """
    base = _celeba_root(root)
    if base is None:
        cure = f"it needs {CELEBA_TABLE} beside {CELEBA_IMAGES}/; --format folder takes the images alone"
        raise DataError("CelebAMask-HQ is not complete", where=str(root), cure=cure)
    names, rows = _read_celeba_table(base / CELEBA_TABLE)
    files = {path.name: path for path in _images(base / CELEBA_IMAGES)}
    _same_names(rows, files, str(base / CELEBA_TABLE))
    labels = _read_labels(base / "labels.csv", files)
    items = tuple(
        Item(file=path, source=f"{CELEBA_IMAGES}/{name}", attributes=rows[name], label=labels.get(name))
        for name, path in sorted(files.items())
    )
    return Source(kind="celebamask-hq", items=items, attributes=names, license=CELEBA_LICENSE)


def read_folder(root: Path) -> Source:
    """Read a folder of images: train/ and val/ are splits, folders below them classes, a table adds attributes."""
    files = _images(root)
    items = [_folder_item(root, path) for path in files]
    if any(item.split for item in items) and not all(item.split for item in items):
        stray = next(item for item in items if not item.split)
        raise DataError("image outside the train/ and val/ folders", where=str(stray.file), cure="move it into one")
    tables = [root / name for name in TABLES if (root / name).exists()]
    if len(tables) > 1:
        raise DataError("more than one attribute table", where=str(tables[1]), cure="keep one")
    names, items = _with_table(tables[0], items) if tables else ((), items)
    return Source(kind="folder", items=tuple(items), attributes=names, notes=_ignored(root, files, tables))


READERS: Mapping[str, Callable[[Path], Source]] = {"celebamask-hq": read_celeba, "folder": read_folder}


def _celeba_root(root: Path) -> Path | None:
    bases = (root, root / "CelebAMask-HQ")
    return next((base for base in bases if (base / CELEBA_TABLE).exists() and (base / CELEBA_IMAGES).is_dir()), None)


def _images(root: Path) -> list[Path]:
    return sorted(path for path in _visible(root) if path.suffix.lower() in SUFFIXES)


def _visible(root: Path) -> Iterable[Path]:
    """Files below a folder, without names that start with a dot."""
    for path in root.rglob("*"):
        if not any(part.startswith(".") for part in path.relative_to(root).parts) and path.is_file():
            yield path


def _folder_item(root: Path, path: Path) -> Item:
    parts = path.relative_to(root).parts
    split = SPLIT_FOLDERS.get(parts[0], "") if len(parts) > 1 else ""
    classes = parts[1:-1] if split else parts[:-1]
    return Item(file=path, source="/".join(parts), label=classes[0] if classes else None, split=split)


def _ignored(root: Path, files: list[Path], tables: list[Path]) -> tuple[str, ...]:
    known = {*files, *tables, root / "LICENSE", root / "LICENSE.txt"}
    others = sorted(path for path in _visible(root) if path not in known)
    return (f"left aside {len(others)} files that are not images, e.g. {others[0].name}",) if others else ()


def _license(root: Path) -> str:
    """First line of the source's own LICENSE file."""
    for path in (root / "LICENSE", root / "LICENSE.txt"):
        if path.is_file():
            lines = _text(path).splitlines()
            return lines[0].strip() if lines else ""
    return ""


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError("not UTF-8 text", where=str(path), cure="save it as UTF-8") from error


def _read_celeba_table(path: Path) -> tuple[tuple[str, ...], dict[str, tuple[int, ...]]]:
    """Parse count, names, then `FILE +-1 x names`; double blanks, CRLF and a byte order mark are seen in the wild."""
    lines = [line.split() for line in _text(path).splitlines() if line.strip()]
    if len(lines) < 2 or len(lines[0]) != 1 or not lines[0][0].isdigit():
        raise DataError("expected a count, a line of names, and rows", where=str(path))
    names, rows = tuple(lines[1]), {}
    for number, (name, *values) in enumerate(lines[2:], start=1):
        if len(values) != len(names) or not set(values) <= {"-1", "1"} or name in rows:
            what = f"row {number} ({name}): {len(values)} values, expected {len(names)} of 1 or -1, each file once"
            raise DataError(what, where=str(path))
        rows[name] = tuple(map(int, values))
    if len(set(names)) != len(names):
        raise DataError("an attribute is named twice", where=str(path))
    if len(rows) != int(lines[0][0]):
        raise DataError(f"{len(rows)} rows, its first line says {lines[0][0]}", where=str(path), cure="fetch it again")
    return names, rows


def _same_names(rows: Iterable[str], files: Iterable[str], table: str) -> None:
    """Refuse a table whose rows and the images do not correspond one to one."""
    alone, unlisted = sorted(set(rows) - set(files)), sorted(set(files) - set(rows))
    if alone or unlisted:
        example = f"no image {alone[0]}" if alone else f"no row for {unlisted[0]}"
        what = f"{len(alone)} rows without image, {len(unlisted)} images without row: {example}"
        raise DataError(what, where=table, cure="complete the table or the images")


def _read_labels(path: Path, files: Mapping[str, Path]) -> dict[str, str]:
    if not path.exists():
        return {}
    rows = [row for row in csv.reader(_text(path).splitlines()) if row]
    if not rows or rows[0] != ["image", "label"] or any(len(row) != 2 for row in rows):
        raise DataError("expected two columns, image,label", where=str(path))
    labels = {row[0]: row[1] for row in rows[1:]}
    if len(labels) != len(rows) - 1:
        raise DataError("an image is listed twice", where=str(path))
    _same_names(labels, files, str(path))
    return labels


def _with_table(path: Path, items: list[Item]) -> tuple[tuple[str, ...], list[Item]]:
    """Give every item the attributes (and the class, from a column `label`) of its row."""
    rows = _read_rows(path)
    column = next((name for name in FILE_COLUMNS if rows and name in rows[0]), None)
    if column is None:
        raise DataError(f"no column names the file: {', '.join(FILE_COLUMNS)}", where=str(path))
    by_name = {row[column]: row for row in rows}
    twice = [name for name, times in Counter(row[column] for row in rows).items() if times > 1]
    if twice:
        raise DataError(f"two rows for {twice[0]}", where=str(path))
    _same_names(by_name, [item.source for item in items], str(path))
    names = tuple(name for name in rows[0] if name not in (column, "label"))
    signed = any(row.get(name) == "-1" for row in rows for name in names)
    return names, [_described(item, by_name[item.source], names, signed, path) for item in items]


def _described(item: Item, row: Mapping[str, str], names: tuple[str, ...], signed: bool, path: Path) -> Item:
    values = {"1": 1, "true": 1, "-1": -1, "": 0, "0": 0 if signed else -1, "false": -1}
    try:
        attributes = tuple(values[row.get(name, "").strip().lower()] for name in names)
    except KeyError as error:
        what = f"row of {item.source}: {error.args[0]!r} is not 1, 0, -1, true, false or empty"
        raise DataError(what, where=str(path)) from error
    return replace(item, attributes=attributes, label=row.get("label") or item.label)


def _read_rows(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV or JSONL table, every value as text."""
    if path.suffix == ".csv":
        rows = [dict(row) for row in csv.DictReader(_text(path).splitlines(), restval=None)]
        if any(None in row or None in row.values() for row in rows):
            raise DataError("a row has more or fewer columns than the first line", where=str(path))
        return rows
    rows = []
    for number, line in enumerate(_text(path).splitlines(), start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"line {number} is not JSON", where=str(path)) from error
        rows.append({name: "" if value is None else str(value) for name, value in row.items()})
    return rows
