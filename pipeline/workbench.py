"""The latent workbench: pictures through a loaded model and back, the same for the command line, Python and pages.

Pictures go in through the guarded decoder, cropped and resized as a dataset would be, and stand at the middle of their
bins, so that encoding and decoding gives back their n-bit pixels. Nothing is taken to be known about them unless the
caller says so: directions were computed that way too. Images go through one by one on one thread, so that what comes
out does not depend on what was asked for beside it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from difflib import get_close_matches

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from glow import (
    bits_per_dim,
    dequantize,
    heat,
    keep_levels,
    keyed_uniform,
    latents_of_seeds,
    move,
    project,
    sample_keys,
    to_pixels,
)
from pipeline.errors import DataError, UsageError
from pipeline.model import LoadedModel
from pipeline.pictures import Target, inspect, load
from pipeline.sampling import Condition, condition_of, one_thread
from pipeline.sources.folder import SUFFIXES
from pipeline.storage import Storage, canonical_json, open_file, open_storage

UNKNOWN: Condition = (None, None)

SEED = "seed:"
"""`seed:7` names the picture that sampling seed 7 draws."""

SCHEMA = "1"


def read_pictures(loaded: LoadedModel, places: Sequence[str], temperature: float = 0.7) -> tuple[list[str], Tensor]:
    """Names and uint8 [n, c, h, w] of pictures: files, s3:// keys, folders or prefixes of either, and `seed:7`."""
    names, pictures = [], []
    for place in places:
        if place.startswith(SEED):
            names.append(place)
            pictures.append(loaded.sample([_seed(place)], temperature)[0])
            continue
        for folder, key in _found(place):
            names.append(folder.where(key))
            pictures.append(_picture(loaded, folder.read(key), folder.where(key)))
    if not pictures:
        raise UsageError("no picture", cure=f"give picture files, folders of them, s3:// addresses, or {SEED}7")
    return names, torch.stack(pictures)


@torch.no_grad()
def encode(loaded: LoadedModel, pixels: Tensor, condition: Condition = UNKNOWN) -> list[Tensor]:
    """Latents of every level of images uint8 [n, c, h, w]."""
    with one_thread():
        rows = [
            loaded.model.encode(_middle(image, loaded.config.bits), *part) for image, part in _single(pixels, condition)
        ]
    return [torch.cat(parts) for parts in zip(*rows, strict=True)]


@torch.no_grad()
def decode(loaded: LoadedModel, latents: Sequence[Tensor], condition: Condition = UNKNOWN) -> Tensor:
    """Images uint8 [n, c, h, w] of latents: the inverse of `encode` under the same condition."""
    pictures = []
    with one_thread():
        for number, (_, part) in enumerate(_single(latents[0], condition)):
            x = loaded.model.decode([z[[number]] for z in latents], *part)
            if not torch.isfinite(x).all():
                raise DataError(
                    "what these latents decode to is not finite", cure="move less, or lower the temperature"
                )
            pictures.append(to_pixels(x, loaded.config.bits))
    return torch.cat(pictures)


@torch.no_grad()
def score(loaded: LoadedModel, pixels: Tensor, condition: Condition = UNKNOWN) -> Tensor:
    """Bits per dimension of images uint8 [n, c, h, w], float64 [n]: large is unlike what the model learned from.

    Every image has the same dequantisation noise, so that a figure belongs to the image alone.
    """
    bits, model = loaded.config.bits, loaded.model
    first = torch.zeros(1, dtype=torch.int64)
    noise = keyed_uniform(sample_keys(0, first, first), tuple(pixels.shape[1:]))
    with one_thread():
        found = [model.log_prob(dequantize(image, bits, noise), *part) for image, part in _single(pixels, condition)]
    return bits_per_dim(torch.cat(found).double(), model.dims, bits)


def edited(loaded: LoadedModel, latents: Sequence[Tensor], name: str, sliders: Iterable[float]) -> list[Tensor]:
    """Images of latents with an attribute's slider at each place, one uint8 [n, c, h, w] a place; 0 changes nothing."""
    directions = [level[[attribute_of(loaded, name)]] for level in loaded.directions]
    count = len(latents[0])
    return [decode(loaded, move(latents, directions, torch.full((count, 1), slider))) for slider in sliders]


def places(loaded: LoadedModel, latents: Sequence[Tensor]) -> Tensor:
    """Where images stand on every attribute's slider, [n, A], in the order of `config.editable`."""
    return project(latents, loaded.directions)


def over_temperatures(latents: Sequence[Tensor], temperatures: Sequence[float]) -> dict[str, list[Tensor]]:
    """The latents at each temperature, by a title."""
    return {f"T = {temperature:g}": heat(latents, temperature) for temperature in temperatures}


