"""Golden samples: latents of a few seeds kept with a model beside the pixels they decoded to where it was written.

Whoever loads the model decodes them again: equal pixels say that weights, code and torch mean the same here.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from glow import Flow, latents_of_seeds, to_pixels
from pipeline.sampling import Condition, one_thread

if TYPE_CHECKING:
    from pipeline.model import LoadedModel, ModelConfig

GOLDEN_SEEDS, GOLDEN_TEMPERATURE = 8, 0.7

EXAMPLES = 64
"""Conditions of real images kept with the model: whoever samples takes from them what is not asked for."""


def make_golden(model: Flow, config: ModelConfig, examples: Condition) -> dict[str, Tensor]:
    """The golden tensors of a model; the conditions are those of `examples`, first to first."""
    seeds = torch.arange(GOLDEN_SEEDS)
    label, attributes = examples
    count = max(len(part) for part in (label, attributes, seeds[:1]) if part is not None)
    golden = {
        "seeds": seeds,
        "labels": torch.full((count,), -1) if label is None else label[:EXAMPLES].long().cpu(),
        "attributes": torch.zeros(count, 0) if attributes is None else attributes[:EXAMPLES].cpu(),
    }
    golden["attributes"] = golden["attributes"].to(torch.int8)
    for level, latent in enumerate(latents_of_seeds(seeds, model.latent_shapes(), GOLDEN_TEMPERATURE)):
        golden[f"latents.{level}"] = latent
    return golden | {"pixels": decode_golden(model, config, golden)}


@torch.no_grad()
def decode_golden(model: Flow, config: ModelConfig, golden: Mapping[str, Tensor]) -> Tensor:
    """The pixels [n, c, h, w] golden latents decode to here and now."""
    latents = [golden[f"latents.{level}"] for level in range(config.model.levels)]
    rows = golden["seeds"] % len(golden["labels"])
    label = golden["labels"][rows] if config.model.classes > 0 else None
    attributes = golden["attributes"][rows] if config.model.attributes > 0 else None
    with one_thread():
        return to_pixels(model.decode(latents, label, attributes), config.bits)


def decoder() -> dict[str, str]:
    """What decides the rounding of decoded pixels: the build of torch and the kind of processor."""
    named = [line.partition(":")[2].strip() for line in _processor_lines() if line.startswith("model name")]
    kind = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()} {''.join(named[:1])}"
    return {"torch": str(torch.__version__), "processor": kind.strip()}


def _processor_lines() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return []


@dataclass(frozen=True)
class GoldenCheck:
    """How far what a model decodes here is from what it decoded where it was written."""

    differing: float
    """Share of pixel values that differ."""
    levels: int
    """Largest difference, in levels of the quantised pixels."""
    same_decoder: bool
    """Whether torch build and processor are those it was written with."""

    @property
    def passed(self) -> bool:
        """Equal; with another processor or torch build one level on at most 0.1 % of the values is equal too."""
        return self.levels == 0 or (not self.same_decoder and self.levels == 1 and self.differing <= 1e-3)

    def __str__(self) -> str:
        place = "the same torch build and processor" if self.same_decoder else "another torch build or processor"
        found = f"{self.differing:.3%} of the values differ, by at most {self.levels}" if self.levels else "bit-equal"
        return f"golden pixels: {found} ({place})"


def verify_model(loaded: LoadedModel) -> GoldenCheck:
    """Decode the golden latents and compare with the golden pixels."""
    shift = 8 - loaded.config.bits
    found = decode_golden(loaded.model, loaded.config, loaded.golden) >> shift
    difference = (found.int() - (loaded.golden["pixels"] >> shift).int()).abs()
    same = decoder().items() <= loaded.lineage.get("export", {}).items()
    return GoldenCheck(float((difference > 0).double().mean()), int(difference.max()), same)
