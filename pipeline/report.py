"""The evaluation report: what a reviewer is shown, and the same as JSON; pipeline/page.py draws it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from PIL import Image
from pydantic import TypeAdapter, ValidationError

from pipeline.bayes import Recognition
from pipeline.charts import Points
from pipeline.conditioning import Obedience
from pipeline.evaluate import Evaluation, Figure
from pipeline.gates import Result
from pipeline.neighbours import Neighbours
from pipeline.spool import Row
from pipeline.storage import MissingError, Storage
from pipeline.uniformity import Kolmogorov

LOSSY = "not comparable: lossy shards"
"""What is said beside bits per dimension of images that lossy shards hold: others measure other pixels."""


class Picture(NamedTuple):
    """A picture of the report."""

    title: str
    note: str
    image: Image.Image


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything a reviewer is shown. The first evaluation is the model that ships; others are for comparison."""

    title: str
    split: str
    samples: int
    """Images of the split, evaluated or not."""
    data: str
    """Dataset digest."""
    lossless: bool = True
    """Whether the dataset's shards are; bits per dimension of lossy ones compare with nothing."""
    evaluations: Mapping[str, Evaluation]
    codecs: Mapping[str, Figure]
    """Bits per dimension of "png" and "webp" files of the same pixels."""
    own_samples: Sequence[Kolmogorov] = ()
    """Of every level: whether the latents found in the model's own samples are standard normal."""
    neighbours: Neighbours | None = None
    """How near samples come to training images."""
    conditioning: Mapping[str, Obedience] = field(default_factory=dict)
    """Of every attribute that was judged."""
    recognition: Mapping[str, Recognition] = field(default_factory=dict)
    """By attribute, and "class": what the likelihoods alone tell about an image."""
    curves: Mapping[str, Points] = field(default_factory=dict)
    """"train" and "val": (images seen, bits per dimension)."""
    pictures: Sequence[Picture] = ()
    gates: Sequence[Result] = ()
    lineage: Mapping[str, str] = field(default_factory=dict)

    @property
    def main(self) -> Evaluation:
        """The evaluation of the model that ships."""
        return next(iter(self.evaluations.values()))


def loss_curves(rows: Sequence[Row]) -> dict[str, list[tuple[float, float]]]:
    """The rows of a run's metrics.jsonl -> points of the report's two curves."""
    keys = {"train": "train/bits_per_dim", "val": "val/bits_per_dim"}
    points = {
        name: [(float(row["images"]), row["metrics"][key]) for row in rows if key in row["metrics"]]
        for name, key in keys.items()
    }
    return {name: found for name, found in points.items() if found}


def as_json(report: Report) -> dict[str, Any]:
    """The report without its pictures, with every image's bits per dimension; null stands for what is not finite."""
    tree = {
        "schema": 1,
        "title": report.title,
        "split": report.split,
        "samples": report.samples,
        "data": report.data,
        "lossless": report.lossless,
        "evaluations": {name: asdict(found) for name, found in report.evaluations.items()},
        "codecs": {name: asdict(found) for name, found in report.codecs.items()},
        "own_samples": [asdict(found) for found in report.own_samples],
        "neighbours": asdict(report.neighbours) if report.neighbours else None,
        "conditioning": {name: asdict(found) for name, found in report.conditioning.items()},
        "recognition": {name: asdict(found) for name, found in report.recognition.items()},
        "fid": {"value": None, "reason": "no weights of a feature network were given"},
        "curves": {name: [list(point) for point in points] for name, points in report.curves.items()},
        "gates": [asdict(result) for result in report.gates],
        "lineage": dict(report.lineage),
    }
    return _finite(tree)


@dataclass(frozen=True, kw_only=True)
class Kept:
    """The part of a kept review (RUN/eval/SPLIT.json) that promotion and the model card need."""

    split: str
    samples: int
    data: str
    evaluations: dict[str, Evaluation]
    codecs: dict[str, Figure]
    neighbours: Neighbours | None
    lineage: dict[str, str]

    @property
    def main(self) -> Evaluation:
        """The evaluation of the model that ships."""
        return next(iter(self.evaluations.values()))


def kept_review(run: Storage, split: str, weights: str, data: str) -> Kept | None:
    """What was kept about these weights on all of that split; None where it is about something else, or nothing is."""
    try:
        kept = TypeAdapter(Kept).validate_json(run.read(f"eval/{split}.json"))
    except (MissingError, ValidationError):
        return None
    same = (kept.lineage.get("weights"), kept.data) == (weights, data)
    return kept if same and kept.main.bits_per_dim.images == kept.samples else None


def _finite(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _finite(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_finite(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree
