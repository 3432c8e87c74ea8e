"""Activation normalisation (Glow, section 3.1): a scale and a bias a channel, set once from data."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glow.bijection import Bijection, Gather, Recomputed

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


BATCH_NORM_EPS = 1e-4
"""Added to every variance, as released with RealNVP."""

BATCH_NORM_DECAY = 0.1
"""Share of the running moments that a step replaces, as released with RealNVP."""


class BatchNorm(Bijection):
    """y = (x - mean) / sqrt(var + eps); log_det = -1/2 sum log(var + eps) over all values (RealNVP, section 3.7).

    In training the moments are those of the leaf, the microbatch at hand, and gradients pass through them. Evaluation
    and `inverse` use the running ones, which move in `absorb` alone: forward only leaves its moments in `last`. So
    forward may run again in backward, and a batch of many leaves on many workers is absorbed once.

    The input may hold several phases of the same channels side by side, [b, p c, h, w]. `zeros` counts as many zeros as
    there are values into the moments of a leaf: in checkerboard couplings, as released, the fields that stay.
    """

    mean: Tensor
    var: Tensor

    def __init__(self, channels: int, zeros: bool = False) -> None:
        super().__init__()
        self.zeros = zeros
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("var", torch.ones(channels))
        self.last: Tensor | None = None

    def moments(self, x: Tensor) -> Tensor:
        """Mean and (biased) variance to normalise x by, [2, c]."""
        if not self.training:
            return torch.stack([self.mean, self.var])
        phases = x.to(self.mean.dtype).reshape(len(x), -1, len(self.mean), *x.shape[2:])
        var, mean = torch.var_mean(phases, (0, 1, 3, 4), correction=0)
        if self.zeros:
            mean, var = mean / 2, var / 2 + mean.square() / 4
        moments = torch.stack([mean, var])
        self.last = moments.detach()
        return moments

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        mean, var = self._like(x, self.moments(x))
        log_std = 0.5 * (var + BATCH_NORM_EPS).log()
        log_det = -x.shape[2] * x.shape[3] * log_std.sum()
        return (x - mean) * torch.exp(-log_std), log_det.expand(x.shape[0])

    def inverse(self, y: Tensor, condition: Tensor | None = None) -> Tensor:
        return self.undone(y, None)

    def undone(self, y: Tensor, moments: Tensor | None) -> Tensor:
        """The x that forward took to y under these moments [2, c], the running ones where None are given."""
        mean, var = self._like(y, torch.stack([self.mean, self.var]) if moments is None else moments)
        return y * (var + BATCH_NORM_EPS).sqrt() + mean

    def kept(self) -> Tensor | None:
        return self.last if self.training else None

    def recompute(self, y: Tensor, condition: Tensor | None = None, kept: Tensor | None = None) -> Recomputed:
        leaf = self.undone(y.detach(), kept).requires_grad_()
        return Recomputed((leaf,), *self.forward(leaf, condition))

    @torch.no_grad()
    def absorb(self, moments: Tensor, share: float = BATCH_NORM_DECAY) -> None:
        """Move the running moments towards these, [2, c]."""
        self.mean.lerp_(moments[0].to(self.mean), share)
        self.var.lerp_(moments[1].to(self.var), share)

    def _like(self, x: Tensor, moments: Tensor) -> Tensor:
        """[2, c] -> [2, p c, 1, 1] for an x of p phases."""
        return moments.repeat(1, x.shape[1] // moments.shape[1])[..., None, None]


def batch_norms(module: nn.Module) -> list[BatchNorm]:
    """Every batch norm of a module, in the order of its state_dict."""
    return [norm for norm in module.modules() if isinstance(norm, BatchNorm)]


def leaf_moments(module: nn.Module) -> Tensor:
    """The moments of the last leaf in every batch norm of a module, side by side, [m]; 0 before there was one."""
    norms = batch_norms(module)
    found = [norm.mean.new_zeros(2, len(norm.mean)) if norm.last is None else norm.last for norm in norms]
    return torch.cat([moments.flatten() for moments in found]) if found else torch.zeros(0)


def absorb_moments(module: nn.Module, moments: Tensor, share: float = BATCH_NORM_DECAY) -> None:
    """Move the running moments of every batch norm towards these, [m] as `leaf_moments` gives them."""
    start = 0
    for norm in batch_norms(module):
        stop = start + 2 * len(norm.mean)
        norm.absorb(moments[start:stop].view(2, -1), share)
        start = stop


class NormedReLU(nn.Module):
    """max(0, normalised x + bias), the norm of RealNVP's networks: a bias and no scale, as released."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = BatchNorm(channels)
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """[b, c, h, w] -> [b, c, h, w]."""
        mean, var = self.norm.moments(x)
        scale = (var + BATCH_NORM_EPS).rsqrt()
        return F.relu(x * scale[:, None, None] + (self.bias - mean * scale)[:, None, None])
