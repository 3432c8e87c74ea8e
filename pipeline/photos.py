"""Two photographs as a dataset: crops of what scikit-learn ships, for a first step on real pictures.

`china.jpg` by danielbuechele and `flower.jpg` by vultilion (Flickr), both CC BY 2.0. `write_crops` writes an image
folder of two classes with train/ and val/: validation crops come from the right fifth of each photograph and no
training crop reaches into it. The crops of a seed are always the same.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

LICENSE = "CC-BY-2.0"
NAMES = ("china", "flower")


def write_crops(folder: Path, *, size: int, train: int, val: int, seed: int = 0) -> bool:
    """Write crops of `size` pixels; False where the folder is there. It appears whole or not at all."""
    if folder.exists():
        return False
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    for number, (name, photo) in enumerate(photographs().items()):
        border = photo.shape[1] * 4 // 5
        rng = np.random.default_rng([seed, number])
        for split, count, left, right in (("train", train, 0, border), ("val", val, border, photo.shape[1])):
            home = unfinished / split / name
            home.mkdir(parents=True)
            for index in range(count * number // 2, count * (number + 1) // 2):
                x, y = rng.integers(left, right - size + 1), rng.integers(photo.shape[0] - size + 1)
                Image.fromarray(photo[y : y + size, x : x + size]).save(home / f"{index:06d}.png")
    (unfinished / "LICENSE").write_text(f"{LICENSE}\n", encoding="utf-8")
    os.replace(unfinished, folder)
    return True


def photographs() -> dict[str, np.ndarray]:
    """The two photographs by class name, uint8 [h, w, 3]."""
    from sklearn.datasets import load_sample_image

    return {name: load_sample_image(f"{name}.jpg") for name in NAMES}
