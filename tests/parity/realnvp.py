"""RealNVP once more, from its equations, in numpy: masks over whole images, nothing folded, nothing of `glow`.

Written from arXiv 1605.08803 (equation, section and appendix numbers below) and from what its released code adds.
Arrays are float64 [b, c, h, w]; `w` maps the names of a state to arrays; `seen` collects the moments of the batch where
a network trains and is None where it is evaluated.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from tests.parity.restatement import Array, convolved, gaussian_log_prob, squeezed, unsqueezed

Weights = Mapping[str, Array]
Seen = dict[str, Array] | None

EPS = 1e-4
CONSTRAINT = 0.9
PHASES = ((0, 0), (1, 1), (0, 1), (1, 0))


def opened(x: Array) -> tuple[Array, Array]:
    """Section 4.1: logit of pixels in (0, 1) squeezed into the middle .9; its log_det, [b]."""
    p = 0.5 * (1 - CONSTRAINT) + CONSTRAINT * (x + 0.5)
    return np.log(p / (1 - p)), np.log(CONSTRAINT / (p * (1 - p))).sum((1, 2, 3))


def closed(y: Array) -> Array:
    """What `opened` undoes."""
    return (1 / (1 + np.exp(-y)) - 0.5 * (1 - CONSTRAINT)) / CONSTRAINT - 0.5


def moments(x: Array, w: Weights, at: str, seen: Seen) -> tuple[Array, Array]:
    """Section 3.7: mean and variance of every channel, [c, 1, 1]: the batch's, noted in `seen`, or running ones."""
    if seen is None:
        found = np.stack([w[at + "mean"], w[at + "var"]])
    else:
        mean = x.mean((0, 2, 3))
        found = np.stack([mean, ((x - mean[:, None, None]) ** 2).mean((0, 2, 3))])
        seen[at] = found
    return found[0][:, None, None], found[1][:, None, None]


def normed(x: Array, w: Weights, at: str, seen: Seen) -> Array:
    """Released code: inside networks a batch norm has a bias and no scale."""
    mean, var = moments(x, w, at + "norm.", seen)
    return (x - mean) / np.sqrt(var + EPS) + w[at + "bias"][:, None, None]


def convolved_normed(x: Array, w: Weights, at: str) -> Array:
    """Section 4.1, weight normalisation: filters of length 1, times a magnitude where there is one; zero padding."""
    direction = w[at + "direction"]
    weight = direction / np.sqrt((direction**2).sum((1, 2, 3)))[:, None, None, None]
    weight = weight * w.get(at + "magnitude", np.ones(len(weight)))[:, None, None, None]
    pad = direction.shape[2] // 2
    bias = w.get(at + "bias", np.zeros(len(weight)))
    return convolved(np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad))), weight) + bias[:, None, None]


def network(x: Array, w: Weights, at: str, condition: Array | None, seen: Seen) -> tuple[Array, Array]:
    """Section 4.1 and released code: residuals, 1x1 skips from each to a sum, norm, ReLU, 1x1; shift beside s."""
    h = convolved_normed(x, w, at + "first.")
    if condition is not None and at + "condition.weight" in w:
        h = h + (condition @ w[at + "condition.weight"].T)[:, :, None, None]
    total, index = convolved_normed(h, w, at + "skips.0."), 0
    while f"{at}residuals.{index}.first.direction" in w:
        inside = f"{at}residuals.{index}."
        inner = convolved_normed(np.maximum(normed(h, w, inside + "norm_first.", seen), 0), w, inside + "first.")
        inner = np.maximum(normed(inner, w, inside + "norm_second.", seen), 0)
        h = h + convolved_normed(inner, w, inside + "second.")
        index += 1
        total = total + convolved_normed(h, w, f"{at}skips.{index}.")
    out = convolved_normed(np.maximum(normed(total, w, at + "norm_last.", seen), 0), w, at + "last.")
    shift, s = np.split(out, 2, axis=1)
    return shift, s


def board(x: Array, odd: bool) -> Array:
    """Section 3.4, figure 3 left: 1 in the fields that stay and are seen, [1, 1, h, w]."""
    rows, columns = np.indices(x.shape[2:])
    return ((rows + columns) % 2 == int(odd)).astype(float)[None, None]


def told_by_fields(x: Array, w: Weights, at: str, odd: bool, given: Array | None, seen: Seen) -> tuple[Array, Array]:
    """Released code: zeros in the other fields, norm doubled, x beside -x, ReLU, and the mask; (shift, log scale)."""
    mask = board(x, odd)
    h = 2 * normed(x * mask, w, at + "conditioner.", seen)
    h = np.concatenate([np.maximum(h, 0), np.maximum(-h, 0), np.broadcast_to(mask, (len(x), 1, *mask.shape[2:]))], 1)
    shift, s = network(h, w, at + "conditioner.net.", given, seen)
    return shift, w[at + "rescale"] * np.tanh(s)


