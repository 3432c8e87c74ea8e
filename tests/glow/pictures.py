"""Pictures a test can make: smooth backgrounds with one disc, seen through dequantisation noise."""

from __future__ import annotations

import torch
from torch import Tensor


def toy_pictures(count: int, size: int, seed: int, channels: int = 3) -> Tensor:
    """Float pictures [count, channels, size, size] in [-1/2, 1/2), a function of the seed."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    axis = torch.linspace(-1, 1, size)
    slope = 0.2 * (draw(count, channels, 1, 1) - 0.5) * axis[:, None]
    centre, radius = draw(count, 2, 1, 1) - 0.5, 0.2 + 0.4 * draw(count, 1, 1)
    inside = (axis[:, None] - centre[:, 0]).square() + (axis - centre[:, 1]).square() < radius.square()
    ground, disc = (draw(2, count, channels, 1, 1) - 0.5) * 0.6
    pictures = torch.where(inside[:, None], disc, ground) + slope
    return (pictures + draw(count, channels, size, size) / 32).clamp(-0.5, 0.4999)
