"""RealNVP as paper and released code say it, in the plainest PyTorch: the oracle of the tests.

Dinh et al. 2017 (arXiv 1605.08803). Masks are masks over whole images, autograd keeps everything, and nothing of `glow`
is imported. `load_from` takes a `glow.RealNVP`'s state_dict, so both can be compared.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class BatchMoments(nn.Module):
    """Mean and variance of every channel: the batch's in training, running ones otherwise."""

    mean: Tensor
    var: Tensor

    def __init__(self, channels: int, biased: bool = True) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("var", torch.ones(channels))
        self.beta = nn.Parameter(torch.zeros(channels)) if biased else None

    def of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(mean, variance + 1e-4), [c, 1, 1] each."""
        mean, var = (x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)) if self.training else (self.mean, self.var)
        return mean[:, None, None], var[:, None, None] + 1e-4

    def forward(self, x: Tensor) -> Tensor:
        """Normalised and shifted, as inside the networks."""
        assert self.beta is not None
        mean, var = self.of(x)
        return (x - mean) / var.sqrt() + self.beta[:, None, None]


class Conv(nn.Module):
    """A weight-normalised convolution, with or without a learned magnitude and a bias."""

    def __init__(self, channels: int, out_channels: int, size: int, magnitude: bool = True, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, channels, size, size))
        self.magnitude = nn.Parameter(torch.ones(out_channels)) if magnitude else None
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight / self.weight.flatten(1).norm(dim=1)[:, None, None, None]
        if self.magnitude is not None:
            weight = weight * self.magnitude[:, None, None, None]
        return F.conv2d(x, weight, self.bias, padding="same")


class Block(nn.Module):
    """A residual block: norm, ReLU and a 3x3 convolution, twice."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.bn_0, self.bn_1 = BatchMoments(width), BatchMoments(width)
        self.conv_0 = Conv(width, width, 3, magnitude=False, bias=False)
        self.conv_1 = Conv(width, width, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_0(F.relu(self.bn_0(x)))
        return x + self.conv_1(F.relu(self.bn_1(h)))


class Network(nn.Module):
    """A residual network whose output is read off 1x1 skips."""

    def __init__(self, channels: int, out_channels: int, width: int, blocks: int, condition: int) -> None:
        super().__init__()
        self.conv_in = Conv(channels, width, 3, magnitude=False)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.skips = nn.ModuleList(Conv(width, width, 1) for _ in range(blocks + 1))
        self.bn_out = BatchMoments(width)
        self.conv_out = Conv(width, out_channels, 1)
        self.condition = nn.Linear(condition, width, bias=False) if condition else None

    def forward(self, x: Tensor, condition: Tensor | None) -> Tensor:
        h = self.conv_in(x)
        if self.condition is not None:
            h = h + self.condition(condition)[:, :, None, None]
        out = self.skips[0](h)
        for block, skip in zip(self.blocks, self.skips[1:], strict=True):
            h = block(h)
            out = out + skip(h)
        return self.conv_out(F.relu(self.bn_out(out)))


class CheckerboardCoupling(nn.Module):
    """Section 3.4, left of figure 3: fields where the mask is 1 stay and move the others."""

    def __init__(self, channels: int, width: int, blocks: int, condition: int, first: int) -> None:
        super().__init__()
        self.first = first
        self.bn_in, self.bn_after = BatchMoments(channels), BatchMoments(channels, biased=False)
        self.network = Network(2 * channels + 1, 2 * channels, width, blocks, condition)
        self.scale = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, condition: Tensor | None) -> tuple[Tensor, Tensor]:
        rows, columns = torch.arange(x.shape[2])[:, None], torch.arange(x.shape[3])
        mask = ((self.first + rows + columns) % 2).to(x)
        h = 2 * self.bn_in(x * mask)
        h = F.relu(torch.cat([h, -h, mask.expand(len(x), 1, -1, -1)], dim=1))
        shift, s = self.network(h, condition).chunk(2, dim=1)
        log_scale = self.scale * torch.tanh(s) * (1 - mask)
        y = (x + shift * (1 - mask)) * log_scale.exp()
        mean, var = self.bn_after.of(y * (1 - mask))
        y = (y - mean * (1 - mask)) * torch.exp(-0.5 * var.log() * (1 - mask))
        log_det = log_scale - 0.5 * var.log() * (1 - mask)
        return y, log_det.sum((1, 2, 3))


class ChannelCoupling(nn.Module):
    """Section 3.4, right of figure 3: half of the channels stays and moves the other."""

    def __init__(self, channels: int, width: int, blocks: int, condition: int, change_last: bool) -> None:
        super().__init__()
        self.change_last = change_last
        self.bn_in, self.bn_after = BatchMoments(channels // 2), BatchMoments(channels // 2, biased=False)
        self.network = Network(channels, channels, width, blocks, condition)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, condition: Tensor | None) -> tuple[Tensor, Tensor]:
        stays, moves = x.chunk(2, dim=1) if self.change_last else reversed(x.chunk(2, dim=1))
        h = self.bn_in(stays)
        shift, s = self.network(F.relu(torch.cat([h, -h], dim=1)), condition).chunk(2, dim=1)
        log_scale = self.scale * torch.tanh(s)
        y = (moves + shift) * log_scale.exp()
        mean, var = self.bn_after.of(y)
        y = (y - mean) / var.sqrt()
        log_det = log_scale.sum((1, 2, 3)) - 0.5 * y[0, 0].numel() * var.log().sum()
        return torch.cat([stays, y] if self.change_last else [y, stays], dim=1), log_det


