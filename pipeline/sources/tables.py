"""Tables beside pictures: CSV, JSONL and parquet rows, the CelebA tables, and what their values mean."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import DataError, UsageError
from pipeline.storage import parse_json

Row = dict[str, str]
SIGNS = {"1": 1, "true": 1, "-1": -1, "false": -1, "0": 0, "": 0}
LABELS = ("label", "labels", "class", "fine_label", "cls")
"""Columns that name the class."""


def text_of(path: Path) -> str:
    """A text file; UTF-8, with or without a byte order mark."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError("not UTF-8 text", where=str(path), cure="save it as UTF-8") from error


def read_rows(path: Path) -> list[Row]:
    """Rows of a CSV, JSONL or parquet table, every value as text."""
    if path.suffix == ".csv":
        head, *rows = _csv(path) or [[]]
        if any(len(row) != len(head) for row in rows):
            raise DataError("a row has more or fewer columns than the first line", where=str(path))
        if len(set(head)) < len(head):
            raise DataError("two columns have one name", where=str(path))
        return [dict(zip(head, row, strict=True)) for row in rows]
    if path.suffix == ".parquet":
        with opened_parquet(path) as table:
            return [_as_text(row) for row in table.read().to_pylist()]
    rows = []
    for number, line in enumerate(text_of(path).splitlines(), start=1):
        try:
            rows.append(_as_text(parse_json(line)))
        except (ValueError, AttributeError) as error:
            raise DataError(f"line {number} is not JSON", where=str(path)) from error
    return rows


def read_pairs(path: Path, *head: str) -> dict[str, str]:
    """A CSV of two columns so named, with every image once."""
    rows = _csv(path)
    if rows[:1] != [list(head)] or any(len(row) != 2 for row in rows):
        raise DataError(f"expected two columns, {','.join(head)}", where=str(path))
    name, times = Counter(row[0] for row in rows).most_common(1)[0]
    if times > 1:
        raise DataError(f"{name} is listed twice", where=str(path), cure="list every image once")
    return {row[0]: row[1] for row in rows[1:]}


def opened_parquet(path: Path) -> Any:
    """An open `pyarrow.parquet.ParquetFile`; a refusal where pyarrow is missing or this is none."""
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        cure = "pip install 'glow-pipeline[sources]'"
        raise UsageError("reading parquet needs pyarrow", where=str(path), cure=cure) from error
    try:
        return ParquetFile(path, memory_map=True)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError("not a parquet file", where=str(path), cure="fetch it again") from error


def attribute_columns(columns: Mapping[str, Sequence[Any]]) -> dict[str, list[int]]:
    """The columns that hold an attribute, as 1, -1 and 0 (unknown).

    Values are true and false, or 1, 0 and -1; where no column holds a -1, 0 means absent.
    """
    words = {name: [_word(value) for value in column] for name, column in columns.items()}
    words = {name: column for name, column in words.items() if SIGNS.keys() >= set(column)}
    signed = any("-1" in column for column in words.values())
    values = SIGNS if signed else {**SIGNS, "0": -1}
    return {name: [values[word] for word in column] for name, column in words.items()}


def read_attributes(path: Path) -> tuple[tuple[str, ...], dict[str, tuple[int, ...]]]:
    """Parse count, names, then `FILE +-1 x names`; double blanks, CRLF and a byte order mark are seen in the wild."""
    lines = [line.split() for line in text_of(path).splitlines() if line.strip()]
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


def same_names(rows: Iterable[str], files: Iterable[str], table: str) -> None:
    """Refuse a table whose rows and the images do not correspond one to one."""
    rows, files = set(rows), set(files)
    alone, unlisted = sorted(rows - files), sorted(files - rows)
    if alone or unlisted:
        example = f"no image {alone[0]}" if alone else f"no row for {unlisted[0]}"
        what = f"{len(alone)} rows without image, {len(unlisted)} images without row: {example}"
        raise DataError(what, where=table, cure="complete the table or the images")


def split_name(word: str) -> str:
    """The split that a name of a file or folder begins with (`valid_64x64`, `test-00000-of-00001`), or nothing."""
    first = word.lower().replace("_", "-").replace(".", "-").split("-")[0]
    return {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}.get(first, "")


def _csv(path: Path) -> list[list[str]]:
    try:
        return [row for row in csv.reader(text_of(path).splitlines()) if row]
    except csv.Error as error:
        raise DataError(f"no CSV ({error})", where=str(path)) from error


def _word(value: Any) -> str:
    return "" if value is None else str(value).strip().lower()


def _as_text(row: Mapping[str, Any]) -> Row:
    return {name: "" if value is None else str(value) for name, value in row.items()}
