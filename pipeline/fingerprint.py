"""What decides what a run learns, and its digest: by it a run is resumed, refused, and found again."""

from __future__ import annotations

import dataclasses
from typing import Any

from pipeline.config import OptimConfig, TrainConfig
from pipeline.storage import canonical_json, sha256_hex

ALGORITHM_VERSION = 2
"""Raised by hand when the same configuration would learn something else; part of every fingerprint."""


def decisive(config: TrainConfig, data_digest: str) -> dict[str, Any]:
    """All that decides what is learned, and nothing else, under flat names; `config.model` must be resolved.

    Reduction, anchors, cluster, names and places are left out: they may change between two attempts at one run.
    """
    schedule = config.schedule
    return {
        "algorithm": ALGORITHM_VERSION,
        "data.digest": data_digest,
        "data.train": config.data.train,
        "data.bits": config.data.bits,
        **{f"model.{name}": value for name, value in config.model.settings().items()},
        **{f"optim.{name}": value for name, value in _decisive(config.optim).items()},
        "schedule.batch": schedule.batch,
        "schedule.leaf": schedule.leaf,
        "schedule.init_images": schedule.init_images,
        "schedule.images": schedule.images if config.optim.decay == "cosine" else None,
        "seed": config.seed,
        **({} if config.memory.nets == "float32" else {"memory.nets": config.memory.nets}),
    }


def fingerprint(config: TrainConfig, data_digest: str) -> str:
    """sha256 of what `decisive` gives."""
    return sha256_hex(canonical_json(decisive(config, data_digest)))


def _decisive(optim: OptimConfig) -> dict[str, Any]:
    tree, defaults = dataclasses.asdict(optim), dataclasses.asdict(OptimConfig())
    return {name: tree[name] for name in tree if name not in optim.later or tree[name] != defaults[name]}