def over_levels(latents: Sequence[Tensor], seed: int, temperature: float = 0.7) -> dict[str, list[Tensor]]:
    """The latents with all levels kept, without the finest, and so on to none; what is dropped is drawn from a seed."""
    seeds = torch.full((len(latents[0]),), seed)
    fresh = latents_of_seeds(seeds, [(z.shape[1], z.shape[2], z.shape[3]) for z in latents], temperature)
    titles = ["all levels", *(f"levels {first + 1} up" for first in range(1, len(latents))), "none"]
    return {title: keep_levels(latents, fresh, first) for first, title in enumerate(titles)}


def known(loaded: LoadedModel, count: int, attributes: str = "", label: int = -1) -> Condition:
    """The condition of images of which this much is known, and no more."""
    config = loaded.config
    nothing = torch.full((count,), -1), torch.zeros(count, len(config.editable), dtype=torch.int8)
    return condition_of(config.model, config.editable, nothing, attributes, label)


def attribute_of(loaded: LoadedModel, name: str) -> int:
    """The place of an attribute among the model's directions; UsageError with the nearest name."""
    known = loaded.config.editable
    if name in known:
        return known.index(name)
    near = get_close_matches(name, known, n=1)
    cure = f"did you mean {near[0]}?" if near else f"directions here: {', '.join(known) or 'none'}"
    raise UsageError(f"no direction {name}", cure=cure)


def latents_bytes(loaded: LoadedModel, names: Sequence[str], latents: Sequence[Tensor]) -> bytes:
    """A latents file: safetensors `level.0`, ... [n, c, h, w] float32; its metadata names the model and the images."""
    tensors = {f"level.{index}": z.contiguous() for index, z in enumerate(latents)}
    note = {"schema": SCHEMA, "model": loaded.digest, "images": canonical_json(list(names)).decode()}
    return safetensors.torch.save(tensors, note)


def read_latents(loaded: LoadedModel, data: bytes, where: str) -> tuple[list[str], list[Tensor]]:
    """Names and latents of a latents file; DataError where it is none, harmed, or of another model."""
    try:
        size = int.from_bytes(data[:8], "little")
        note = json.loads(data[8 : 8 + size])["__metadata__"]
        tensors = safetensors.torch.load(data)
        latents = [tensors[f"level.{index}"] for index in range(loaded.config.model.levels)]
        names, model = json.loads(note["images"]), note["model"]
    except (ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
        cure = "python -m jobs latents encode writes such files"
        raise DataError(f"not a latents file ({type(error).__name__})", where=where, cure=cure) from error
    if model != loaded.digest:
        what = f"latents of model {model[:12]}, given to {loaded.digest[:12]}"
        raise DataError(
            what, where=where, cure="latents mean nothing to another model: encode the pictures with this one"
        )
    if {tuple(z.shape) for z in latents} != {(len(names), *shape) for shape in loaded.model.latent_shapes()}:
        raise DataError("shapes do not fit the model", where=where, cure="encode the pictures again")
    return names, latents


def _single(images: Tensor, condition: Condition) -> Iterable[tuple[Tensor, Condition]]:
    """Every image [1, ...] with its own condition."""
    for number in range(len(images)):
        label, signs = (None if part is None else part[[number]] for part in condition)
        yield images[[number]], (label, signs)


def _middle(pixels: Tensor, bits: int) -> Tensor:
    return dequantize(pixels, bits, torch.full(pixels.shape, 0.5))


def _seed(place: str) -> int:
    try:
        return int(place.removeprefix(SEED))
    except ValueError as error:
        raise UsageError(f"not a seed: {place}", cure=f"a whole number, as {SEED}7") from error


def _found(place: str) -> list[tuple[Storage, str]]:
    """The picture files of a place: itself, or what lies below it."""
    if place.lower().endswith(SUFFIXES):
        return [open_file(place)]
    folder = open_storage(place)
    keys = [key for key in sorted(folder.list()) if key.lower().endswith(SUFFIXES)]
    if not keys:
        raise UsageError("no pictures here", where=place, cure=f"files that end in {', '.join(SUFFIXES)}")
    return [(folder, key) for key in keys]


def _picture(loaded: LoadedModel, data: bytes, where: str) -> Tensor:
    """Decode a picture to what the model knows; one that is too small is refused, not blown up."""
    header, config = inspect(data, where), loaded.config.model
    if min(header.width, header.height) < config.size:
        what = f"{header.width}x{header.height} px, the model's images have {config.size}"
        raise DataError(what, where=where, cure="give a larger picture")
    pixels = load(data, Target(size=config.size, channels=config.channels), where)
    return (
        torch.from_numpy(np.array(pixels).reshape(config.size, config.size, config.channels))
        .permute(2, 0, 1)
        .contiguous()
    )
