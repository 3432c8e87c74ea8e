"""Variational dequantisation (Flow++, arXiv 1902.00275, section 3.1): noise in a bin from a flow that sees the image.

Uniform noise u0 is moved by u = sigmoid(f(logit(u0); image)), f a chain of couplings between fixed permutations whose
networks see the quantised image. With q the density of u,

    log P(pixels) >= E[log p(bins + u) - log q(u | image)],    -log q = log|det du / du0|,

so the flow is one more bijection below the first level. logit(u0) is logistic and f starts as a permutation: q starts
uniform.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glow.bijection import Chain, Gather, full_precision
from glow.coupling import Coupling
from glow.mixing import PermutationMixing
from glow.shape import Squeeze


class Dequantizer(nn.Module):
    """Moves the noise of dequantised images [b, c, h, w] within their bins."""

    def __init__(self, channels: int, steps: int, width: int) -> None:
        super().__init__()
        self.squeeze = Squeeze()
        self.steps = Chain(*(DequantizerStep(4 * channels, width) for _ in range(steps)))

    def forward(self, x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
        """(x with its noise moved, log|det| = -log q(noise | bins) [b]) of `glow.dequantize`d x at these bits.

        The noise is a multiple of 2^(bits - 24) and stands for the middle of its cell, so that its logit is finite;
        moved, it stays inside its bin.
        """
        bins, start, context = self.divide(x, bits)
        end, log_det = self.steps(start, context)
        with full_precision(x):
            log_det = log_det + (log_slope(end) - log_slope(start)).flatten(1).sum(1)
            noise = torch.sigmoid(self.squeeze.inverse(end)).clamp_max(1 - 2.0 ** (bits - 24))
            return (bins + noise) / 2**bits - 0.5, log_det

    def divide(self, x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
        """x -> (bin numbers, logit of the noise, middles of the bins), the last two squeezed."""
        scaled = (x + 0.5) * 2**bits
        bins, half = scaled.floor(), 2.0 ** (bits - 25)
        start = torch.logit((scaled - bins + half).clamp_max(1 - half))
        return bins, self.squeeze(start)[0], self.squeeze((bins + 0.5) / 2**bits - 0.5)[0]

    @torch.no_grad()
    def initialize(self, xs: Sequence[Tensor], bits: int, gather: Gather) -> None:
        """Set the norms inside its networks from microbatches; what it says stays 0."""
        divided = [self.divide(x, bits) for x in xs]
        self.steps.initialize([start for _, start, _ in divided], [context for *_, context in divided], gather)


class DequantizerStep(Chain):
    """A coupling that sees the image, and a reversal so that the next one moves the other half."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__(
            coupling=Coupling(channels, width, "affine", clamp="soft_exp", context=channels),
            reverse=PermutationMixing(channels, "reverse"),
        )


def log_slope(v: Tensor) -> Tensor:
    """log d sigmoid(v) / dv, of every value."""
    return -F.softplus(v) - F.softplus(-v)
