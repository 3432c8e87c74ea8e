"""Two models on the same images under the same noise, image by image."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.errors import ConfigError
from pipeline.evaluate import Evaluation, Figure


@dataclass(frozen=True)
class Comparison:
    """What `new` needs more than `old`, in bits/dim; a model against itself differs by exactly 0."""

    bits_per_dim: Figure
    classes: Mapping[str, Figure]
    """Of the classes that occur."""

    @property
    def worst_class(self) -> tuple[str, Figure] | None:
        """Of the classes that get worse by more than chance the worst; where none does, the highest of all."""
        return max(self.classes.items(), key=lambda item: (_surely_worse(item[1]), item[1].mean), default=None)


def compare(new: Evaluation, old: Evaluation) -> Comparison:
    """Paired differences; ConfigError unless both are about the same images in the same order, at the same depth."""
    if new.bits != old.bits:
        found = f"{new.bits}-bit images against {old.bits}-bit ones: their bits/dim are of different data"
        raise ConfigError(found, cure="register the one under another name, or train both at one data.bits")
    if new.labels != old.labels:
        found = f"{len(new.values)} images against {len(old.values)}, or of other classes"
        raise ConfigError(f"not the same images: {found}", cure="evaluate both on one split of one dataset")
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


def _surely_worse(difference: Figure) -> bool:
    return difference.mean > 2 * difference.stderr
