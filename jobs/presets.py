"""The presets: what was published, as the release configures it, and what learns in minutes on a laptop.

Published figures are bits/dim of the test set as printed in Glow (arXiv 1807.03039, table 2; for 5-bit CelebA-HQ as
quoted by MaCow, arXiv 1902.04208), and of the validation set in RealNVP (arXiv 1605.08803, table 1); `gpus` is how many
the release's README asks for. GPU hours are not published, so the images below are a budget of ours; batches are the
release's global ones, GPUs x local batch.
"""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass

from glow import GlowConfig, RealNVPConfig
from pipeline.config import DataConfig, EvaluateConfig, MemoryConfig, OptimConfig, ScheduleConfig, TrainConfig
from pipeline.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A configuration and what is known about it."""

    config: TrainConfig
    published: float | None
    """bits/dim in the literature; None where there is none."""
    gpus: int | None
    """GPUs of the published run, or wanted; None where one machine does."""
    source: str


_LITTLE = GlowConfig(coupling="additive", width=64, condition_splits=True, condition_steps=True)
_RELEASED = OptimConfig(algorithm="adamax", lr=1e-3, warmup=500_000, ema_halflife=35_000)
_RELEASED_REALNVP = OptimConfig(
    algorithm="adam", lr=1e-3, warmup=0, loss="nats", l2=5e-5, clip=100.0, guard_factor=1e6, ema_halflife=35_000
)
_SHORT = OptimConfig(algorithm="adam", lr=2e-3, warmup=500, decay="cosine", ema_halflife=2_200)

_TOYS = (
    # name        L   K   images  every  checkpoint  source
    ("toy32",     3,  8,   6_000, 1_500,  1_000, "procedural faces at 32 px: CI and kill loops"),
    ("toy64",     4,  6,  28_000, 7_000,  4_000, "procedural faces at 64 px: the demo"),
    ("photos32",  3,  8,   6_000, 1_500,  1_000, "crops of two photographs at 32 px"),
)  # fmt: skip

_PUBLISHED = (
    # name              size  L   K  coupling   bits batch leaf    images  published  gpus  source
    ("cifar10",            32, 3, 32, "affine",     8,  512,  64,  90_000_000,  3.35,    8, "Glow, table 2"),
    ("imagenet32",         32, 3, 48, "affine",     8,  512,  64, 180_000_000,  4.09,    8, "Glow, table 2"),
    ("imagenet64",         64, 4, 48, "affine",     8,  128,  16, 120_000_000,  3.81,    8, "Glow, table 2"),
    ("lsun64",             64, 3, 48, "affine",     8,  128,  16,  90_000_000,  2.38,    8, "Glow, table 2 (bedroom)"),
    ("lsun64tower",        64, 3, 48, "affine",     8,  128,  16,  90_000_000,  2.46,    8, "Glow, table 2 (tower)"),
    ("lsun64church",       64, 3, 48, "affine",     8,  128,  16,  90_000_000,  2.67,    8, "Glow, table 2 (church)"),
    ("lsun96",             96, 5, 64, "additive",   5,  280,   7,  60_000_000,  None,   40, "Glow, figures"),
    ("lsun128",           128, 5, 64, "additive",   5,  160,   4,  40_000_000,  None,   40, "Glow, figures"),
    ("celebahq256",       256, 6, 32, "additive",   5,   40,   1,   6_000_000,  1.03,   40, "Glow, by MaCow"),
    ("celebahq256-64gpu", 256, 6, 32, "additive",   5,  512,   4,  12_000_000,  None,   64, "celebahq256, large batch"),
)  # fmt: skip

_LABELLED = (
    # name          size  L   K  coupling   bits batch leaf    images  published  gpus  source
    ("cifar10class",    32, 3, 32, "additive", 5, 512,  64,  90_000_000,  None,    8, "Glow, README: --ycond"),
    ("imagenet32class", 32, 3, 48, "additive", 5, 512,  64, 180_000_000,  None,    8, "Glow, README: --ycond"),
)  # fmt: skip
"""With class labels in the top prior and a classifier of weight 0.01, as in the release's two conditional commands."""

_TOYS_REALNVP = (
    # name             size  L   images  every  checkpoint  source
    ("toy32-realnvp",     0, 3,  12_000, 3_000,  2_000, "procedural faces at 32 px: the other family"),
)  # fmt: skip

_PUBLISHED_REALNVP = (
    # name                  size  L  width residuals images   published  source
    ("cifar10-realnvp",       32, 2, 64, 8,      25_000_000,  3.49, "RealNVP, table 1"),
    ("imagenet32-realnvp",    32, 4, 32, 4,      64_000_000,  4.28, "RealNVP, table 1"),
    ("imagenet64-realnvp",    64, 5, 32, 2,      64_000_000,  3.98, "RealNVP, table 1"),
    ("celeba64-realnvp",      64, 5, 32, 2,      16_000_000,  3.02, "RealNVP, table 1"),
    ("lsun64-realnvp",        64, 5, 32, 2,      64_000_000,  2.72, "RealNVP, table 1 (bedroom)"),
)  # fmt: skip


