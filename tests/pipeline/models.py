"""Tiny real models for the tests of registry, evaluation and commands."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from glow import Glow, GlowConfig
from pipeline.model import ModelConfig, write_model
from pipeline.storage import open_storage

NAMES = ("Smiling", "Eyeglasses", "Wearing_Hat")


def tiny_config(seed_data: str = "ab", validation: str = "val") -> ModelConfig:
    """A conditional model of two levels over 8 px images."""
    glow = GlowConfig(size=8, channels=3, levels=2, steps=2, width=8, classes=2, attributes=3, condition_splits=True)
    return ModelConfig(
        model=glow,
        bits=5,
        attributes=(*NAMES, "Bald"),
        editable=NAMES,
        labels=("left", "right"),
        data={"digest": seed_data * 32, "license": "CC0-1.0", "validation": validation},
    )


def tiny_model(config: ModelConfig, seed: int = 0) -> Glow:
    """A model whose every parameter is away from its initial value, so that all of them matter."""
    torch.manual_seed(seed)
    model = Glow(config.model)
    model.initialize([torch.rand(32, 3, 8, 8) - 0.5])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model.eval()


def conditions(count: int = 10) -> tuple[Tensor, Tensor]:
    """Labels and attributes of some images."""
    rows = torch.arange(count)
    return rows % 2, torch.stack([rows % 2, rows // 2 % 2, rows // 4 % 2], dim=1).mul(2).sub(1).to(torch.int8)


def write_tiny(folder: Path, seed: int = 0, run: str = "run-1", validation: str = "val") -> str:
    """Write a tiny model folder; returns its artifact digest."""
    config = tiny_config(validation=validation)
    model = tiny_model(config, seed)
    directions = [torch.full((3, *shape), 0.5) for shape in model.latent_shapes()]
    lineage = {"schema": 1, "run": run}
    storage = open_storage(str(folder))
    return write_model(
        storage, model, config, directions=directions, examples=conditions(), lineage=lineage, card=f"# {run}\n"
    )
