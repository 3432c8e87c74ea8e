"""The network inside a coupling (Glow, section 3.3 and released code): 3x3, 1x1 and a zero-initialised 3x3 convolution.

Every 3x3 convolution sees one channel more than its input, 1 on the padded border and 0 inside, as released: that is
how a translation-invariant network knows where the edge is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glow.bijection import Gather
from glow.norm import LOG_SCALE_FACTOR, ActNorm

HIDDEN_STD = 0.05
"""Standard deviation of hidden weights at the start, as released."""

PIXEL_MAJOR_FROM = 512
"""Pixels of a batch from which hidden maps lie pixel-major; below it turning the weights costs more (on a CPU)."""


def border_mask(like: Tensor) -> Tensor:
    """The border channel of a padded [b, c, h, w]: [1, 1, h + 2, w + 2], 1 on the border and 0 inside."""
    inside = like.new_zeros(1, 1, like.shape[2], like.shape[3])
    return F.pad(inside, (1, 1, 1, 1), value=1.0)


def padded(x: Tensor) -> Tensor:
    """x zero-padded by one pixel, [b, c, h, w] -> [b, c, h + 2, w + 2]."""
    return F.pad(x, (1, 1, 1, 1))


def padded_with_border(x: Tensor) -> Tensor:
    """x zero-padded by one pixel beside its border channel, [b, c, h, w] -> [b, c + 1, h + 2, w + 2]."""
    return torch.cat([F.pad(x, (1, 1, 1, 1)), border_mask(x).expand(x.shape[0], -1, -1, -1)], dim=1)


class ZeroConv(nn.Module):
    """A 3x3 convolution that starts at 0, with output scale exp(3 log_scale); a border channel has its own weight."""

    def __init__(self, channels: int, out_channels: int, border: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(out_channels, channels, 3, 3))
        self.border = nn.Parameter(torch.zeros(out_channels, 1, 3, 3)) if border else None
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.log_scale = nn.Parameter(torch.zeros(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        """[b, channels, h, w] -> [b, out_channels, h, w]."""
        scale = torch.exp(LOG_SCALE_FACTOR * self.log_scale)
        edge = None if self.border is None else F.conv2d(border_mask(x), self.border * scale[:, None, None, None])
        y = F.conv2d(x, self.weight * scale[:, None, None, None], self.bias * scale, padding=1).contiguous()
        return y if edge is None else y + edge


class ConvConditioner(nn.Module):
    """[b, channels, h, w] (and condition [b, k]) -> [b, out_channels, h, w]; 0 at the start.

    Both activation norms are folded into the convolutions before them. A condition adds a bias a channel to the first
    hidden map through a zero-initialised linear map, so the unconditional network is the starting point. Large hidden
    maps lie pixel-major (channels_last): the 1x1 convolution is then one matrix product over all pixels. Input, output
    and parameters keep their layout.
    """

    def __init__(self, channels: int, out_channels: int, width: int, condition: int = 0, border: bool = True) -> None:
        super().__init__()
        self.padded = padded_with_border if border else padded
        self.first = nn.Parameter(HIDDEN_STD * torch.randn(width, channels + border, 3, 3))
        self.norm_first = ActNorm(width)
        self.second = nn.Parameter(HIDDEN_STD * torch.randn(width, width, 1, 1))
        self.norm_second = ActNorm(width)
        self.last = ZeroConv(width, out_channels, border)
        self.condition = zero_linear(condition, width) if condition else None

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        hidden = F.relu_(self._first(x, condition))
        hidden = folded_pixelwise(hidden, self.second, self.norm_second)
        return self.last(hidden)

    def _first(self, x: Tensor, condition: Tensor | None) -> Tensor:
        hidden = folded_conv(laid_out(self.padded(x)), self.first, self.norm_first)
        if self.condition is None or condition is None:
            return hidden
        return hidden.add_(self.condition(condition)[:, :, None, None])

    @torch.no_grad()
    def initialize(self, xs: Sequence[Tensor], conditions: Sequence[Tensor | None], gather: Gather) -> None:
        """Set both norms from microbatches; hidden maps are made again, one at a time, rather than held."""

        def first_maps() -> Iterable[Tensor]:
            return (self._first(x, c) for x, c in zip(xs, conditions, strict=True))

        reset(self.norm_first)
        self.norm_first.set_from(first_maps(), gather)
        self.norm_second.set_from((F.conv2d(F.relu(h), self.second) for h in first_maps()), gather)


class MapConditioner(ConvConditioner):
    """The same network with its condition a map beside its input, [b, context, h, w]."""

    def __init__(self, channels: int, out_channels: int, width: int, context: int, border: bool = True) -> None:
        super().__init__(channels + context, out_channels, width, border=border)

    def _first(self, x: Tensor, condition: Tensor | None) -> Tensor:
        assert condition is not None
        return super()._first(torch.cat([x, condition], dim=1), None)


def folded_conv(x: Tensor, weight: Tensor, norm: ActNorm) -> Tensor:
    """norm(conv(x, weight)) as one convolution whose weight and bias carry the norm."""
    scale, shift = norm.scale_and_shift()
    return F.conv2d(x, weight * scale[:, None, None, None], shift)


def laid_out(x: Tensor) -> Tensor:
    """x, pixel-major where it has enough pixels to pay for turning the weights round."""
    pixels = x.shape[0] * x.shape[2] * x.shape[3]
    return x.contiguous(memory_format=torch.channels_last) if pixels >= PIXEL_MAJOR_FROM else x


def folded_pixelwise(x: Tensor, weight: Tensor, norm: ActNorm) -> Tensor:
    """relu(norm(conv(x, weight))) of a 1x1 convolution; one matrix product where x lies pixel-major."""
    if x.is_contiguous():
        return F.relu_(folded_conv(x, weight, norm))
    scale, shift = norm.scale_and_shift()
    b, c, h, w = x.shape
    matrix = weight.flatten(1) * scale[:, None]
    # relu_ takes the product itself, not a view of it: in-place on a view, autograd would copy the whole map.
    rows = F.relu_(torch.addmm(shift, x.permute(0, 2, 3, 1).reshape(b * h * w, c), matrix.t()))
    return rows.view(b, h, w, -1).permute(0, 3, 1, 2)


def zero_linear(inputs: int, outputs: int) -> nn.Linear:
    """A linear map without bias that starts at 0."""
    linear = nn.Linear(inputs, outputs, bias=False)
    nn.init.zeros_(linear.weight)
    return linear


def reset(norm: ActNorm) -> None:
    """Make a norm the identity, so that its input can be measured through the folded convolution."""
    nn.init.zeros_(norm.bias)
    nn.init.zeros_(norm.log_scale)


Conditioner = Callable[[Tensor, Tensor | None], Tensor]
