"""What is looked at before a worker, and with it a GPU, is asked for: cheap, and each refusal with its cure.

In this order: the settings, MLflow (unless --offline), the manifest with what follows from it, whether the run's prefix
can be written, and whether disk and memory have room. What only the cluster knows, its CPUs and GPUs, is asked when Ray
is there (jobs/cluster), and a cluster's nodes by `cluster doctor`.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from glow import GlowConfig
from glow.budget import level_costs, plan_of, plans
from jobs.plan import amount, checkpoint_bytes, parameters_of
from pipeline.anchors import free_bytes, nets_dtype
from pipeline.config import TrainConfig, refuse_impossible
from pipeline.errors import ConfigError
from pipeline.manifest import Manifest, open_manifest
from pipeline.mlflow_server import refuse_silent
from pipeline.storage import Storage, open_storage
from pipeline.train import resolved

PERSISTENT = 6
"""Copies of every parameter a worker holds: weights, averaged weights, two moments, gradient, a sum of gradients."""


@dataclass(frozen=True, kw_only=True)
class Room:
    """What is needed of something on this machine, and what is there."""

    what: str
    needed: int
    free: int
    cure: str

    def __str__(self) -> str:
        return f"{self.what} {amount(self.needed)} of {amount(self.free)} free"


def preflight(config: TrainConfig, *, offline: bool = False) -> None:
    """Raise what would stop this run later: ConfigError, RemoteError or DataError, in one line."""
    refuse_impossible(config)
    if not offline:
        refuse_silent(config.tracking.uri)
    manifest = open_manifest(open_storage(config.data.prefix))
    config = resolved(config, manifest)
    refuse_unwritable(open_storage(config.storage))
    refuse_full(rooms(config, manifest))


def refuse_full(rooms: Iterable[Room]) -> None:
    """ConfigError for the first that has less than is needed."""
    for room in rooms:
        if room.needed > room.free:
            raise ConfigError(f"no room: {room}", cure=room.cure)


def refuse_unwritable(storage: Storage) -> None:
    """Write and remove a small object; raises as storage does."""
    key = f"preflight-{secrets.token_hex(4)}"
    storage.write(key, b"can this be written?")
    storage.remove(key)


def rooms(config: TrainConfig, manifest: Manifest) -> list[Room]:
    """Disk for checkpoints and the cache, memory for the workers or of a GPU; of this machine alone."""
    folder = open_storage(config.storage).local
    found = [_checkpoints(config, folder)] if folder else []
    if not config.cluster.address:  # else others do the work
        found.append(_cache(config, manifest))
        if not config.cluster.gpu:
            found.append(_memory(config))
        elif torch.cuda.is_available():
            gpus = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
            found.append(gpu_room(config, min(gpu.total_memory for gpu in gpus)))
    return found


def _checkpoints(config: TrainConfig, folder: Path) -> Room:
    there = _bytes_in(folder / config.name / "checkpoints")
    schedule = config.schedule
    for_good = schedule.images // schedule.keep_every if schedule.keep_every else 0
    needed = (schedule.keep + 1 + for_good) * checkpoint_bytes(config)
    cure = "make room, a smaller schedule.keep, a larger schedule.keep_every (0 is off), or another --storage"
    return Room(what="disk for checkpoints", needed=max(0, needed - there), free=_free(folder), cure=cure)


def _cache(config: TrainConfig, manifest: Manifest) -> Room:
    folder = Path(config.data.cache) if config.data.cache else Path.home() / ".cache" / "glow-pipeline"
    splits = (config.data.train, config.data.validation)
    whole = sum(int(manifest.split(split).shards.bytes.sum()) for split in splits)
    needed = max(0, min(int(config.data.cache_gb * 1e9), whole) - _bytes_in(folder))
    cure = "make room, another data.cache, or a smaller data.cache_gb"
    return Room(what="disk for the cache", needed=needed, free=_free(folder), cure=cure)


def _memory(config: TrainConfig) -> Room:
    """Of all workers on this machine."""
    workers = max(1, config.cluster.workers) if "RANK" not in os.environ else 1
    cure = "--memory.anchor-every plan, a smaller schedule.leaf, or fewer workers here"
    free = free_bytes(torch.device("cpu"))
    return Room(what="memory of the workers", needed=workers * worker_bytes(config), free=free, cure=cure)


def gpu_room(config: TrainConfig, total: int) -> Room:
    """Of a GPU with so many bytes, which one worker has for itself."""
    cure = "--memory.anchor-every plan, a smaller schedule.leaf, or a larger GPU"
    return Room(what="memory of a GPU", needed=worker_bytes(config), free=total, cure=cure)


def worker_bytes(config: TrainConfig) -> int:
    """What a worker holds for good, and a leaf's backward: with "plan" the smallest there is."""
    needed = 4 * PERSISTENT * parameters_of(config.model)
    if isinstance(config.model, GlowConfig):
        costs, asked = level_costs(config.model, config.schedule.leaf, nets_dtype(config)), config.memory.anchor_every
        needed += (plans(costs)[-1] if asked == "plan" else plan_of(costs, asked)).bytes
    return needed


def _bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.exists() else 0


def _free(folder: Path) -> int:
    """Bytes free where a folder is, or will be."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
