"""Gaussian priors of the latents: learned at the top, read off the kept half at every split (released code)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glow.bijection import full_precision
from glow.conditioner import ZeroConv, border_mask, zero_linear
from glow.norm import LOG_SCALE_FACTOR

LOG_2_PI = math.log(2 * math.pi)


def standard_normal_log_prob(eps: Tensor) -> Tensor:
    """log N(eps; 0, 1) of every sample, [b, ...] -> [b], in nats."""
    dims = eps[0].numel()
    return -0.5 * (eps.square().flatten(1).sum(1) + dims * LOG_2_PI)


class GaussianPrior(nn.Module):
    """N(mean, exp(log_std)) a value, with mean and log_std interleaved in the channels of `statistics`."""

    condition: nn.Linear | None

    def statistics(self, kept: Tensor) -> Tensor:
        """[b or 1, 2c, h, w] from the kept half (a split) or from its shape alone (the top)."""
        raise NotImplementedError

    def mean_and_log_std(self, kept: Tensor, condition: Tensor | None) -> tuple[Tensor, Tensor]:
        """Both [b or 1, c, h, w]; the condition moves every channel by a learned amount, equal in space."""
        with full_precision(kept):
            out = self.statistics(kept)
            if self.condition is not None and condition is not None:
                out = out + self.condition(condition)[:, :, None, None]
        return out[:, 0::2], out[:, 1::2]

    def normalize(self, z: Tensor, kept: Tensor, condition: Tensor | None) -> tuple[Tensor, Tensor]:
        """z -> (eps = (z - mean) / std, log p(z) [b] in nats)."""
        mean, log_std = self.mean_and_log_std(kept, condition)
        eps = (z - mean) * torch.exp(-log_std)
        return eps, standard_normal_log_prob(eps) - log_std.expand_as(z).flatten(1).sum(1)

    def denormalize(self, eps: Tensor, kept: Tensor, condition: Tensor | None) -> Tensor:
        """eps -> z = mean + std * eps."""
        mean, log_std = self.mean_and_log_std(kept, condition)
        return mean + torch.exp(log_std) * eps


class StandardPrior(GaussianPrior):
    """N(0, 1) at every split and at the top, as released with RealNVP."""

    def normalize(self, z: Tensor, kept: Tensor, condition: Tensor | None) -> tuple[Tensor, Tensor]:
        return z, standard_normal_log_prob(z)

    def denormalize(self, eps: Tensor, kept: Tensor, condition: Tensor | None) -> Tensor:
        return eps


class SplitPrior(GaussianPrior):
    """The prior of a factored-out half: a zero-initialised 3x3 convolution of the kept half."""

    def __init__(self, channels: int, condition: int = 0, border: bool = True) -> None:
        super().__init__()
        self.conv = ZeroConv(channels, 2 * channels, border)
        self.condition = zero_linear(condition, 2 * channels) if condition else None

    def statistics(self, kept: Tensor) -> Tensor:
        return self.conv(kept)


class TopPrior(GaussianPrior):
    """The prior of the last latent: a zero convolution of zeros (a bias and the border's share), as released.

    Not learned (`--learntop` off in the release) it is N(0, 1), moved by the condition alone.
    """

    def __init__(self, channels: int, condition: int = 0, border: bool = True, learned: bool = True) -> None:
        super().__init__()
        self.channels, self.learned = channels, learned
        self.bias = nn.Parameter(torch.zeros(2 * channels)) if learned else None
        self.border = nn.Parameter(torch.zeros(2 * channels, 1, 3, 3)) if learned and border else None
        self.log_scale = nn.Parameter(torch.zeros(2 * channels)) if learned else None
        self.condition = zero_linear(condition, 2 * channels) if condition else None

    def statistics(self, kept: Tensor) -> Tensor:
        if self.bias is None or self.log_scale is None:
            return kept.new_zeros(1, 2 * self.channels, *kept.shape[2:])
        scale = torch.exp(LOG_SCALE_FACTOR * self.log_scale)
        if self.border is None:
            return (self.bias * scale)[None, :, None, None].expand(1, -1, *kept.shape[2:])
        return F.conv2d(border_mask(kept), self.border * scale[:, None, None, None], self.bias * scale)


def zero_classifier(channels: int, classes: int) -> nn.Linear:
    """Logits of classes from the top latent's spatial mean, 0 at the start (released code, `weight_y`)."""
    linear = nn.Linear(channels, classes)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear
