"""The toy set: procedural faces that every first step runs on, when no photographs are at hand.

`write_toy` writes the CelebAMask-HQ layout, lossless, with the 40 CelebA attribute names. `DRAWN` of them are truly
drawn, independently of one another (hair colours exclude each other); the others are -1. The background style is a
four-way class label in `labels.csv`, independent of the attributes. `truth.jsonl` holds the renderer's parameters, so
that what an edit changes, and what it should have left alone, can be measured. Image `index` of seed `seed` is a pure
function of the two. The pictures are in the public domain (CC0-1.0).
"""

from __future__ import annotations

import colorsys
import functools
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.errors import ConflictError, UsageError
from pipeline.faces import STYLES, Color, Face, between, render, shade
from pipeline.storage import canonical_json, open_storage
from pipeline.workers import ordered_map

_NAMES = (
    "5_o_Clock_Shadow Arched_Eyebrows Attractive Bags_Under_Eyes Bald Bangs Big_Lips Big_Nose Black_Hair Blond_Hair "
    "Blurry Brown_Hair Bushy_Eyebrows Chubby Double_Chin Eyeglasses Goatee Gray_Hair Heavy_Makeup High_Cheekbones Male "
    "Mouth_Slightly_Open Mustache Narrow_Eyes No_Beard Oval_Face Pale_Skin Pointy_Nose Receding_Hairline Rosy_Cheeks "
    "Sideburns Smiling Straight_Hair Wavy_Hair Wearing_Earrings Wearing_Hat Wearing_Lipstick Wearing_Necklace "
    "Wearing_Necktie Young"
)
CELEBA_ATTRIBUTES = tuple(_NAMES.split())
HAIR = {
    "Black_Hair": (38, 31, 34),
    "Blond_Hair": (232, 194, 110),
    "Brown_Hair": (98, 58, 34),
    "": (176, 76, 40),
}
"""Hair colours; a red-haired face has none of the three attributes."""

COINS = {
    "Bangs": 0.4,
    "Bushy_Eyebrows": 0.4,
    "Eyeglasses": 0.4,
    "No_Beard": 0.65,
    "Pale_Skin": 0.5,
    "Smiling": 0.5,
    "Wavy_Hair": 0.4,
    "Wearing_Hat": 0.3,
    "Wearing_Lipstick": 0.4,
}
"""How often each of the independent attributes is drawn."""

DRAWN = tuple(sorted([*COINS, *filter(None, HAIR)]))
PALE = ((252, 226, 208), (240, 208, 190))
DEEP = ((222, 172, 132), (150, 102, 76))
IRIS = ((92, 60, 36), (70, 110, 160), (84, 124, 84))

IMAGES = "CelebA-HQ-img"
MARKER, MARKER_STARTED = "toy.json", "toy.unfinished.json"
VERSION = 1
CHUNK = 64

Report = Callable[[int], None]


def ignore(done: int) -> None:
    """Report progress to nobody."""


def draw_face(seed: int, index: int) -> Face:
    """Draw the parameters of one face; a pure function of seed and index."""
    rng = np.random.default_rng([seed, index])
    hair = list(HAIR)[rng.integers(len(HAIR))]
    coins = [name for name, chance in COINS.items() if rng.random() < chance]
    return Face(
        present=tuple(sorted([*coins, *filter(None, [hair])])),
        style=STYLES[rng.integers(len(STYLES))],
        skin=between(*(PALE if "Pale_Skin" in coins else DEEP), rng.random()),
        hair=shade(HAIR[hair], rng.uniform(0.88, 1.12)),
        shirt=_hue(rng.random(), rng.uniform(0.4, 0.8), rng.uniform(0.4, 0.75)),
        hat=_hue(rng.random(), rng.uniform(0.4, 0.85), rng.uniform(0.35, 0.75)),
        iris=IRIS[rng.integers(len(IRIS))],
        background=_backdrop(rng),
        shift=(_rounded(rng.uniform(-1, 1) / 64), _rounded(rng.uniform(-1, 1) / 64)),
        width=_rounded(rng.uniform(0.205, 0.245)),
        gaze=_rounded(rng.uniform(-0.01, 0.01)),
        light=_rounded(rng.uniform(-1, 1)),
        phase=_rounded(rng.random()),
    )


def toy_image(seed: int, index: int, size: int) -> np.ndarray:
    """Image `index` of the toy set: uint8 [size, size, 3]."""
    return render(draw_face(seed, index), size, np.random.default_rng([seed, index, 1]))


