"""What a run would do, without doing it: the text of `train --dry-run`."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from glow import Glow, GlowConfig
from pipeline.config import TrainConfig, fingerprint
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
    side = 2**config.model.levels
    parameters = _linear(*[_parameters(_small(config.model, side, n)) for n in (1, 2)], steps=config.model.steps)
    every = _number(config.schedule.checkpoint_every)
    lines = [
        *_about_run(config, manifest),
        *_about_data(config, manifest),
        *_about_model(config, parameters),
        *_about_memory(config),
        f"checkpoint   {_bytes(parameters * 4 * COPIES)} each, every {every} images, {config.schedule.keep} kept",
    ]
    return "\n".join(lines)


def _about_run(config: TrainConfig, manifest: Manifest) -> list[str]:
    schedule, cluster = config.schedule, config.cluster
    run = open_storage(config.storage).sub(config.name)
    known = "there is a run here to go on with" if run.exists("config.toml") else "a new run"
    leaves = schedule.batch // schedule.leaf
    who = f"{cluster.workers} Ray workers" if cluster.workers else "this process, or torchrun's"
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
    shapes = ", ".join("x".join(map(str, shape)) for shape in Glow(replace(model, steps=1)).latent_shapes())
    return [
        f"model        L{model.levels} K{model.steps} width {model.width} {model.coupling} {model.mixing}, "
        f"{_number(parameters)} parameters; {model.classes} classes, {model.attributes} attributes",
        f"latents      {shapes}",
    ]


def _about_memory(config: TrainConfig) -> list[str]:
    """Bytes one image keeps for backward, by level and anchor; * marks the setting of this run."""
    model, dial = config.model, config.memory.anchor_every
    asked = [dial[min(level, len(dial) - 1)] for level in range(model.levels)]
    columns = sorted({0, 1, 4, model.steps, *asked})
    stored = _stored(model)
    lines = ["memory       kept for backward, an image: anchor_every " + " ".join(f"{every:>10}" for every in columns)]
    total = 0
    for level in range(model.levels):
        state = 4 * model.channels * model.size**2 // 2**level
        row = {0: stored[level]}
        row |= {every: -(-model.steps // every) * state for every in columns if every}
        total += row[asked[level]]
        cells = " ".join(f"{_bytes(row[every]) + '*' * (every == asked[level]):>10}" for every in columns)
        lines.append(f"             {'level ' + str(level + 1):>43} {cells}")
    leaf = _bytes(total * config.schedule.leaf)
    return [*lines, f"             {_bytes(total)} an image, {leaf} a leaf, beside one step's own needs"]


def _small(config: GlowConfig, size: int, steps: int) -> Glow:
    return Glow(replace(config, size=size, steps=steps))


def _parameters(model: Glow) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _linear(one: int, two: int, steps: int) -> int:
    """What grows by the same amount with every step, from its values at one and two."""
    return one + (steps - 1) * (two - one)


def _stored(config: GlowConfig) -> list[int]:
    """Bytes plain autograd keeps for one image, by level: linear in pixels and steps, so measured on small ones.

    What does not grow with the image (folded weights) is kept once a leaf and left out.
    """
    side = 2**config.levels
    by_steps = []
    for steps in (1, 2):
        small, larger = (_kept(_small(config, size, steps)) for size in (side, 2 * side))
        by_steps.append([(b - a) * config.size**2 // (3 * side**2) for a, b in zip(small, larger, strict=True)])
    return [_linear(one, two, config.steps) for one, two in zip(*by_steps, strict=True)]


def _kept(model: Glow) -> list[int]:
    """Bytes autograd saves in one forward pass of one image, by level."""
    own = {parameter.data_ptr() for parameter in model.parameters()}
    x = torch.zeros(1, model.config.channels, model.config.size, model.config.size, requires_grad=True)
    condition = model.condition(1, None, None, x)
    sizes = []
    for level in model:
        kept: dict[int, int] = {}

        def keep(tensor: Tensor, kept: dict[int, int] = kept) -> Tensor:
            if tensor.data_ptr() not in own:
                kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            following = level(x, condition)[0]
        sizes.append(sum(kept.values()))
        x = following.detach().requires_grad_()
    return sizes


def _number(value: int) -> str:
    return f"{value:,}".replace(",", " ")


def _bytes(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"
