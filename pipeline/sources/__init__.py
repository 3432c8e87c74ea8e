"""What people have -> items to prepare. One file a kind; `open_source` recognises the kind by looking.

A source is local; its items carry paths relative to it, so that the same pictures give the same dataset wherever they
lie. Refusals name the file.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import DataError, UsageError
from pipeline.sources import arrays, celeba, folder, parquet, tfrecord, webdataset
from pipeline.sources.item import Item, Source, refuse_odd_names, refuse_stray
from pipeline.sources.tables import text_of

__all__ = ["KINDS", "Item", "Source", "open_source"]


@dataclass(frozen=True)
class Kind:
    """How a kind of source is recognised and read; what must be unpacked goes into the second folder."""

    looks: Callable[[Path], bool]
    read: Callable[[Path, Path], Source]


KINDS = {
    "celebamask-hq": Kind(celeba.is_hq, celeba.read_hq),
    "celeba": Kind(celeba.is_aligned, celeba.read_aligned),
    "celeba-tfr": Kind(tfrecord.looks, tfrecord.read),
    "parquet": Kind(parquet.looks, parquet.read),
    "cifar10": Kind(arrays.is_cifar, arrays.read_cifar),
    "npz": Kind(arrays.is_npz, arrays.read_npz),
    "webdataset": Kind(webdataset.looks, webdataset.read),
    "folder": Kind(lambda root: True, folder.read),
}
"""By name, in the order in which they are looked for."""


def open_source(where: str, kind: str = "auto", scratch: Path | None = None) -> Source:
    """List a source, recognising its kind unless `kind` says it.

    Pictures in compressed containers are unpacked into `scratch` (None: the system's folder for temporary files), where
    they must stay while the source is used.
    """
    root = Path(where).expanduser()
    if "://" in where or not root.is_dir():
        raise UsageError("not a local folder", where=where, cure="give a folder of images; copy remote ones first")
    if kind == "auto":
        kind = next(name for name, own in KINDS.items() if own.looks(root))
    if kind not in KINDS:
        raise UsageError(f"no format {kind!r}", cure=f"formats: auto, {', '.join(sorted(KINDS))}")
    if not KINDS[kind].looks(root):
        raise DataError(f"this is no {kind}", where=where, cure="--format auto looks what it is")
    source = KINDS[kind].read(root, scratch or Path(tempfile.gettempdir()))
    if not source.items:
        raise DataError("no images here", where=where, cure=f"looked for {', '.join(folder.SUFFIXES)}")
    refuse_odd_names((*source.attributes, *source.labels, *(item.source for item in source.items)), where)
    refuse_stray(source.items)
    return source.licensed(_license(root))


def _license(root: Path) -> str:
    """First line of the source's own LICENSE file."""
    for path in (root / "LICENSE", root / "LICENSE.txt"):
        if path.is_file():
            lines = text_of(path).splitlines()
            return lines[0].strip() if lines else ""
    return ""
