"""From 8-bit pixels to a density and back: quantisation, uniform dequantisation, keyed noise, bits per dimension.

`x = floor(pixel / 2^(8 - bits)) / 2^bits - 1/2 + u / 2^bits`, u uniform in [0, 1) (Glow, section 2; released code).
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64: the odd constant of splitmix64
_MIX_A = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_B = -7723592293110705685  # 0x94D049BB133111EB


def quantize(pixels: Tensor, bits: int) -> Tensor:
    """uint8 -> uint8 of the `bits` upper bits, 0 .. 2^bits - 1."""
    return pixels >> (8 - bits)


def dequantize(pixels: Tensor, bits: int, noise: Tensor) -> Tensor:
    """uint8 [b, c, h, w] and noise in [0, 1) of that shape -> float in [-1/2, 1/2).

    The noise is cut to the grid of 2^-24 that float32 carries exactly over the whole range: otherwise a sum near the
    upper edge of a bin rounds into the next one.
    """
    grid = 2.0 ** (24 - bits)
    return (quantize(pixels, bits) + (noise * grid).floor() / grid) / 2**bits - 0.5


def to_pixels(x: Tensor, bits: int) -> Tensor:
    """Float [b, c, h, w] -> uint8 of the bin it falls in: floor((x + 1/2) 2^bits) 2^(8 - bits), clipped."""
    bins = ((x + 0.5) * 2**bits).floor().clamp(0, 2**bits - 1)
    return (bins * 2 ** (8 - bits)).to(torch.uint8)


def bits_per_dim(log_prob: Tensor, dims: int, bits: int) -> Tensor:
    """Nats of the dequantised density -> bits per dimension of the discrete image; `bits` is the bin size's share."""
    return bits - log_prob / (math.log(2) * dims)


def sample_keys(seed: int, epochs: Tensor, samples: Tensor) -> Tensor:
    """One noise key a sample, int64 [b], from a seed, epochs [b] and sample numbers [b]: no worker, batch or clock."""
    start = _mix(torch.full_like(samples, seed))
    return _mix(_mix(start + epochs) + samples)


def keyed_uniform(keys: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Uniform float32 in [0, 1), [b, *shape]: a pure function of each key (splitmix64), the same on every device."""
    counter = torch.arange(1, math.prod(shape) + 1, device=keys.device) * _GOLDEN
    mantissa = _shift(_mix(keys[:, None] + counter), 40)
    return (mantissa.float() * 2.0**-24).view(len(keys), *shape)


def keyed_normal(keys: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Standard normal float32 [b, *shape] by the inverse distribution function of keyed uniforms."""
    uniform = keyed_uniform(keys, shape).double() + 2.0**-25
    return cast(Tensor, torch.special.ndtri(uniform)).float()  # pyright: ignore[reportUnknownMemberType]


def _mix(z: Tensor) -> Tensor:
    z = (z ^ _shift(z, 30)) * _MIX_A
    z = (z ^ _shift(z, 27)) * _MIX_B
    return z ^ _shift(z, 31)


def _shift(z: Tensor, places: int) -> Tensor:
    """Logical right shift of int64 (the built-in one is arithmetic)."""
    return (z >> places) & ((1 << (64 - places)) - 1)
