"""`bench kills`: a run whose workers are killed beside one left alone: the same losses, the same bits; and how long.

Both train toy faces of 16 px on Ray workers. SIGKILL strikes a worker at positions spread over the run; all workers go
on from the last checkpoint, and the steps between are taken again.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil
import torch

from jobs.bench.rows import Measurement, Row
from jobs.presets import preset
from pipeline.config import TrainConfig
from pipeline.errors import PipelineError
from pipeline.export import read_run
from pipeline.scratch import scratch
from pipeline.storage import open_storage

WORKER = "ray::RayTrainWo"
"""How the system names Ray's train workers (15 characters)."""


@dataclass
class Watcher:
    """Follows a run's rows, and kills a worker whenever the next of some positions is passed."""

    positions: list[int]
    rows: list[Row] = field(default_factory=list)
    deaths: list[dict[str, float]] = field(default_factory=list)

    def __call__(self, row: Row) -> None:
        if "images" not in row:
            return
        now = time.monotonic()
        if self.deaths and "back" not in self.deaths[-1]:
            self.deaths[-1] |= {"back": now, "first": row["images"]}
        self.rows.append(row)
        if self.positions and row["images"] >= self.positions[0] and self._killed():
            self.positions.pop(0)
            self.deaths.append({"killed": now, "at": row["images"]})

    def _killed(self) -> bool:
        workers = [child for child in psutil.Process().children(recursive=True) if child.name().startswith(WORKER)]
        for worker in workers[-1:]:
            worker.kill()
        return bool(workers)


def kills(options: argparse.Namespace) -> Measurement:
    """Losses, bits and seconds of a run whose workers are killed."""

    def work() -> list[Row]:
        return measure_kills(options.images, options.kills, options.workers, options.plot)

    return {"headline": f"{options.images} images on {options.workers} Ray workers, {options.kills} killed"}, work


def measure_kills(images: int, kills: int, workers: int, plot: str = "") -> list[Row]:
    """A row a kill: where it struck, the first status line afterwards, seconds to it; PipelineError if bits differ."""
    from jobs import cluster

    with scratch() as folder:
        config = _config(folder, images, kills, workers)
        calm, struck = Watcher([]), Watcher([(number + 1) * images // (kills + 1) for number in range(kills)])
        for name, watcher in (("calm", calm), ("struck", struck)):
            cluster.train(replace(config, name=name), watcher)
        _refuse_other(folder)
    if plot:
        from jobs.bench.plots import kills_plot

        kills_plot(Path(plot), calm.rows, struck.rows, [death["at"] for death in struck.deaths])
    return [
        {
            "row": f"kill {number}",
            "at": int(death["at"]),
            "first": int(death["first"]),
            "seconds": death["back"] - death["killed"],
        }
        for number, death in enumerate(struck.deaths, 1)
    ]


def _config(folder: Path, images: int, kills: int, workers: int) -> TrainConfig:
    from jobs import data

    with contextlib.redirect_stdout(io.StringIO()):  # what it says of itself is no row of ours
        data.toy(str(folder / "source"), images=400, size=16)
        data.prepare(str(folder / "source"), str(folder / "data"), samples_per_shard=16, workers=1)
    config = preset("toy32").config
    return replace(
        config,
        storage=str(folder / "runs"),
        data=replace(config.data, prefix=str(folder / "data"), cache=str(folder / "cache")),
        model=replace(config.model, levels=2, steps=4, width=32),
        memory=replace(config.memory, anchor_every=(4, 0)),
        schedule=replace(config.schedule, images=images, status_every=80, checkpoint_every=240),
        evaluate=replace(config.evaluate, every=images, images=16),
        cluster=replace(config.cluster, workers=workers, max_failures=kills),
    )


def _refuse_other(folder: Path) -> None:
    """PipelineError unless parameters, moments and averaged weights of both runs are the same bits."""
    calm, struck = (read_run(open_storage(str(folder / "runs" / name))).tensors for name in ("calm", "struck"))
    other = [name for name in calm if name not in struck or not torch.equal(calm[name], struck[name])]
    if other or calm.keys() != struck.keys():
        raise PipelineError(f"the runs differ in {len(other)} tensors, the first {other[:1]}")
