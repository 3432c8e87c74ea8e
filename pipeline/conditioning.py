"""Conditioning, judged: whether samples asked for an attribute show it, and samples asked for its absence do not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from glow import Flow
from pipeline.sampling import Condition, condition_of, sample

if TYPE_CHECKING:
    from pipeline.judge import Judge


@dataclass(frozen=True, kw_only=True)
class Obedience:
    """One attribute. The judge may be wrong in at most 3 % of held-out images, so a perfect model shows about that."""

    present: float
    """Share of samples asked for it that show it."""
    absent: float
    """Share of samples asked to be without it that are."""
    seeds: int
    judge: float
    """The judge's own accuracy on held-out images."""


def obedience(
    model: Flow, bits: int, editable: Sequence[str], judge: Judge, base: Condition, temperature: float
) -> dict[str, Obedience]:
    """Of every attribute that the judge may judge; one seed a row of the conditions `base`, the rest of which stays."""
    some = next((part for part in base if part is not None), None)
    seeds = range(0 if some is None else len(some))

    def shown(name: str, sign: str) -> float:
        condition = condition_of(model.config, editable, base, f"{sign}{name}")
        return float(judge.shows(sample(model, bits, seeds, temperature, condition), [name]).double().mean())

    return {
        name: Obedience(
            present=shown(name, "+"), absent=1 - shown(name, "-"), seeds=len(seeds), judge=judge.accuracy[name]
        )
        for name in (judge.able if model.config.attributes > 0 and seeds else ())
    }
