"""The studies that compare models of different cost: at equal images, and at equal CPU time of the process.

Equal time is made of images, so that what is learned does not depend on how busy the machine is: the cheaper model sees
as many more images as its training cost less, by the CPU seconds of the cells that were measured before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from jobs.studies.cells import Cell, Result
from jobs.studies.plans import Measure, Outcome, Scale, by_group, cell, compared


def dequantization(measure: Measure, scale: Scale) -> Outcome:
    """Variational against uniform dequantisation, at equal images and at equal time, on crops of photographs."""
    seeds = range(scale.seeds)
    uniform = [cell(scale, "uniform", "photos32", seed) for seed in seeds]
    variational = [cell(scale, "variational", "photos32", seed, dequantization="variational") for seed in seeds]
    return at_equal_time(measure, ("uniform", uniform), ("variational (bound)", variational))


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
