"""Write the golden arrays: inputs and weights from a seed, outputs from the restatement.

    python -m tests.parity.make_golden

Committed as golden.npz (no pickle in it). They change only when the equations do, and then on purpose: a difference
here is a difference to every model trained so far.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tests.parity import realnvp
from tests.parity import restatement as plain
from tests.parity.restatement import Array

GOLDEN = Path(__file__).with_name("golden.npz")


@dataclass(frozen=True, kw_only=True)
class Case:
    """A small Glow."""

    affine: bool
    lu: bool
    classes: int = 0
    attributes: int = 0
    everywhere: bool = False
    """The condition enters splits and couplings too."""
    size: int = 4
    channels: int = 2
    levels: int = 2
    steps: int = 2
    width: int = 5

    @property
    def condition(self) -> int:
        return self.classes + self.attributes


CASES = {
    "affine, lu": Case(affine=True, lu=True),
    "additive, dense": Case(affine=False, lu=False, channels=1, size=8, levels=3, steps=1),
    "affine, dense, conditioned": Case(affine=True, lu=False, classes=3, steps=1),
    "additive, lu, conditioned everywhere": Case(affine=False, lu=True, classes=2, attributes=3, everywhere=True),
}

REALNVP_CASES = {"realnvp": (0, 2), "realnvp, conditioned": (3, 1)}
"""Name -> (length of its condition, residuals) of a RealNVP of 4 px, one channel, two scales and width 2."""

IMAGES = 3


def weights(case: Case, rng: np.random.Generator) -> dict[str, Array]:
    """Every parameter and buffer of a small Glow by name, none of them at its start."""
    found: dict[str, Array] = {}

    def draw(name: str, *shape: int, by: float = 0.2) -> None:
        found[name] = np.round(by * rng.standard_normal(shape) * 2**10) / 2**10  # short, so that the file is

    def zero_conv(at: str, channels: int, outputs: int) -> None:
        draw(at + "weight", outputs, channels, 3, 3)
        draw(at + "border", outputs, 1, 3, 3)
        draw(at + "bias", outputs)
        draw(at + "log_scale", outputs, by=0.1)

    def norm(at: str, channels: int) -> None:
        draw(at + "bias", channels)
        draw(at + "log_scale", channels, by=0.1)

    channels = case.channels
    for level in range(case.levels):
        channels *= 4
        for step in range(case.steps):
            at = f"levels.{level}.steps.{step}."
            norm(at + "mix.norm.", channels)
            found |= {at + "mix.mixing." + name: value for name, value in mixing(case, channels, rng).items()}
            at += "coupling.conditioner."
            draw(at + "first", case.width, channels // 2 + 1, 3, 3)
            norm(at + "norm_first.", case.width)
            draw(at + "second", case.width, case.width, 1, 1, by=0.5)
            norm(at + "norm_second.", case.width)
            zero_conv(at + "last.", case.width, channels if case.affine else channels // 2)
            if case.everywhere:
                draw(at + "condition.weight", case.width, case.condition)
        at, last = f"levels.{level}.prior.", level == case.levels - 1
        kept = channels if last else channels // 2
        zero_conv(at if last else at + "conv.", kept, 2 * kept)
        if last:
            del found[at + "weight"]
        if case.condition and (last or case.everywhere):
            draw(at + "condition.weight", 2 * kept, case.condition)
        channels = kept
    return found


def mixing(case: Case, channels: int, rng: np.random.Generator) -> dict[str, Array]:
    """A 1x1 convolution: a disturbed rotation, or the factors of one."""
    if not case.lu:
        rotation = np.linalg.qr(rng.standard_normal((channels, channels)))[0]
        return {"weight": rotation + 0.05 * rng.standard_normal((channels, channels))}
    return {
        "permutation": np.eye(channels)[rng.permutation(channels)],
        "lower": np.tril(0.3 * rng.standard_normal((channels, channels)), -1),
        "upper": np.triu(0.3 * rng.standard_normal((channels, channels)), 1),
        "sign": np.sign(rng.standard_normal(channels)),
        "log_s": 0.2 * rng.standard_normal(channels),
    }


def conditions(case: Case, rng: np.random.Generator) -> dict[str, Array]:
    """Labels (one unknown), attributes, and the vector they make."""
    label = rng.integers(0, max(case.classes, 1), IMAGES)
    label[-1] = -1
    attributes = rng.integers(-1, 2, (IMAGES, case.attributes)).astype(float)
    one_hot = (label[:, None] == np.arange(case.classes)).astype(float)
    return {
        "label": label.astype(float),
        "attributes": attributes,
        "condition": np.concatenate([one_hot, attributes], 1),
    }


def golden_of(case: Case, rng: np.random.Generator) -> dict[str, Array]:
    """Weights, inputs and outputs of a case."""
    w, given = weights(case, rng), conditions(case, rng)
    bits = 5
    pixels = rng.integers(0, 256, (IMAGES, case.channels, case.size, case.size)).astype(np.uint8)
    noise = rng.integers(0, 2 ** (24 - bits), pixels.shape) / 2.0 ** (24 - bits)
    x = plain.dequantized(pixels, bits, noise)
    found = {"pixels": pixels.astype(float), "noise": noise, "x": x, **given}
    latents, found["log_prob"] = plain.encoded(x, w, case.levels, case.steps, given["condition"])
    found["bits_per_dim"] = plain.bits_per_dim(found["log_prob"], x[0].size, bits)
    found |= {f"latents.{level}": latent for level, latent in enumerate(latents)}
    found["decoded"] = plain.decoded([0.7 * latent for latent in latents], w, case.steps, given["condition"])
    found |= {f"w/{name}": value for name, value in w.items()}
    if not case.condition:
        start = plain.initialized(x, w, case.levels, case.steps)
        found |= {f"initialized/{name}": value for name, value in start.items() if "norm" in name}
    return found


def golden_pieces(rng: np.random.Generator) -> dict[str, Array]:
    """Squeeze, border channel and optimiser by themselves."""
    x = rng.standard_normal((2, 3, 4, 6))
    start, gradients = rng.standard_normal(7), rng.standard_normal((6, 7))
    gradients[2] = 0.0
    rates = np.array([0.0, 0.01, 0.02, 0.03, 0.03, 0.01])
    return {
        "x": x,
        "squeezed": plain.squeezed(x),
        "bordered": plain.with_border(x),
        "start": start,
        "gradients": gradients,
        "rates": rates,
        "moved": plain.adamax(start, list(gradients), list(rates)),
    }


def realnvp_weights(condition: int, residuals: int, rng: np.random.Generator) -> dict[str, Array]:
    """Every parameter and running moment of a small RealNVP by name."""
    found: dict[str, Array] = {}

    def draw(name: str, *shape: int, by: float = 0.4, middle: float = 0.0) -> None:
        found[name] = middle + np.round(by * rng.standard_normal(shape) * 2**10) / 2**10

    def norm(at: str, channels: int) -> None:
        draw(at + "mean", channels)
        found[at + "var"] = np.round(np.exp(0.5 * rng.standard_normal(channels)) * 2**10) / 2**10

    def biased_norm(at: str, channels: int) -> None:
        norm(at + "norm.", channels)
        draw(at + "bias", channels)

    def conv(at: str, channels: int, outputs: int, size: int, *, scaled: bool = True, biased: bool = True) -> None:
        draw(at + "direction", outputs, channels, size, size)
        if scaled:
            draw(at + "magnitude", outputs, middle=1.0)
        if biased:
            draw(at + "bias", outputs)

    def network(at: str, channels: int, outputs: int, width: int) -> None:
        conv(at + "first.", channels, width, 3, scaled=False)
        for i in range(residuals):
            biased_norm(f"{at}residuals.{i}.norm_first.", width)
            conv(f"{at}residuals.{i}.first.", width, width, 3, scaled=False, biased=False)
            biased_norm(f"{at}residuals.{i}.norm_second.", width)
            conv(f"{at}residuals.{i}.second.", width, width, 3)
        for i in range(residuals + 1):
            conv(f"{at}skips.{i}.", width, width, 1)
        biased_norm(at + "norm_last.", width)
        conv(at + "last.", width, outputs, 1)
        if condition:
            draw(at + "condition.weight", width, condition)

    def coupling(at: str, channels: int, mask: int, width: int) -> None:
        draw(at + "rescale", middle=0.6)
        biased_norm(at + "conditioner.", channels)
        network(at + "conditioner.net.", 2 * channels + mask, 2 * channels, width)
        norm(at + "norm.", channels)

    for i in range(3):
        coupling(f"levels.0.steps.fields_{i}.", 1, 1, 2)
        coupling(f"levels.0.steps.channels_{i}.", 2, 0, 4)
    for i in range(4):
        coupling(f"levels.1.steps.fields_{i}.", 2, 1, 4)
    return found


def golden_realnvp(condition: int, residuals: int, rng: np.random.Generator) -> dict[str, Array]:
    """Weights, images, and what comes out by the batch's moments (`trained/`) and by running ones."""
    w = realnvp_weights(condition, residuals, rng)
    x = rng.integers(0, 2**16, (IMAGES, 1, 4, 4)) / 2.0**16 - 0.5
    given = rng.integers(-1, 2, (IMAGES, condition)).astype(float) if condition else None
    seen: dict[str, Array] = {}
    found = {"x": x} | ({} if given is None else {"condition": given})
    for prefix, noted in (("", None), ("trained/", seen)):
        latents, found[prefix + "log_prob"] = realnvp.encoded(x, w, 2, given, noted)
        found |= {f"{prefix}latents.{level}": latent for level, latent in enumerate(latents)}
    latents = [0.7 * found[f"latents.{level}"] for level in range(2)]
    found["decoded"] = realnvp.decoded(latents, w, given)
    return found | {"w": packed(w), "seen": packed(seen)}


def packed(arrays: dict[str, Array]) -> Array:
    """Many small arrays as one: each by itself would cost the file more than its numbers do."""
    return np.concatenate([array.ravel() for array in arrays.values()])


def unpacked(vector: Array, like: dict[str, Array]) -> dict[str, Array]:
    """What `packed` took, by the names and shapes of `like`."""
    ends = np.cumsum([array.size for array in like.values()])
    pieces = np.split(vector, ends[:-1])
    return {name: piece.reshape(like[name].shape) for name, piece in zip(like, pieces, strict=True)}


def golden() -> dict[str, Array]:
    """Everything, by "case/name"."""
    rng = np.random.default_rng(2018)
    found = {f"pieces/{name}": value for name, value in golden_pieces(rng).items()}
    for name, case in CASES.items():
        found |= {f"{name}/{key}": value for key, value in golden_of(case, rng).items()}
    rng = np.random.default_rng(2017)
    for name, (condition, residuals) in REALNVP_CASES.items():
        found |= {f"{name}/{key}": value for key, value in golden_realnvp(condition, residuals, rng).items()}
    return found


if __name__ == "__main__":
    np.savez_compressed(GOLDEN, **golden())
    print(f"{GOLDEN}: {GOLDEN.stat().st_size} bytes")
