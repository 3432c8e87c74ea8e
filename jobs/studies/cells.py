"""The cells of a study: trainings through the project's own loop, each kept as one result file.

A cell whose result is there is not trained again, one that was stopped goes on from its last checkpoint, and two
processes in one folder share the work: a cell is locked while it is trained, and a lock dies with its process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from jobs.material import Pictures, pack
from pipeline.config import TrainConfig
from pipeline.errors import DivergedError
from pipeline.evaluate import evaluate
from pipeline.export import TrainedRun, natural_stream, read_run
from pipeline.fingerprint import ALGORITHM_VERSION
from pipeline.learner import Examples
from pipeline.manifest import Manifest, open_manifest
from pipeline.storage import canonical_json, open_storage, sha256_hex
from pipeline.train import resolved, run
from pipeline.world import World

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One training: what from, and under which settings; `config` has no places, `Workshop` gives it some."""

    name: str
    data: str
    """Name of the pictures in the workshop."""
    config: TrainConfig


@dataclass(frozen=True, kw_only=True)
class Result:
    """What came of a cell, on every held-out image; likelihoods in bits per dimension, averaged weights."""

    name: str
    bits_per_dim: float | None
    """None where training diverged."""
    images: int = 0
    """Seen in training."""
    parameters: int = 0
    cpu_seconds: float = 0.0
    """Of the process, over all attempts: training and what is looked at on the way."""
    curve: tuple[tuple[float, float], ...] = ()
    """(images seen, bits/dim of the first held-out images)."""


class Workshop:
    """A folder of datasets, runs and results."""

    def __init__(self, folder: Path, pictures: Mapping[str, Pictures], say: Say) -> None:
        self.folder, self._pictures, self._say = folder, pictures, say

    def measure(self, cells: Sequence[Cell]) -> list[Result]:
        """The results of cells, in order; trains what is missing and nobody else is training, waits for the rest."""
        while missing := [cell for cell in cells if self.found(cell) is None]:
            if not any(self._trained_here(cell) for cell in missing):
                time.sleep(1)
        return self.results(cells)

    def results(self, cells: Sequence[Cell]) -> list[Result]:
        """The results that are there, in order."""
        return [result for cell in cells if (result := self.found(cell)) is not None]

    def found(self, cell: Cell) -> Result | None:
        """The result of a cell with these very settings, if it is there."""
        path = self._place(cell, "result.json")
        if not path.exists():
            return None
        tree = json.loads(path.read_bytes())
        return Result(**tree | {"curve": tuple((x, y) for x, y in tree["curve"])})

    def trained(self, cell: Cell) -> TrainedRun:
        """The finished run of a cell."""
        return read_run(open_storage(str(self.folder / "runs")).sub(key(cell)))

    def manifest(self, data: str) -> Manifest:
        """A dataset of the workshop; made where it is not there."""
        dataset = self.folder / "data" / data
        with locked(self.folder / f"{data}.lock"):
            if not (dataset / "manifest.json").exists():
                pack(self._pictures[data], dataset)
        return open_manifest(open_storage(str(dataset)))

    def _place(self, cell: Cell, name: str) -> Path:
        return self.folder / "runs" / key(cell) / name

    def _placed(self, cell: Cell) -> TrainConfig:
        """The cell's configuration with its data, resolved."""
        manifest = self.manifest(cell.data)
        prefix, cache = str(self.folder / "data" / cell.data), str(self.folder / "cache")
        data = replace(cell.config.data, prefix=prefix, cache=cache)
        config = replace(cell.config, data=data, storage=str(self.folder / "runs"))
        return resolved(config, manifest)

    def _trained_here(self, cell: Cell) -> bool:
        """Train a cell; False where another process is at it, or has done it meanwhile."""
        with locked(self.folder / f"{key(cell)}.lock", wait=False) as mine:
            if not mine or self.found(cell) is not None:
                return False
            self._say(f"{cell.name}: training")
            result = self._train(cell)
            if result.bits_per_dim is not None:
                self._say(f"{cell.name}: {result.bits_per_dim:.4f} bits/dim, {result.cpu_seconds:.0f} CPU s")
            return True

    def _train(self, cell: Cell) -> Result:
        config, clock = replace(self._placed(cell), name=key(cell)), self._place(cell, "cpu.json")
        before, start = json.loads(clock.read_text()) if clock.exists() else 0.0, time.process_time()

        def note(_: dict[str, float]) -> None:
            clock.write_text(json.dumps(before + time.process_time() - start))

        try:
            run(config, note)
            note({})
            result = self._judged(cell, self.trained(cell), json.loads(clock.read_text()))
        except DivergedError as error:
            self._say(f"{cell.name}: {error.what}")
            result = Result(name=cell.name, bits_per_dim=None)
        home = open_storage(str(clock.parent))
        home.write("result.json", canonical_json(dataclasses.asdict(result)))
        return result

    def _judged(self, cell: Cell, trained: TrainedRun, seconds: float) -> Result:
        config, manifest, model = trained.config, self.manifest(cell.data), trained.model()
        examples = Examples(config, manifest, torch.device("cpu"))
        with natural_stream(manifest, config.data.validation, config.data) as unseen:
            found = evaluate(model, examples, unseen, World(), bits=config.data.bits, round_trip=0).bits_per_dim
        rows = map(json.loads, trained.storage.read("metrics.jsonl").splitlines())
        return Result(
            name=cell.name,
            bits_per_dim=found.mean,
            images=trained.images,
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            cpu_seconds=seconds,
            curve=tuple(_curve(rows)),
        )


def _curve(rows: Iterable[dict[str, Any]]) -> Iterator[tuple[float, float]]:
    for row in rows:
        if "val/bits_per_dim" in row["metrics"]:
            yield row["images"], row["metrics"]["val/bits_per_dim"]


def key(cell: Cell) -> str:
    """The cell's name and a digest of its settings where they are not the defaults: new options leave old results."""
    decisive = {"algorithm": ALGORITHM_VERSION, "data": cell.data, "settings": _chosen(cell.config, TrainConfig())}
    return f"{cell.name}-{sha256_hex(canonical_json(decisive))[:10]}"


def _chosen(config: Any, usual: Any) -> dict[str, Any]:
    """The tree of what differs from the defaults, and of which kind it is where that is another."""
    kind = {} if type(config) is type(usual) else {"kind": type(config).__name__}
    usual = type(config)() if kind else usual
    pairs = {part.name: (getattr(config, part.name), getattr(usual, part.name)) for part in dataclasses.fields(config)}
    differing = {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
    return kind | {
        name: _chosen(value, default) if dataclasses.is_dataclass(value) else value
        for name, (value, default) in differing.items()
    }


@contextlib.contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[bool]:
    """Hold a lock among processes; it goes with the process. False where it is held and `wait` is not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True
