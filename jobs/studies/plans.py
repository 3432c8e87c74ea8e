"""The studies that compare trainings: their cells, and the table and plot of what came of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from jobs.presets import preset
from jobs.studies.cells import Cell, Result
from jobs.studies.plot import Panel, draw_lines
from pipeline.config import TrainConfig
from pipeline.evaluate import Figure

Measure = Callable[[Sequence[Cell]], list[Result]]
"""Gives the results of cells: all of them, trained where need be, or those that are there."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How large the trainings of a study are; the defaults are what the documents show."""

    images: int = 6_000
    """Seen by every training."""
    seeds: int = 3
    levels: int = 3
    steps: int = 8
    width: int = 64
    judged: int = 400
    """Held-out images of a point of the curves; figures in tables are of the whole split."""
    init_images: int = 256
    edited: int = 200
    """Held-out images that are edited."""
    judge_images: int = 30_000
    """Seen by the judge of edits in its training."""


@dataclass(frozen=True)
class Outcome:
    """What a study found: a table, heads first, and how to draw it."""

    table: Sequence[Sequence[str]]
    draw: Callable[[Path], None]

    def markdown(self) -> str:
        """The table; first column to the left, figures to the right."""
        head, *rows = self.table
        rule = ["---", *["--:"] * (len(head) - 1)]
        return "".join(f"| {' | '.join(row)} |\n" for row in [head, rule, *rows])


def cell(scale: Scale, name: str, data: str, seed: int, **model: Any) -> Cell:
    """A training of the toy32 preset at 8 bits; the top prior alone is conditioned unless `model` says otherwise.

    Slower than the preset and with clipped gradients: at its rate affine couplings over a reversed order diverge.
    """
    base = preset("toy32").config
    plain = {"levels": scale.levels, "steps": scale.steps, "width": scale.width, "coupling": "affine"}
    plain |= {"condition_splits": False, "condition_steps": False}
    config = TrainConfig(
        name=name,
        seed=seed,
        data=replace(base.data, bits=8),
        model=replace(base.model, **plain | model),
        optim=replace(base.optim, lr=1e-3, warmup=scale.images // 4, clip=10.0, guard_factor=1e9),
        schedule=replace(
            base.schedule,
            images=scale.images,
            leaf=base.schedule.batch,
            init_images=scale.init_images,
            checkpoint_every=max(scale.images // 4, 1),
            keep=1,
        ),
        evaluate=replace(base.evaluate, every=max(scale.images // 8, 1), images=scale.judged, rows=1),
    )
    return Cell(name=f"{name}-seed{seed}", data=data, config=config)


def affine_glow(scale: Scale, data: str) -> list[Cell]:
    """The Glow that several studies start from, affine with 1x1 convolutions, a cell a seed; trained once."""
    return [cell(scale, f"{data}-affine-lu", data, seed, mixing="lu") for seed in range(scale.seeds)]


DATA = {"photos32": "photographs", "toy32": "toy faces"}
MIXINGS = {"reverse": "reverse", "shuffle": "shuffle", "lu": "1x1 convolution"}
COUPLINGS = ("additive", "affine")


def mixing(measure: Measure, scale: Scale) -> Outcome:
    """Glow's figure 3: does a learned 1x1 convolution pay beside fixed permutations?"""
    groups = {
        (data, coupling, kind): [
            cell(scale, f"{data}-{coupling}-{kind}", data, seed, coupling=coupling, mixing=kind)
            for seed in range(scale.seeds)
        ]
        for data in DATA
        for coupling in COUPLINGS
        for kind in MIXINGS
    }
    found = by_group(measure, groups)
    table = [["data, coupling", *MIXINGS.values()]]
    panels = []
    for data, title in DATA.items():
        for coupling in COUPLINGS:
            own = {name: found[data, coupling, kind] for kind, name in MIXINGS.items()}
            table.append([f"{title}, {coupling}", *(mean_of(results) for results in own.values())])
            panels.append(Panel(f"{title}, {coupling}", {name: curve_of(results) for name, results in own.items()}))
    return Outcome(table, partial(draw_lines, panels))


CONDITIONS: Mapping[str, Mapping[str, Any]] = {
    "unconditional": {"classes": -1, "attributes": -1},
    "class in the top prior (released)": {"attributes": -1},
    "class and attributes in the top prior": {},
    "and in the split priors": {"condition_splits": True},
    "and in the couplings": {"condition_splits": True, "condition_steps": True},
}


def conditioning(measure: Measure, scale: Scale) -> Outcome:
    """What does it bring in bits/dim to know the class and the attributes, and where should they enter?"""
    groups = {
        name: [cell(scale, f"condition{number}", "toy32", seed, **model) for seed in range(scale.seeds)]
        if model
        else affine_glow(scale, "toy32")
        for number, (name, model) in enumerate(CONDITIONS.items())
    }
    return compared(by_group(measure, groups), "toy faces")


def by_group(measure: Measure, groups: Mapping[Any, Sequence[Cell]]) -> dict[Any, list[Result]]:
    """Results of every group. First seeds come first, so that a study that was stopped has something of everything."""
    order = sorted((cell for cells in groups.values() for cell in cells), key=lambda cell: cell.config.seed)
    names = {result.name: result for result in measure(order)}
    return {key: [names[cell.name] for cell in cells if cell.name in names] for key, cells in groups.items()}


def compared(found: Mapping[str, Sequence[Result]], title: str) -> Outcome:
    """A row a group: bits/dim, difference to the first group, what it took; and the curves in one panel."""
    first = next(iter(found.values()))
    table = [["", "bits/dim", "beside the first", "images", "parameters", "CPU s"]]
    for name, results in found.items():
        gap = paired(results, first)
        cost = sum(result.cpu_seconds for result in results) / max(len(results), 1)
        size = [f"{results[0].images}", f"{results[0].parameters}", f"{cost:.0f}"] if results else ["", "", ""]
        table.append([name, mean_of(results), gap, *size])
    panel = Panel(title, {name: curve_of(results) for name, results in found.items()})
    return Outcome(table, partial(draw_lines, [panel]))


def mean_of(results: Sequence[Result]) -> str:
    """Mean over seeds with its standard error; of one seed there is none."""
    found = [result.bits_per_dim for result in results if result.bits_per_dim is not None]
    lost = f"{len(results) - len(found)} of {len(results)} diverged" if len(found) < len(results) else ""
    if not found:
        return lost or "not yet run"
    figure = Figure.of(found)
    error = f"± {figure.stderr:.3f}" if len(found) > 1 else "(one seed)"
    return f"{figure.mean:.3f} {error}{lost and f', {lost}'}"


def paired(results: Sequence[Result], first: Sequence[Result]) -> str:
    """Mean difference to the first group, seed by seed, with its standard error."""
    gaps = [
        a.bits_per_dim - b.bits_per_dim
        for a, b in zip(results, first, strict=False)
        if a.bits_per_dim is not None and b.bits_per_dim is not None
    ]
    if not gaps or results is first:
        return ""
    figure = Figure.of(gaps)
    return f"{figure.mean:+.3f} ± {figure.stderr:.3f}" if len(gaps) > 1 else f"{figure.mean:+.3f}"


def curve_of(results: Sequence[Result]) -> list[tuple[float, float]]:
    """The mean curve of trainings that were looked at at the same images."""
    points = zip(*(result.curve for result in results if result.curve), strict=False)
    return [(at[0][0], sum(y for _, y in at) / len(at)) for at in points]
