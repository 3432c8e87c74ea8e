"""Gates: what a version must pass to be promoted, with limits as data.

Challenger and champion are compared image by image under the same noise; a difference within two standard errors is
neither a win nor a regression.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, TypeAdapter, ValidationError

from glow import latents_of_seeds
from pipeline.comparison import compare
from pipeline.config import read_toml
from pipeline.errors import ConfigError, GateError, UsageError
from pipeline.evaluate import Evaluation, Figure
from pipeline.golden import verify_model
from pipeline.model import LoadedModel

Bound = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The table of limits; `read_limits` takes any of them from a TOML file."""

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012

    bits_per_dim: Bound = 0.005
    """Largest regression against the champion; one within two standard errors of the difference is none."""
    worst_class: Bound = 0.02
    """The same for every class."""
    round_trip: Bound = 1e-3
    """Largest error of decode(encode(x)), x spanning 1."""
    finite_seeds: Annotated[int, Field(ge=1, le=10**6)] = 256
    """Seeds whose samples must be finite ..."""
    finite_temperatures: Annotated[tuple[Bound, ...], Field(min_length=1)] = (0.7, 1.0)
    """... at each of these temperatures ..."""
    saturated: Annotated[Bound, Field(le=1)] = 0.01
    """... and the largest share of their values outside the range of pixels, beyond the share of held-out values that
    are at its ends: who learns from photographs with burnt-out skies puts density there."""


@dataclass(frozen=True)
class Result:
    """One line of the gate table."""

    gate: str
    passed: bool
    value: float | None
    limit: float
    detail: str

    def __str__(self) -> str:
        value = "-" if self.value is None else f"{self.value:.4g}"
        return f"{'ok' if self.passed else 'FAILED':6}  {self.gate:14}  {value:>10}  {self.limit:>8.4g}  {self.detail}"


@dataclass(frozen=True)
class Evidence:
    """A model and what it says about the held-out images."""

    loaded: LoadedModel
    evaluation: Evaluation
    lineage: tuple[str, ...] = ()
    """What of the version's recorded origin is not so (pipeline/lineage.py)."""


def read_limits(path: Path) -> Limits:
    """Limits from a TOML file; what it does not name keeps its default. ConfigError for one that limits nothing."""
    tree = dataclasses.asdict(Limits()) | read_toml(path)
    try:
        return TypeAdapter(Limits).validate_json(json.dumps(tree, default=str), strict=True)
    except ValidationError as error:
        finding = error.errors()[0]
        cure = f"limits are {', '.join(field.name for field in dataclasses.fields(Limits))}"
        raise ConfigError(f"{finding['loc'][0]}: {finding['msg'].lower()}", where=str(path), cure=cure) from error


def judge(challenger: Evidence, champion: Evidence | None, limits: Limits) -> list[Result]:
    """Every gate's result, passed or not."""
    return [
        *_regressions(challenger.evaluation, champion.evaluation if champion else None, limits),
        _round_trip(challenger.evaluation, limits.round_trip),
        *_samples(challenger.loaded, limits, challenger.evaluation.ends),
        golden(challenger.loaded),
        _lineage(challenger),
    ]


def table(results: Sequence[Result]) -> str:
    """The gate table as text."""
    head = f"{'':6}  {'gate':14}  {'value':>10}  {'limit':>8}  "
    return "\n".join([head.rstrip(), *map(str, results)])


def as_json(results: Sequence[Result]) -> tuple[dict[str, Any], ...]:
    """The gate table as the ledger keeps it."""
    return tuple(dataclasses.asdict(result) for result in results)


