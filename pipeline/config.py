"""One tree of frozen dataclasses: everything a run is made of, in TOML beside every checkpoint.

Units are images: every `..._every`, `warmup` and `images` counts images seen, and `batch` is the global batch, so the
number of workers never changes what is learned. What follows from other values (size, channels, classes, attribute
count) is computed from the dataset's manifest.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import tomllib
from dataclasses import dataclass, field
from typing import Any, Literal

import tomli_w
from pydantic import TypeAdapter, ValidationError

from glow import GlowConfig
from pipeline.errors import ConfigError

ALGORITHM_VERSION = 1
"""Raised by hand when the same configuration would learn something else; part of every fingerprint."""

STRICT = {"extra": "forbid"}


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is learned from."""

    __pydantic_config__ = STRICT
    prefix: str = ""
    """Dataset prefix (s3://bucket/name or a folder) that holds manifest.json."""
    digest: str = ""
    """Manifest digest the run is pinned to; empty pins the one found."""
    train: str = "train"
    """Split to learn from."""
    validation: str = "val"
    """Split to evaluate on."""
    bits: int = 8
    """Bits kept of every 8-bit value, 1 to 8 (Glow, section 6)."""
    cache: str = ""
    """Folder for verified shards; empty uses the user's cache folder."""
    cache_gb: float = 8.0
    """Upper bound of that folder in GB."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """How parameters move."""

    __pydantic_config__ = STRICT
    algorithm: Literal["adamax", "adam"] = "adamax"
    """adamax as released with Glow, or textbook Adam."""
    lr: float = 1e-3
    """Learning rate after warm-up."""
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    warmup: int = 10_000
    """Images over which the rate rises linearly from 0."""
    decay: Literal["constant", "cosine"] = "constant"
    """Rate after warm-up: constant, or a half cosine to 0 at the last image."""
    ema_halflife: int = 50_000
    """Half-life of the averaged weights, in images."""
    clip: float = 0.0
    """Gradient norm above which the gradient is scaled down; 0 never."""
    guard_factor: float = 20.0
    """A norm above this many times the running norm skips the update."""
    guard_skips: int = 20
    """Consecutive skipped updates after which the run has diverged."""


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """What backward keeps and what it recovers by inverting."""

    __pydantic_config__ = STRICT
    anchor_every: tuple[int, ...] = (0,)
    """Per level (the last value repeats): 0 stores everything, n keeps the stream every n steps, K inverts all."""


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """How long, in what portions, and what happens on the way."""

    __pydantic_config__ = STRICT
    images: int = 1_000_000
    """Images to see in all."""
    batch: int = 32
    """Global batch."""
    leaf: int = 8
    """Microbatch: the unit of work of one backward; divides batch."""
    reduction: Literal["tree", "overlap"] = "tree"
    """tree: bit-identical for any number of workers; overlap: all-reduce while backward runs."""
    init_images: int = 256
    """Images whose moments initialise the activation norms."""
    status_every: int = 500
    checkpoint_every: int = 50_000
    keep: int = 3
    """Checkpoints kept."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What is looked at while training."""

    __pydantic_config__ = STRICT
    every: int = 50_000
    """Images between evaluations (and sample grids)."""
    images: int = 1_000
    """Validation images of an evaluation during training; the final one takes the whole split."""
    temperatures: tuple[float, ...] = (0.7, 1.0)
    """Temperatures of the sample grids."""
    rows: int = 4
    """Fixed seeds in a sample grid."""


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """Where runs and models are seen."""

    __pydantic_config__ = STRICT
    uri: str = ""
    """MLflow tracking URI; empty records in the run folder alone."""
    experiment: str = "glow"
    """MLflow experiment."""


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """Who does the work. Never part of what is learned."""

    __pydantic_config__ = STRICT
    workers: int = 0
    """Ray Train workers; 0 trains in this process (or under torchrun)."""
    gpu: bool = False
    """Give every worker a GPU."""
    threads: int = 1
    """CPU threads a worker; part of bit-reproducibility on CPUs."""
    address: str = ""
    """Ray address; empty starts Ray on this machine."""
    max_failures: int = 3
    """Restarts of the worker group before the run fails."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A run."""

    __pydantic_config__ = STRICT
    name: str = "glow"
    """Name of the run; its folder is STORAGE/NAME."""
    storage: str = "runs"
    """Prefix (s3://... or a folder) under which run folders live."""
    seed: int = 0
    """Of weights, order and noise."""
    data: DataConfig = field(default_factory=DataConfig)
    model: GlowConfig = field(default_factory=GlowConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
