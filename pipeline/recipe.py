"""What it takes to train a model again, bit for bit: kept in a run's checkpoints, refused where it would not do.

Every checkpoint says by what its run learned, from its first image on: a list of attempts, of which one goes as far as
the next begins. A run that went on with other settings, with other code or on another machine has several, and no one
run comes to its bits.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch

from pipeline.checkpoint import Loaded
from pipeline.config import (
    ClusterConfig,
    DataConfig,
    EvaluateConfig,
    ScheduleConfig,
    TrackingConfig,
    TrainConfig,
    config_of,
)
from pipeline.errors import ConfigError
from pipeline.golden import decoder
from pipeline.origin import origin
from pipeline.world import World, on_all, on_first

Attempt = dict[str, Any]
"""{"images": where it began, "config": settings that decide, "device", "processor", "torch", and `origin`}."""

FOR_PEOPLE = ("images", "commit", "dirty", "job", "packages", "python")
"""Of an attempt, what decides nothing."""


def attempts_of(config: TrainConfig, world: World, loaded: Loaded | None) -> list[Attempt]:
    """By what a run learns that goes on from `loaded`: the attempts before and, if it is another, this. Collective."""
    before: list[Attempt] = loaded.state.get("attempts", [{}]) if loaded else []
    processors = sorted(set(on_all(world, lambda: decoder()["processor"])))
    now = {
        "config": settings_of(config),
        "device": torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "cpu",
        "processor": " + ".join(processors),
        "torch": str(torch.__version__),
        **on_first(world, origin),
    }
    if before and {**before[-1], "images": 0} == {**now, "images": 0}:
        return before
    return [*before, {"images": loaded.images if loaded else 0, **now}]


def known_of(lineage: Mapping[str, Any]) -> dict[str, Any]:
    """What a lineage says under flat names: of the run, and of the last attempt at it."""
    last = (lineage.get("attempts") or [{}])[-1]
    return {name: value for name, value in {**last, **lineage}.items() if not isinstance(value, dict | list)}


def settings_of(config: TrainConfig) -> dict[str, Any]:
    """A run's settings without those that only say where things are, how often is looked, and how far it goes."""
    data, schedule = config.data, config.schedule
    bare = replace(
        config,
        storage="",
        allow_change=(),
        data=DataConfig(digest=data.digest, train=data.train, validation=data.validation, bits=data.bits),
        schedule=ScheduleConfig(
            images=schedule.images if config.optim.decay == "cosine" else ScheduleConfig.images,
            batch=schedule.batch,
            leaf=schedule.leaf,
            reduction=schedule.reduction,
            init_images=schedule.init_images,
        ),
        evaluate=EvaluateConfig(),
        tracking=TrackingConfig(),
        cluster=ClusterConfig(gpu=config.cluster.gpu, threads=config.cluster.threads),
    )
    return json.loads(json.dumps(dataclasses.asdict(bare)))


def config_again(lineage: Mapping[str, Any], where: str) -> TrainConfig:
    """The recorded settings; ConfigError where what is here would not come to the same bits, and why."""
    attempts = lineage.get("attempts")
    if not attempts or not all("config" in attempt for attempt in attempts):
        what = "lineage.json does not say by what all of it was learned"
        raise ConfigError(what, where=where, cure="train it anew: this version keeps that in its checkpoints")
    _refuse_several(attempts, where)
    _refuse_other_ground(lineage, attempts[-1], where)
    config = config_of(attempts[-1]["config"], f"{where}/lineage.json")
    for bad, what in (
        (config.schedule.reduction == "overlap", "schedule.reduction overlap: sums differ in rounding from run to run"),
        (config.memory.anchor_every == "plan", "memory.anchor_every plan: it depended on the memory that was free"),
        (config.cluster.gpu, "it was learned on GPUs, which round differently from one another"),
    ):
        if bad:
            raise ConfigError(f"cannot be trained again to the bit: {what}", where=where)
    if config.optim.decay != "cosine":
        config = replace(config, schedule=replace(config.schedule, images=lineage["images"]))
    return config


def _refuse_several(attempts: list[Attempt], where: str) -> None:
    """ConfigError for attempts that were not all by one recipe: what changed, and at which image."""
    for before, after in pairwise(attempts):
        one, other = dict(_decisive(before)), dict(_decisive(after))
        changed = [name for name in sorted(one.keys() | other.keys()) if one.get(name) != other.get(name)]
        if changed:
            told = ", ".join(f"{name} was {_short(one.get(name))} and is {_short(other.get(name))}" for name in changed)
            what = f"no one run comes to its bits: from image {after['images']} on {told}"
            raise ConfigError(what, where=where, cure="nothing brings that back; train a run that changes nothing")


def _decisive(attempt: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """What decides the bits of an attempt, under flat names; settings as the command line calls them."""
    for name, value in attempt.items():
        if isinstance(value, dict):
            yield from _decisive(value, "" if name == "config" else f"{prefix}{name}.")
        elif prefix or name not in FOR_PEOPLE:
            yield f"{prefix}{name}", value


def _short(value: object) -> str:
    """A digest by its beginning."""
    return value[:12] if isinstance(value, str) and len(value) == 64 else str(value)


def _refuse_other_ground(lineage: Mapping[str, Any], attempt: Attempt, where: str) -> None:
    """ConfigError for another torch, processor or code than learned and exported."""
    known = f"git checkout {attempt.get('commit') or 'the code it was learned with'}"
    if attempt.get("dirty"):
        known += ", and what was changed there beyond that commit"
    cures = {"torch": f"pip install torch=={attempt.get('torch')}", "processor": "go to a machine of that kind"}
    for verb, said in (("learned", attempt), ("exported", lineage.get("export", {}))):
        for name, found in {**decoder(), "code": origin()["code"]}.items():
            if said.get(name) != found:
                what = f"{verb} with {name} {_short(said.get(name))}, here is {_short(found)}"
                raise ConfigError(what, where=where, cure=cures.get(name, known))
