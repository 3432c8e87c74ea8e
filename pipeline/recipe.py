"""What it takes to train a model again, bit for bit: written into its lineage, refused where it would not do."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.config import ClusterConfig, TrackingConfig, TrainConfig, config_of
from pipeline.errors import ConfigError
from pipeline.fingerprint import ALGORITHM_VERSION
from pipeline.golden import decoder
from pipeline.storage import sha256_file

ROOT = Path(__file__).parents[1]


def recipe_of(config: TrainConfig) -> dict[str, Any]:
    """A run's settings without places and addresses, and the code that learned by them."""
    bare = replace(
        config,
        storage="",
        allow_change=(),
        data=replace(config.data, prefix="", cache=""),
        tracking=TrackingConfig(),
        cluster=ClusterConfig(gpu=config.cluster.gpu, threads=config.cluster.threads),
    )
    return {
        "algorithm": ALGORITHM_VERSION,
        "code": code_digest(),
        "config": json.loads(json.dumps(dataclasses.asdict(bare))),
    }


def code_digest() -> str:
    """sha256 over the names and contents of all that learns and exports: glow/ and pipeline/."""
    listing = hashlib.sha256()
    for path in sorted([*ROOT.glob("glow/**/*.py"), *ROOT.glob("pipeline/**/*.py")]):
        listing.update(f"{path.relative_to(ROOT).as_posix()} {sha256_file(path)}\n".encode())
    return listing.hexdigest()


def config_again(lineage: Mapping[str, Any], where: str) -> TrainConfig:
    """The recorded settings; ConfigError where what is here would not come to the same bits, and why."""
    recipe = lineage.get("recipe")
    if not isinstance(recipe, dict):
        cure = "register the run again with this version"
        raise ConfigError("lineage.json holds no recipe to train by", where=where, cure=cure)
    _refuse_other_ground(lineage, recipe, where)
    config = config_of(recipe["config"], f"{where}/lineage.json")
    for bad, what in (
        (config.schedule.reduction == "overlap", "schedule.reduction overlap: sums differ in rounding from run to run"),
        (config.memory.anchor_every == "plan", "memory.anchor_every plan: it depended on the memory that was free"),
        (config.cluster.gpu, "it was learned on GPUs, which round differently from one another"),
    ):
        if bad:
            raise ConfigError(f"cannot be trained again to the bit: {what}", where=where)
    return config


def _refuse_other_ground(lineage: Mapping[str, Any], recipe: Mapping[str, Any], where: str) -> None:
    """ConfigError for another algorithm, torch, processor or code than learned."""
    here = decoder()
    known = f"git checkout {lineage.get('commit') or 'the code it was learned with'}"
    if lineage.get("dirty"):
        known += ", and what was changed there beyond that commit"
    for name, said, found, cure in (
        ("ALGORITHM_VERSION", recipe.get("algorithm"), ALGORITHM_VERSION, known),
        ("torch", lineage.get("torch"), here["torch"], f"pip install torch=={lineage.get('torch')}"),
        ("processor", lineage.get("processor"), here["processor"], "go to a machine of that kind"),
        ("code", str(recipe.get("code"))[:12], code_digest()[:12], known),
    ):
        if said != found:
            raise ConfigError(f"learned with {name} {said}, here is {found}", where=where, cure=cure)
