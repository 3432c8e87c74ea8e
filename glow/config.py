"""Everything that decides a flow's parameters, every choice by name; defaults are the released code's (decision 1)."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Literal

from glow.coupling import Clamp, CouplingKind
from glow.mixing import MixingKind

Dequantization = Literal["uniform", "variational"]


@dataclass(frozen=True, kw_only=True)
class FlowConfig:
    """What both families have in common."""

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012
    later: ClassVar[tuple[str, ...]] = ()
    """Settings that came later: left out of digests at their default, so that an equal model keeps its digest."""

    size: int = 0
    """Image side in pixels; 0 takes it from the data."""
    channels: int = 0
    """Image channels; 0 takes them from the data."""
    levels: int = 6
    """Levels (L): each halves the side, all but the last factor half of the channels out."""
    width: int = 512
    """Hidden channels of the couplings' networks."""
    classes: int = 0
    """Class labels the model is conditioned on; 0 takes them from the data, -1 ignores them."""
    attributes: int = 0
    """Attributes (-1, 0 unknown, +1) the model is conditioned on; 0 takes them from the data, -1 ignores them."""
    condition_splits: bool = False
    """Condition the split priors too, not only the top prior as released."""
    condition_steps: bool = False
    """Condition every coupling's network too."""
    classifier_weight: float = 0.0
    """Weight in the loss of a linear classifier over the top latent's spatial mean; 0.01 in released commands with
    labels, 0 has no classifier."""
    dequantization: Dequantization = "uniform"
    """uniform noise in a bin, or variational: noise of a small flow that sees the image (Flow++, section 3.1)."""
    dequantizer_steps: int = 4
    """Couplings of that flow."""
    dequantizer_width: int = 32
    """Hidden channels of its networks."""

    @property
    def condition_size(self) -> int:
        """Length of the condition vector: one-hot label beside attributes."""
        return max(self.classes, 0) + max(self.attributes, 0)

    def settings(self) -> dict[str, Any]:
        """Name -> value, for digests: settings that came `later` are left out at their default; ignored is 0."""
        defaults = {field.name: field.default for field in fields(self)}
        tree = asdict(self) | {"classes": max(self.classes, 0), "attributes": max(self.attributes, 0)}
        return {name: tree[name] for name in tree if name not in self.later or tree[name] != defaults[name]}

    def refuse_impossible(self) -> None:
        """ValueError for values no model can have."""
        if self.size <= 0 or self.channels <= 0:
            raise ValueError("size and channels must be given: 0 stands for 'from the data' in configurations alone")
        if min(self.levels, self.width, self.dequantizer_steps, self.dequantizer_width) < 1:
            raise ValueError("levels, steps and width must be 1 or more, the dequantizer's too")
        if self.size % 2**self.levels:
            raise ValueError(f"size {self.size} is not divisible by 2^{self.levels}: lower levels or resize")
        if self.classifier_weight < 0 or (self.classifier_weight > 0 and self.classes <= 0):
            raise ValueError(f"classifier_weight {self.classifier_weight:g} wants classes, and 0 or more")


@dataclass(frozen=True, kw_only=True)
class GlowConfig(FlowConfig):
    """A Glow. Where the paper (arXiv 1807.03039) differs from its released code, the option says so."""

    later: ClassVar[tuple[str, ...]] = (
        "family",
        "clamp",
        "border",
        "learned_top",
        "classifier_weight",
        "dequantization",
        "dequantizer_steps",
        "dequantizer_width",
    )
    family: Literal["glow"] = "glow"
    """The architecture: Kingma & Dhariwal 2018."""
    steps: int = 32
    """Steps of flow a level (K)."""
    coupling: CouplingKind = "affine"
    """affine scales and shifts; additive shifts alone."""
    clamp: Clamp = "sigmoid"
    """Scale of affine couplings: sigmoid(s + 2) as released; two_sigmoid and soft_exp start at 1 and may grow. The
    paper's exp(s) (table 1) is not offered unclamped."""
    mixing: MixingKind = "lu"
    """lu (section 3.2, equation 10) or dense (as released) 1x1 convolution; reverse and shuffle: figure 3."""
    border: bool = True
    """3x3 convolutions see a channel that marks the padding, as released; off: zero padding alone (section 3.3)."""
    learned_top: bool = True
    """The top prior is learned, as in every released command; off: N(0, 1) (equation 2), moved by conditions alone."""

    def refuse_impossible(self) -> None:
        super().refuse_impossible()
        if self.steps < 1:
            raise ValueError("levels, steps and width must be 1 or more")


@dataclass(frozen=True, kw_only=True)
class RealNVPConfig(FlowConfig):
    """A RealNVP. Where the paper (arXiv 1605.08803) differs from its released code, the option says so."""

    family: Literal["realnvp"] = "realnvp"
    """The architecture: Dinh et al. 2017."""
    levels: int = 4
    """Scales (L): the last sees 1 / 2^(L - 1) of the side; 4 at 32 px, 5 at 64 px, 2 for CIFAR-10 (section 4.1)."""
    width: int = 32
    """Hidden channels of the first checkerboard couplings' networks; every scale and channel couplings double them."""
    residuals: int = 2
    """Residuals of a coupling's network: 4 at 32 px, 2 at 64 px, 8 for CIFAR-10 (section 4.1)."""
    constraint: float = 0.9
    """Share of (0, 1) that pixels are squeezed into before the logit, .9 as released: alpha = .05 (section 4.1)."""
    masked_moments: bool = True
    """The norm after a checkerboard coupling counts the fields that stay as zeros, as released; off: not at all."""
    prior: Literal["standard", "learned"] = "standard"
    """N(0, 1), or as in Glow: learned from the half that goes on and, at the top, from the condition."""
    condition_steps: bool = True
    """Condition every coupling's network, where there is a condition."""

    def refuse_impossible(self) -> None:
        super().refuse_impossible()
        if self.residuals < 1 or not 0 < self.constraint < 1:
            raise ValueError("residuals must be 1 or more and constraint between 0 and 1")
        if self.condition_size and not self.condition_steps and self.prior == "standard":
            raise ValueError("a condition must enter: condition_steps, or a learned prior")
