"""Glow: a multi-scale flow over images with exact log-likelihood, exact latents and one-pass sampling."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glow.bijection import Chain, Gather
from glow.coupling import Coupling, CouplingKind
from glow.mixing import MixingKind, NormedMixing, make_mixing
from glow.norm import ActNorm
from glow.prior import GaussianPrior, SplitPrior, TopPrior
from glow.shape import Squeeze


@dataclass(frozen=True, kw_only=True)
class GlowConfig:
    """Everything that decides a Glow's parameters."""

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012
    size: int = 0
    """Image side in pixels; 0 takes it from the data."""
    channels: int = 0
    """Image channels; 0 takes them from the data."""
    levels: int = 6
    """Levels (L): each halves the side, all but the last factor half of the channels out."""
    steps: int = 32
    """Steps of flow a level (K)."""
    width: int = 512
    """Hidden channels of the couplings' networks."""
    coupling: CouplingKind = "affine"
    """affine scales and shifts; additive shifts alone."""
    mixing: MixingKind = "lu"
    """lu or dense 1x1 convolution; reverse or shuffle are the ablation of Glow's figure 3."""
    classes: int = 0
    """Class labels the model is conditioned on; 0 takes them from the data, -1 ignores them."""
    attributes: int = 0
    """Attributes (-1, 0 unknown, +1) the model is conditioned on; 0 takes them from the data, -1 ignores them."""
    condition_splits: bool = False
    """Condition the split priors too, not only the top prior as released."""
    condition_steps: bool = False
    """Condition every coupling's network too."""

    @property
    def condition_size(self) -> int:
        """Length of the condition vector: one-hot label beside attributes."""
        return max(self.classes, 0) + max(self.attributes, 0)


class LogProb(NamedTuple):
    """log p(x) and its terms, each [b] in nats: log_prob = log_det + sum(priors)."""

    log_prob: Tensor
    log_det: Tensor
    priors: tuple[Tensor, ...]
    """Of every level, first level first."""


class Step(Chain):
    """Activation norm, channel mixing, coupling (Glow, figure 2a)."""

    def __init__(self, channels: int, config: GlowConfig) -> None:
        condition = config.condition_size if config.condition_steps else 0
        super().__init__(
            mix=NormedMixing(ActNorm(channels), make_mixing(config.mixing, channels)),
            coupling=Coupling(channels, config.width, config.coupling, condition),
        )


