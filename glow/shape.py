"""Squeezing space into channels (RealNVP, section 3.6) and the logit that opens an interval."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from glow.bijection import Bijection


class Squeeze(Bijection):
    """[b, c, h, w] -> [b, 4c, h/2, w/2], output channel 4c + 2dy + dx as released; a permutation, log_det exactly 0."""

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return F.pixel_unshuffle(x, 2), x.new_zeros(x.shape[0])

    def inverse(self, y: Tensor, condition: Tensor | None = None) -> Tensor:
        return F.pixel_shuffle(y, 2)


PHASES = ((0, 0), (1, 1), (0, 1), (1, 0))
"""(dy, dx) within 2x2 pixels, in RealNVP's order: the even fields of a checkerboard before the odd ones."""


class OrderedSqueeze(Bijection):
    """[b, c, h, w] -> [b, 4c, h/2, w/2], output channel c * phase + channel, as released; a permutation.

    The first half of its channels are the even fields of a checkerboard, the second half the odd ones: in this layout
    both of RealNVP's partitions (section 3.4) are halves of channels.
    """

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return torch.cat([x[:, :, dy::2, dx::2] for dy, dx in PHASES], dim=1), x.new_zeros(x.shape[0])

    def inverse(self, y: Tensor, condition: Tensor | None = None) -> Tensor:
        return F.pixel_shuffle(relaid(y), 2)


class Relayout(Bijection):
    """The channels of an `OrderedSqueeze` in the order of a `Squeeze`, [b, 4c, h, w] -> the same; a permutation."""

    def __init__(self, back: bool = False) -> None:
        super().__init__()
        self.back = back

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return relaid(x, self.back), x.new_zeros(x.shape[0])

    def inverse(self, y: Tensor, condition: Tensor | None = None) -> Tensor:
        return relaid(y, not self.back)


def relaid(x: Tensor, back: bool = False) -> Tensor:
    """Channels in the order of `OrderedSqueeze` to that of `Squeeze`, or back."""
    if back:
        return torch.cat([x[:, 2 * dy + dx :: 4] for dy, dx in PHASES], dim=1)
    blocks = dict(zip(PHASES, x.chunk(4, dim=1), strict=True))
    return torch.stack([blocks[dy, dx] for dy in (0, 1) for dx in (0, 1)], dim=2).flatten(1, 2)


class Logit(Bijection):
    """[-1/2, 1/2] -> logit(1/2 + constraint * x), each value by itself (RealNVP, section 4.1; .9 as released)."""

    def __init__(self, constraint: float) -> None:
        super().__init__()
        self.constraint = constraint

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y = torch.logit(0.5 + self.constraint * x)
        log_slope = F.softplus(y) + F.softplus(-y) + math.log(self.constraint)
        return y, log_slope.flatten(1).sum(1)

    def inverse(self, y: Tensor, condition: Tensor | None = None) -> Tensor:
        return (torch.sigmoid(y) - 0.5) / self.constraint
