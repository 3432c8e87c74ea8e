"""Do edits edit? Moving a face along an attribute's direction should change that attribute and leave the others alone.

The judge, trained on the same pictures, says what an image shows before and after; it is asked only for attributes it
tells right. Directions are taken over the whole training split, faces are held-out ones, encoded as if nothing were
known about them, and every face is moved towards what it does not show.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from glow import attribute_directions, dequantize, keyed_uniform, move, sample_keys, to_pixels
from jobs.presets import preset
from jobs.studies.cells import Cell, Workshop, key
from jobs.studies.plans import Measure, Outcome, Scale
from jobs.studies.plot import draw_bars
from pipeline.export import TrainedRun, natural_stream
from pipeline.judge import PASS, Judge, judge_for
from pipeline.manifest import Manifest
from pipeline.storage import canonical_json, open_storage
from pipeline.stream import Batch

REACHED = 0.9
"""Share of faces whose attribute must change for an edit to work."""

PLACES = (0.5, 1.0)
"""How far faces are moved, in units of the slider."""

BATCH = 32


@dataclass(frozen=True, kw_only=True)
class Edit:
    """What moving by one place of an attribute's slider does, judged."""

    added: float
    """Share of faces without the attribute that show it afterwards; 0 where there were none."""
    removed: float
    """Share of faces with it that no longer show it."""
    changed: float
    """Of both together."""
    others: Mapping[str, float]
    """For every other attribute, the share of faces of which it is judged otherwise than before."""


def edits(workshop: Workshop, measure: Measure, scale: Scale, cell: Cell | None = None) -> Outcome:
    """Which attributes follow their direction on the demo's faces?"""
    base = preset("toy64").config
    cell = cell or Cell(name="edits-toy64", data="toy64", config=replace(base, name="edits"))
    kept = workshop.folder / "runs" / key(cell) / f"edits-{scale.edited}.json"
    if measure([cell]) and not kept.exists():
        found = judged_edits(workshop, cell, scale)
        open_storage(str(kept.parent)).write(kept.name, canonical_json(found))
    return outcome(json.loads(kept.read_bytes()) if kept.exists() else {"accuracy": {}, "edits": {}})


def judged_edits(workshop: Workshop, cell: Cell, scale: Scale) -> dict[str, Any]:
    """The judge's accuracy, and of every attribute it can tell an `Edit` for every place."""
    run, manifest = workshop.trained(cell), workshop.manifest(cell.data)
    home = open_storage(str(workshop.folder)).sub(f"judges/{cell.data}-{run.config.data.bits}bit")
    judge = judge_for(manifest, run.config.data, home, scale.judge_images, print)
    with natural_stream(manifest, run.config.data.validation, run.config.data) as stream:
        faces = next(stream.batches(0, min(scale.edited, stream.samples)))
    directions = directions_of(run, manifest)
    found = {
        name: {str(place): dataclasses.asdict(judged(run, judge, directions, faces, name, place)) for place in PLACES}
        for name in judge.able
    }
    return {"accuracy": dict(judge.accuracy), "edits": found}


@torch.no_grad()
def directions_of(run: TrainedRun, manifest: Manifest) -> dict[str, list[Tensor]]:
    """Directions [1, c, h, w] a level by attribute, over the whole training split."""
    model, columns = run.model(), [manifest.attributes.index(name) for name in manifest.editable]
    with natural_stream(manifest, run.config.data.train, run.config.data) as stream:
        batches = stream.batches(0, BATCH, stop=stream.samples)
        encoded = ((model.encode(_floats(run, batch)), batch.attributes[:, columns]) for batch in batches)
        levels = attribute_directions(encoded, len(columns))
    return {name: [level[[number]] for level in levels] for number, name in enumerate(manifest.editable)}


@torch.no_grad()
def judged(
    run: TrainedRun, judge: Judge, directions: Mapping[str, list[Tensor]], faces: Batch, name: str, place: float
) -> Edit:
    """Move every face towards what it does not show, as the judge sees it, and ask the judge again."""
    model, names = run.model(), judge.able
    before = judge.shows(faces.pixels, names)
    own = before[:, names.index(name)]
    sliders = torch.where(own, -place, place)[:, None]
    moved = move(model.encode(_floats(run, faces)), directions[name], sliders)
    parts = zip(*(z.split(BATCH) for z in moved), strict=True)
    pixels = torch.cat([to_pixels(model.decode(part), run.config.data.bits) for part in parts])
    changed = judge.shows(pixels, names) != before
    mine = changed[:, names.index(name)].double()
    return Edit(
        added=_mean(mine[~own]),
        removed=_mean(mine[own]),
        changed=_mean(mine),
        others={other: _mean(changed[:, n].double()) for n, other in enumerate(names) if other != name},
    )


def outcome(found: Mapping[str, Any]) -> Outcome:
    """A row an attribute: what the judge knows of it, what an edit does to it and to the others."""
    table = [["attribute", "judge", *(f"changed at {place:g}" for place in PLACES), "added", "removed", "goal",
              "others changed", "most of all"]]  # fmt: skip
    shares: dict[str, Sequence[float]] = {}
    for name, accuracy in found["accuracy"].items():
        if name not in found["edits"]:
            table.append(
                [name, f"{accuracy:.1%}", *[""] * len(PLACES), "", "", f"not judged (below {PASS:.0%})", "", ""]
            )
            continue
        tried = [found["edits"][name][str(place)] for place in PLACES]
        last, shares[name] = tried[-1], [edit["changed"] for edit in tried]
        others = last["others"]
        worst = max(others, key=lambda other: others[other], default="")
        table.append([
            name, f"{accuracy:.1%}", *(f"{edit['changed']:.0%}" for edit in tried), f"{last['added']:.0%}",
            f"{last['removed']:.0%}", "reached" if last["changed"] >= REACHED else "missed",
            f"{sum(others.values()) / max(len(others), 1):.0%}", f"{worst} {others[worst]:.0%}" if others else "",
        ])  # fmt: skip
    return Outcome(table, partial(draw_bars, shares, [f"slider by {place:g}" for place in PLACES], REACHED))


def _floats(run: TrainedRun, batch: Batch) -> Tensor:
    """Dequantised images of a batch, with the noise of the evaluation."""
    noise = keyed_uniform(sample_keys(0, batch.epochs, batch.samples), tuple(batch.pixels.shape[1:]))
    return dequantize(batch.pixels, run.config.data.bits, noise)


def _mean(values: Tensor) -> float:
    """Mean, or 0 of nothing."""
    return float(values.mean()) if len(values) else 0.0
