"""The table of constructors: a row a bijection; every law of `test_laws.py` and every gradient test walks it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from glow import (
    ActNorm,
    BatchNorm,
    Bijection,
    Chain,
    Coupling,
    DenseMixing,
    Flow,
    FlowConfig,
    GlowConfig,
    Logit,
    LUMixing,
    NormedCoupling,
    NormedMixing,
    OrderedSqueeze,
    PermutationMixing,
    RealNVPConfig,
    Relayout,
    SplitPrior,
    Squeeze,
    TopPrior,
    make_flow,
)
from glow.level import Step
from glow.mixing import MixingKind, make_mixing
from glow.prior import GaussianPrior, standard_normal_log_prob
from glow.residual import ChannelConditioner, FieldConditioner

Module = TypeVar("Module", bound=nn.Module)
Shape = tuple[int, int, int]
Pattern = Callable[[Shape], Tensor]
"""(c, h, w) -> bool [c h w, c h w]: which entries of the Jacobian may differ from 0."""


class PriorBijection(Bijection):
    """A prior's normalisation as a bijection: (kept, z) -> (kept, eps) at a split, z -> eps at the top."""

    def __init__(self, prior: GaussianPrior) -> None:
        super().__init__()
        self.prior = prior

    def _divide(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return (x, x) if isinstance(self.prior, TopPrior) else tuple(x.chunk(2, dim=1))

    def _join(self, kept: Tensor, out: Tensor) -> Tensor:
        return out if isinstance(self.prior, TopPrior) else torch.cat([kept, out], dim=1)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        kept, z = self._divide(x)
        eps, log_prior = self.prior.normalize(z, kept, condition)
        return self._join(kept, eps), log_prior - standard_normal_log_prob(eps)

    def inverse(self, y: Tensor, condition: Tensor | None = None) -> Tensor:
        kept, eps = self._divide(y)
        return self._join(kept, self.prior.denormalize(eps, kept, condition))


class FlowBijection(Bijection):
    """A whole model as a bijection from images to all its latents side by side, [b, D, 1, 1]."""

    def __init__(self, flow: Flow) -> None:
        super().__init__()
        self.flow = flow

    def _label(self, condition: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        if condition is None:
            return None, None
        classes = max(self.flow.config.classes, 0)
        return condition[:, :classes].argmax(1), condition[:, classes:]

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        label, attributes = self._label(condition)
        y = torch.cat([z.flatten(1) for z in self.flow.encode(x, label, attributes)], dim=1)
        return y[:, :, None, None], self.flow.log_prob(x, label, attributes) - standard_normal_log_prob(y)

    def inverse(self, y: Tensor, condition: Tensor | None = None) -> Tensor:
        shapes = self.flow.latent_shapes()
        parts = y.flatten(1).split([c * h * w for c, h, w in shapes], dim=1)
        latents = [part.reshape(len(y), *shape) for part, shape in zip(parts, shapes, strict=True)]
        return self.flow.decode(latents, *self._label(condition))


def anything(shape: Shape) -> Tensor:
    """A bijection whose every output may depend on every input."""
    size = shape[0] * shape[1] * shape[2]
    return torch.ones(size, size, dtype=torch.bool)


def diagonal(shape: Shape) -> Tensor:
    """A bijection of every value by itself."""
    return torch.eye(shape[0] * shape[1] * shape[2], dtype=torch.bool)


def pixel_blocks(shape: Shape) -> Tensor:
    """One c x c block a pixel."""
    c, h, w = shape
    return torch.eye(h * w, dtype=torch.bool).repeat(c, c)


def half_moved(shape: Shape) -> Tensor:
    """[[I, 0], [*, diagonal]]: the first half of the channels stays and moves the second."""
    allowed = diagonal(shape)
    half = len(allowed) // 2
    allowed[half:, :half] = True
    return allowed


def other_half_moved(shape: Shape) -> Tensor:
    """The second half of the channels stays and moves the first."""
    return half_moved(shape).flip(0, 1)


@dataclass(frozen=True, kw_only=True)
class Row:
    """A bijection to be proven: how to make it, on what, and what its Jacobian looks like."""

    name: str
    make: Callable[[], Bijection]
    shape: Shape = (4, 2, 4)
    condition: int = 0
    pattern: Pattern = anything
    permutation: bool = False
    """Its Jacobian is a permutation matrix and its log_det exactly 0."""
    discrete: bool = False
    """Its condition begins with a label: there is no gradient for it."""
    bounded: bool = False
    """It maps the interval [-1/2, 1/2] alone."""

    def build(self, seed: int = 0, dtype: torch.dtype = torch.float64) -> Bijection:
        """The bijection as it is evaluated, with parameters away from their start, where half of them are 0."""
        torch.manual_seed(seed)
        return perturbed(self.make()).to(dtype).eval()

    def inputs(self, batch: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor | None]:
        """(x, condition) of that batch size."""
        generator = torch.Generator().manual_seed(seed)
        draw = torch.rand if self.bounded else torch.randn
        x = draw(batch, *self.shape, generator=generator, dtype=dtype) - 0.5 * self.bounded
        if not self.condition:
            return x, None
        return x, torch.randint(-1, 2, (batch, self.condition), generator=generator).to(dtype)


def perturbed(module: Module, by: float = 0.1) -> Module:
    """Move every parameter and running moment: nothing stays at an initialisation that hides a mistake."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += by * torch.randn_like(parameter)
        for norm in module.modules():
            if isinstance(norm, BatchNorm):
                norm.mean += by * torch.randn_like(norm.mean)
                norm.var *= torch.exp(by * torch.randn_like(norm.var))
    return module


MIXINGS: tuple[MixingKind, ...] = ("lu", "dense", "reverse", "shuffle")
TINY = GlowConfig(size=4, channels=2, levels=2, steps=2, width=6, classes=-1, attributes=-1)
TINY_REALNVP = RealNVPConfig(size=4, channels=2, levels=2, width=3, residuals=1, classes=-1, attributes=-1)


def step_config(**changes: object) -> GlowConfig:
    """A configuration whose `Step`s are small."""
    return GlowConfig(**{"size": 4, "channels": 1, "levels": 1, "steps": 1, "width": 6, **changes})  # type: ignore[arg-type]


def _mixings() -> list[Row]:
    permutations = ("reverse", "shuffle")
    alone = [
        Row(
            name=f"mixing {kind}",
            make=lambda kind=kind: make_mixing(kind, 4),
            pattern=pixel_blocks,
            permutation=kind in permutations,
        )
        for kind in MIXINGS
    ]
    normed = [
        Row(
            name=f"normed mixing {kind}",
            make=lambda kind=kind: NormedMixing(ActNorm(4), make_mixing(kind, 4)),
            pattern=pixel_blocks,
        )
        for kind in MIXINGS
    ]
    return alone + normed


def _couplings() -> list[Row]:
    return [
        Row(
            name=f"coupling {kind}{' conditioned' if condition else ''}",
            make=lambda kind=kind, condition=condition: Coupling(4, 6, kind, condition),
            shape=(4, 3, 4),
            condition=condition,
            pattern=half_moved,
        )
        for kind in ("additive", "affine")
        for condition in (0, 3)
    ] + [
        Row(
            name=f"coupling {clamp}, border {border}",
            make=lambda clamp=clamp, border=border: Coupling(4, 6, "affine", clamp=clamp, border=border),
            shape=(4, 3, 4),
            pattern=half_moved,
        )
        for clamp, border in (("two_sigmoid", True), ("soft_exp", True), ("soft_exp", False))
    ]


def field_coupling(channels: int, *, odd: bool = False, condition: int = 0) -> NormedCoupling:
    """A small checkerboard coupling of RealNVP over 4 * channels of an ordered squeeze."""
    conditioner = FieldConditioner(channels, 5, 1, condition, odd=odd)
    return NormedCoupling(conditioner, BatchNorm(channels, zeros=True), 0.0, swapped=odd)


def channel_coupling(channels: int, *, swapped: bool = False, condition: int = 0) -> NormedCoupling:
    """A small channel coupling of RealNVP."""
    conditioner = ChannelConditioner(channels // 2, 5, 1, condition)
    return NormedCoupling(conditioner, BatchNorm(channels // 2), 1.0, swapped=swapped)


def _normed_couplings() -> list[Row]:
    makes: dict[str, tuple[Callable[..., Bijection], Pattern]] = {
        "even fields": (lambda condition: field_coupling(1, condition=condition), half_moved),
        "odd fields": (lambda condition: field_coupling(1, odd=True, condition=condition), other_half_moved),
        "first channels": (lambda condition: channel_coupling(4, condition=condition), half_moved),
        "last channels": (lambda condition: channel_coupling(4, swapped=True, condition=condition), other_half_moved),
    }
    return [
        Row(
            name=f"coupling by {name}{' conditioned' if condition else ''}",
            make=lambda make=make, condition=condition: make(condition),
            shape=(4, 2, 3),
            condition=condition,
            pattern=pattern,
        )
        for name, (make, pattern) in makes.items()
        for condition in (0, 3)
    ]


def _priors() -> list[Row]:
    makes: dict[str, tuple[Callable[[int], GaussianPrior], Pattern]] = {
        "split": (lambda condition: SplitPrior(2, condition), half_moved),
        "split, no border": (lambda condition: SplitPrior(2, condition, border=False), half_moved),
        "top": (lambda condition: TopPrior(4, condition), diagonal),
        "top, no border": (lambda condition: TopPrior(4, condition, border=False), diagonal),
        "top, fixed": (lambda condition: TopPrior(4, condition, learned=False), diagonal),
    }
    return [
        Row(
            name=f"{name} prior{' conditioned' if condition else ''}",
            make=lambda make=make, condition=condition: PriorBijection(make(condition)),
            condition=condition,
            pattern=pattern,
        )
        for name, (make, pattern) in makes.items()
        for condition in (0, 3)
    ]


def _models() -> list[Row]:
    whole: dict[str, FlowConfig] = {
        "glow affine": TINY,
        "glow additive, dense": GlowConfig(**{**TINY.__dict__, "coupling": "additive", "mixing": "dense"}),
        "glow conditioned everywhere": GlowConfig(
            **{**TINY.__dict__, "classes": 2, "attributes": 3, "condition_splits": True, "condition_steps": True}
        ),
        "glow conditioned as released": GlowConfig(**{**TINY.__dict__, "classes": 3, "mixing": "reverse"}),
        "realnvp": TINY_REALNVP,
        "realnvp conditioned everywhere": replace(
            TINY_REALNVP, classes=2, attributes=3, prior="learned", condition_splits=True, masked_moments=False
        ),
        "glow of options": GlowConfig(
            **{**TINY.__dict__, "clamp": "soft_exp", "border": False, "learned_top": False, "classes": 2}
        ),
    }
    return [
        Row(
            name=name,
            make=lambda config=config: FlowBijection(make_flow(config)),
            shape=(config.channels, config.size, config.size),
            condition=config.condition_size,
            discrete=True,
            bounded=isinstance(config, RealNVPConfig),
        )
        for name, config in whole.items()
    ]


ROWS: tuple[Row, ...] = (
    Row(name="actnorm", make=lambda: ActNorm(4), pattern=diagonal),
    *_mixings(),
    *_couplings(),
    *_normed_couplings(),
    Row(name="batch norm", make=lambda: BatchNorm(4), pattern=diagonal),
    Row(name="batch norm of two phases", make=lambda: BatchNorm(2), pattern=diagonal),
    Row(name="squeeze", make=Squeeze, permutation=True),
    Row(name="ordered squeeze", make=OrderedSqueeze, permutation=True),
    Row(name="relayout", make=Relayout, permutation=True),
    Row(name="relayout back", make=lambda: Relayout(back=True), permutation=True),
    Row(name="logit", make=lambda: Logit(0.9), pattern=diagonal, bounded=True),
    *_priors(),
    Row(name="step", make=lambda: Step(4, step_config()), shape=(4, 2, 3)),
    Row(name="chain", make=lambda: Chain(Squeeze(), Step(8, step_config()), ActNorm(8)), shape=(2, 4, 4)),
    Row(name="chain of one", make=lambda: Chain(LUMixing(4)), pattern=pixel_blocks),
    Row(name="chain of none", make=Chain, pattern=diagonal, permutation=True),
    Row(name="chain of chains", make=lambda: Chain(Chain(DenseMixing(4)), Chain(PermutationMixing(4, "shuffle")))),
    *_models(),
)