def _toy(name: str, levels: int, steps: int, images: int, every: int, checkpoint: int, source: str) -> Preset:
    schedule = ScheduleConfig(
        images=images, batch=16, leaf=8, init_images=256, status_every=200, checkpoint_every=checkpoint
    )
    config = TrainConfig(
        name=name,
        data=DataConfig(bits=5, cache_gb=1.0),
        model=dataclasses.replace(_LITTLE, levels=levels, steps=steps),
        optim=_SHORT,
        # Level 1 holds most of the activations: it keeps its ends alone and recovers the rest by inversion.
        memory=MemoryConfig(anchor_every=(steps, 0)),
        schedule=schedule,
        evaluate=EvaluateConfig(every=every, images=200, temperatures=(0.6,)),
    )
    return Preset(config=config, published=None, gpus=None, source=source)


def _released(
    name: str, size: int, levels: int, steps: int, coupling: str, bits: int, batch: int, leaf: int, images: int,
    published: float | None, gpus: int, source: str,
) -> Preset:  # fmt: skip
    kind = "affine" if coupling == "affine" else "additive"
    config = TrainConfig(
        name=name,
        data=DataConfig(bits=bits),
        model=GlowConfig(size=size, levels=levels, steps=steps, width=512, coupling=kind, classes=-1, attributes=-1),
        optim=_RELEASED,
        # Levels 1 and 2 hold 93 % of the activations of a 256 px image: they are recovered by inversion.
        memory=MemoryConfig(anchor_every=(4, 4, 0)),
        schedule=ScheduleConfig(images=images, batch=batch, leaf=leaf, status_every=5_000),
    )
    return Preset(config=config, published=published, gpus=gpus, source=source)


def _labelled(entry: Preset) -> Preset:
    """The same with labels, whose number the data knows."""
    model = dataclasses.replace(entry.config.model, classes=0, classifier_weight=0.01)
    return dataclasses.replace(entry, config=dataclasses.replace(entry.config, model=model))


def _released_realnvp(
    name: str, size: int, levels: int, width: int, residuals: int, images: int, published: float, source: str
) -> Preset:
    config = TrainConfig(
        name=name,
        model=RealNVPConfig(size=size, levels=levels, width=width, residuals=residuals, classes=-1, attributes=-1),
        optim=_RELEASED_REALNVP,
        memory=MemoryConfig(anchor_every=(3, 0)),
        # One leaf a batch: its moments are those of the released batch.
        schedule=ScheduleConfig(images=images, batch=64, leaf=64, status_every=5_000),
    )
    return Preset(config=config, published=published, gpus=None, source=source)


def _toy_realnvp(name: str, size: int, levels: int, images: int, every: int, checkpoint: int, source: str) -> Preset:
    base = _toy(name, levels, 1, images, every, checkpoint, source)
    config = dataclasses.replace(
        base.config,
        model=RealNVPConfig(size=size, levels=levels, width=16, residuals=1, prior="learned", condition_splits=True),
        optim=dataclasses.replace(_SHORT, l2=5e-5, loss="nats", clip=0.0),
        memory=MemoryConfig(anchor_every=(0,)),
        schedule=dataclasses.replace(base.config.schedule, leaf=16),
    )
    return dataclasses.replace(base, config=config)


PRESETS: dict[str, Preset] = (
    {row[0]: _toy(*row) for row in _TOYS}
    | {row[0]: _toy_realnvp(*row) for row in _TOYS_REALNVP}
    | {row[0]: _released(*row) for row in _PUBLISHED}
    | {row[0]: _labelled(_released(*row)) for row in _LABELLED}
    | {row[0]: _released_realnvp(*row) for row in _PUBLISHED_REALNVP}
)


def preset(name: str) -> Preset:
    """The preset of that name; UsageError with the nearest one otherwise."""
    if name in PRESETS:
        return PRESETS[name]
    near = difflib.get_close_matches(name, PRESETS, n=1)
    cure = f"did you mean {near[0]}?" if near else f"there are {', '.join(PRESETS)}"
    raise UsageError(f"no preset {name!r}", cure=cure)


def table() -> str:
    """Every preset on a line: configuration, published bits/dim, GPUs, source."""
    heads = ("preset", "size", "L", "K", "width", "inside", "bits", "batch", "images", "published", "GPUs", "source")
    rows = [heads] + [_row(name, entry) for name, entry in PRESETS.items()]
    widths = [max(len(row[column]) for row in rows) for column in range(len(heads))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
                     for row in rows)  # fmt: skip


def _row(name: str, entry: Preset) -> tuple[str, ...]:
    model, schedule = entry.config.model, entry.config.schedule
    return (
        name, str(model.size or "data"), str(model.levels), *_inside(model),
        str(entry.config.data.bits), str(schedule.batch), f"{schedule.images:,}".replace(",", " "),
        f"{entry.published:.2f}" if entry.published else "-", str(entry.gpus or "-"), entry.source,
    )  # fmt: skip


def _inside(model: GlowConfig | RealNVPConfig) -> tuple[str, str, str]:
    """(steps a level, width, what is special): a RealNVP has six couplings a level, its depth is in their networks."""
    if isinstance(model, RealNVPConfig):
        return "6", str(model.width), f"{model.residuals} residuals"
    return str(model.steps), str(model.width), model.coupling
