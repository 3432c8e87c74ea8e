"""RealNVP (Dinh et al. 2017, arXiv 1605.08803): couplings over checkerboards and channels, batch-normalised.

As the released code (laurent-dinh/models) has it; where the paper or we differ: docs/decisions.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from glow.bijection import Bijection, Recomputed
from glow.norm import BatchNorm
from glow.residual import ChannelConditioner, FieldConditioner


class NormedCoupling(Bijection):
    """y1 = x1, y2 = norm((x2 + shift) exp(rescale tanh(s))), shift and s read off x1 (sections 3.2 and 3.7).

    x1 is the first half of the channels, or the second where `swapped`. In the layout of an `OrderedSqueeze` halves are
    the fields of a checkerboard.
    """

    def __init__(
        self, conditioner: ChannelConditioner | FieldConditioner, norm: BatchNorm, rescale: float, *, swapped: bool
    ) -> None:
        super().__init__()
        self.conditioner = conditioner
        self.norm = norm
        self.rescale = nn.Parameter(torch.tensor(rescale))
        self.swapped = swapped

    def shift_and_log_scale(self, x1: Tensor, condition: Tensor | None) -> tuple[Tensor, Tensor]:
        """What both directions apply to the other half, each of its shape."""
        shift, s = self.conditioner(x1, condition)
        return shift.to(x1.dtype), self.rescale * torch.tanh(s.to(x1.dtype))

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x1, x2 = self._halves(x)
        y2, log_det = self._moved(x2, *self.shift_and_log_scale(x1, condition))
        return self._whole(x1, y2), log_det

    def inverse(self, y: Tensor, condition: Tensor | None = None) -> Tensor:
        y1, y2 = self._halves(y)
        return self._whole(y1, self._moved_back(y2, *self.shift_and_log_scale(y1, condition), None))

    def kept(self) -> Tensor | None:
        return self.norm.kept()

    def recompute(self, y: Tensor, condition: Tensor | None = None, kept: Tensor | None = None) -> Recomputed:
        """One conditioner evaluation serves the inverse and the gradient; `kept` are the moments forward divided by."""
        y1, y2 = self._halves(y)
        x1 = y1.detach().requires_grad_()
        shift, log_scale = self.shift_and_log_scale(x1, condition)
        with torch.no_grad():
            recovered = self._moved_back(y2, shift, log_scale, kept)
        x2 = recovered.requires_grad_()
        again, log_det = self._moved(x2, shift, log_scale)
        return Recomputed((x2, x1) if self.swapped else (x1, x2), self._whole(x1, again), log_det)

    def _halves(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first, second = x.chunk(2, dim=1)
        return (second, first) if self.swapped else (first, second)

    def _whole(self, one: Tensor, other: Tensor) -> Tensor:
        return torch.cat([other, one] if self.swapped else [one, other], dim=1)

    def _moved(self, x2: Tensor, shift: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
        y2, log_det = self.norm((x2 + shift) * log_scale.exp())
        return y2, log_scale.sum((1, 2, 3)) + log_det

    def _moved_back(self, y2: Tensor, shift: Tensor, log_scale: Tensor, moments: Tensor | None) -> Tensor:
        return self.norm.undone(y2, moments) * (-log_scale).exp() - shift