def moved_fields(
    x: Array, w: Weights, at: str, odd: bool, given: Array | None = None, seen: Seen = None
) -> tuple[Array, Array]:
    """Equation 9: y = m x + (1 - m) (x + shift) exp(log scale), normed by moments that count the fields of m as 0."""
    shift, log_scale = told_by_fields(x, w, at, odd, given, seen)
    moves = 1 - board(x, odd)
    y = (x + shift) * np.exp(log_scale) * moves
    mean, var = moments(y, w, at + "norm.", seen)
    log_det = (moves * (log_scale - 0.5 * np.log(var + EPS))).sum((1, 2, 3))
    return x * (1 - moves) + moves * (y - mean) / np.sqrt(var + EPS), log_det


def moved_fields_back(y: Array, w: Weights, at: str, odd: bool, given: Array | None = None) -> Array:
    """Equation 8 on a checkerboard, by running moments."""
    shift, log_scale = told_by_fields(y, w, at, odd, given, None)
    mean, var = moments(y, w, at + "norm.", None)
    x = (y * np.sqrt(var + EPS) + mean) * np.exp(-log_scale) - shift
    mask = board(y, odd)
    return mask * y + (1 - mask) * x


def told_by_channels(stays: Array, w: Weights, at: str, given: Array | None, seen: Seen) -> tuple[Array, Array]:
    """Released code: norm, x beside -x, ReLU, network; (shift, log scale)."""
    h = normed(stays, w, at + "conditioner.", seen)
    shift, s = network(np.maximum(np.concatenate([h, -h], 1), 0), w, at + "conditioner.net.", given, seen)
    return shift, w[at + "rescale"] * np.tanh(s)


def moved_channels(
    x: Array, w: Weights, at: str, odd: bool, given: Array | None = None, seen: Seen = None
) -> tuple[Array, Array]:
    """Equations 4, 5: one half of the channels stays (the second where odd), the other is moved and normed."""
    stays, moves = np.split(x, 2, axis=1)[:: -1 if odd else 1]
    shift, log_scale = told_by_channels(stays, w, at, given, seen)
    y = (moves + shift) * np.exp(log_scale)
    mean, var = moments(y, w, at + "norm.", seen)
    log_det = (log_scale - 0.5 * np.log(var + EPS)).sum((1, 2, 3))
    return np.concatenate([stays, (y - mean) / np.sqrt(var + EPS)][:: -1 if odd else 1], axis=1), log_det


def moved_channels_back(y: Array, w: Weights, at: str, odd: bool, given: Array | None = None) -> Array:
    """Equation 8 over channels, by running moments."""
    stays, moved = np.split(y, 2, axis=1)[:: -1 if odd else 1]
    shift, log_scale = told_by_channels(stays, w, at, given, None)
    mean, var = moments(moved, w, at + "norm.", None)
    x = (moved * np.sqrt(var + EPS) + mean) * np.exp(-log_scale) - shift
    return np.concatenate([stays, x][:: -1 if odd else 1], axis=1)


def squeezed_in_order(x: Array) -> Array:
    """Released code: the phases of 2x2 pixels as blocks of channels, the diagonal ones first."""
    return np.concatenate([x[:, :, dy::2, dx::2] for dy, dx in PHASES], axis=1)


def unsqueezed_in_order(y: Array) -> Array:
    """What `squeezed_in_order` undoes."""
    b, c, h, w = y.shape
    x = np.empty((b, c // 4, 2 * h, 2 * w))
    for (dy, dx), block in zip(PHASES, np.split(y, 4, axis=1), strict=True):
        x[:, :, dy::2, dx::2] = block
    return x


def encoded(
    x: Array, w: Weights, levels: int, given: Array | None = None, seen: Seen = None
) -> tuple[list[Array], Array]:
    """Section 3.6, equations 13 to 16: (latents of every scale, log p(x) [b]) under N(0, 1)."""
    x, log_prob = opened(x)
    latents: list[Array] = []
    for level in range(levels):
        at, last = f"levels.{level}.steps.", level == levels - 1
        for i in range(4 if last else 3):
            x, log_det = moved_fields(x, w, f"{at}fields_{i}.", i % 2 == 1, given, seen)
            log_prob = log_prob + log_det
        if not last:
            x = squeezed(x)
            for i in range(3):
                x, log_det = moved_channels(x, w, f"{at}channels_{i}.", i % 2 == 1, given, seen)
                log_prob = log_prob + log_det
            x = unsqueezed(x)
        y = squeezed_in_order(x)
        x, z = (y, y) if last else np.split(y, 2, axis=1)
        latents.append(z)
        log_prob = log_prob + gaussian_log_prob(z, np.zeros_like(z), np.zeros_like(z))
    return latents, log_prob


def decoded(latents: list[Array], w: Weights, given: Array | None = None) -> Array:
    """Section 3.6, backwards."""
    x, levels = np.zeros(0), len(latents)
    for level in reversed(range(levels)):
        at, last = f"levels.{level}.steps.", level == levels - 1
        x = unsqueezed_in_order(latents[level] if last else np.concatenate([x, latents[level]], axis=1))
        if not last:
            x = squeezed(x)
            for i in reversed(range(3)):
                x = moved_channels_back(x, w, f"{at}channels_{i}.", i % 2 == 1, given)
            x = unsqueezed(x)
        for i in reversed(range(4 if last else 3)):
            x = moved_fields_back(x, w, f"{at}fields_{i}.", i % 2 == 1, given)
    return closed(x)
