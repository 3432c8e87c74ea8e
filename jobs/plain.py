"""Glow as the paper says it, in the plainest PyTorch: the oracle of the tests and the baseline of the bench.

Kingma & Dhariwal 2018 (arXiv 1807.03039). One module a box of figure 2, autograd keeps everything, nothing is folded or
recomputed, and nothing of `glow` is imported. `load_from` takes a `glow.Glow`'s state_dict, so both can be compared.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class ActNorm(nn.Module):
    """Section 3.1: y = (x + b) exp(3 p) in every channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels))
        self.log_scale = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = (x + self.bias[:, None, None]) * torch.exp(3 * self.log_scale[:, None, None])
        return y, x.shape[2] * x.shape[3] * (3 * self.log_scale).sum()


class DenseMixing(nn.Module):
    """Section 3.2, equation 9: an invertible 1x1 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linalg.qr(torch.randn(channels, channels))[0])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        log_det = x.shape[2] * x.shape[3] * torch.linalg.slogdet(self.weight)[1]
        return F.conv2d(x, self.weight[:, :, None, None]), log_det


class LUMixing(nn.Module):
    """Section 3.2, equations 10 and 11: W = P L (U + diag(s)), log|det W| = sum log|s|."""

    permutation: Tensor
    sign: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        permutation, lower, upper = torch.linalg.lu(torch.linalg.qr(torch.randn(channels, channels))[0])
        self.register_buffer("permutation", permutation)
        self.register_buffer("sign", upper.diagonal().sign())
        self.log_s = nn.Parameter(upper.diagonal().abs().log())
        self.lower = nn.Parameter(lower.tril(-1))
        self.upper = nn.Parameter(upper.triu(1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        lower = self.lower.tril(-1) + torch.eye(len(self.log_s)).to(self.lower)
        upper = self.upper.triu(1) + torch.diag(self.sign * self.log_s.exp())
        weight = self.permutation @ lower @ upper
        return F.conv2d(x, weight[:, :, None, None]), x.shape[2] * x.shape[3] * self.log_s.sum()


class Permutation(nn.Module):
    """The fixed permutations of figure 3, as a matrix: reversal or random."""

    weight: Tensor

    def __init__(self, channels: int, kind: Literal["reverse", "shuffle"]) -> None:
        super().__init__()
        order = torch.arange(channels).flip(0) if kind == "reverse" else torch.randperm(channels)
        self.register_buffer("weight", torch.eye(channels)[order])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x[:, self.weight.argmax(1)], x.new_zeros(())


def padded(x: Tensor, border: bool) -> Tensor:
    """Zero-pad by one pixel; with a border add a channel that is 1 on the padding (released code)."""
    if not border:
        return F.pad(x, (1, 1, 1, 1))
    edge = F.pad(torch.zeros_like(x[:, :1]), (1, 1, 1, 1), value=1)
    return torch.cat([F.pad(x, (1, 1, 1, 1)), edge], dim=1)


class ZeroConv(nn.Module):
    """A 3x3 convolution that starts at 0, its output scaled by exp(3 p)."""

    def __init__(self, channels: int, out_channels: int, border: bool) -> None:
        super().__init__()
        self.border = border
        self.conv = nn.Conv2d(channels + border, out_channels, 3)
        self.log_scale = nn.Parameter(torch.zeros(out_channels))
        nn.init.zeros_(self.conv.weight)
        nn.init.zeros_(self.conv.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(padded(x, self.border)) * torch.exp(3 * self.log_scale[:, None, None])


class Network(nn.Module):
    """Section 3.3: 3x3, 1x1 and zero 3x3 convolutions; actnorm and ReLU between."""

    def __init__(self, channels: int, out_channels: int, width: int, border: bool, condition: int) -> None:
        super().__init__()
        self.border = border
        self.conv_1 = nn.Conv2d(channels + border, width, 3, bias=False)
        self.norm_1 = ActNorm(width)
        self.conv_2 = nn.Conv2d(width, width, 1, bias=False)
        self.norm_2 = ActNorm(width)
        self.conv_3 = ZeroConv(width, out_channels, border)
        self.condition = nn.Linear(condition, width, bias=False) if condition else None
        nn.init.normal_(self.conv_1.weight, std=0.05)
        nn.init.normal_(self.conv_2.weight, std=0.05)

    def forward(self, x: Tensor, condition: Tensor | None) -> Tensor:
        h, _ = self.norm_1(self.conv_1(padded(x, self.border)))
        if self.condition is not None:
            h = h + self.condition(condition)[:, :, None, None]
        h, _ = self.norm_2(self.conv_2(F.relu(h)))
        return self.conv_3(F.relu(h))


class Coupling(nn.Module):
    """Section 3.3: the first half of the channels moves the second; affine, or additive with scale 1."""

    def __init__(self, channels: int, config: Any, condition: int) -> None:
        super().__init__()
        self.affine, self.clamp = config.coupling == "affine", config.clamp
        outputs = channels if self.affine else channels // 2
        self.network = Network(channels // 2, outputs, config.width, config.border, condition)

    def forward(self, x: Tensor, condition: Tensor | None) -> tuple[Tensor, Tensor]:
        x1, x2 = x.chunk(2, dim=1)
        out = self.network(x1, condition)
        if not self.affine:
            return torch.cat([x1, x2 + out], dim=1), x.new_zeros(len(x))
        shift, log_scale = out[:, 0::2], self.log_scale(out[:, 1::2])
        return torch.cat([x1, (x2 + shift) * log_scale.exp()], dim=1), log_scale.sum((1, 2, 3))

    def log_scale(self, s: Tensor) -> Tensor:
        """Released code, and two ways to keep the scale from 0."""
        return {
            "sigmoid": lambda: F.logsigmoid(s + 2),
            "two_sigmoid": lambda: F.logsigmoid(s) + math.log(2),
            "soft_exp": lambda: 2 * torch.tanh(s / 2),
        }[self.clamp]()


class Step(nn.Module):
    """Figure 2a: actnorm, channel mixing, coupling."""

    def __init__(self, channels: int, config: Any, condition: int) -> None:
        super().__init__()
        self.norm = ActNorm(channels)
        if config.mixing in ("reverse", "shuffle"):
            self.mixing: nn.Module = Permutation(channels, config.mixing)
        else:
            self.mixing = LUMixing(channels) if config.mixing == "lu" else DenseMixing(channels)
        self.coupling = Coupling(channels, config, condition)

    def forward(self, x: Tensor, condition: Tensor | None) -> tuple[Tensor, Tensor]:
        x, log_det_norm = self.norm(x)
        x, log_det_mixing = self.mixing(x)
        x, log_det_coupling = self.coupling(x, condition)
        return x, log_det_norm + log_det_mixing + log_det_coupling


class Prior(nn.Module):
    """Released code: N(mean, exp(log_std)) of one half from the other, or of the top from zeros and the condition."""

    def __init__(self, channels: int, border: bool, learned: bool, condition: int) -> None:
        super().__init__()
        self.conv = ZeroConv(channels, 2 * channels, border) if learned else None
        self.condition = nn.Linear(condition, 2 * channels, bias=False) if condition else None

    def forward(self, z: Tensor, given: Tensor, condition: Tensor | None) -> tuple[Tensor, Tensor]:
        """(normalised z, log p(z | given))."""
        statistics = torch.zeros_like(given.repeat(1, 2, 1, 1)) if self.conv is None else self.conv(given)
        if self.condition is not None:
            statistics = statistics + self.condition(condition)[:, :, None, None]
        mean, log_std = statistics[:, 0::2], statistics[:, 1::2]
        eps = (z - mean) / log_std.exp()
        return eps, (-0.5 * (eps**2 + math.log(2 * math.pi)) - log_std).sum((1, 2, 3))


class Level(nn.Module):
    """Figure 2b: squeeze, K steps, split."""

    def __init__(self, channels: int, config: Any, last: bool) -> None:
        super().__init__()
        condition = config.condition_size if config.condition_steps else 0
        self.last = last
        self.steps = nn.ModuleList(Step(channels, config, condition) for _ in range(config.steps))
        condition = config.condition_size if config.condition_splits or last else 0
        learned = config.learned_top or not last
        self.prior = Prior(channels if last else channels // 2, config.border, learned, condition)


class PlainGlow(nn.Module):
    """Figure 2b, L levels, from a `glow.GlowConfig` or anything with its fields.

    `condition` is a vector [b, k] of one-hot label and attributes; `checkpointed` gives every step to
    torch.utils.checkpoint.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.checkpointed = False
        last = config.levels - 1
        self.levels = nn.ModuleList(
            Level(4 * config.channels * 2**index, config, index == last) for index in range(config.levels)
        )

    def __iter__(self) -> Iterator[Level]:
        return iter(self.levels)  # type: ignore[arg-type]

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[list[Tensor], Tensor]:
        """[b, c, h, w] -> (normalised latents of every level, log p(x) [b] in nats)."""
        latents, log_prob = [], x.new_zeros(len(x))
        for level in self:
            x = F.pixel_unshuffle(x, 2)
            for step in level.steps:
                x, log_det = self._apply_step(step, x, condition)
                log_prob = log_prob + log_det
            x, z = (torch.zeros_like(x), x) if level.last else x.chunk(2, dim=1)
            eps, log_prior = level.prior(z, x, condition)
            latents.append(eps)
            log_prob = log_prob + log_prior
        return latents, log_prob

    def _apply_step(self, step: nn.Module, x: Tensor, condition: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.checkpointed:
            return checkpoint(step, x, condition, use_reentrant=False)  # type: ignore[return-value]
        return step(x, condition)

    def load_from(self, state: Mapping[str, Tensor]) -> None:
        """Take the parameters of a `glow.Glow` of the same configuration, given as its state_dict."""
        self.load_state_dict(translated(state))


RENAMED = (
    (r"\.mix\.(norm|mixing)\.", r".\1."),
    (r"\.conditioner\.first$", ".network.conv_1.weight"),
    (r"\.conditioner\.second$", ".network.conv_2.weight"),
    (r"\.conditioner\.norm_first\.", ".network.norm_1."),
    (r"\.conditioner\.norm_second\.", ".network.norm_2."),
    (r"\.conditioner\.last\.", ".network.conv_3."),
    (r"\.conditioner\.condition\.", ".network.condition."),
    (r"\.prior\.(bias|border|log_scale)$", r".prior.conv.\1"),
)


def translated(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A Glow's tensors (parameters, or gradients: the map is linear) under the names and in the shapes of PlainGlow."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        for ours, plain in RENAMED:
            name = re.sub(ours, plain, name)
        found[name] = tensor
    for prefix in [name.removesuffix("log_scale") for name in found if re.search(r"conv(_3)?\.log_scale$", name)]:
        _join_zero_conv(found, prefix)
    return found


def _join_zero_conv(found: dict[str, Tensor], prefix: str) -> None:
    """Weight beside border weight is one convolution over c + 1 channels; the top prior's has none and sees zeros."""
    bias = found.pop(prefix + "bias")
    weight = found.pop(prefix + "weight", bias.new_zeros(len(bias), len(bias) // 2, 3, 3))
    border = found.pop(prefix + "border", weight[:, :0])
    found[prefix + "conv.weight"] = torch.cat([weight, border], dim=1)
    found[prefix + "conv.bias"] = bias
