"""The presets say what was published: configurations and figures, checked against a table typed in by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from glow import GlowConfig, RealNVPConfig, make_flow
from jobs.presets import PRESETS, table
from pipeline.config import refuse_impossible

PUBLISHED = {
    # preset: size, L, K, coupling, bits, batch, bits/dim (Glow, table 2 and README; batch = GPUs x 64 (32 / size)^2)
    "cifar10": (32, 3, 32, "affine", 8, 512, 3.35),
    "imagenet32": (32, 3, 48, "affine", 8, 512, 4.09),
    "imagenet64": (64, 4, 48, "affine", 8, 128, 3.81),
    "lsun64": (64, 3, 48, "affine", 8, 128, 2.38),
    "lsun64tower": (64, 3, 48, "affine", 8, 128, 2.46),
    "lsun64church": (64, 3, 48, "affine", 8, 128, 2.67),
    "lsun96": (96, 5, 64, "additive", 5, 280, None),
    "lsun128": (128, 5, 64, "additive", 5, 160, None),
    "celebahq256": (256, 6, 32, "additive", 5, 40, 1.03),
    "cifar10class": (32, 3, 32, "additive", 5, 512, None),
    "imagenet32class": (32, 3, 48, "additive", 5, 512, None),
}


PUBLISHED_REALNVP = {
    # preset: size, scales, width, residuals, bits/dim (RealNVP, section 4.1 and table 1)
    "cifar10-realnvp": (32, 2, 64, 8, 3.49),
    "imagenet32-realnvp": (32, 4, 32, 4, 4.28),
    "imagenet64-realnvp": (64, 5, 32, 2, 3.98),
    "celeba64-realnvp": (64, 5, 32, 2, 3.02),
    "lsun64-realnvp": (64, 5, 32, 2, 2.72),
}


@pytest.mark.parametrize("name", PUBLISHED_REALNVP)
def test_a_published_realnvp(name: str) -> None:
    config = PRESETS[name].config
    model, optim = config.model, config.optim
    assert isinstance(model, RealNVPConfig)
    found = (model.size, model.levels, model.width, model.residuals, PRESETS[name].published)
    assert found == PUBLISHED_REALNVP[name]
    assert (model.prior, model.constraint, model.masked_moments) == ("standard", 0.9, True)
    assert (optim.algorithm, optim.lr, optim.l2, optim.clip, optim.loss) == ("adam", 1e-3, 5e-5, 100.0, "nats")
    assert (config.data.bits, config.schedule.batch, config.schedule.leaf) == (8, 64, 64)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_configuration(name: str) -> None:
    entry = PRESETS[name]
    model, schedule = entry.config.model, entry.config.schedule
    assert isinstance(model, GlowConfig)
    found = (model.size, model.levels, model.steps, model.coupling, entry.config.data.bits, schedule.batch)
    assert (*found, entry.published) == PUBLISHED[name]
    assert (model.width, model.border, model.learned_top, model.clamp) == (512, True, True, "sigmoid")
    assert (entry.config.optim.algorithm, entry.config.optim.lr) == ("adamax", 1e-3)
    assert entry.gpus
    if model.size > 32 or schedule.batch == 512:
        assert schedule.batch == entry.gpus * int(64 * (32 / model.size) ** 2)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_possible(name: str) -> None:
    config = PRESETS[name].config
    refuse_impossible(config)
    classes = 10 if config.model.classifier_weight else 0
    small = {"steps": 1} if isinstance(config.model, GlowConfig) else {"residuals": 1}
    make_flow(replace(config.model, size=config.model.size or 64, channels=3, width=4, classes=classes, **small))  # type: ignore[arg-type]
    assert name in table()
