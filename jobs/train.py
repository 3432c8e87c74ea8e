"""Train a preset: in this process, under torchrun, or on Ray workers. The same command again goes on where it stopped.

  python -m jobs train PRESET [--config FILE.toml] [--SETTING VALUE ...] [--elastic MIN:MAX]
                              [--dry-run] [--offline] [--profile STEPS]
  python -m jobs train RUN/config.toml

A setting comes from the preset, then from the file, then from the flags. --dry-run prints the plan and writes nothing.
--offline trains although MLflow does not answer; the next run or command that reaches it sends what it missed.
--elastic MIN:MAX trains on as many Ray workers as there is room for: cluster.min_workers and cluster.workers at once.
--profile has torch's profiler trace so many steps into RUN/traces.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TextIO

import tyro

from jobs.presets import preset, table
from pipeline.config import TrainConfig, read_config, refuse_impossible
from pipeline.errors import ConfigError, UsageError

Row = dict[str, Any]
Report = Callable[[Row], None]

SHOWN = (
    # figure                   on the line
    ("train/bits_per_dim",    "train {:.3f}"),
    ("val/bits_per_dim",      "val {:.3f}"),
    ("perf/images_per_s",     "{:.1f} images/s"),
    ("train/lr",              "lr {:.1e}"),
    ("perf/data_wait_pct",    "wait {:.1f} %"),
    ("perf/mfu",              "MFU {:.1%}"),
    ("perf/peak_gb",          "memory {:.2f} GB"),
    ("train/inversion_error", "inversion {:.0e}"),
    ("memory/tightened",      "anchors tightened {:.0f} times"),
    ("ft/checkpoint",         "checkpoint at {:.0f}"),
    ("ft/restarts",           "restarts {:.0f}"),
)  # fmt: skip
"""What of a row a person watches, a bar has room for the first three; all of it is in RUN/metrics.jsonl."""


def main(argv: Sequence[str]) -> int:
    """Train a preset, or print the plan."""
    if argv and argv[0] in ("-h", "--help"):
        print(f"{__doc__}\n{table()}\n\npython -m jobs train PRESET --help lists every setting and its value there.")
        return 0
    config, dry_run = parse([word for word in argv if word != "--offline"])
    refuse_impossible(config)
    if not config.data.prefix:
        raise ConfigError("no dataset given", cure="--data.prefix FOLDER (or s3://...) made by: python -m jobs data")
    if dry_run:
        from jobs.plan import plan

        print(plan(config))
        return 0
    from jobs.preflight import preflight

    preflight(config, offline="--offline" in argv)
    summary = launch(config)
    if os.environ.get("RANK", "0") == "0":
        print(f"{config.storage}/{config.name}: {closing(summary)}")
        print(f"next: python -m jobs evaluate {config.storage}/{config.name}")
    return 0


def parse(arguments: list[str]) -> tuple[TrainConfig, bool]:
    """(configuration, whether only its plan is wanted); preset < --config FILE < flags."""
    if not arguments or arguments[0].startswith("-"):
        raise UsageError("which preset?", cure="python -m jobs train --help lists them")
    name, *rest = arguments
    base = read_config(name) if name.endswith(".toml") else preset(name).config
    dry_run = "--dry-run" in rest
    files, rest = taken([word for word in rest if word != "--dry-run"], "--config")
    ranges, rest = taken(rest, "--elastic", "MIN:MAX")
    rest = [f"--tracking.{word[2:]}" if word.split("=")[0] == "--profile" else word for word in rest]
    for file in files:
        base = read_config(file, base)
    prog = f"python -m jobs train {name}"
    rest += elastic(ranges[-1]) if ranges else []
    one_family = (tyro.conf.AvoidSubcommands,)  # that of the preset: its settings are flags like all others
    return tyro.cli(TrainConfig, default=base, args=rest, prog=prog, description=__doc__, config=one_family), dry_run


def elastic(bounds: str) -> list[str]:
    """The words of the settings that MIN:MAX stands for."""
    found = re.fullmatch(r"([1-9]\d*):([1-9]\d*)", bounds)
    if found is None:
        raise UsageError(f"--elastic {bounds!r} is no range", cure="--elastic 2:8 takes from 2 to 8 workers")
    return ["--cluster.min-workers", found[1], "--cluster.workers", found[2]]


def taken(words: list[str], flag: str, wanted: str = "a file") -> tuple[list[str], list[str]]:
    """(values of `flag`, the other words)."""
    values, others, rest = [], [], iter(words)
    for word in rest:
        if word == flag:
            value = next(rest, None)
            if value is None:
                raise UsageError(f"{flag} wants {wanted}")
            values.append(value)
        elif word.startswith(f"{flag}="):
            values.append(word.removeprefix(f"{flag}="))
        else:
            others.append(word)
    return values, others


def launch(config: TrainConfig) -> Row:
    """Train where the configuration says, with progress on standard output; returns the last figures."""
    with following(config.schedule.images) as report:
        if config.cluster.workers == 0:
            from pipeline.train import run

            return run(config, report)
        if "RANK" in os.environ:
            raise UsageError("torchrun and Ray at once", cure="--cluster.workers 0 under torchrun")
        from jobs import cluster

        report({"event": f"starting Ray with {config.cluster.wanted} workers"})
        return cluster.train(config, report)


def closing(summary: Row) -> str:
    """What a run came to, in a line."""
    figures = [f", {shape.format(summary[name])} bits/dim" for name, shape in SHOWN[:2] if name in summary]
    return f"{summary.get('images', 0):.0f} images{''.join(figures)}"


@contextlib.contextmanager
def following(total: int) -> Iterator[Report]:
    """Give a function that shows rows of figures: a bar on a terminal, a line a row elsewhere; warnings stand aside."""
    from pipeline.tracking import warned

    stream = sys.stdout
    plain = contextlib.nullcontext(lambda row: print(_line(row, total), file=stream, flush=True))
    with _bar(total, stream) if stream.isatty() else plain as show:
        yield lambda row: warned(row["warning"]) if "warning" in row else show(row)


def _line(row: Row, total: int) -> str:
    if "event" in row:
        return str(row["event"])
    left = f"  eta {_clock(row['perf/eta_s'])}" if row.get("perf/eta_s") else ""
    return f"images {row.get('images', 0):.0f}/{total}  {_figures(row)}{left}"


def _figures(row: Row, count: int = len(SHOWN)) -> str:
    return "  ".join(shape.format(row[name]) for name, shape in SHOWN[:count] if row.get(name) is not None)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


@contextlib.contextmanager
def _bar(total: int, stream: TextIO) -> Iterator[Report]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = MofNCompleteColumn(), BarColumn(bar_width=None), TextColumn("{task.description}")
    with Progress(*columns, console=Console(file=stream), refresh_per_second=4, expand=True) as bar:
        task = bar.add_task("", total=total)

        def report(row: Row) -> None:
            if "event" in row:
                bar.console.print(row["event"], highlight=False)
            else:
                left = _clock(row.get("perf/eta_s", 0.0))
                bar.update(task, completed=row.get("images", 0), description=f"{_figures(row, 3)}  eta {left}")

        yield report
