"""Versions in a registry whose models say what a test wants them to say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pipeline.config import TrackingConfig
from pipeline.evaluate import Evaluation, Figure
from pipeline.gates import Evidence, Limits, Result
from pipeline.mlflow_run import found_or_made
from pipeline.model import LoadedModel
from pipeline.promotion import Promotion, Request, promote
from pipeline.registry import ModelRegistry
from tests.pipeline.models import write_tiny

LIMITS = Limits(finite_seeds=4, saturated=1.0)


def evaluation(values: list[float], round_trip: float = 1e-6) -> Evaluation:
    labels = tuple(index % 2 for index in range(len(values)))
    names = ("left", "right")
    by_class = {
        name: [v for v, label in zip(values, labels, strict=True) if label == i] for i, name in enumerate(names)
    }
    return Evaluation(
        bits=5,
        bits_per_dim=Figure.of(values),
        log_det=-3.0,
        priors=(0.5, 0.5),
        class_names=names,
        classes={name: Figure.of(found) for name, found in by_class.items()},
        round_trip=round_trip,
        values=tuple(values),
        labels=labels,
    )


def saying(*values: float, **rest: float) -> Callable[[LoadedModel, str], Evidence]:
    """Evidence with these bits/dim for every model."""
    return lambda loaded, split: Evidence(loaded, evaluation(list(values), **rest))


def by_digest(found: dict[str, list[float]]) -> Callable[[LoadedModel, str], Evidence]:
    """Evidence with these bits/dim by artifact digest."""
    return lambda loaded, split: Evidence(loaded, evaluation(found[loaded.digest]))


def promoted(
    registry: ModelRegistry,
    version: int,
    evidence: Callable[[LoadedModel, str], Evidence],
    announce: Callable[[Sequence[Result]], None] = lambda results: None,
    name: str = "faces",
    **words: Any,
) -> Promotion:
    """Promote a version."""
    return promote(registry, Request(name=name, version=version, **words), evidence, LIMITS, announce)


def register(registry: ModelRegistry, folder: Path, seed: int = 0, name: str = "faces", validation: str = "val") -> int:
    write_tiny(folder, seed, validation=validation)
    run, _ = found_or_made(registry.client, TrackingConfig(uri=registry.uri), "run", f"key-{seed}")
    return registry.register(name, folder, run, {"step": "12"})
