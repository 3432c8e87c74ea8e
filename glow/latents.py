"""What can be done with latents: draw them by seed, and find the direction of an attribute (Glow, section 6)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from glow.bits import keyed_normal, sample_keys


def latents_of_seeds(seeds: Tensor, shapes: Sequence[tuple[int, int, int]], temperature: float = 1.0) -> list[Tensor]:
    """Latents of every level for int64 seeds [b]: a seed draws the same latents in any batch, on any device."""
    latents: list[Tensor] = []
    for level, shape in enumerate(shapes):
        keys = sample_keys(level, torch.zeros_like(seeds), seeds)
        latents.append(temperature * keyed_normal(keys, shape))
    return latents


def attribute_directions(stream: Iterable[tuple[Sequence[Tensor], Tensor]], attributes: int) -> list[Tensor]:
    """Mean latent with an attribute minus mean latent without it, for every level: [attributes, c, h, w].

    `stream` yields (latents of every level, attributes [b, A] of -1, 0, +1); unknowns count for neither side, and an
    attribute never seen on both sides has direction 0. Means run over the stream: nothing but sums is held.
    """
    sums: list[Tensor] = []
    counts = torch.zeros(2, attributes, dtype=torch.float64)
    for latents, signs in stream:
        sides = torch.stack([signs > 0, signs < 0]).to(torch.float64)
        counts += sides.sum(1).cpu()
        parts = [torch.einsum("sba,bchw->sachw", sides, z.double()) for z in latents]
        sums = [total + part for total, part in zip(sums, parts, strict=True)] if sums else parts

    return [_difference(total, counts.to(total.device)) for total in sums]


def _difference(total: Tensor, counts: Tensor) -> Tensor:
    """Mean with minus mean without, [2, a, c, h, w] -> [a, c, h, w]; 0 where a side was never seen."""
    means = total / counts.clamp_min(1)[:, :, None, None, None]
    seen = (counts > 0).all(0)[:, None, None, None]
    return torch.where(seen, means[0] - means[1], 0.0).float()
