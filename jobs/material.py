"""What the demo learns from: toy faces, or crops of two photographs, packed into verified shards."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class Pictures:
    """What a preset of the demo learns from."""

    kind: Literal["faces", "photographs"]
    size: int
    images: int


DATA = {
    "toy64": Pictures("faces", 64, 8000),
    "toy32": Pictures("faces", 32, 4000),
    "photos32": Pictures("photographs", 32, 4400),
}


def pack(pictures: Pictures, dataset: Path) -> None:
    """Make the pictures beside `dataset` and pack them into it; goes on where an earlier call stopped."""
    from jobs import data

    source = dataset.with_name(f"{dataset.name}-source")
    source.parent.mkdir(parents=True, exist_ok=True)
    if pictures.kind == "faces":
        data.toy(str(source), images=pictures.images, size=pictures.size)
    else:
        from pipeline.photos import write_crops

        held_out = pictures.images // 11
        write_crops(source, size=pictures.size, train=pictures.images - held_out, val=held_out)
    # Photographs come with their own split; of faces a twentieth is enough to judge by.
    split = "auto" if pictures.kind == "photographs" else "random:0:0.05"
    data.prepare(str(source), str(dataset), split=split)