def attribute_row(face: Face) -> list[int]:
    """The 40 attributes of a face as 1 or -1."""
    return [1 if face.has(name) else -1 for name in CELEBA_ATTRIBUTES]


def _backdrop(rng: np.random.Generator) -> tuple[Color, Color]:
    hue, turn = rng.random(), rng.uniform(-0.12, 0.12)
    light = _hue(hue, rng.uniform(0.15, 0.45), rng.uniform(0.85, 0.97))
    deep = _hue(hue + turn, rng.uniform(0.35, 0.65), rng.uniform(0.5, 0.72))
    return light, deep


def _hue(hue: float, saturation: float, value: float) -> Color:
    red, green, blue = colorsys.hsv_to_rgb(hue % 1, saturation, value)
    return round(255 * red), round(255 * green), round(255 * blue)


def _rounded(value: float) -> float:
    return round(float(value), 5)


def write_toy(folder: Path, *, images: int, size: int, seed: int, workers: int = 1, report: Report = ignore) -> bool:
    """Write a toy set in the CelebAMask-HQ layout; return False if exactly it is there already.

    The marker toy.json is written last. `ConflictError` where another toy set, or anything else, is in the folder.
    """
    if images < 1 or not 8 <= size <= 1024:
        raise UsageError(f"{images} images of {size} px", cure="ask for at least one image of 8 to 1024 px")
    marker = canonical_json({"images": images, "schema": VERSION, "seed": seed, "size": size})
    if not _claim(folder, marker):
        return False
    (folder / IMAGES).mkdir(parents=True, exist_ok=True)
    faces = [draw_face(seed, index) for index in range(images)]
    _write_images(folder / IMAGES, images, size, seed, workers, report)
    _write_tables(folder, faces)
    os.replace(folder / MARKER_STARTED, folder / MARKER)
    return True


def _claim(folder: Path, marker: bytes) -> bool:
    """Take the folder for this very set; False if the set is finished."""
    cure = "choose another folder, or remove this one"
    for name, finished in ((MARKER, True), (MARKER_STARTED, False)):
        if (folder / name).exists():
            if (folder / name).read_bytes() != marker:
                raise ConflictError("another toy set is here", where=str(folder), cure=cure)
            return not finished
    if folder.exists() and any(folder.iterdir()):
        raise ConflictError("the folder is not empty", where=str(folder), cure=cure)
    folder.mkdir(parents=True, exist_ok=True)
    open_storage(str(folder)).write(MARKER_STARTED, marker)
    return True


def _write_images(folder: Path, images: int, size: int, seed: int, workers: int, report: Report) -> None:
    chunks = [range(start, min(start + CHUNK, images)) for start in range(0, images, CHUNK)]
    write = functools.partial(_write_chunk, folder, size, seed)
    for done in ordered_map(write, chunks, workers):
        report(done)


def _write_chunk(folder: Path, size: int, seed: int, indices: range) -> int:
    for index in indices:
        Image.fromarray(toy_image(seed, index, size)).save(folder / f"{index}.png", compress_level=1)
    return len(indices)


def _write_tables(folder: Path, faces: list[Face]) -> None:
    """Write the attribute table, the mapping, the labels, the licence and the truth."""
    names = [f"{index}.png" for index in range(len(faces))]
    rows = [
        f"{name}  {' '.join(f'{value:2d}' for value in attribute_row(face))}"
        for name, face in zip(names, faces, strict=True)
    ]
    table = [str(len(faces)), " ".join(CELEBA_ATTRIBUTES), *rows]
    mapping = ["idx        orig_idx        orig_file", *(f"{i}        {i}        {n}" for i, n in enumerate(names))]
    labels = ["image,label", *(f"{name},{face.style}" for name, face in zip(names, faces, strict=True))]
    truth = [canonical_json({"image": name, **asdict(face)}) for name, face in zip(names, faces, strict=True)]
    storage = open_storage(str(folder))
    storage.write("CelebA-HQ-to-CelebA-mapping.txt", _lines(mapping))
    storage.write("labels.csv", _lines(labels))
    storage.write("LICENSE", b"CC0-1.0\n")
    storage.write("truth.jsonl", b"".join(truth))
    storage.write("CelebAMask-HQ-attribute-anno.txt", _lines(table))


def _lines(rows: list[str]) -> bytes:
    return "".join(f"{row}\n" for row in rows).encode()
