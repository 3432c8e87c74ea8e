"""Activation normalisation (Glow, section 3.1): a scale and a bias a channel, set once from data."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from glow.bijection import Bijection, Gather

LOG_SCALE_FACTOR = 3.0
"""Learned log scales are stored divided by this, as released with Glow: they then move three times as fast."""

MIN_STD = 1e-3
"""Smallest standard deviation initialisation divides by, so that a dead channel is not blown up."""


def channel_moments(xs: Iterable[Tensor], channels: int, gather: Gather) -> tuple[Tensor, Tensor]:
    """Mean and population standard deviation of every channel over all microbatches of all workers, float64 [c].

    Sums of each microbatch are taken in float64 and added in sample order: the result does not depend on the workers.
    """
    rows: list[Tensor] = []
    for x in xs:
        wide = x.double()
        count = torch.full_like(wide[0, :, 0, 0], x.shape[0] * x.shape[2] * x.shape[3])
        rows.append(torch.stack([wide.sum((0, 2, 3)), wide.square().sum((0, 2, 3)), count]))
    table = gather(torch.stack(rows) if rows else torch.zeros(0, 3, channels, dtype=torch.float64))
    total = torch.zeros_like(table[0])
    for row in table:
        total = total + row
    mean = total[0] / total[2]
    return mean, (total[1] / total[2] - mean.square()).clamp_min(0).sqrt()


class ActNorm(Bijection):
    """y = (x + bias) * exp(3 log_scale), one bias and log_scale a channel; log_det = h w sum(3 log_scale)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels))
        self.log_scale = nn.Parameter(torch.zeros(channels))

    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """The same map as y = x * scale + shift, both [c], for folding into a neighbouring linear map."""
        scale = torch.exp(LOG_SCALE_FACTOR * self.log_scale)
        return scale, self.bias * scale

    def log_det_per_pixel(self) -> Tensor:
        """Sum of the log scales, a scalar."""
        return LOG_SCALE_FACTOR * self.log_scale.sum()

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        scale, shift = self.scale_and_shift()
        log_det = x.shape[2] * x.shape[3] * self.log_det_per_pixel()
        return x * scale[:, None, None] + shift[:, None, None], log_det.expand(x.shape[0])

    def inverse(self, y: Tensor, condition: Tensor | None = None) -> Tensor:
        scale, _ = self.scale_and_shift()
        return y / scale[:, None, None] - self.bias[:, None, None]

    @torch.no_grad()
    def set_from(self, xs: Iterable[Tensor], gather: Gather) -> None:
        """Make the output of these microbatches [n, c, h, w] zero mean and unit variance in every channel."""
        mean, std = channel_moments(xs, len(self.bias), gather)
        self.bias.copy_(-mean)
        self.log_scale.copy_(-std.clamp_min(MIN_STD).log() / LOG_SCALE_FACTOR)

    def initialize(self, xs: Sequence[Tensor], conditions: Sequence[Tensor | None], gather: Gather) -> list[Tensor]:
        self.set_from(xs, gather)
        return super().initialize(xs, conditions, gather)
