"""The network inside RealNVP's couplings (section 4.1, released code): residual, batch- and weight-normalised."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glow.conditioner import zero_linear
from glow.norm import BatchNorm, NormedReLU
from glow.shape import OrderedSqueeze

FIELD_GAIN = 2.0
"""Normalised fields of a checkerboard are doubled, as released: half of what is normalised are zeros."""


class NormedConv(nn.Module):
    """A convolution by filters of length 1 (weight normalisation), times a learned `magnitude` where it is scaled.

    As released: directions start uniform within sqrt(2 / channels), magnitudes at half the length that would have.
    """

    def __init__(
        self, channels: int, out_channels: int, size: int, *, scaled: bool = True, biased: bool = True
    ) -> None:
        super().__init__()
        bound = math.sqrt(2 / channels)
        start = torch.full((out_channels,), bound * math.sqrt(channels * size**2 / 12))
        self.direction = nn.Parameter(torch.empty(out_channels, channels, size, size).uniform_(-bound, bound))
        self.magnitude = nn.Parameter(start) if scaled else None
        self.bias = nn.Parameter(torch.zeros(out_channels)) if biased else None

    def forward(self, x: Tensor) -> Tensor:
        """[b, channels, h, w] -> [b, out_channels, h, w]."""
        length = self.direction.square().sum((1, 2, 3)).sqrt()
        scale = 1 / length if self.magnitude is None else self.magnitude / length
        weight = self.direction * scale[:, None, None, None]
        return F.conv2d(x, weight, self.bias, padding=weight.shape[-1] // 2)


class Residual(nn.Module):
    """x + conv(relu(norm(conv(relu(norm(x)))))), both convolutions 3x3."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm_first = NormedReLU(width)
        self.first = NormedConv(width, width, 3, scaled=False, biased=False)
        self.norm_second = NormedReLU(width)
        self.second = NormedConv(width, width, 3)

    def forward(self, x: Tensor) -> Tensor:
        """[b, width, h, w] -> [b, width, h, w]."""
        return x + self.second(self.norm_second(self.first(self.norm_first(x))))


class ResidualNet(nn.Module):
    """[b, channels, h, w] (and condition [b, k]) -> [b, out_channels, h, w].

    The output reads 1x1 skips from the first hidden map and from every residual, summed. A condition adds a bias a
    channel to the first hidden map through a zero-initialised linear map, as in Glow's network.
    """

    def __init__(self, channels: int, out_channels: int, width: int, residuals: int, condition: int = 0) -> None:
        super().__init__()
        self.first = NormedConv(channels, width, 3, scaled=False)
        self.residuals = nn.ModuleList(Residual(width) for _ in range(residuals))
        self.skips = nn.ModuleList(NormedConv(width, width, 1) for _ in range(residuals + 1))
        self.norm_last = NormedReLU(width)
        self.last = NormedConv(width, out_channels, 1)
        self.condition = zero_linear(condition, width) if condition else None

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        hidden = self.first(x)
        if self.condition is not None and condition is not None:
            hidden = hidden + self.condition(condition)[:, :, None, None]
        out = self.skips[0](hidden)
        for residual, skip in zip(self.residuals, self.skips[1:], strict=True):
            hidden = residual(hidden)
            out = out + skip(hidden)
        return self.last(self.norm_last(out))


class ChannelConditioner(nn.Module):
    """What one half of the channels says of the other: [b, c, h, w] -> shift and s, [b, c, h, w] each."""

    def __init__(self, channels: int, width: int, residuals: int, condition: int = 0) -> None:
        super().__init__()
        self.norm = BatchNorm(channels)
        self.bias = nn.Parameter(torch.zeros(channels))
        self.net = ResidualNet(2 * channels, 2 * channels, width, residuals, condition)

    def forward(self, x1: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        both_signs = concat_relu(self.norm(x1)[0] + self.bias[:, None, None])
        shift, s = self.net(both_signs, condition).chunk(2, dim=1)
        return shift, s


class FieldConditioner(nn.Module):
    """What half of a checkerboard's fields says of the other, both in the layout of an `OrderedSqueeze`.

    [b, 2c, h/2, w/2] -> shift and s of that shape; the network sees the whole board [b, c, h, w] with zeros in the
    other fields, and a channel that is 1 in its own. `odd`: it is given the odd fields.
    """

    def __init__(self, channels: int, width: int, residuals: int, condition: int = 0, *, odd: bool = False) -> None:
        super().__init__()
        self.odd = odd
        self.board = OrderedSqueeze()
        self.norm = BatchNorm(channels)
        self.bias = nn.Parameter(torch.zeros(channels))
        self.net = ResidualNet(2 * channels + 1, 2 * channels, width, residuals, condition)

    def forward(self, x1: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        given = self.norm(self._on_board(x1))[0] + self.bias[:, None, None]
        mask = self._on_board(torch.ones_like(x1[:, :2]))
        seen = torch.cat([concat_relu(FIELD_GAIN * given), mask], dim=1)
        shift, s = (self._off_board(part) for part in self.net(seen, condition).chunk(2, dim=1))
        return shift, s

    def _on_board(self, fields: Tensor) -> Tensor:
        halves = [torch.zeros_like(fields), fields] if self.odd else [fields, torch.zeros_like(fields)]
        return self.board.inverse(torch.cat(halves, dim=1))

    def _off_board(self, board: Tensor) -> Tensor:
        """The fields that are not given."""
        return self.board(board)[0].chunk(2, dim=1)[0 if self.odd else 1]


def concat_relu(x: Tensor) -> Tensor:
    """max(0, x) beside max(0, -x): twice the channels."""
    return F.relu(torch.cat([x, -x], dim=1))
