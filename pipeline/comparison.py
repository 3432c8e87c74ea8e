"""Two models on the same images under the same noise, image by image."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.evaluate import Evaluation, Figure


@dataclass(frozen=True)
class Comparison:
    """What `new` needs more than `old`, in bits/dim; a model against itself differs by exactly 0."""

    bits_per_dim: Figure
    classes: Mapping[str, Figure]
    """Of the classes that occur."""

    @property
    def worst_class(self) -> tuple[str, Figure] | None:
        """The class that gets worst, or least better."""
        return max(self.classes.items(), key=lambda item: item[1].mean, default=None)


def compare(new: Evaluation, old: Evaluation) -> Comparison:
    """Paired differences; both must be about the same images in the same order."""
    differences = [a - b for a, b in zip(new.values, old.values, strict=True)]
    by_class = {
        name: Figure.of([d for d, label in zip(differences, new.labels, strict=True) if label == index])
        for index, name in enumerate(new.class_names)
        if name in new.classes
    }
    return Comparison(Figure.of(differences), by_class)


def lines(found: Comparison) -> list[str]:
    """A line a difference, the whole first, then every class."""
    figures = {"difference": found.bits_per_dim, **found.classes}
    return [
        f"{title:12} {figure.mean:+.5f} ± {figure.stderr:.5f}  {figure.images} images  {verdict(figure)}"
        for title, figure in figures.items()
    ]


def verdict(difference: Figure) -> str:
    """What a difference means; within two standard errors it may be chance."""
    if difference.mean == 0 and difference.stderr == 0:
        return "equal"
    if abs(difference.mean) <= 2 * difference.stderr:
        return "within two standard errors"
    return "better" if difference.mean < 0 else "worse"