def squeeze_ordered(x: Tensor) -> Tensor:
    """Released code: the four phases of 2x2 pixels, those of the diagonal first, as blocks of channels."""
    return torch.cat([x[:, :, 0::2, 0::2], x[:, :, 1::2, 1::2], x[:, :, 0::2, 1::2], x[:, :, 1::2, 0::2]], dim=1)


class Scale(nn.Module):
    """Section 3.6: three checkerboard couplings, then three over channels; the last scale has a fourth checkerboard."""

    def __init__(self, channels: int, width: int, blocks: int, condition: int, last: bool) -> None:
        super().__init__()
        self.last = last
        firsts = (1, 0, 1, 0) if last else (1, 0, 1)
        self.checkerboards = nn.ModuleList(
            CheckerboardCoupling(channels, width, blocks, condition, first) for first in firsts
        )
        self.channels = nn.ModuleList(
            ChannelCoupling(4 * channels, 2 * width, blocks, condition, change_last)
            for change_last in ((), (True, False, True))[not last]
        )

    def forward(self, x: Tensor, condition: Tensor | None) -> tuple[Tensor, Tensor]:
        total = x.new_zeros(len(x))
        for coupling in self.checkerboards:
            x, log_det = coupling(x, condition)
            total = total + log_det
        x = F.pixel_unshuffle(x, 2)
        for coupling in self.channels:
            x, log_det = coupling(x, condition)
            total = total + log_det
        return F.pixel_shuffle(x, 2), total


class PlainRealNVP(nn.Module):
    """Sections 3.6 and 4.1 with the prior N(0, 1), from a `glow.RealNVPConfig` or anything with its fields."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.constraint = config.constraint
        condition = config.condition_size if config.condition_steps else 0
        self.scales = nn.ModuleList(
            Scale(config.channels * 2**i, config.width * 2**i, config.residuals, condition, i == config.levels - 1)
            for i in range(config.levels)
        )

    def __iter__(self) -> Iterator[Scale]:
        return iter(self.scales)  # type: ignore[arg-type]

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[list[Tensor], Tensor]:
        """[b, c, h, w] in [-1/2, 1/2) -> (latents of every scale, log p(x) [b] in nats)."""
        p = (1 + self.constraint * (2 * (x + 0.5) - 1)) / 2
        log_prob = (-p.log() - (1 - p).log() + math.log(self.constraint)).sum((1, 2, 3))
        x, latents = p.log() - (1 - p).log(), []
        for scale in self:
            x, log_det = scale(x, condition)
            x, z = (x, squeeze_ordered(x)) if scale.last else squeeze_ordered(x).chunk(2, dim=1)
            latents.append(z)
            log_prob = log_prob + log_det - 0.5 * (z**2 + math.log(2 * math.pi)).sum((1, 2, 3))
        return latents, log_prob

    def load_from(self, state: Mapping[str, Tensor]) -> None:
        """Take the tensors of a `glow.RealNVP` of the same configuration, given as its state_dict."""
        self.load_state_dict(translated(state))


RENAMED = (
    (r"^levels\.", "scales."),
    (r"\.steps\.fields_(\d)\.", r".checkerboards.\1."),
    (r"\.steps\.channels_(\d)\.", r".channels.\1."),
    (r"\.conditioner\.norm\.", ".bn_in."),
    (r"\.conditioner\.bias$", ".bn_in.beta"),
    (r"(\d)\.norm\.(mean|var)$", r"\1.bn_after.\2"),
    (r"\.rescale$", ".scale"),
    (r"\.conditioner\.net\.", ".network."),
    (r"\.network\.first\.", ".network.conv_in."),
    (r"\.network\.last\.", ".network.conv_out."),
    (r"\.network\.norm_last\.", ".network.bn_out."),
    (r"\.residuals\.(\d)\.norm_first\.", r".blocks.\1.bn_0."),
    (r"\.residuals\.(\d)\.norm_second\.", r".blocks.\1.bn_1."),
    (r"\.residuals\.(\d)\.first\.", r".blocks.\1.conv_0."),
    (r"\.residuals\.(\d)\.second\.", r".blocks.\1.conv_1."),
    (r"\.direction$", ".weight"),
    (r"\.norm\.(mean|var)$", r".\1"),
    (r"(\.bn_\w+)\.bias$", r"\1.beta"),
)


def translated(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A RealNVP's tensors (state or gradients) under the names of PlainRealNVP."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        for ours, plain in RENAMED:
            name = re.sub(ours, plain, name)
        found[name] = tensor
    return found
