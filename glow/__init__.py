"""Invertible flows over images: exact likelihoods, exact latents, and training in the memory of one step."""

from glow.bijection import Bijection, Chain
from glow.bits import (
    bits_per_dim,
    dequantize,
    keyed_normal,
    keyed_uniform,
    quantize,
    sample_keys,
    to_pixels,
)
from glow.config import FlowConfig, GlowConfig, RealNVPConfig
from glow.coupling import Coupling
from glow.dequantizer import Dequantizer
from glow.flow import Flow, Glow, LogProb
from glow.latents import (
    attribute_directions,
    heat,
    interpolate,
    keep_levels,
    latents_of_seeds,
    move,
    project,
)
from glow.memory import anchored
from glow.mixing import DenseMixing, LUMixing, NormedMixing, PermutationMixing
from glow.norm import ActNorm, BatchNorm
from glow.prior import SplitPrior, TopPrior
from glow.realnvp import NormedCoupling, RealNVP, make_flow
from glow.shape import Logit, OrderedSqueeze, Relayout, Squeeze

__all__ = [
    "ActNorm",
    "BatchNorm",
    "Bijection",
    "Chain",
    "Coupling",
    "DenseMixing",
    "Dequantizer",
    "Flow",
    "FlowConfig",
    "Glow",
    "GlowConfig",
    "LUMixing",
    "LogProb",
    "Logit",
    "NormedCoupling",
    "NormedMixing",
    "OrderedSqueeze",
    "PermutationMixing",
    "RealNVP",
    "RealNVPConfig",
    "Relayout",
    "SplitPrior",
    "Squeeze",
    "TopPrior",
    "anchored",
    "attribute_directions",
    "bits_per_dim",
    "dequantize",
    "heat",
    "interpolate",
    "keep_levels",
    "keyed_normal",
    "keyed_uniform",
    "latents_of_seeds",
    "make_flow",
    "move",
    "project",
    "quantize",
    "sample_keys",
    "to_pixels",
]
