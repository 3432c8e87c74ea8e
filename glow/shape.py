"""Squeezing space into channels (RealNVP, section 3.6) and halving channels at a level's end."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from glow.bijection import Bijection


class Squeeze(Bijection):
    """[b, c, h, w] -> [b, 4c, h/2, w/2], output channel 4c + 2dy + dx as released; a permutation, log_det exactly 0."""

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return F.pixel_unshuffle(x, 2), x.new_zeros(x.shape[0])

    def inverse(self, y: Tensor, condition: Tensor | None = None) -> Tensor:
        return F.pixel_shuffle(y, 2)
