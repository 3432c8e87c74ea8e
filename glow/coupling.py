"""Coupling layers (NICE; RealNVP, section 3.2; Glow, section 3.3): one half of the channels moves the other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from glow.bijection import Bijection, Gather, Recomputed
from glow.conditioner import ConvConditioner, MapConditioner

CouplingKind = Literal["affine", "additive"]

Clamp = Literal["sigmoid", "two_sigmoid", "soft_exp"]

SIGMOID_SHIFT = 2.0
"""scale = sigmoid(s + 2): near 1 at the start, as released."""

SOFT_LIMIT = 2.0
"""soft_exp keeps the log scale within this of 0."""


def log_scale_of(s: Tensor, clamp: Clamp) -> Tensor:
    """The log scale of an affine coupling from what its network says, of the same shape.

    sigmoid: log sigmoid(s + 2), below 0, as released. two_sigmoid: log 2 sigmoid(s), below log 2. soft_exp:
    2 tanh(s / 2), within 2 of 0: neither direction can explode. The last two are 0 at s = 0.
    """
    if clamp == "sigmoid":
        return F.logsigmoid(s + SIGMOID_SHIFT)
    if clamp == "two_sigmoid":
        return F.logsigmoid(s) + math.log(2)
    return SOFT_LIMIT * torch.tanh(s / SOFT_LIMIT)


class Coupling(Bijection):
    """y1 = x1, y2 = (x2 + shift) * scale with shift and scale read off x1; additive couplings have scale 1.

    With `context` its condition is a map of so many channels beside x1, [b, context, h, w], instead of a vector.
    """

    def __init__(
        self,
        channels: int,
        width: int,
        kind: CouplingKind,
        condition: int = 0,
        *,
        clamp: Clamp = "sigmoid",
        border: bool = True,
        context: int = 0,
    ) -> None:
        super().__init__()
        if channels % 2:
            raise ValueError(f"a coupling halves its channels and cannot halve {channels}")
        self.kind: CouplingKind = kind
        self.clamp: Clamp = clamp
        half, outputs = channels // 2, channels if kind == "affine" else channels // 2
        if context:
            self.conditioner: ConvConditioner = MapConditioner(half, outputs, width, context, border)
        else:
            self.conditioner = ConvConditioner(half, outputs, width, condition, border)

    def shift_and_log_scale(self, x1: Tensor, condition: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """What both directions apply to the second half: shift [b, c/2, h, w] and log scale (None: 0).

        The network may run in a lower precision (autocast); what it says is applied in the stream's.
        """
        out = self.conditioner(x1, condition).to(x1.dtype)
        if self.kind == "additive":
            return out, None
        return out[:, 0::2], log_scale_of(out[:, 1::2], self.clamp)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x1, x2 = x.chunk(2, dim=1)
        y2, log_det = _moved(x2, *self.shift_and_log_scale(x1, condition))
        return torch.cat([x1, y2], dim=1), log_det

    def inverse(self, y: Tensor, condition: Tensor | None = None) -> Tensor:
        y1, y2 = y.chunk(2, dim=1)
        return torch.cat([y1, _moved_back(y2, *self.shift_and_log_scale(y1, condition))], dim=1)

    def recompute(self, y: Tensor, condition: Tensor | None = None, kept: Tensor | None = None) -> Recomputed:
        """One conditioner evaluation serves the inverse and the gradient."""
        y1, y2 = y.chunk(2, dim=1)
        x1 = y1.detach().requires_grad_()
        shift, log_scale = self.shift_and_log_scale(x1, condition)
        with torch.no_grad():
            recovered = _moved_back(y2, shift, log_scale)
        x2 = recovered.requires_grad_()
        again, log_det = _moved(x2, shift, log_scale)
        return Recomputed((x1, x2), torch.cat([x1, again], dim=1), log_det)

    def initialize(self, xs: Sequence[Tensor], conditions: Sequence[Tensor | None], gather: Gather) -> list[Tensor]:
        self.conditioner.initialize([x.chunk(2, dim=1)[0] for x in xs], conditions, gather)
        return super().initialize(xs, conditions, gather)


def _moved(x2: Tensor, shift: Tensor, log_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    if log_scale is None:
        return x2 + shift, x2.new_zeros(x2.shape[0])
    return (x2 + shift) * log_scale.exp(), log_scale.sum((1, 2, 3))


def _moved_back(y2: Tensor, shift: Tensor, log_scale: Tensor | None) -> Tensor:
    return (y2 if log_scale is None else y2 * (-log_scale).exp()) - shift
