"""Everything that decides a Glow's parameters, every choice by name; defaults are the released code's (decision 1)."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Literal

from glow.coupling import Clamp, CouplingKind
from glow.mixing import MixingKind

Dequantization = Literal["uniform", "variational"]


@dataclass(frozen=True, kw_only=True)
class GlowConfig:
    """A Glow. Where the paper (arXiv 1807.03039) differs from its released code, the option says so."""

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012
    later: ClassVar[tuple[str, ...]] = (
        "clamp",
        "border",
        "learned_top",
        "classifier_weight",
        "dequantization",
        "dequantizer_steps",
        "dequantizer_width",
    )
    """Settings that came later: left out of digests at their default, so that an equal model keeps its digest."""

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
    clamp: Clamp = "sigmoid"
    """Scale of affine couplings: sigmoid(s + 2) as released; two_sigmoid and soft_exp start at 1 and may grow. The
    paper's exp(s) (table 1) is not offered unclamped."""
    mixing: MixingKind = "lu"
    """lu (section 3.2, equation 10) or dense (as released) 1x1 convolution; reverse and shuffle: figure 3."""
    border: bool = True
    """3x3 convolutions see a channel that marks the padding, as released; off: zero padding alone (section 3.3)."""
    learned_top: bool = True
    """The top prior is learned, as in every released command; off: N(0, 1) (equation 2), moved by conditions alone."""
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
        """Name -> value, for digests: settings that came `later` are left out at their default."""
        defaults = {field.name: field.default for field in fields(self)}
        tree = asdict(self)
        return {name: tree[name] for name in tree if name not in self.later or tree[name] != defaults[name]}

    def refuse_impossible(self) -> None:
        """ValueError for values no model can have."""
        counts = (self.levels, self.steps, self.width, self.dequantizer_steps, self.dequantizer_width)
        if self.size <= 0 or self.channels <= 0:
            raise ValueError("size and channels must be given: 0 stands for 'from the data' in configurations alone")
        if min(counts) < 1:
            raise ValueError("levels, steps and width must be 1 or more, the dequantizer's too")
        if self.size % 2**self.levels:
            raise ValueError(f"size {self.size} is not divisible by 2^{self.levels}: lower levels or resize")
        if self.classifier_weight < 0 or (self.classifier_weight > 0 and self.classes <= 0):
            raise ValueError(f"classifier_weight {self.classifier_weight:g} wants classes, and 0 or more")
