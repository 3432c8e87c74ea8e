"""Raw pixels in fixed rows: CIFAR-10's binary version and the ImageNet-32/64 npz batches. Nothing is unpickled."""

from __future__ import annotations

import math
import os
import shutil
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from pipeline.errors import DataError
from pipeline.sources.item import Item, Source
from pipeline.sources.tables import split_name, text_of

CIFAR_FILES = {**{f"data_batch_{number}.bin": "train" for number in range(1, 6)}, "test_batch.bin": "test"}
CIFAR_ROW = 1 + 3 * 32 * 32
CURE = "fetch the file again"


def is_cifar(root: Path) -> bool:
    """Whether this looks like the binary version of CIFAR-10."""
    return _cifar_root(root) is not None


def read_cifar(root: Path, scratch: Path) -> Source:
    """Read CIFAR-10: rows of a label and 3072 bytes [3, 32, 32]; the test batch is the split `test`."""
    base = _cifar_root(root)
    missing = [name for name in CIFAR_FILES if base is None or not (base / name).is_file()]
    if base is None or missing:
        raise DataError(f"CIFAR-10 is not complete: no {missing[0]}", where=str(root), cure="fetch the binary version")
    names = tuple(text_of(base / "batches.meta.txt").split())
    items = [item for name, split in CIFAR_FILES.items() for item in _cifar_items(base / name, split, names)]
    return Source(kind="cifar10", items=tuple(items), classes=names)


def is_npz(root: Path) -> bool:
    """Whether there are npz batches."""
    return bool(_npz_files(root))


def read_npz(root: Path, scratch: Path) -> Source:
    """Read npz batches `train*.npz` and `val*.npz`: `data` uint8 [n, 3 * size * size] and `labels` from 1 on."""
    files = _npz_files(root)
    items = [item for path in files for item in _npz_items(root, path, scratch)]
    classes = tuple(str(number) for number in sorted({int(item.label) for item in items if item.label}))
    return Source(kind="npz", items=tuple(items), classes=classes)


def _cifar_root(root: Path) -> Path | None:
    bases = (root, root / "cifar-10-batches-bin")
    return next((base for base in bases if (base / "batches.meta.txt").is_file()), None)


def _cifar_items(path: Path, split: str, names: tuple[str, ...]) -> Iterator[Item]:
    rows = np.frombuffer(path.read_bytes(), np.uint8)
    if not len(rows) or len(rows) % CIFAR_ROW or rows[::CIFAR_ROW].max() >= len(names):
        what = f"{len(rows)} bytes, not rows of {CIFAR_ROW} with a label below {len(names)}"
        raise DataError(what, where=str(path), cure=CURE)
    for number, label in enumerate(rows[::CIFAR_ROW].tolist()):
        yield Item(
            file=path,
            source=f"{path.name}/{number:05d}",
            label=names[label],
            split=split,
            offset=number * CIFAR_ROW + 1,
            length=CIFAR_ROW - 1,
            shape=(3, 32, 32),
            planar=True,
        )


def _npz_files(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*.npz") if split_name(path.name))


@dataclass(frozen=True)
class _Array:
    """Where an array lies in a file."""

    file: Path
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype


def _npz_items(root: Path, path: Path, scratch: Path) -> Iterator[Item]:
    """Rows of one batch; a compressed one is unpacked into `scratch` first."""
    data, labels = _array(path, "data", scratch), _array(path, "labels", scratch)
    size = math.isqrt(data.shape[-1] // 3) if len(data.shape) == 2 else 0
    if (
        not size
        or data.shape != (*labels.shape, 3 * size * size)
        or data.dtype != np.uint8
        or labels.dtype.kind not in "iu"
    ):
        found = f"data {data.dtype} {list(data.shape)}, labels {labels.dtype} {list(labels.shape)}"
        raise DataError(f"{found}, expected uint8 [n, 3 * size * size] and integers [n]", where=str(path), cure=CURE)
    split, source = split_name(path.name), path.relative_to(root).as_posix()
    values = np.fromfile(labels.file, labels.dtype, offset=labels.offset, count=labels.shape[0])
    for number, label in enumerate(values.tolist()):
        yield Item(
            file=data.file,
            source=f"{source}/{number:06d}",
            label=str(label),
            split=split,
            offset=data.offset + number * data.shape[1],
            length=data.shape[1],
            shape=(3, size, size),
            planar=True,
        )


def _array(path: Path, name: str, scratch: Path) -> _Array:
    """Find an array of an npz file: in place where it is stored as it is; the archive's checksum is checked."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as member:
            info = archive.getinfo(f"{name}.npy")
            stored = info.compress_type == zipfile.ZIP_STORED
            with Path(os.devnull).open("wb") if stored else _new_file(scratch) as out:
                shutil.copyfileobj(member, out, 1 << 20)
            with (path if stored else Path(out.name)).open("rb") as file:
                begin = file.seek(_begin(file, info) if stored else 0)
                shape, fortran, dtype = _header(file)
                if fortran or dtype.hasobject:
                    raise ValueError(f"{name} is {dtype}, {'Fortran' if fortran else 'C'} order")
                if file.tell() - begin + math.prod(shape) * dtype.itemsize != info.file_size:
                    raise ValueError(f"{name} says {list(shape)}, and is {info.file_size} bytes")
                return _Array(Path(file.name), file.tell(), shape, dtype)
    except (KeyError, OSError, ValueError, struct.error, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"not an npz batch with data and labels ({error})", where=str(path), cure=CURE) from error


def _new_file(folder: Path) -> BinaryIO:
    return tempfile.NamedTemporaryFile(dir=folder, suffix=".npy", delete=False)  # type: ignore[return-value]


def _begin(file: BinaryIO, info: zipfile.ZipInfo) -> int:
    """Where a stored member's bytes begin: after its local header, whose name and extra field have their own length."""
    file.seek(info.header_offset + 26)
    name, extra = struct.unpack("<HH", file.read(4))
    return info.header_offset + 30 + name + extra


def _header(file: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(file)
    reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return reader(file)
