"""Multi-scale flows over images: exact log-likelihood, exact latents, one-pass sampling; and the one that is Glow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glow.bijection import Chain, Gather
from glow.config import FlowConfig, GlowConfig
from glow.dequantizer import Dequantizer
from glow.level import Level, Step
from glow.norm import absorb_moments, leaf_moments
from glow.prior import GaussianPrior, SplitPrior, TopPrior, zero_classifier
from glow.shape import Squeeze


class LogProb(NamedTuple):
    """log p(x) and its terms, each [b] in nats: log_prob = log_det + sum(priors) (+ dequantization in a bound)."""

    log_prob: Tensor
    log_det: Tensor
    priors: tuple[Tensor, ...]
    """Of every level, first level first."""
    dequantization: Tensor | None = None
    """-log q(u | x) of variational noise; None for uniform noise, whose density is 1."""
    logits: Tensor | None = None
    """What the classifier over the top latent says of every class, [b, classes]; None without one."""


class Encoded(NamedTuple):
    """What one pass through the levels finds."""

    latents: list[Tensor]
    priors: list[Tensor]
    log_det: Tensor
    logits: Tensor | None


class Flow(nn.Module):
    """A conditional multi-scale flow over float images [b, channels, size, size] in [-1/2, 1/2).

    `label`: int64 [b], -1 unknown; `attributes`: [b, A] of -1, 0 (unknown), +1. Both may be left out: unknown.
    """

    def __init__(self, config: FlowConfig, levels: Sequence[Level]) -> None:
        super().__init__()
        self.config = config
        self.levels = nn.ModuleList(levels)
        top = self.latent_shapes()[-1][0]
        self.classifier = zero_classifier(top, config.classes) if config.classifier_weight else None
        varied = config.dequantization == "variational"
        depth, width = config.dequantizer_steps, config.dequantizer_width
        self.dequantizer = Dequantizer(config.channels, depth, width) if varied else None

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
        if self.dequantizer is not None:
            self.dequantizer.steps.anchor_every = anchor_every[0]

    def inversion_error(self) -> Tensor | None:
        """Largest |recovered - kept| over all levels and every backward so far, or None where nothing was inverted."""
        chains = [level.steps for level in self] + ([self.dequantizer.steps] if self.dequantizer else [])
        errors = [chain.inversion_error for chain in chains if chain.inversion_error is not None]
        return torch.stack(errors).amax() if errors else None

    def moments(self) -> Tensor:
        """Batch moments of the last leaf in every batch norm, [m], 0 before any; [0] for a flow without them."""
        return leaf_moments(self)

    def scales(self) -> list[Tensor]:
        """Parameters that released training draws towards 0 (RealNVP, section 4.1); none in a Glow."""
        return []

    def absorb(self, moments: Tensor) -> None:
        """Move the running moments by one step towards these; call once an optimiser step with the leaves' mean."""
        absorb_moments(self, moments)

    def terms(self, x: Tensor, label: Tensor | None = None, attributes: Tensor | None = None) -> LogProb:
        """log p(x | label, attributes) and its terms (Glow, equation 7)."""
        found = self._encode(x, label, attributes)
        log_prob = found.log_det + torch.stack(found.priors).sum(0)
        return LogProb(log_prob, found.log_det, tuple(found.priors), logits=found.logits)

    def bound(self, x: Tensor, bits: int, label: Tensor | None = None, attributes: Tensor | None = None) -> LogProb:
        """A lower bound of log P(pixels) + D ln 2^bits whose mean over noise training raises (Flow++, equation 6).

        `x` is what `glow.dequantize` gives. Under uniform noise this is `terms(x)`; a variational model first moves
        the noise within its bins by its own flow and pays that flow's density.
        """
        x, freedom = self.dequantized(x, bits)
        terms = self.terms(x, label, attributes)
        if self.dequantizer is None:
            return terms
        return terms._replace(log_prob=terms.log_prob + freedom, dequantization=freedom)

    def dequantized(self, x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
        """Uniformly dequantised images with their noise as this model wants it, and -log q(noise | image), [b]."""
        return (x, x.new_zeros(len(x))) if self.dequantizer is None else self.dequantizer(x, bits)

    def log_prob(self, x: Tensor, label: Tensor | None = None, attributes: Tensor | None = None) -> Tensor:
        """log p(x | label, attributes) of every image, [b] in nats."""
        return self.terms(x, label, attributes).log_prob

    def encode(self, x: Tensor, label: Tensor | None = None, attributes: Tensor | None = None) -> list[Tensor]:
        """Normalised latents of every level, standard normal under the model (shapes: `latent_shapes`)."""
        return self._encode(x, label, attributes).latents

    @torch.no_grad()
    def posterior(
        self, x: Tensor, attributes: Tensor | None = None, prior: Tensor | None = None, chunk: int = 32
    ) -> Tensor:
        """p(label | x, attributes), [b, classes], by Bayes' rule from the likelihood under every class.

        `prior`: probabilities [classes] of the classes beforehand; None takes them equal. One pass a class, `chunk`
        images at a time.
        """
        classes = self.config.classes
        if classes <= 0:
            raise ValueError("a model without classes has no posterior over them")
        prior = x.new_full((classes,), 1 / classes) if prior is None else prior.to(x)
        if prior.shape != (classes,) or bool((prior < 0).any()):
            raise ValueError(f"prior of shape {tuple(prior.shape)} for {classes} classes: one probability each")
        rows: list[Tensor] = []
        for start in range(0, len(x), chunk):
            part = x[start : start + chunk]
            given = None if attributes is None else attributes[start : start + chunk]
            labels = [torch.full((len(part),), label, device=x.device) for label in range(classes)]
            rows.append(torch.stack([self.log_prob(part, label, given) for label in labels], dim=1))
        found = torch.cat(rows) if rows else x.new_zeros(0, classes)
        return torch.softmax(found + prior.log(), dim=1)

    def _encode(self, x: Tensor, label: Tensor | None, attributes: Tensor | None) -> Encoded:
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
        # At the top nothing is factored out: what is left is the top latent itself, before its prior.
        logits = None if self.classifier is None else self.classifier(x.mean((2, 3)))
        return Encoded(latents, priors, log_det, logits)

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
        classes, named = max(self.config.classes, 0), max(self.config.attributes, 0)
        _refuse_condition(count, classes, named, label, attributes)
        parts: list[Tensor] = []
        if classes:
            label = torch.full((count,), -1, device=like.device) if label is None else label
            parts.append(F.one_hot(label + 1, classes + 1)[:, 1:].to(like))
        if named:
            parts.append(like.new_zeros(count, named) if attributes is None else attributes.to(like))
        return torch.cat(parts, dim=1) if parts else None

    @torch.no_grad()
    def initialize(
        self,
        xs: Sequence[Tensor],
        labels: Sequence[Tensor | None] | None = None,
        attributes: Sequence[Tensor | None] | None = None,
        gather: Gather = lambda rows: rows,
        bits: int = 8,
    ) -> None:
        """Set every activation norm (Glow, section 3.1) and running moment from microbatches of data.

        `xs`: this worker's equal microbatches [n, c, h, w], dequantised at `bits` (a variational model asks);
        `gather` joins rows of moments of all workers in sample order, so every worker and every number of workers ends
        with the same parameters.
        """
        if self.dequantizer is not None:
            self.dequantizer.initialize(xs, bits, gather)
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


class Glow(Flow):
    """Glow (Kingma & Dhariwal 2018): levels of steps of activation norm, channel mixing and coupling."""

    config: GlowConfig

    def __init__(self, config: GlowConfig) -> None:
        config.refuse_impossible()
        super().__init__(config, [_glow_level(config, index) for index in range(config.levels)])


def _glow_level(config: GlowConfig, index: int) -> Level:
    channels, last = 4 * config.channels * 2**index, index == config.levels - 1
    steps = Chain(*(Step(channels, config) for _ in range(config.steps)))
    condition = config.condition_size if last or config.condition_splits else 0
    prior: GaussianPrior
    if last:
        prior = TopPrior(channels, condition, config.border, config.learned_top)
    else:
        prior = SplitPrior(channels // 2, condition, config.border)
    return Level(Squeeze(), steps, prior, last)


def _refuse_condition(count: int, classes: int, named: int, label: Tensor | None, attributes: Tensor | None) -> None:
    """ValueError for a condition of another shape or with values that mean nothing.

    Values on an accelerator are not looked at: that would wait for it, and a label out of range stops it anyway.
    """
    for name, given, wanted in (
        ("label", label, (count,) if classes else None),
        ("attributes", attributes, (count, named)),
    ):
        if given is not None and tuple(given.shape) != wanted:
            needs = f"{count} images want {wanted}" if wanted else "this model knows no classes"
            raise ValueError(f"condition of shapes: {name} {tuple(given.shape)}; {needs}")
    if label is not None and label.device.type == "cpu" and not bool(((label >= -1) & (label < classes)).all()):
        found = f"not {int(label.min())} to {int(label.max())}"
        raise ValueError(f"labels of {classes} classes are -1 (unknown) to {classes - 1}, {found}")
    if attributes is not None and attributes.device.type == "cpu" and bool((attributes.abs() > 1).any()):
        raise ValueError("attributes are -1, 0 (unknown) or +1: got values beyond")