class Level(nn.Module):
    """Squeeze, steps of flow, and a split whose factored-out half has its own prior (Glow, figure 2b)."""

    def __init__(self, channels: int, config: GlowConfig, last: bool) -> None:
        super().__init__()
        self.squeeze = Squeeze()
        self.steps = Chain(*(Step(channels, config) for _ in range(config.steps)))
        condition = config.condition_size if last or config.condition_splits else 0
        self.prior: GaussianPrior = TopPrior(channels, condition) if last else SplitPrior(channels // 2, condition)
        self.last = last

    def divide(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """(what goes on, what is factored out); at the top everything is, and what goes on only lends its shape."""
        if self.last:
            return h, h
        kept, out = h.chunk(2, dim=1)
        return kept, out

    def forward(self, x: Tensor, condition: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """[b, c, h, w] -> (what goes on, eps of this level, its log prior [b], log_det [b])."""
        h, log_det = self.steps(self.squeeze(x)[0], condition)
        kept, out = self.divide(h)
        eps, log_prior = self.prior.normalize(out, kept, condition)
        return kept, eps, log_prior, log_det

    def inverse(self, kept: Tensor | None, eps: Tensor, condition: Tensor | None) -> Tensor:
        """The level's input from what went on (None at the top) and its normalised latent."""
        if kept is None:
            h = self.prior.denormalize(eps, eps, condition)
        else:
            h = torch.cat([kept, self.prior.denormalize(eps, kept, condition)], dim=1)
        return self.squeeze.inverse(self.steps.inverse(h, condition))


class Glow(nn.Module):
    """A conditional Glow over float images [b, channels, size, size] in [-1/2, 1/2).

    `label`: int64 [b], -1 unknown; `attributes`: [b, A] of -1, 0 (unknown), +1. Both may be left out: unknown.
    """

    def __init__(self, config: GlowConfig) -> None:
        super().__init__()
        _refuse_impossible(config)
        self.config = config
        channels = config.channels
        levels: list[Level] = []
        for index in range(config.levels):
            last = index == config.levels - 1
            levels.append(Level(4 * channels, config, last))
            channels *= 2
        self.levels = nn.ModuleList(levels)

    def __iter__(self) -> Iterator[Level]:
        return iter(self.levels)  # type: ignore[arg-type]

    @property
    def dims(self) -> int:
        """Numbers in an image, D."""
        return self.config.channels * self.config.size**2

    def latent_shapes(self) -> list[tuple[int, int, int]]:
        """(c, h, w) of every level's latent, first level first; their sizes add to `dims`."""
        shapes: list[tuple[int, int, int]] = []
        channels, side = self.config.channels, self.config.size
        for level in self:
            channels, side = 4 * channels, side // 2
            channels = channels if level.last else channels // 2
            shapes.append((channels, side, side))
        return shapes

    def set_anchors(self, anchor_every: Sequence[int]) -> None:
        """Set the memory dial of every level (the last value repeats); see `glow.Chain`."""
        if not anchor_every or min(anchor_every) < 0:
            raise ValueError(f"anchor_every needs values >= 0, one a level: got {list(anchor_every)}")
        for index, level in enumerate(self):
            level.steps.anchor_every = anchor_every[min(index, len(anchor_every) - 1)]

    def inversion_error(self) -> Tensor | None:
        """Largest |recovered - kept| of the last backward over all levels, or None where nothing was inverted."""
        errors = [level.steps.inversion_error for level in self if level.steps.inversion_error is not None]
        return torch.stack(errors).amax() if errors else None

    def terms(self, x: Tensor, label: Tensor | None = None, attributes: Tensor | None = None) -> LogProb:
        """log p(x | label, attributes) and its terms (Glow, equation 7)."""
        _, priors, log_det = self._encode(x, label, attributes)
        return LogProb(log_det + torch.stack(priors).sum(0), log_det, tuple(priors))

    def log_prob(self, x: Tensor, label: Tensor | None = None, attributes: Tensor | None = None) -> Tensor:
        """log p(x | label, attributes) of every image, [b] in nats."""
        return self.terms(x, label, attributes).log_prob

    def encode(self, x: Tensor, label: Tensor | None = None, attributes: Tensor | None = None) -> list[Tensor]:
        """Normalised latents of every level, standard normal under the model (shapes: `latent_shapes`)."""
        return self._encode(x, label, attributes)[0]

    def _encode(
        self, x: Tensor, label: Tensor | None, attributes: Tensor | None
    ) -> tuple[list[Tensor], list[Tensor], Tensor]:
        self._refuse_shape(x)
        condition = self.condition(len(x), label, attributes, x)
        latents: list[Tensor] = []
        priors: list[Tensor] = []
        log_det = x.new_zeros(len(x))
        for level in self:
            x, eps, log_prior, term = level(x, condition)
            latents.append(eps)
            priors.append(log_prior)
            log_det = log_det + term
        return latents, priors, log_det

    def decode(
        self, latents: Sequence[Tensor], label: Tensor | None = None, attributes: Tensor | None = None
    ) -> Tensor:
        """The image of normalised latents: the inverse of `encode` under the same condition."""
        shapes = [tuple(z.shape[1:]) for z in latents]
        if shapes != self.latent_shapes():
            raise ValueError(f"latents of shapes {shapes} do not fit this model's {self.latent_shapes()}")
        condition = self.condition(len(latents[0]), label, attributes, latents[0])
        x: Tensor | None = None
        for level, eps in zip(reversed(list(self)), reversed(latents), strict=True):
            x = level.inverse(x, eps, condition)
        assert x is not None
        return x

    def sample(
        self,
        count: int,
        *,
        temperature: float | Sequence[float] = 1.0,
        label: Tensor | None = None,
        attributes: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Images [count, c, h, w] drawn at a temperature (of all levels, or one a level): latents are scaled by it."""
        parameter = next(self.parameters())
        heats = [temperature] * self.config.levels if isinstance(temperature, int | float) else list(temperature)
        if len(heats) != self.config.levels:
            raise ValueError(f"{len(heats)} temperatures for {self.config.levels} levels")
        latents = [
            heat * torch.randn(count, *shape, generator=generator, device=parameter.device, dtype=parameter.dtype)
            for heat, shape in zip(heats, self.latent_shapes(), strict=True)
        ]
        return self.decode(latents, label, attributes)

    def condition(self, count: int, label: Tensor | None, attributes: Tensor | None, like: Tensor) -> Tensor | None:
        """The condition vector [count, classes + attributes], unknowns 0; None for an unconditional model."""
        config = self.config
        parts: list[Tensor] = []
        if config.classes > 0:
            label = torch.full((count,), -1, device=like.device) if label is None else label
            parts.append(F.one_hot(label + 1, config.classes + 1)[:, 1:].to(like))
        if config.attributes > 0:
            known = like.new_zeros(count, config.attributes) if attributes is None else attributes.to(like)
            parts.append(known)
        if not parts:
            return None
        sizes = [size for size in (config.classes, config.attributes) if size > 0]
        if any(part.shape != (count, size) for part, size in zip(parts, sizes, strict=True)):
            shapes = [tuple(part.shape) for part in parts]
            raise ValueError(f"condition of shapes {shapes} for {count} images and {config.condition_size} values each")
        return torch.cat(parts, dim=1)

    @torch.no_grad()
    def initialize(
        self,
        xs: Sequence[Tensor],
        labels: Sequence[Tensor | None] | None = None,
        attributes: Sequence[Tensor | None] | None = None,
        gather: Gather = lambda rows: rows,
    ) -> None:
        """Set every activation norm from microbatches of data (Glow, section 3.1).

        `xs`: this worker's equal microbatches [n, c, h, w]; `gather` joins rows of moments of all workers in sample
        order, so every worker and every number of workers ends with the same parameters.
        """
        nothing: list[Tensor | None] = [None] * len(xs)
        conditions = [
            self.condition(len(x), label, attribute, x)
            for x, label, attribute in zip(xs, labels or nothing, attributes or nothing, strict=True)
        ]
        states = list(xs)
        for level in self:
            states = [level.squeeze(x)[0] for x in states]
            states = [level.divide(h)[0] for h in level.steps.initialize(states, conditions, gather)]

    def _refuse_shape(self, x: Tensor) -> None:
        wanted = (self.config.channels, self.config.size, self.config.size)
        if tuple(x.shape[1:]) != wanted:
            raise ValueError(f"images of shape {tuple(x.shape[1:])} given to a model of {wanted}")


def _refuse_impossible(config: GlowConfig) -> None:
    if config.size <= 0 or config.channels <= 0:
        raise ValueError("size and channels must be given: 0 stands for 'from the data' in configurations alone")
    if min(config.levels, config.steps, config.width) < 1:
        raise ValueError("levels, steps and width must be 1 or more")
    if config.size % 2**config.levels:
        raise ValueError(f"size {config.size} is not divisible by 2^{config.levels}: lower levels or resize")
