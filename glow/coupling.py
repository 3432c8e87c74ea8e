"""Coupling layers (NICE; RealNVP, section 3.2; Glow, section 3.3): one half of the channels moves the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from glow.bijection import Bijection, Gather, Recomputed
from glow.conditioner import ConvConditioner

CouplingKind = Literal["affine", "additive"]

SIGMOID_SHIFT = 2.0
"""scale = sigmoid(s + 2): near 1 at the start, as released."""


class Coupling(Bijection):
    """y1 = x1, y2 = (x2 + shift) * scale with shift and scale read off x1; additive couplings have scale 1."""

    def __init__(self, channels: int, width: int, kind: CouplingKind, condition: int = 0) -> None:
        super().__init__()
        if channels % 2:
            raise ValueError(f"a coupling halves its channels and cannot halve {channels}")
        self.kind: CouplingKind = kind
        outputs = channels if kind == "affine" else channels // 2
        self.conditioner = ConvConditioner(channels // 2, outputs, width, condition)

    def shift_and_log_scale(self, x1: Tensor, condition: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """What both directions apply to the second half: shift [b, c/2, h, w] and log scale (None: 0).

        The network may run in a lower precision (autocast); what it says is applied in the stream's.
        """
        out = self.conditioner(x1, condition).to(x1.dtype)
        if self.kind == "additive":
            return out, None
        return out[:, 0::2], F.logsigmoid(out[:, 1::2] + SIGMOID_SHIFT)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x1, x2 = x.chunk(2, dim=1)
        y2, log_det = _moved(x2, *self.shift_and_log_scale(x1, condition))
        return torch.cat([x1, y2], dim=1), log_det

    def inverse(self, y: Tensor, condition: Tensor | None = None) -> Tensor:
        y1, y2 = y.chunk(2, dim=1)
        return torch.cat([y1, _moved_back(y2, *self.shift_and_log_scale(y1, condition))], dim=1)

    def recompute(self, y: Tensor, condition: Tensor | None = None) -> Recomputed:
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
