"""What can be done with latents: draw them by seed, find an attribute's direction, move, mix and resample (section 6).

Latents are a list of tensors [b, c, h, w], one a level, first level first, standard normal under the model. Everything
here is arithmetic on such lists: no model, no files, and nothing is random but by seed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from glow.bits import keyed_normal, sample_keys

SCALE = 1.6
"""How many directions one unit of a slider moves, as in the released demonstration."""

PARALLEL = 1e-6
"""Sine of the angle below which an arc is a straight line to float rounding."""

SMALLEST = 1e-300
"""Keeps a quotient that is not used finite."""


def latents_of_seeds(
    seeds: Tensor, shapes: Sequence[tuple[int, int, int]], temperature: float | Sequence[float] = 1.0
) -> list[Tensor]:
    """Latents of every level for int64 seeds [b]: a seed draws the same latents in any batch, on any device.

    `temperature` of all levels, or one a level.
    """
    latents: list[Tensor] = []
    for level, shape in enumerate(shapes):
        keys = sample_keys(level, torch.zeros_like(seeds), seeds)
        latents.append(keyed_normal(keys, shape))
    return heat(latents, temperature)


def heat(latents: Sequence[Tensor], temperature: float | Sequence[float]) -> list[Tensor]:
    """Latents scaled by a temperature (of all levels, or one a level): 0 is the mode's image, 1 leaves them alone."""
    heats = [temperature] * len(latents) if isinstance(temperature, int | float) else list(temperature)
    if len(heats) != len(latents):
        raise ValueError(f"{len(heats)} temperatures for {len(latents)} levels")
    return [factor * z for factor, z in zip(heats, latents, strict=True)]


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


def move(
    latents: Sequence[Tensor], directions: Sequence[Tensor], sliders: Tensor, scale: float = SCALE
) -> list[Tensor]:
    """Latents moved along directions [A, c, h, w] a level by sliders [b, A], usually in [-1, 1]; 0 changes no bit."""
    moved: list[Tensor] = []
    for z, direction in zip(latents, directions, strict=True):
        step = torch.einsum("ba,achw->bchw", scale * sliders.to(z), direction.to(z))
        moved.append(torch.where(sliders.any(1)[:, None, None, None], z + step, z))
    return moved


def project(latents: Sequence[Tensor], directions: Sequence[Tensor], scale: float = SCALE) -> Tensor:
    """Where images stand on every attribute's slider, [b, A]: moving by s moves what this returns by s.

    The inner product over all levels with the direction, in units of `scale` directions; 0 along a direction of 0.
    """
    z, d = _joined(latents), _joined(directions)
    square = scale * (d * d).sum(1)
    return torch.where(square > 0, z @ d.T / square.clamp_min(SMALLEST), 0.0).float()


def interpolate(first: Sequence[Tensor], second: Sequence[Tensor], weights: Tensor, spherical: bool) -> list[Tensor]:
    """Between two images' latents [1, c, h, w] a level, at weights [n] from 0 (first) to 1 (second): [n, c, h, w].

    Straight, or along the great arc through all levels together, which keeps the length that standard normal latents
    have; the ends are exact either way.
    """
    angle = _angle(first, second) if spherical else 0.0
    mixed: list[Tensor] = []
    for a, b in zip(first, second, strict=True):
        t = weights.to(a)[:, None, None, None]
        here, there = 1 - t, t
        if angle:
            here, there = (torch.sin(part * angle) / math.sin(angle) for part in (here, there))
        inside = here * a + there * b
        mixed.append(torch.where(t == 0, a, torch.where(t == 1, b, inside)))
    return mixed


def keep_levels(latents: Sequence[Tensor], fresh: Sequence[Tensor], first: int) -> list[Tensor]:
    """The latents of levels >= `first`, counted from 0 at the finest, over fresh ones below."""
    if not 0 <= first <= len(latents):
        raise ValueError(f"levels from {first} on, of {len(latents)}")
    return [new if level < first else kept for level, (kept, new) in enumerate(zip(latents, fresh, strict=True))]


def _difference(total: Tensor, counts: Tensor) -> Tensor:
    """Mean with minus mean without, [2, a, c, h, w] -> [a, c, h, w]; 0 where a side was never seen."""
    means = total / counts.clamp_min(1)[:, :, None, None, None]
    seen = (counts > 0).all(0)[:, None, None, None]
    return torch.where(seen, means[0] - means[1], 0.0).float()


def _angle(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    """The angle between two images' latents over all levels; 0 where there is no one arc: parallel, opposite or 0."""
    a, b = _joined(first).flatten(), _joined(second).flatten()
    lengths = float((a @ a).sqrt() * (b @ b).sqrt())
    angle = math.acos(max(-1.0, min(1.0, float(a @ b) / max(lengths, SMALLEST))))
    return angle if lengths > 0 and math.sin(angle) > PARALLEL else 0.0


def _joined(latents: Sequence[Tensor]) -> Tensor:
    """All levels side by side in float64, [b, D]."""
    return torch.cat([z.double().flatten(1) for z in latents], dim=1)
