"""A level of a flow: squeeze, steps, split; and the step that is Glow's."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from glow.bijection import Bijection, Chain
from glow.config import GlowConfig
from glow.coupling import Coupling
from glow.mixing import NormedMixing, make_mixing
from glow.norm import ActNorm
from glow.prior import GaussianPrior


class Step(Chain):
    """Activation norm, channel mixing, coupling (Glow, figure 2a)."""

    def __init__(self, channels: int, config: GlowConfig) -> None:
        condition = config.condition_size if config.condition_steps else 0
        super().__init__(
            mix=NormedMixing(ActNorm(channels), make_mixing(config.mixing, channels)),
            coupling=Coupling(
                channels, config.width, config.coupling, condition, clamp=config.clamp, border=config.border
            ),
        )


class Level(nn.Module):
    """Squeeze, steps of flow, and a split whose factored-out half has its own prior (Glow, figure 2b)."""

    def __init__(self, squeeze: Bijection, steps: Chain, prior: GaussianPrior, last: bool) -> None:
        super().__init__()
        self.squeeze = squeeze
        self.steps = steps
        self.prior = prior
        self.last = last

    def divide(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """(what goes on, what is factored out); at the top everything is, and what goes on only lends its shape."""
        if self.last:
            return h, h
        kept, out = h.chunk(2, dim=1)
        return kept, out

    def forward(self, x: Tensor, condition: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """[b, c, h, w] -> (what goes on, eps of this level, its log prior [b], log_det [b])."""
        h, log_det = self.squeeze(x)
        h, term = self.steps(h, condition)
        kept, out = self.divide(h)
        eps, log_prior = self.prior.normalize(out, kept, condition)
        return kept, eps, log_prior, log_det + term

    def inverse(self, kept: Tensor | None, eps: Tensor, condition: Tensor | None) -> Tensor:
        """The level's input from what went on (None at the top) and its normalised latent."""
        if kept is None:
            h = self.prior.denormalize(eps, eps, condition)
        else:
            h = torch.cat([kept, self.prior.denormalize(eps, kept, condition)], dim=1)
        return self.squeeze.inverse(self.steps.inverse(h, condition))
