"""One tree of frozen dataclasses: everything a run is made of, in TOML beside every checkpoint.

Units are images: every `..._every`, `warmup` and `images` counts images seen, and `batch` is the global batch, so the
number of workers never changes what is learned. What follows from other values (size, channels, classes, attribute
count) is computed from the dataset's manifest.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import tomli_w
from pydantic import Discriminator, Tag, TypeAdapter, ValidationError

from glow import FlowConfig, GlowConfig, RealNVPConfig
from pipeline.bounds import BOUNDS, refuse_out_of_bounds
from pipeline.errors import ConfigError, redact

STRICT = {"extra": "forbid"}

NAME_BYTES = 200
"""Of a run's name: file systems take 255 in a part of a path."""

FAMILIES: dict[str, type[FlowConfig]] = {"glow": GlowConfig, "realnvp": RealNVPConfig}


def family_of(model: Any) -> str:
    """Which family a model's configuration, or the table of one, is of: a Glow unless it says otherwise."""
    return str(model.get("family", "glow") if isinstance(model, dict) else getattr(model, "family", "?"))  # pyright: ignore


ModelSettings = Annotated[
    Annotated[GlowConfig, Tag("glow")] | Annotated[RealNVPConfig, Tag("realnvp")], Discriminator(family_of)
]


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
    damaged: Literal["fail", "quarantine"] = "fail"
    """What to do about a damaged shard: stop, or let others stand in while that is one sample in a thousand at most."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """How parameters move."""

    __pydantic_config__ = STRICT
    later: ClassVar[tuple[str, ...]] = ("loss", "l2")
    """Settings that came later: left out of fingerprints at their default."""
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
    loss: Literal["bits_per_dim", "nats"] = "bits_per_dim"
    """Unit of the loss, of `clip` and of `l2`: bits a dimension, or nats an image as released with RealNVP."""
    l2: float = 0.0
    """Weight in the loss of the squares of a RealNVP's weight-norm magnitudes and checkerboard scales."""
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
    anchor_every: tuple[int, ...] | Literal["plan"] = (0,)
    """Per level (the last value repeats): 0 stores everything, n keeps the stream every n steps, K inverts all; plan
    takes the cheapest that fits."""
    budget_gb: float = 0.0
    """GB a plan may use for one leaf's backward; 0 takes what the device has free."""
    nets: Literal["float32", "bfloat16"] = "float32"
    """Precision of the couplings' networks; the stream, norms, mixing, priors and log_det stay float32."""


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
    """Last checkpoints kept."""
    keep_every: int = 1_000_000
    """Images between checkpoints kept for good: the first at or after each multiple; 0 keeps none of them."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What is looked at while training."""

    __pydantic_config__ = STRICT
    every: int = 50_000
    """Images between evaluations (and sample grids)."""
    images: int = 1_000
    """Validation images of an evaluation during training, at its end too; `jobs evaluate` takes the whole split."""
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
    profile: int = 0
    """Steps that torch's profiler traces, once, into RUN/traces; 0 none."""


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """Who does the work. Never part of what is learned."""

    __pydantic_config__ = STRICT
    workers: int = 0
    """Ray Train workers; 0 trains in this process (or under torchrun)."""
    min_workers: int = 0
    """Elastic: any number from this to `workers`, as nodes come and go (--elastic MIN:MAX sets both); 0 is exactly
    `workers`."""
    gpu: bool = False
    """Give every worker a GPU."""
    threads: int = 1
    """CPU threads a worker; part of bit-reproducibility on CPUs."""
    peak_tflops: float = 0.0
    """What a worker's device can do at most, for MFU; 0 takes the maker's figure of a known GPU."""
    address: str = ""
    """Ray address; empty starts Ray on this machine."""
    max_failures: int = 3
    """Restarts of the worker group between two checkpoints before the run fails."""
    lease_s: float = 60.0
    """Seconds of silence after which another job may take the run over."""

    @property
    def wanted(self) -> str:
        """How many Ray workers are asked for, in words."""
        return f"{self.min_workers} to {self.workers}" if self.min_workers else str(self.workers)


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
    allow_change: tuple[str, ...] = ()
    """Settings, such as optim.lr, in which this attempt may differ from the run it resumes."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelSettings = field(default_factory=GlowConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)


def read_config(path: str | Path, base: TrainConfig | None = None) -> TrainConfig:
    """The tree of a TOML file laid over `base`; ConfigError names the first key that makes no sense."""
    return config_of(read_toml(path), str(path), base)


def read_toml(path: str | Path) -> dict[str, Any]:
    """The tree of a TOML file; ConfigError where there is none."""
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"cannot be read: {error}", where=str(path)) from error


def config_of(overrides: dict[str, Any], where: str, base: TrainConfig | None = None) -> TrainConfig:
    """A tree of plain values, found at `where`, laid over `base`; raises as `read_config` does."""
    below = dataclasses.asdict(base or TrainConfig())
    asked = overrides.get("model")
    if isinstance(asked, dict) and asked.get("family", below["model"]["family"]) != below["model"]["family"]:
        family = FAMILIES.get(asked["family"])
        if family is None:
            raise ConfigError(f"model.family: no {asked['family']!r}", where=where, cure=f"one of {list(FAMILIES)}")
        below["model"] = dataclasses.asdict(family())
    merged = _laid_over(below, overrides)
    try:
        # JSON mode is strict about types (no "3" for 3) and still takes a TOML array for a tuple.
        return TypeAdapter(TrainConfig).validate_json(json.dumps(merged, default=str), strict=True)
    except ValidationError as error:
        raise _first_finding(error, merged, where) from error


def write_config(config: TrainConfig) -> str:
    """The whole tree as TOML; `read_config` of it gives an equal tree."""
    return tomli_w.dumps(json.loads(json.dumps(dataclasses.asdict(config))))


def refuse_impossible(config: TrainConfig) -> None:
    """ConfigError for values that type checks let through and no run can honour."""
    refuse_out_of_bounds(config)
    schedule, cluster = config.schedule, config.cluster
    leaves = schedule.batch // schedule.leaf
    for bad, what, cure in (
        (schedule.batch % schedule.leaf != 0,
         f"schedule.leaf {schedule.leaf} does not divide schedule.batch {schedule.batch}",
         "every batch is cut into whole leaves"),
        (not config.memory.anchor_every, "memory.anchor_every is empty", BOUNDS["memory.anchor_every"][2]),
        (cluster.workers > leaves, f"{cluster.workers} workers for {leaves} leaves a batch",
         "at most batch / leaf workers have work"),
        (cluster.min_workers > cluster.workers, f"cluster.min_workers is {cluster.min_workers}",
         "from 0 to cluster.workers"),
        (bool(cluster.address) and cluster.workers == 0,
         "cluster.address is given and cluster.workers is 0", "--cluster.workers N; 0 trains in this process"),
        (redact(config.tracking.uri) != config.tracking.uri, "tracking.uri holds a password or a query",
         "the address alone: MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD say who you are"),
        (not config.name.isprintable() or len(config.name.encode(errors="replace")) > NAME_BYTES,
         f"name is {config.name[:20]!r}{'...' * (len(config.name) > 20)}",
         f"a folder name of at most {NAME_BYTES} bytes, all printable"),
        (not config.name or {"/", "\\"} & {*config.name} or config.name.startswith("."), f"name is {config.name!r}",
         "a folder name"),
    ):  # fmt: skip
        if bad:
            raise ConfigError(what, cure=cure)


def _laid_over(base: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """`base` with the tables of `overrides` laid over it, key by key."""
    merged = dict(base)
    for key, value in overrides.items():
        below = merged.get(key)
        merged[key] = _laid_over(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def _first_finding(error: ValidationError, tree: dict[str, Any], path: str) -> ConfigError:
    """The first finding of pydantic, in our words."""
    finding = error.errors()[0]
    *tables, key = [str(part) for part in finding["loc"] if part not in FAMILIES] or [""]
    if finding["type"] != "unexpected_keyword_argument":
        return ConfigError(f"{'.'.join([*tables, key])}: {finding['msg'].lower()}", where=path)
    for name in tables:
        tree = tree[name]
    known = [name for name in tree if name != key]
    near = difflib.get_close_matches(key, known, n=1)
    cure = f"did you mean {'.'.join([*tables, near[0]])}?" if near else f"known here: {', '.join(known)}"
    return ConfigError(f"no setting {'.'.join([*tables, key])}", where=path, cure=cure)
