"""The flow's own test of "data to the standard distribution": Phi(latents) is uniform where the model is right.

On held-out images the histogram says where the model is off (probability integral transform); on the model's own
samples it must be uniform, whatever was learned, or encoding and sampling do not agree.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from glow import Flow, latents_of_seeds
from pipeline.sampling import Condition

BINS = 20
COLUMNS = BINS + 2
"""Of `transform`: counts of every bin, sum, sum of squares."""


@dataclass(frozen=True, kw_only=True)
class Uniformity:
    """Phi of the latents of one level; a uniform one has mean 1/2 and variance 1/12."""

    values: int
    counts: tuple[int, ...]
    """Values in equal bins over [0, 1]."""
    mean: float
    variance: float


@dataclass(frozen=True, kw_only=True)
class Kolmogorov:
    """Kolmogorov and Smirnov's test of one level's latents against the standard normal distribution."""

    values: int
    statistic: float
    p: float


def transform(latents: Sequence[Tensor]) -> Tensor:
    """Float64 [b, levels * COLUMNS]: what `summarised` adds up, image by image."""
    edges = torch.arange(1, BINS, dtype=torch.float64) / BINS
    columns = []
    for latent in latents:
        u = torch.special.ndtr(latent.double().flatten(1).cpu())
        bins = torch.bucketize(u, edges)
        counts = torch.zeros(len(u), BINS, dtype=torch.float64).scatter_add_(1, bins, torch.ones_like(u))
        columns += [counts, u.sum(1, keepdim=True), u.square().sum(1, keepdim=True)]
    return torch.cat(columns, dim=1)


def summarised(table: Tensor) -> tuple[Uniformity, ...]:
    """Rows of `transform`, of any images in any order -> one figure a level."""
    found = []
    for part in table.sum(0).split(COLUMNS):
        counts, total, squares = part[:BINS], float(part[BINS]), float(part[BINS + 1])
        values = int(counts.sum())
        mean = total / values if values else math.nan
        variance = squares / values - mean**2 if values else math.nan
        whole = tuple(int(count) for count in counts)
        found.append(Uniformity(values=values, counts=whole, mean=mean, variance=variance))
    return tuple(found)


@torch.no_grad()
def own_samples(model: Flow, seeds: Sequence[int], condition: Condition) -> tuple[Kolmogorov, ...]:
    """Test the latents that the model finds in its own samples of seeds at temperature 1, level by level."""
    label, attributes = condition
    levels: list[list[Tensor]] = [[] for _ in model.latent_shapes()]
    for start in range(0, len(seeds), 16):
        rows = slice(start, start + 16)
        part = [None if whole is None else whole[rows] for whole in (label, attributes)]
        x = model.decode(latents_of_seeds(torch.tensor(list(seeds[rows])), model.latent_shapes(), 1.0), *part)
        for level, latent in zip(levels, model.encode(x, *part), strict=True):
            level.append(latent.double().flatten().cpu())
    return tuple(kolmogorov(torch.cat(level)) for level in levels)


def kolmogorov(values: Tensor) -> Kolmogorov:
    """Values [n] against N(0, 1), with the asymptotic p (Kolmogorov 1933); 0 where they are not finite."""
    count = len(values)
    u = torch.special.ndtr(values.double()).sort().values
    steps = torch.arange(count + 1, dtype=torch.float64) / count
    statistic = float(torch.maximum((steps[1:] - u).max(), (u - steps[:-1]).max()))
    if not math.isfinite(statistic):
        return Kolmogorov(values=count, statistic=1.0, p=0.0)
    scaled = statistic * (math.sqrt(count) + 0.12 + 0.11 / math.sqrt(count))  # Stephens 1970
    series = math.fsum(2 * (-1) ** (k - 1) * math.exp(-2 * (k * scaled) ** 2) for k in range(1, 101))
    p = min(1.0, max(0.0, series)) if scaled > 0.2 else 1.0  # below, the series is slow and p is 1 to ten places
    return Kolmogorov(values=count, statistic=statistic, p=p)
