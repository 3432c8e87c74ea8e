"""Memorisation: how near samples come to training images, measured by how near held-out images come to them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.stream import Stream

SIDE = 16
"""Images are compared as averages over at most SIDE x SIDE places."""

IMAGES = 20_000
"""Training images that are looked at."""


@dataclass(frozen=True, kw_only=True)
class Neighbours:
    """Nearest training images of some samples."""

    ratio: float
    """Median distance of the samples over that of held-out images; far below 1 would be memorised images."""
    searched: int
    nearest: tuple[int, ...]
    """Of every sample, its neighbour's number in the training split."""


def nearest(samples: Tensor, held_out: Tensor, training: Stream, images: int = IMAGES) -> Neighbours:
    """Neighbours of samples, with held-out images (both uint8 [n, c, h, w]) for comparison."""
    asked = torch.cat([_small(samples), _small(held_out)])
    best, which = torch.full((len(asked),), torch.inf), torch.zeros(len(asked), dtype=torch.int64)
    count = min(images, training.samples)
    for batch in training.batches(0, 256, stop=count):
        distance, place = torch.cdist(asked, _small(batch.pixels)).min(1)
        nearer = distance < best
        best = torch.where(nearer, distance, best)
        which = torch.where(nearer, batch.samples[place], which)
    mine, theirs = best[: len(samples)].median(), best[len(samples) :].median()
    ratio = float(mine / theirs.clamp(min=1e-9))
    return Neighbours(ratio=ratio, searched=count, nearest=tuple(which[: len(samples)].tolist()))


def _small(pixels: Tensor) -> Tensor:
    """[n, d] in [0, 1]."""
    side = min(SIDE, pixels.shape[-1])
    return F.adaptive_avg_pool2d(pixels.float() / 255, side).flatten(1)