def refuse_failures(results: Sequence[Result], forced: Sequence[str], where: str) -> tuple[str, ...]:
    """The gates that failed and are overruled; GateError if any is not."""
    if unknown := set(forced) - {result.gate for result in results}:
        cure = f"gates are {', '.join(result.gate for result in results)}"
        raise UsageError(f"no gate {', '.join(sorted(unknown))}", cure=cure)
    failed = tuple(result.gate for result in results if not result.passed)
    if refused := [gate for gate in failed if gate not in forced]:
        found = "; ".join(f"{result.gate}: {result.detail}" for result in results if result.gate in refused)
        raise GateError(f"not promoted: {found}", where=where, cure="--force-gate GATE --reason WHY overrules it")
    return failed


def _regressions(new: Evaluation, old: Evaluation | None, limits: Limits) -> list[Result]:
    """The gates against the champion: on the whole, and the class that gets worst."""
    if not math.isfinite(new.bits_per_dim.mean):
        return [
            Result("bits_per_dim", False, None, limits.bits_per_dim, "not finite"),
            Result("worst_class", False, None, limits.worst_class, "not finite"),
        ]
    if old is None:
        first = f"{new.bits_per_dim}; there is no champion yet"
        return [
            Result("bits_per_dim", True, None, limits.bits_per_dim, first),
            Result("worst_class", True, None, limits.worst_class, "there is no champion yet"),
        ]
    found = compare(new, old)
    detail = f"{new.bits_per_dim} against {old.bits_per_dim}, difference {found.bits_per_dim}"
    name, worst = found.worst_class or ("no classes", Figure(0.0, 0.0, 0))
    return [
        _no_worse("bits_per_dim", found.bits_per_dim, limits.bits_per_dim, detail),
        _no_worse("worst_class", worst, limits.worst_class, name),
    ]


def _no_worse(gate: str, difference: Figure, limit: float, detail: str) -> Result:
    """Failed by a regression of more than the limit that is also more than chance; nan is a regression."""
    return Result(gate, difference.mean <= max(limit, 2 * difference.stderr), difference.mean, limit, detail)


def _round_trip(new: Evaluation, limit: float) -> Result:
    error = new.round_trip
    known = math.isfinite(error) and error >= 0
    return Result(
        "round_trip", known and error <= limit, error if known else None, limit, "max |decode(encode(x)) - x|"
    )


@torch.no_grad()
def _samples(loaded: LoadedModel, limits: Limits, ends: float) -> list[Result]:
    """Whether samples are finite, and how many of their values lie outside the range of pixels and would be cut off."""
    broken, outside = 0, []
    for temperature in limits.finite_temperatures:
        for start in range(0, limits.finite_seeds, 32):
            numbers = range(start, min(start + 32, limits.finite_seeds))
            latents = latents_of_seeds(torch.tensor(numbers), loaded.model.latent_shapes(), temperature)
            x = loaded.model.decode(latents, *loaded.condition(numbers))
            finite = torch.isfinite(x).flatten(1).all(1)
            broken += int((~finite).sum())
            outside.append(((x[finite] + 0.5).clamp(0, 1) != x[finite] + 0.5).double().flatten(1).mean(1))
    share = float(torch.cat(outside).mean()) if broken == 0 else math.nan
    heats = ", ".join(f"{heat:g}" for heat in limits.finite_temperatures)
    about = f"of {limits.finite_seeds} seeds at T {heats}"
    return [
        Result("finite_samples", broken == 0, float(broken), 0.0, f"samples not finite, {about}"),
        Result("saturated", share <= limits.saturated + ends, None if broken else share, limits.saturated + ends,
               f"share of values outside the range of pixels, {about}; {ends:.2%} of the data is at its ends"),
    ]  # fmt: skip


def golden(loaded: LoadedModel) -> Result:
    """Whether the golden latents decode here to the golden pixels."""
    check = verify_model(loaded)
    return Result("golden", check.passed, float(check.levels), 0.0 if check.same_decoder else 1.0, str(check))


def _lineage(evidence: Evidence) -> Result:
    found = evidence.lineage
    detail = "; ".join(found) or "dataset digest, fingerprint and weights are what the run's folder gives"
    return Result("lineage", not found, float(len(found)), 0.0, detail)
