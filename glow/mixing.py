"""Channel mixing: the invertible 1x1 convolution of Glow (section 3.2) and the fixed permutations it generalises."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glow.bijection import Bijection, Gather, full_precision
from glow.inverses import Matrix
from glow.norm import ActNorm

MixingKind = Literal["lu", "dense", "reverse", "shuffle"]


class Mixing(Bijection, Matrix):
    """y = W x at every pixel; log_det = h w log|det W|."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.size = channels

    def log_det_per_pixel(self) -> Tensor:
        """log|det W|, a scalar."""
        raise NotImplementedError

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        log_det = x.shape[2] * x.shape[3] * self.log_det_per_pixel()
        with full_precision(x):
            return F.conv2d(x, self.matrix()[:, :, None, None]), log_det.expand(x.shape[0])

    def inverse(self, y: Tensor, condition: Tensor | None = None) -> Tensor:
        with full_precision(y):
            return F.conv2d(y, self.inverse_matrix()[:, :, None, None])


class DenseMixing(Mixing):
    """A learned matrix that starts as a random rotation; the determinant costs O(c^3)."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.weight = nn.Parameter(random_rotation(channels))

    def matrix(self) -> Tensor:
        return self.weight

    def log_det_per_pixel(self) -> Tensor:
        return torch.slogdet(self.weight).logabsdet


class LUMixing(Mixing):
    """W = P L (U + diag(sign exp(log_s))) with P and sign fixed (Glow, equation 10); the determinant costs O(c)."""

    permutation: Tensor
    sign: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        rotation = random_rotation(channels)
        factors = torch.linalg.lu(rotation)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
        permutation, lower, upper = cast("tuple[Tensor, Tensor, Tensor]", factors)
        diagonal = upper.diagonal()
        self.lower = nn.Parameter(lower.tril(-1))
        self.upper = nn.Parameter(upper.triu(1))
        self.log_s = nn.Parameter(diagonal.abs().log())
        self.register_buffer("permutation", permutation)
        self.register_buffer("sign", diagonal.sign())

    def matrix(self) -> Tensor:
        lower = self.lower.tril(-1) + torch.eye(len(self.log_s), dtype=self.log_s.dtype, device=self.log_s.device)
        upper = self.upper.triu(1) + torch.diag(self.sign * self.log_s.exp())
        return self.permutation @ lower @ upper

    def log_det_per_pixel(self) -> Tensor:
        return self.log_s.sum()


class PermutationMixing(Mixing):
    """A fixed permutation of the channels: the reversal of RealNVP, or a random shuffle (Glow's ablation, figure 3)."""

    weight: Tensor

    def __init__(self, channels: int, kind: Literal["reverse", "shuffle"]) -> None:
        super().__init__(channels)
        order = torch.arange(channels - 1, -1, -1) if kind == "reverse" else torch.randperm(channels)
        self.register_buffer("weight", torch.eye(channels)[order])

    def matrix(self) -> Tensor:
        return self.weight

    def log_det_per_pixel(self) -> Tensor:
        return self.weight.new_zeros(())


class NormedMixing(Bijection):
    """Activation norm and mixing folded into one affine map a pixel: one pass over memory instead of three."""

    def __init__(self, norm: ActNorm, mixing: Mixing) -> None:
        super().__init__()
        self.norm = norm
        self.mixing = mixing

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        scale, shift = self.norm.scale_and_shift()
        with full_precision(x):
            matrix = self.mixing.matrix()
            y = F.conv2d(x, (matrix * scale)[:, :, None, None], matrix @ shift)
        log_det = x.shape[2] * x.shape[3] * (self.norm.log_det_per_pixel() + self.mixing.log_det_per_pixel())
        return y, log_det.expand(x.shape[0])

    def inverse(self, y: Tensor, condition: Tensor | None = None) -> Tensor:
        scale, _ = self.norm.scale_and_shift()
        with full_precision(y):
            matrix = self.mixing.inverse_matrix() / scale[:, None]
            return F.conv2d(y, matrix[:, :, None, None], -self.norm.bias)

    def initialize(self, xs: Sequence[Tensor], conditions: Sequence[Tensor | None], gather: Gather) -> list[Tensor]:
        self.norm.set_from(xs, gather)
        return super().initialize(xs, conditions, gather)


def make_mixing(kind: MixingKind, channels: int) -> Mixing:
    """The mixing of that name over so many channels."""
    if kind == "lu":
        return LUMixing(channels)
    return DenseMixing(channels) if kind == "dense" else PermutationMixing(channels, kind)


def random_rotation(channels: int) -> Tensor:
    """A random orthogonal matrix [c, c] from the default generator, computed in float64."""
    normal = torch.randn(channels, channels, dtype=torch.float64)
    return torch.orgqr(*torch.geqrf(normal)).to(torch.get_default_dtype())
