"""Gates: what a version must pass to be promoted, with limits as data.

Challenger and champion are compared image by image under the same noise; a difference within two standard errors is
neither a win nor a regression.
"""

from __future__ import annotations

import dataclasses
import json
import math
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError

from glow import latents_of_seeds
from pipeline.errors import ConfigError, GateError, UsageError
from pipeline.evaluate import Evaluation, Figure
from pipeline.model import LoadedModel, verify_model


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The table of limits; `read_limits` takes any of them from a TOML file."""

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012

    bits_per_dim: float = 0.005
    """Largest regression against the champion, beyond two standard errors of the difference."""
    worst_class: float = 0.02
    """The same for the class that regresses most."""
    round_trip: float = 1e-3
    """Largest error of decode(encode(x)), x spanning 1."""
    finite_seeds: int = 256
    """Seeds whose samples must be finite ..."""
    finite_temperatures: tuple[float, ...] = (0.7, 1.0)
    """... at each of these temperatures."""


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


def read_limits(path: Path) -> Limits:
    """Limits from a TOML file; what it does not name keeps its default."""
    try:
        tree = dataclasses.asdict(Limits()) | tomllib.loads(path.read_text())
        return TypeAdapter(Limits).validate_json(json.dumps(tree), strict=True)
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"cannot be read: {error}", where=str(path)) from error
    except ValidationError as error:
        finding = error.errors()[0]
        cure = f"limits are {', '.join(field.name for field in dataclasses.fields(Limits))}"
        raise ConfigError(f"{finding['loc'][0]}: {finding['msg'].lower()}", where=str(path), cure=cure) from error


def judge(challenger: Evidence, champion: Evidence | None, limits: Limits) -> list[Result]:
    """Every gate's result, passed or not."""
    return [
        _bits_per_dim(challenger.evaluation, champion.evaluation if champion else None, limits.bits_per_dim),
        _worst_class(challenger.evaluation, champion.evaluation if champion else None, limits.worst_class),
        _round_trip(challenger.evaluation, limits.round_trip),
        _finite_samples(challenger.loaded, limits.finite_seeds, limits.finite_temperatures),
        _golden(challenger.loaded),
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


def _bits_per_dim(new: Evaluation, old: Evaluation | None, limit: float) -> Result:
    if not math.isfinite(new.bits_per_dim.mean):
        return Result("bits_per_dim", False, None, limit, "not finite")
    if old is None:
        return Result("bits_per_dim", True, None, limit, f"{new.bits_per_dim}; there is no champion yet")
    difference = Figure.of([a - b for a, b in zip(new.values, old.values, strict=True)])
    detail = f"{new.bits_per_dim} against {old.bits_per_dim}, difference {difference}"
    return Result("bits_per_dim", _no_worse(difference, limit), difference.mean, limit, detail)


def _worst_class(new: Evaluation, old: Evaluation | None, limit: float) -> Result:
    if old is None or not new.classes:
        return Result("worst_class", True, None, limit, "no champion yet" if new.classes else "no classes")
    pairs = list(zip(new.values, old.values, new.labels, strict=True))
    regressions = {
        name: Figure.of([a - b for a, b, label in pairs if label == index])
        for index, name in enumerate(new.class_names)
        if name in new.classes
    }
    name = max(regressions, key=lambda name: regressions[name].mean)
    return Result("worst_class", _no_worse(regressions[name], limit), regressions[name].mean, limit, name)


def _no_worse(difference: Figure, limit: float) -> bool:
    """False for a regression of more than the limit that is also more than chance; nan is a regression."""
    return difference.mean <= limit + 2 * difference.stderr


def _round_trip(new: Evaluation, limit: float) -> Result:
    error = new.round_trip
    known = math.isfinite(error) and error >= 0
    return Result(
        "round_trip", known and error <= limit, error if known else None, limit, "max |decode(encode(x)) - x|"
    )


@torch.no_grad()
def _finite_samples(loaded: LoadedModel, seeds: int, temperatures: Sequence[float]) -> Result:
    broken = 0
    for temperature in temperatures:
        for start in range(0, seeds, 32):
            numbers = range(start, min(start + 32, seeds))
            latents = latents_of_seeds(torch.tensor(numbers), loaded.model.latent_shapes(), temperature)
            x = loaded.model.decode(latents, *loaded.condition(numbers))
            broken += int((~torch.isfinite(x).flatten(1).all(1)).sum())
    detail = f"samples not finite, of {seeds} seeds at T {', '.join(f'{t:g}' for t in temperatures)}"
    return Result("finite_samples", broken == 0, float(broken), 0.0, detail)


def _golden(loaded: LoadedModel) -> Result:
    check = verify_model(loaded)
    detail = f"golden pixels: at most {check.levels} levels off, {check.differing:.2%} of the values"
    return Result("golden", check.passed, float(check.levels), 1.0, detail)
