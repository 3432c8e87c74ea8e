"""Glow once more, from its equations, in numpy and loops: what `glow/` has to agree with.

Written from arXiv 1807.03039 (equation and section numbers below) and from what its released code adds, and from
nothing else: no torch, no module of this repository. Arrays are float64 [b, c, h, w]; `w` maps parameter names to
arrays; every function is as slow and as plain as it can be.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Weights = Mapping[str, Array]


def dequantized(pixels: NDArray[np.uint8], bits: int, noise: Array) -> Array:
    """Section 2: floor(v / 2^(8 - b)) / 2^b - 1/2 + u / 2^b."""
    return np.floor(pixels / 2.0 ** (8 - bits)) / 2.0**bits - 0.5 + noise / 2.0**bits


def bits_per_dim(log_prob: Array, dims: int, bits: int) -> Array:
    """Equation 2: the density of a bin is 2^(-b D) of what it would be with bins of size 1."""
    return -(log_prob - bits * math.log(2) * dims) / (math.log(2) * dims)


def squeezed(x: Array) -> Array:
    """Section 3.6 of RealNVP in the release's order: channel 4 c + 2 dy + dx."""
    b, c, h, w = x.shape
    y = np.empty((b, 4 * c, h // 2, w // 2))
    for channel in range(c):
        for dy in range(2):
            for dx in range(2):
                y[:, 4 * channel + 2 * dy + dx] = x[:, channel, dy::2, dx::2]
    return y


def unsqueezed(y: Array) -> Array:
    """What `squeezed` undoes."""
    b, c, h, w = y.shape
    x = np.empty((b, c // 4, 2 * h, 2 * w))
    for channel in range(c // 4):
        for dy in range(2):
            for dx in range(2):
                x[:, channel, dy::2, dx::2] = y[:, 4 * channel + 2 * dy + dx]
    return x


def with_border(x: Array) -> Array:
    """Released code: zeros around the picture, and a channel that is 1 on them."""
    b, c, h, w = x.shape
    padded = np.zeros((b, c + 1, h + 2, w + 2))
    padded[:, :c, 1:-1, 1:-1] = x
    padded[:, c] = 1.0
    padded[:, c, 1:-1, 1:-1] = 0.0
    return padded


def convolved(x: Array, weight: Array) -> Array:
    """A convolution without padding, [b, i, h + 2, w + 2] and [o, i, 3, 3] -> [b, o, h, w] (or 1x1)."""
    size = weight.shape[2]
    h, w = x.shape[2] - size + 1, x.shape[3] - size + 1
    y = np.zeros((x.shape[0], weight.shape[0], h, w))
    for dy in range(size):
        for dx in range(size):
            y += np.einsum("bihw,oi->bohw", x[:, :, dy : dy + h, dx : dx + w], weight[:, :, dy, dx])
    return y


def zero_convolved(x: Array, w: Weights, at: str) -> Array:
    """Released code: (conv + bias) exp(3 p), the border's weights beside the others."""
    weight = np.concatenate([w[at + "weight"], w[at + "border"]], axis=1)
    y = convolved(with_border(x), weight) + w[at + "bias"][:, None, None]
    return y * np.exp(3 * w[at + "log_scale"])[:, None, None]


def normed(x: Array, w: Weights, at: str) -> tuple[Array, float]:
    """Section 3.1: y = (x + b) exp(3 p), log_det = h w sum 3 p."""
    y = (x + w[at + "bias"][:, None, None]) * np.exp(3 * w[at + "log_scale"])[:, None, None]
    return y, x.shape[2] * x.shape[3] * float(np.sum(3 * w[at + "log_scale"]))


def norm_from(x: Array) -> dict[str, Array]:
    """Section 3.1: bias and log scale that make every channel zero mean and unit variance, std at least 1e-3."""
    mean = x.mean((0, 2, 3))
    std = np.sqrt(((x - mean[:, None, None]) ** 2).mean((0, 2, 3)))
    return {"bias": -mean, "log_scale": -np.log(np.maximum(std, 1e-3)) / 3}


def matrix(w: Weights, at: str) -> Array:
    """Equations 9 and 10: the learned matrix itself, or P L (U + diag(sign exp(log_s)))."""
    if at + "weight" in w:
        return w[at + "weight"]
    lower = np.tril(w[at + "lower"], -1) + np.eye(len(w[at + "log_s"]))
    upper = np.triu(w[at + "upper"], 1) + np.diag(w[at + "sign"] * np.exp(w[at + "log_s"]))
    return w[at + "permutation"] @ lower @ upper


def mixed(x: Array, w: Weights, at: str) -> tuple[Array, float]:
    """Equation 9: y = W x at every pixel; log_det = h w log|det W|, here always from the matrix."""
    weight = matrix(w, at)
    log_det = x.shape[2] * x.shape[3] * math.log(abs(np.linalg.det(weight)))
    return np.einsum("bihw,oi->bohw", x, weight), log_det


def network(x: Array, w: Weights, at: str, condition: Array | None) -> Array:
    """Section 3.3: conv 3x3, actnorm (and condition), ReLU, conv 1x1, actnorm, ReLU, zero conv 3x3."""
    h, _ = normed(convolved(with_border(x), w[at + "first"]), w, at + "norm_first.")
    if condition is not None and at + "condition.weight" in w:
        h = h + (condition @ w[at + "condition.weight"].T)[:, :, None, None]
    h, _ = normed(convolved(np.maximum(h, 0), w[at + "second"]), w, at + "norm_second.")
    return zero_convolved(np.maximum(h, 0), w, at + "last.")


def shift_and_scale(x1: Array, w: Weights, at: str, condition: Array | None) -> tuple[Array, Array]:
    """Released code: shift in the even channels, sigmoid(s + 2) of the odd; as many channels as x1: shift alone."""
    out = network(x1, w, at + "conditioner.", condition)
    if out.shape[1] == x1.shape[1]:
        return out, np.ones_like(x1)
    return out[:, 0::2], 1 / (1 + np.exp(-(out[:, 1::2] + 2)))


def coupled(x: Array, w: Weights, at: str, condition: Array | None = None) -> tuple[Array, Array]:
    """Table 1, in the release's order: y1 = x1, y2 = (x2 + shift) scale; log_det = sum log scale, [b]."""
    x1, x2 = np.split(x, 2, axis=1)
    shift, scale = shift_and_scale(x1, w, at, condition)
    return np.concatenate([x1, (x2 + shift) * scale], axis=1), np.log(scale).sum((1, 2, 3))


def uncoupled(y: Array, w: Weights, at: str, condition: Array | None = None) -> Array:
    """Table 1: x2 = y2 / scale - shift."""
    y1, y2 = np.split(y, 2, axis=1)
    shift, scale = shift_and_scale(y1, w, at, condition)
    return np.concatenate([y1, y2 / scale - shift], axis=1)


def stepped(x: Array, w: Weights, at: str, condition: Array | None) -> tuple[Array, Array]:
    """Figure 2a: actnorm, mixing, coupling."""
    x, log_det_norm = normed(x, w, at + "mix.norm.")
    x, log_det_mixing = mixed(x, w, at + "mix.mixing.")
    x, log_det_coupling = coupled(x, w, at + "coupling.", condition)
    return x, log_det_norm + log_det_mixing + log_det_coupling


def unstepped(y: Array, w: Weights, at: str, condition: Array | None) -> Array:
    """Figure 2a, backwards."""
    y = uncoupled(y, w, at + "coupling.", condition)
    y = np.einsum("bihw,oi->bohw", y, np.linalg.inv(matrix(w, at + "mix.mixing.")))
    scale = np.exp(3 * w[at + "mix.norm.log_scale"])[:, None, None]
    return y / scale - w[at + "mix.norm.bias"][:, None, None]


def prior(kept: Array, w: Weights, at: str, condition: Array | None) -> tuple[Array, Array]:
    """Released code: (mean, log std) interleaved, from the kept half; at the top from zeros of `kept`'s shape."""
    if at + "conv.weight" in w:
        statistics = zero_convolved(kept, w, at + "conv.")
    else:
        top = {"weight": np.zeros((2 * kept.shape[1], kept.shape[1], 3, 3))}
        top |= {name: w[at + name] for name in ("border", "bias", "log_scale")}
        statistics = zero_convolved(np.zeros_like(kept), top, "")
    if condition is not None and at + "condition.weight" in w:
        statistics = statistics + (condition @ w[at + "condition.weight"].T)[:, :, None, None]
    return statistics[:, 0::2], statistics[:, 1::2]


def gaussian_log_prob(z: Array, mean: Array, log_std: Array) -> Array:
    """Sum over all values of log N(z; mean, exp(log_std)), [b]."""
    terms = -0.5 * (math.log(2 * math.pi) + 2 * log_std + (z - mean) ** 2 / np.exp(2 * log_std))
    return terms.sum((1, 2, 3))


def encoded(x: Array, w: Weights, levels: int, steps: int, condition: Array | None = None) -> tuple[list[Array], Array]:
    """Figure 2b and equation 7: (normalised latents of every level, log p(x) [b])."""
    latents, log_prob = [], np.zeros(len(x))
    for level in range(levels):
        at = f"levels.{level}."
        x = squeezed(x)
        for step in range(steps):
            x, log_det = stepped(x, w, f"{at}steps.{step}.", condition)
            log_prob = log_prob + log_det
        kept, z = (x, x) if level == levels - 1 else np.split(x, 2, axis=1)
        mean, log_std = prior(kept, w, at + "prior.", condition)
        latents.append((z - mean) / np.exp(log_std))
        log_prob = log_prob + gaussian_log_prob(z, mean, log_std)
        x = kept
    return latents, log_prob


def decoded(latents: list[Array], w: Weights, steps: int, condition: Array | None = None) -> Array:
    """Figure 2b, backwards: z = mean + std eps, and every step undone."""
    x = np.zeros(0)
    for level in reversed(range(len(latents))):
        at, top = f"levels.{level}.", level == len(latents) - 1
        kept = latents[level] if top else x
        mean, log_std = prior(kept, w, at + "prior.", condition)
        z = mean + np.exp(log_std) * latents[level]
        x = z if top else np.concatenate([kept, z], axis=1)
        for step in reversed(range(steps)):
            x = unstepped(x, w, f"{at}steps.{step}.", condition)
        x = unsqueezed(x)
    return x


def initialized(x: Array, w: Weights, levels: int, steps: int) -> dict[str, Array]:
    """Section 3.1 through the whole network: every norm measured on what reaches it, in order."""
    w = dict(w)
    for level in range(levels):
        x = squeezed(x)
        for step in range(steps):
            at = f"levels.{level}.steps.{step}."
            _set(w, at + "mix.norm.", x)
            y, _ = mixed(normed(x, w, at + "mix.norm.")[0], w, at + "mix.mixing.")
            x1, inside = np.split(y, 2, axis=1)[0], at + "coupling.conditioner."
            h = convolved(with_border(x1), w[inside + "first"])
            _set(w, inside + "norm_first.", h)
            h = convolved(np.maximum(normed(h, w, inside + "norm_first.")[0], 0), w[inside + "second"])
            _set(w, inside + "norm_second.", h)
            x, _ = coupled(y, w, at + "coupling.")
        x = np.split(x, 2, axis=1)[0]
    return w


def _set(w: dict[str, Array], at: str, x: Array) -> None:
    w.update({at + name: value for name, value in norm_from(x).items()})


def adamax(
    w: Array, gradients: list[Array], rates: list[float], beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8
) -> Array:
    """Released code (optim.py): m = b1 m + (1 - b1) g, u = max(b2 u, |g|), w -= a_t m / (u + eps); a step a rate.

    a_t = lr sqrt(1 - b2^t) / (1 - b1^t), t from 1.
    """
    m, u = np.zeros_like(w), np.zeros_like(w)
    for t, (g, rate) in enumerate(zip(gradients, rates, strict=True), start=1):
        m = beta1 * m + (1 - beta1) * g
        u = np.maximum(beta2 * u, np.abs(g))
        w = w - rate * math.sqrt(1 - beta2**t) / (1 - beta1**t) * m / (u + eps)
    return w
