"""CelebAMask-HQ and aligned CelebA as they are distributed, and CelebA's own partition."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Mapping
from pathlib import Path

from pipeline.errors import DataError
from pipeline.sources.folder import images
from pipeline.sources.item import Item, Source
from pipeline.sources.tables import read_attributes, read_pairs, same_names, text_of

HQ_TABLE = "CelebAMask-HQ-attribute-anno.txt"
HQ_IMAGES = "CelebA-HQ-img"
HQ_MAPPING = "CelebA-HQ-to-CelebA-mapping.txt"
HQ_LICENSE = "CelebAMask-HQ agreement: non-commercial research and education only"
TABLE = "list_attr_celeba.txt"
IMAGES = "img_align_celeba"
PARTITION = "list_eval_partition.txt"
LICENSE = "CelebA agreement: non-commercial research only"
SPLITS = ("train", "val", "test")
LAST = (162_770, 182_637)
"""Number of the last training and of the last validation image of CelebA; what follows is for testing."""


def is_hq(root: Path) -> bool:
    """Whether this looks like CelebAMask-HQ."""
    return (root / HQ_IMAGES).is_dir() or _hq_root(root) is not None


def read_hq(root: Path, scratch: Path) -> Source:
    """Read CelebAMask-HQ: N.jpg (or N.png, lossless) in CelebA-HQ-img/ and the table of 40 attributes.

    A `labels.csv` (image,label) beside the table adds classes; the mapping to CelebA gives `--split celeba`.
    """
    base = _hq_root(root)
    if base is None:
        cure = f"it needs {HQ_TABLE} beside {HQ_IMAGES}/; --format folder takes the images alone"
        raise DataError("CelebAMask-HQ is not complete", where=str(root), cure=cure)
    names, rows = read_attributes(base / HQ_TABLE)
    files = {path.name: path for path in images(base / HQ_IMAGES)}
    same_names(rows, files, str(base / HQ_TABLE))
    labels, partition = _labels(base / "labels.csv", files), _mapped(base / HQ_MAPPING)
    items = tuple(
        Item(
            file=path,
            source=f"{HQ_IMAGES}/{name}",
            attributes=rows[name],
            label=labels.get(name),
            partition=partition.get(path.stem, ""),
        )
        for name, path in sorted(files.items())
    )
    return Source(kind="celebamask-hq", items=items, attributes=names, license=HQ_LICENSE)


def is_aligned(root: Path) -> bool:
    """Whether this looks like aligned CelebA."""
    return _found(root, TABLE) is not None and _found(root, IMAGES) is not None


def read_aligned(root: Path, scratch: Path) -> Source:
    """Read aligned CelebA: img_align_celeba/, list_attr_celeba.txt and list_eval_partition.txt, flat or as shared."""
    table, folder, partition = (_found(root, name) for name in (TABLE, IMAGES, PARTITION))
    if table is None or folder is None:
        cure = f"it needs {TABLE} and {IMAGES}/; --format folder takes the images alone"
        raise DataError("CelebA is not complete", where=str(root), cure=cure)
    names, rows = read_attributes(table)
    files = {path.name: path for path in images(folder)}
    same_names({Path(name).stem for name in rows}, {path.stem for path in files.values()}, str(table))
    values = {Path(name).stem: row for name, row in rows.items()}
    splits = _partition(partition, files) if partition else {}
    items = tuple(
        Item(
            file=path,
            source=f"{IMAGES}/{name}",
            attributes=values[path.stem],
            split=splits.get(path.stem, ""),
            partition=splits.get(path.stem, ""),
        )
        for name, path in sorted(files.items())
    )
    notes = () if partition else (f"no {PARTITION}: splits as for any folder",)
    return Source(kind="celeba", items=items, attributes=names, license=LICENSE, notes=notes)


def _hq_root(root: Path) -> Path | None:
    bases = (root, root / "CelebAMask-HQ")
    return next((base for base in bases if (base / HQ_TABLE).exists() and (base / HQ_IMAGES).is_dir()), None)


def _found(root: Path, name: str) -> Path | None:
    """A file or folder here or one folder below, where the official archives have it (Anno/, Eval/, Img/)."""
    return next(iter([root / name] if (root / name).exists() else sorted(root.glob(f"*/{name}"))), None)


def _labels(path: Path, files: Mapping[str, Path]) -> dict[str, str]:
    if not path.exists():
        return {}
    labels = read_pairs(path, "image", "label")
    same_names(labels, files, str(path))
    return labels


def _mapped(path: Path) -> dict[str, str]:
    """CelebA's split of every CelebA-HQ number: rows `idx orig_idx orig_file`, where orig_file counts from 1."""
    if not path.exists():
        return {}
    rows = [line.split() for line in text_of(path).splitlines()[1:] if line.strip()]
    if any(len(row) != 3 or not Path(row[2]).stem.isdigit() for row in rows):
        raise DataError("expected rows idx orig_idx orig_file", where=str(path), cure="fetch it again")
    return {row[0]: SPLITS[bisect(LAST, int(Path(row[2]).stem) - 1)] for row in rows}


def _partition(path: Path, files: Mapping[str, Path]) -> dict[str, str]:
    """Rows `FILE 0|1|2`: train, val, test."""
    rows = [line.split() for line in text_of(path).splitlines() if line.strip()]
    if any(len(row) != 2 or row[1] not in ("0", "1", "2") for row in rows):
        raise DataError("expected rows FILE 0|1|2", where=str(path), cure="fetch it again")
    splits = {Path(name).stem: SPLITS[int(number)] for name, number in rows}
    same_names(splits, {file.stem for file in files.values()}, str(path))
    return splits
