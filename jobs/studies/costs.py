"""The studies that compare models of different cost: at equal images, and at equal CPU time of the process.

Equal time is made of images, so that what is learned does not depend on how busy the machine is: the cheaper model sees
as many more images as its training cost less, by the CPU seconds of the cells that were measured before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from glow import RealNVPConfig, make_flow
from jobs.studies.cells import Cell, Result
from jobs.studies.plans import Measure, Outcome, Scale, affine_glow, by_group, cell, compared

RESIDUALS = 2
"""Of every coupling's network in the studies' RealNVP, as in its preset for 64 px."""


def families(measure: Measure, scale: Scale) -> Outcome:
    """Glow against RealNVP, at equal parameters and at equal time, on toy faces."""
    ours = affine_glow(scale, "toy32")
    width = realnvp_width(ours[0], scale)
    realnvp = [realnvp_cell(scale, "realnvp", seed, width) for seed in range(scale.seeds)]
    return at_equal_time(measure, ("Glow, affine", ours), (f"RealNVP, width {width}", realnvp))


def dequantization(measure: Measure, scale: Scale) -> Outcome:
    """Variational against uniform dequantisation, at equal images and at equal time, on crops of photographs."""
    variational = [
        cell(scale, "variational", "photos32", seed, mixing="lu", dequantization="variational")
        for seed in range(scale.seeds)
    ]
    return at_equal_time(measure, ("uniform", affine_glow(scale, "photos32")), ("variational (bound)", variational))


def at_equal_time(measure: Measure, first: tuple[str, list[Cell]], second: tuple[str, list[Cell]]) -> Outcome:
    """Both at equal images, and whichever cost less again with as many more images as the other's time pays for."""
    groups = dict([first, second])
    found = by_group(measure, groups)
    costs = {name: cost_of(results) for name, results in found.items()}
    if all(costs.values()):
        cheap, dear = sorted(costs, key=lambda name: costs[name])
        longer = [lasting(one, costs[dear] / costs[cheap]) for one in groups[cheap]]
        found |= by_group(measure, {f"{cheap}, as long as {dear}": longer})
    return compared(found, "equal images, equal time")


def cost_of(results: Sequence[Result]) -> float:
    """Mean CPU seconds of trainings; 0 where there are none."""
    return sum(result.cpu_seconds for result in results) / max(len(results), 1)


def lasting(one: Cell, factor: float) -> Cell:
    """The same training with so many times the images, in whole batches; looked at as often."""
    schedule, evaluate = one.config.schedule, one.config.evaluate
    images = max(round(schedule.images * factor / schedule.batch), 1) * schedule.batch
    longer = replace(schedule, images=images, checkpoint_every=max(images // 4, 1))
    config = replace(one.config, schedule=longer, evaluate=replace(evaluate, every=max(images // 8, 1)))
    return replace(one, name=f"{one.name}-longer", config=config)


def realnvp_cell(scale: Scale, name: str, seed: int, width: int) -> Cell:
    """A RealNVP under the settings of the studies' Glow."""
    base = cell(scale, name, "toy32", seed)
    model = RealNVPConfig(levels=scale.levels, width=width, residuals=RESIDUALS)
    return replace(base, config=replace(base.config, model=model))


def realnvp_width(glow: Cell, scale: Scale) -> int:
    """The width at which a RealNVP comes nearest to the parameters of a Glow for 32 px in colour."""
    wanted = _parameters(glow)
    return min(range(1, 65), key=lambda width: abs(_parameters(realnvp_cell(scale, "narrow", 0, width)) - wanted))


def _parameters(one: Cell) -> int:
    model = make_flow(replace(one.config.model, size=32, channels=3, classes=0, attributes=0))
    return sum(parameter.numel() for parameter in model.parameters())
