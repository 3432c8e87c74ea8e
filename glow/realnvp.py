"""RealNVP (Dinh et al. 2017, arXiv 1605.08803): couplings over checkerboards and channels, batch-normalised.

As the released code (laurent-dinh/models) has it; where the paper or we differ: docs/decisions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from glow.bijection import Bijection, Chain, Gather, Recomputed
from glow.config import FlowConfig, GlowConfig, RealNVPConfig
from glow.flow import Flow, Glow
from glow.level import Level
from glow.norm import BatchNorm, absorb_moments, batch_norms, leaf_moments
from glow.prior import GaussianPrior, SplitPrior, StandardPrior, TopPrior
from glow.residual import ChannelConditioner, FieldConditioner
from glow.shape import Logit, OrderedSqueeze, Relayout


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

    def initialize(self, xs: Sequence[Tensor], conditions: Sequence[Tensor | None], gather: Gather) -> list[Tensor]:
        """Give the running moments the mean of the microbatches' own, so that evaluation makes sense from the start."""
        ys: list[Tensor] = []
        rows: list[Tensor] = []
        before = self.training
        self.train()
        for x, condition in zip(xs, conditions, strict=True):
            ys.append(self(x, condition)[0])
            rows.append(leaf_moments(self).double())
        self.train(before)
        width = sum(2 * len(norm.mean) for norm in batch_norms(self))
        table = gather(torch.stack(rows) if rows else torch.zeros(0, width, dtype=torch.float64))
        absorb_moments(self, sum(table, torch.zeros_like(table[0])) / len(table), share=1.0)
        return ys

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


class RealNVP(Flow):
    """RealNVP over float images [b, channels, size, size] in [-1/2, 1/2); see `Flow`.

    Its batch norms use the moments of the batch at hand while `training`, and running ones in evaluation, `decode` and
    `sample`: after every optimiser step call `absorb(moments())` (with many leaves: the mean of theirs).
    """

    config: RealNVPConfig

    def __init__(self, config: RealNVPConfig) -> None:
        config.refuse_impossible()
        super().__init__(config, [_level(config, index) for index in range(config.levels)])

    def scales(self) -> list[Tensor]:
        """Weight-norm magnitudes and the checkerboard couplings' rescale, as released."""
        return [
            parameter
            for name, parameter in self.named_parameters()
            if name.endswith("magnitude") or (".fields_" in name and name.endswith("rescale"))
        ]


def _level(config: RealNVPConfig, index: int) -> Level:
    """Checkerboard couplings, then channel couplings (section 3.6); the last level has a fourth checkerboard instead.

    All of it in the layout of an ordered squeeze, whose halves are both the fields of the checkerboard and, after the
    couplings, what goes on and what is factored out.
    """
    channels, width, last = config.channels * 2**index, config.width * 2**index, index == config.levels - 1
    steps: dict[str, Bijection] = {
        f"fields_{i}": _field_coupling(config, channels, width, odd=i % 2 == 1) for i in range(4 if last else 3)
    }
    if not last:
        over_channels = {f"channels_{i}": _channel_coupling(config, channels, 2 * width, i % 2 == 1) for i in range(3)}
        steps |= {"relayout": Relayout(), **over_channels, "back": Relayout(back=True)}
    squeeze = Chain(Logit(config.constraint), OrderedSqueeze()) if index == 0 else OrderedSqueeze()
    return Level(squeeze, Chain(**steps), _prior(config, 4 * channels, last), last)


def _field_coupling(config: RealNVPConfig, channels: int, width: int, *, odd: bool) -> NormedCoupling:
    condition = config.condition_size if config.condition_steps else 0
    conditioner = FieldConditioner(channels, width, config.residuals, condition, odd=odd)
    return NormedCoupling(conditioner, BatchNorm(channels, zeros=config.masked_moments), 0.0, swapped=odd)


def _channel_coupling(config: RealNVPConfig, channels: int, width: int, swapped: bool) -> NormedCoupling:
    condition = config.condition_size if config.condition_steps else 0
    conditioner = ChannelConditioner(2 * channels, width, config.residuals, condition)
    return NormedCoupling(conditioner, BatchNorm(2 * channels), 1.0, swapped=swapped)


def _prior(config: RealNVPConfig, channels: int, last: bool) -> GaussianPrior:
    if config.prior == "standard":
        return StandardPrior()
    condition = config.condition_size if last or config.condition_splits else 0
    return TopPrior(channels, condition) if last else SplitPrior(channels // 2, condition)


def make_flow(config: FlowConfig) -> Flow:
    """The flow a configuration describes, its weights drawn from torch's default generator."""
    if isinstance(config, RealNVPConfig):
        return RealNVP(config)
    assert isinstance(config, GlowConfig)
    return Glow(config)
