"""The model card: what a model is, learned from, is worth and is not, in Markdown for people."""

from __future__ import annotations

from glow import GlowConfig, RealNVPConfig
from pipeline.config import TrainConfig
from pipeline.gates import Limits
from pipeline.manifest import Manifest
from pipeline.report import Kept


def model_card(config: TrainConfig, manifest: Manifest, images: int, kept: Kept | None = None) -> str:
    """The card of a run's model after `images` images; `kept` is its review, where it has one."""
    lossless = "" if manifest.lossless else " (lossy shards: bits/dim compare with nothing)"
    return f"""# {config.name}

{architecture(config.model)}, over {config.model.size} px images of {config.model.channels} channels, \
{config.data.bits} bits each.

- Conditioned on: {" and ".join(_known(config, manifest)) or "nothing"}
- Learned from: split `{config.data.train}` of dataset `{manifest.digest}`{lossless}, {images:,} images seen
- Licence of the data: {manifest.license or "not stated"}
- Dequantisation: {config.model.dequantization} noise
- Weights: averaged with a half-life of {config.optim.ema_halflife:,} images

## What it is worth

{_worth(config, kept)}

## What it must pass to become champion

{_asked(Limits())}

## Limits

It samples what resembles its training images, their biases included; likelihoods rank images by how \
compressible they are as much as by how typical; attributes are those annotated in the data, as annotated.
"""


def architecture(config: GlowConfig | RealNVPConfig) -> str:
    """What a model is, in words."""
    if isinstance(config, RealNVPConfig):
        return (
            f"A RealNVP: a normalizing flow with exact likelihoods, {config.levels} scales of affine couplings by "
            f"networks of {config.residuals} residuals and width {config.width}"
        )
    return (
        f"A Glow: a normalizing flow with exact likelihoods, {config.levels} levels of {config.steps} steps, "
        f"{config.coupling} couplings of width {config.width}"
    )


def _known(config: TrainConfig, manifest: Manifest) -> list[str]:
    known = [f"{len(manifest.labels)} classes ({', '.join(manifest.labels)})"] if config.model.classes > 0 else []
    some = f"{len(manifest.editable)} attributes ({', '.join(manifest.editable)})"
    return [*known, some] if config.model.attributes > 0 else known


def _worth(config: TrainConfig, kept: Kept | None) -> str:
    """Held-out figures of a review, or that there are none."""
    if kept is None:
        return f"Not evaluated when this was written: `python -m jobs evaluate` on split `{config.data.validation}`."
    figure = kept.main.bits_per_dim
    codecs = ", ".join(f"{name} {found}" for name, found in kept.codecs.items())
    lines = [f"- {figure} bits/dim, mean ± standard error of {figure.images} images of split `{kept.split}` ({codecs})"]
    lines += [f"- Round trip: at most {kept.main.round_trip:.1e}; {kept.main.exact:.0%} of the images exact to the bit"]
    if kept.neighbours:
        lines.append(
            f"- Memorisation: samples lie {kept.neighbours.ratio:.2f} times as far from their nearest training image "
            f"as held-out images do (medians, {kept.neighbours.searched:,} searched); copies would lie near 0"
        )
    return "\n".join(lines)


def _asked(limits: Limits) -> str:
    """The gates in words; what came of them is with the promotion, below where there was one."""
    return f"""At most {limits.bits_per_dim} bits/dim worse than the champion on the same images and noise, \
{limits.worst_class} in the worst class, beyond two standard errors; round trip within {limits.round_trip}; \
{limits.finite_seeds} samples at T {" and ".join(map(str, limits.finite_temperatures))} finite, with at most \
{limits.saturated:.0%} of their values outside the range of pixels beyond what the data has at its ends; golden pixels \
as written; lineage as recorded."""
