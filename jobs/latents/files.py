"""Pictures to latents, latents to pictures, and what pictures are worth in bits."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from jobs.latents.ways import Model, Pictures, opened, write, write_picture

LatentsFile = Annotated[str, tyro.conf.arg(metavar="LATENTS")]


def encode(
    model: Model, pictures: Pictures, /, out: str = "latents.safetensors", uri: str = "", dry_run: bool = False
) -> int:
    """Write the latents of pictures, one standard normal tensor a level; `decode` of them gives the pictures back.

    Args:
        model: A model's folder, an s3:// prefix, models:/NAME@alias or models:/NAME/3.
        pictures: Files, s3:// addresses, folders of either, or seed:7; cropped to a square and resized to the model.
        out: File of safetensors to write; it carries the model's digest.
        uri: MLflow address for models:/ names; empty takes MLFLOW_TRACKING_URI.
        dry_run: Load and check everything, write nothing.
    """
    from pipeline import workbench

    loaded, names, pixels = opened(model, pictures, uri)
    if dry_run:
        print(f"dry run: would encode {len(names)} pictures to {out}")
        return 0
    write(out, workbench.latents_bytes(loaded, names, workbench.encode(loaded, pixels)))
    print(
        f"{out}: latents of {len(names)} pictures, {loaded.config.model.levels} levels, artifact {loaded.digest[:12]}"
    )
    return 0


def decode(model: Model, latents: LatentsFile, /, out: str = "decoded", uri: str = "", dry_run: bool = False) -> int:
    """Turn a file of latents back into pictures.

    Args:
        model: The model they were encoded by; another one is refused.
        latents: File that `encode` wrote.
        out: Folder for 0000.png, 0001.png, ... in their own size, or a file .png for one grid.
        uri: MLflow address for models:/ names; empty takes MLFLOW_TRACKING_URI.
        dry_run: Load and check everything, write nothing.
    """
    from pipeline import workbench
    from pipeline.grids import as_picture, grid, png_bytes
    from pipeline.registry import load_model
    from pipeline.storage import open_file

    loaded = load_model(model, uri)
    home, key = open_file(latents)
    names, found = workbench.read_latents(loaded, home.read(key), latents)
    if dry_run:
        print(f"dry run: would decode {len(names)} pictures to {out}")
        return 0
    pixels = workbench.decode(loaded, found)
    if out.endswith(".png"):
        write_picture(out, [grid([pixels], [], [Path(name).name for name in names])], f"{len(names)} pictures")
        return 0
    for number, image in enumerate(pixels):
        write(f"{out}/{number:04d}.png", png_bytes(as_picture(image)))
    print(f"{out}: {len(names)} pictures")
    return 0


def score(
    model: Model,
    pictures: Pictures,
    /,
    attributes: str = "",
    label: int = -1,
    out: str = "",
    uri: str = "",
    dry_run: bool = False,
) -> int:
    """Give every picture's bits per dimension under the model, outliers first.

    Args:
        model: A model's folder, an s3:// prefix, models:/NAME@alias or models:/NAME/3.
        pictures: Files, s3:// addresses, folders of either, or seed:7.
        attributes: What all of them show, as +Smiling,-Eyeglasses; the rest counts as unknown.
        label: Their class number; -1 is unknown.
        out: JSON file for the same.
        uri: MLflow address for models:/ names; empty takes MLFLOW_TRACKING_URI.
        dry_run: Load and check everything, write nothing.
    """
    from pipeline import workbench
    from pipeline.storage import canonical_json

    loaded, names, pixels = opened(model, pictures, uri)
    condition = workbench.known(loaded, len(names), attributes, label)
    if dry_run:
        print(f"dry run: would score {len(names)} pictures, artifact {loaded.digest[:12]}")
        return 0
    found = workbench.score(loaded, pixels, condition).tolist()
    ranked = sorted(zip(names, found, strict=True), key=lambda pair: -pair[1])
    print("\n".join(f"{bits:8.4f} bits/dim  {name}" for name, bits in ranked))
    if out:
        tree = {"model": loaded.digest, "bits": loaded.config.bits, "bits_per_dim": dict(ranked)}
        write(out, canonical_json(tree))
    return 0
