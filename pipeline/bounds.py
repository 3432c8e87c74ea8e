"""What each number of a configuration, or asked of a model, may be: two tables, so that none is used unlooked at."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

from pipeline.errors import ConfigError, UsageError

ABOVE_0, BELOW_1 = math.ulp(0.0), math.nextafter(1.0, 0.0)
MANY = 10**15
FINITE = math.nextafter(math.inf, 0.0)

BOUNDS: dict[str, tuple[float, float, str]] = {
    # setting                  least    most          in words
    "seed":                    (-(2**63), 2**63 - 1,  "a whole number of 64 bits"),
    "data.bits":               (1,       8,           "1 to 8"),
    "data.cache_gb":           (ABOVE_0, MANY,        "GB, above 0"),
    "model.size":              (0,       2**15,       "pixels; 0 takes it from the data"),
    "model.channels":          (0,       2**15,       "0 takes them from the data"),
    "model.levels":            (1,       15,          "1 to 15"),
    "model.steps":             (1,       2**15,       "1 or more"),
    "model.width":             (1,       2**20,       "1 or more"),
    "model.residuals":         (1,       2**15,       "1 or more"),
    "model.constraint":        (ABOVE_0, BELOW_1,     "above 0, below 1"),
    "model.classes":           (-1,      2**31,       "-1 ignores them, 0 takes them from the data"),
    "model.attributes":        (-1,      2**31,       "-1 ignores them, 0 takes them from the data"),
    "model.classifier_weight": (0,       FINITE,      "0 or more"),
    "model.dequantizer_steps": (1,       2**15,       "1 or more"),
    "model.dequantizer_width": (1,       2**20,       "1 or more"),
    "optim.lr":                (ABOVE_0, FINITE,      "finite, above 0"),
    "optim.beta1":             (0,       BELOW_1,     "0 or more, below 1"),
    "optim.beta2":             (0,       BELOW_1,     "0 or more, below 1"),
    "optim.eps":               (ABOVE_0, FINITE,      "finite, above 0"),
    "optim.warmup":            (0,       MANY,        "images, 0 or more"),
    "optim.ema_halflife":      (1,       MANY,        "images, 1 or more"),
    "optim.l2":                (0,       FINITE,      "finite, 0 or more"),
    "optim.clip":              (0,       FINITE,      "finite, 0 or more"),
    "optim.guard_factor":      (1,       FINITE,      "1 or more"),
    "optim.guard_skips":       (1,       MANY,        "updates, 1 or more"),
    "memory.anchor_every":     (0,       2**15,       "one number a level, 0 or more, or plan"),
    "memory.budget_gb":        (0,       MANY,        "GB, 0 or more"),
    "schedule.images":         (1,       MANY,        "1 or more"),
    "schedule.batch":          (1,       MANY,        "images, 1 or more"),
    "schedule.leaf":           (1,       MANY,        "images, 1 or more"),
    "schedule.init_images":    (1,       MANY,        "1 or more"),
    "schedule.status_every":   (1,       MANY,        "images: an interval of 0 never comes round"),
    "schedule.checkpoint_every": (1,     MANY,        "images: an interval of 0 never comes round"),
    "schedule.keep":           (1,       MANY,        "1 or more checkpoints must stay"),
    "schedule.keep_every":     (0,       MANY,        "images; 0 keeps the last ones alone"),
    "evaluate.every":          (1,       MANY,        "images: an interval of 0 never comes round"),
    "evaluate.images":         (1,       MANY,        "1 or more"),
    "evaluate.temperatures":   (0,       FINITE,      "each 0 or more"),
    "evaluate.rows":           (1,       1_000,       "1 to 1000"),
    "tracking.profile":        (0,       MANY,        "steps, 0 or more"),
    "cluster.workers":         (0,       2**20,       "0 trains in this process"),
    "cluster.min_workers":     (0,       2**20,       "0 is exactly cluster.workers"),
    "cluster.threads":         (1,       1_024,       "1 to 1024"),
    "cluster.peak_tflops":     (0,       MANY,        "0 or more"),
    "cluster.max_failures":    (0,       2**20,       "restarts, 0 or more"),
    "cluster.lease_s":         (ABOVE_0, 10**6,       "seconds, above 0"),
}  # fmt: skip

ASKED: dict[str, tuple[float, float, str]] = {
    # of a model    least    most          in words
    "seed":         (0,      2**63 - 1,    f"0 to {2**63 - 1}"),
    "temperature":  (0,      FINITE,       "0 or more; 0.7 is usual"),
    "slider":       (-1_000, 1_000,        "-1 to 1 as a rule, 1000 at most"),
    "rows":         (1,      10_000,       "1 to 10000"),
    "steps":        (2,      10_000,       "2 to 10000, both ends included"),
    "count":        (1,      100_000,      "1 to 100000 images"),
    "max-images":   (0,      MANY,         "1 or more; 0 takes all"),
    "workers":      (0,      2**20,        "1 or more; 0 evaluates in this process"),
}  # fmt: skip


def refuse_odd(**asked: float | Sequence[float]) -> None:
    """UsageError for the first number outside its row of `ASKED`; a sequence is one number each."""
    for word, numbers_of in asked.items():
        name = word.replace("_", "-")
        least, most, words = ASKED[name]
        for number in numbers_of if isinstance(numbers_of, Sequence) else (numbers_of,):
            if not least <= number <= most:
                raise UsageError(f"{name} {number}", cure=words)


def refuse_out_of_bounds(config: Any) -> None:
    """ConfigError for the first number of a tree of dataclasses outside its row; every number has one."""
    for path, number in numbers(config):
        least, most, words = BOUNDS[path]
        if not least <= number <= most:
            raise ConfigError(f"{path} is {number}", cure=words)


def numbers(config: Any, path: str = "") -> Iterator[tuple[str, float]]:
    """(name with dots, value) of every number of a tree of dataclasses, those in tuples each."""
    for field in dataclasses.fields(config):
        name, value = f"{path}{field.name}", getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from numbers(value, f"{name}.")
        for part in value if isinstance(value, tuple) else (value,):
            if isinstance(part, int | float) and not isinstance(part, bool):
                yield name, part
