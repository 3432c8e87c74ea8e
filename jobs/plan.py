"""What a run would do, without doing it: the text of `train --dry-run`."""

from __future__ import annotations

import os
import time
from dataclasses import replace

import torch

from glow import Flow, Glow, GlowConfig, RealNVPConfig, make_flow
from glow.budget import Plan, level_costs, plan_of, plans
from glow.flops import step_flops
from pipeline.anchors import budget, nets_dtype, planned
from pipeline.config import ScheduleConfig, TrainConfig
from pipeline.fingerprint import fingerprint
from pipeline.manifest import Manifest, open_manifest
from pipeline.order import Order
from pipeline.storage import open_storage
from pipeline.train import resolved

COPIES = 4
"""Of every parameter in a checkpoint: weights, averaged weights, two moments."""


def plan(config: TrainConfig) -> str:
    """The plan of a run, some twenty lines; reads the manifest, measures small steps of the model, writes nothing."""
    manifest = open_manifest(open_storage(config.data.prefix))
    config = resolved(config, manifest)
    parameters = parameters_of(config.model)
    every = _number(config.schedule.checkpoint_every)
    copied = amount(checkpoint_bytes(config) // max(1, config.cluster.workers))
    lines = [
        *_about_run(config, manifest),
        *_about_data(config, manifest),
        *_about_model(config, parameters),
        *_about_memory(config, parameters),
        f"checkpoint   {amount(checkpoint_bytes(config))} each, every {every} images, {kept(config.schedule)}; "
        f"{copied} of a worker's memory while one is written",
        *_about_speed(config),
        *_about_room(config, manifest),
    ]
    return "\n".join(lines)


def kept(schedule: ScheduleConfig) -> str:
    """Which checkpoints stay, in words."""
    marks = f" and the first of each {_number(schedule.keep_every)} images" if schedule.keep_every else ""
    return f"the last {schedule.keep}{marks} kept"


def checkpoint_bytes(config: TrainConfig) -> int:
    """Of one checkpoint's tensors; as much is copied in memory, shared over the workers, while it is written."""
    return 4 * COPIES * parameters_of(config.model)


def _about_run(config: TrainConfig, manifest: Manifest) -> list[str]:
    schedule, cluster = config.schedule, config.cluster
    run = open_storage(config.storage).sub(config.name)
    known = "there is a run here to go on with" if run.exists("config.toml") else "a new run"
    leaves = schedule.batch // schedule.leaf
    who = f"{cluster.wanted} Ray workers" if cluster.workers else "this process, or torchrun's"
    steps = -(-schedule.images // schedule.batch)
    return [
        f"run          {run.url}: {known}, fingerprint {fingerprint(config, manifest.digest)[:12]}",
        f"workers      {who}; {leaves} leaves of {schedule.leaf} a batch, summed by {schedule.reduction}",
        f"schedule     {_number(schedule.images)} images in {_number(steps)} steps of {schedule.batch}, "
        f"{config.optim.algorithm} at {config.optim.lr:g}, {config.optim.decay}",
    ]


def _about_data(config: TrainConfig, manifest: Manifest) -> list[str]:
    split = manifest.split(config.data.train)
    order = Order([shard.samples for shard in split.shards], config.schedule.batch, config.seed, manifest.window)
    epochs = config.schedule.images / split.samples
    return [
        f"data         {manifest.storage.url}, digest {manifest.digest[:12]}: {_number(split.samples)} images of "
        f"{manifest.size} px at {config.data.bits} bits, {epochs:.1f} epochs",
        f"order        {len(split.shards)} shards in {order.lanes} lanes, {len(split.shards) // order.lanes} a lane, "
        f"shuffled in windows of {order.window}",
    ]


def _about_model(config: TrainConfig, parameters: int) -> list[str]:
    model = config.model
    if isinstance(model, RealNVPConfig):
        little = replace(model, width=1, residuals=1)
        what = f"realnvp L{model.levels} width {model.width}, {model.residuals} residuals, {model.prior} prior"
    else:
        little = replace(model, steps=1)
        what = f"L{model.levels} K{model.steps} width {model.width} {model.coupling} {model.mixing}"
    shapes = ", ".join("x".join(map(str, shape)) for shape in make_flow(little).latent_shapes())
    return [
        f"model        {what}, {_number(parameters)} parameters; "
        f"{max(model.classes, 0)} classes, {max(model.attributes, 0)} attributes",
        f"latents      {shapes}",
    ]


def _about_couplings(config: TrainConfig) -> list[str]:
    """What a RealNVP keeps by its anchors; a dial for couplings as deep as these is not worth a table."""
    asked = planned(config, 0).anchor_every if config.memory.anchor_every == "plan" else config.memory.anchor_every
    return [
        f"memory       anchor_every {' '.join(map(str, asked))}: 0 keeps every hidden map of a level, n its state",
        "             every n members and two vectors of moments a coupling",
    ]


def _about_memory(config: TrainConfig, parameters: int) -> list[str]:
    """Anchor settings from the fastest to the smallest, what each needs for a leaf; * marks the setting of this run."""
    model = config.model
    if isinstance(model, RealNVPConfig):
        return _about_couplings(config)
    costs = level_costs(model, config.schedule.leaf, nets_dtype(config))
    device = torch.device("cuda" if config.cluster.gpu and torch.cuda.is_available() else "cpu")
    free = budget(config, parameters, device)
    asked = config.memory.anchor_every
    chosen = planned(config, free) if asked == "plan" else plan_of(costs, asked)
    known = [plan for plan in plans(costs) if plan.anchor_every != chosen.anchor_every]
    shown = sorted([chosen, *_spread(known)], key=lambda plan: (plan.cost, -plan.bytes))
    rows = [
        f"             {'*' if plan is chosen else ' '} {amount(plan.bytes):>9} {plan.cost:>9.2f}x   "
        + " ".join(map(str, plan.anchor_every))
        for plan in shown
    ]
    head = f"memory       of a leaf's backward ({amount(free)} free for it), cost beside plain, anchor_every by level"
    return [head, *rows]


def _about_speed(config: TrainConfig) -> list[str]:
    """A guess at images a second, from a step of a shallow copy of the model on this device; or why there is none."""
    model, cluster = config.model, config.cluster
    if not isinstance(model, GlowConfig):
        return ["speed        no guess: a RealNVP's multiply-adds are not counted"]
    if cluster.gpu and not torch.cuda.is_available():
        return ["speed        no guess: no GPU here to try"]
    if cluster.address:
        return ["speed        no guess: the cluster's machines are not this one"]
    device = torch.device("cuda" if cluster.gpu else "cpu")
    flops = _flops_a_second(replace(model, steps=1), config.schedule.leaf, device, cluster.threads)
    anchors = config.memory.anchor_every
    cost = 1.0 if anchors == "plan" else plan_of(level_costs(model, 1, nets_dtype(config)), anchors).cost
    at_once = min(max(1, cluster.workers), max(1, (os.cpu_count() or 1) // cluster.threads))
    workers = max(1, cluster.workers) if cluster.gpu else at_once
    guess = workers * flops / (cost * step_flops(model, 1))
    minutes = config.schedule.images / guess / 60
    long = f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.0f} h"
    return [f"speed        {guess:.3g} images/s, {long} in all, guessed from a leaf of one step a level here"]


def _flops_a_second(model: GlowConfig, leaf: int, device: torch.device, threads: int) -> float:
    """What a backward of a leaf achieves here: the better of two, after one that does not count."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    flow = Glow(replace(model, classes=0, attributes=0)).to(device)
    x = torch.rand(leaf, model.channels, model.size, model.size, device=device) - 0.5
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        flow.log_prob(x).mean().backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    torch.set_num_threads(before)
    return step_flops(model, leaf) / min(seconds[1:])


def _about_room(config: TrainConfig, manifest: Manifest) -> list[str]:
    from jobs.preflight import rooms

    return [f"{'room' if not index else '':12} {room}" for index, room in enumerate(rooms(config, manifest))]


def _spread(known: list[Plan], count: int = 6) -> list[Plan]:
    """A few from the first to the last."""
    places = {round(index * (len(known) - 1) / (count - 1)) for index in range(count)} if known else set()
    return [known[place] for place in sorted(places)]


def _small(config: GlowConfig, size: int, steps: int) -> Glow:
    return Glow(replace(config, size=size, steps=steps))


def parameters_of(model: GlowConfig | RealNVPConfig) -> int:
    """Parameters of a model; a Glow's steps are all alike, so two small ones tell."""
    if isinstance(model, RealNVPConfig):
        return _parameters(make_flow(replace(model, size=2**model.levels)))
    return _linear(*[_parameters(_small(model, 2**model.levels, n)) for n in (1, 2)], steps=model.steps)


def _parameters(model: Flow) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _linear(one: int, two: int, steps: int) -> int:
    """What grows by the same amount with every step, from its values at one and two."""
    return one + (steps - 1) * (two - one)


def _number(value: int) -> str:
    return f"{value:,}".replace(",", " ")


def amount(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"
