"""Tracking: rows are appended to files beside the run, and a thread carries them to MLflow, in order, once.

The run folder is the truth and is readable with every server down: `metrics.jsonl` (one row a call of `log`),
`events.jsonl` (what happened), `samples/` (pictures). MLflow is a copy of it. Training appends a line and goes on; it
never waits for MLflow and never fails because of it. Both files are bounded (pipeline/spool.py); a full one is said
once, and so is what was not sent when a run ends.

Exactly once, whatever is killed and whenever:

- a key is recorded at most once per position (images seen): `log` drops what the spool already holds, so steps that a
  resumed run makes again are not recorded again;
- the thread asks the MLflow run for the last position of every key and sends only what lies beyond. The metrics of one
  `log_batch` are one transaction of the store, so there is no half of a batch, and a batch sent twice carries the
  timestamps of its rows, which the store takes for the same values. The tag `spool.rows` says how far the thread is;
- the MLflow run is found by the tag `glow.run`, a random key kept in run.json before the first call, so a crash right
  after its creation finds it again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import secrets
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config import TrackingConfig, TrainConfig
from pipeline.errors import ConflictError, redact
from pipeline.mlflow_run import BATCH_METRICS, Description, MlflowRun
from pipeline.scratch import scratch
from pipeline.spool import SPOOL_BYTES, Cursor, Row, Spool, last_positions
from pipeline.storage import MissingError, Storage, canonical_json

if TYPE_CHECKING:
    from PIL.Image import Image

PARAMS = (
    "name",
    "seed",
    "data.digest",
    "data.train",
    "data.validation",
    "data.bits",
    "model",
    "optim",
    "memory",
    "schedule",
)
"""Parts of a configuration that become MLflow params: nothing that can hold an address or a secret."""

FILES = ("picture", "artifact")
"""Kinds of events that bring a file of the run folder."""

RETRY_SECONDS = (1.0, 2.0, 5.0, 15.0, 30.0)
"""Waits after consecutive failures to reach MLflow; the last repeats."""

Warn = Callable[[str], None]


def warned(text: str) -> None:
    """Say it on standard error, in a line."""
    print(f"warning: {text}", file=sys.stderr, flush=True)


class Tracker:
    """One run as people and MLflow see it; on ranks other than 0 every method does nothing.

    `run` is the run's folder or prefix, `room` the bound of each of its two files in bytes; `warn` is told what people
    should know. With an empty `config.uri` only the run folder is written.
    """

    def __init__(
        self,
        run: Storage,
        config: TrackingConfig,
        name: str,
        rank: int = 0,
        room: int = SPOOL_BYTES,
        warn: Warn = warned,
    ) -> None:
        self._run, self._config, self._name, self._active, self._warn = run, config, name, rank == 0, warn
        self._drain: Drain | None = None
        self._full: set[Path] = set()
        if not self._active:
            return
        self._left = contextlib.ExitStack()
        folder = run.local or _fetched(run, self._left.enter_context(scratch()))
        folder.mkdir(parents=True, exist_ok=True)
        self._metrics, self._events = Spool(folder / "metrics.jsonl", room), Spool(folder / "events.jsonl", room)
        self._recorded = last_positions(self._metrics.rows())
        self._pictures = {(row["key"], row["images"]) for row in self._events.rows() if row["kind"] == "picture"}

    def start(self, params: Mapping[str, str], inputs: Mapping[str, Any] | None = None, guest: bool = False) -> None:
        """Open the MLflow run in the background, once; `inputs` are name, digest, source and samples of the dataset.

        A `guest` adds to a run that another process trains, or has trained: whether it runs, is that one's to say.
        """
        if self._active and self._config.uri and self._drain is None:
            described = Description(
                name=self._name, key=run_key(self._run), params=dict(params), inputs=dict(inputs or {}), guest=guest
            )
            self._drain = Drain(self._run, self._config, described, self._metrics, self._events)
            self._drain.start()

    def log(self, images: int, metrics: Mapping[str, float]) -> None:
        """Record metrics at a position; what is already there is dropped, a non-finite value is an event."""
        if not self._active:
            return
        fresh = {key: float(value) for key, value in metrics.items() if images > self._recorded.get(key, -1)}
        self._recorded.update(dict.fromkeys(fresh, images))
        for key in [key for key, value in fresh.items() if not math.isfinite(value)]:
            self.event("nonfinite", images=images, key=key, value=str(fresh.pop(key)))
        if fresh:
            self._append(self._metrics, {"images": images, "time": _now(), "metrics": fresh})

    def event(self, kind: str, **fields: Any) -> None:
        """Record that something happened."""
        if self._active:
            self._append(self._events, {"kind": kind, "time": _now(), **fields})

    def image(self, key: str, images: int, picture: Path | Image) -> None:
        """Keep a picture as samples/images-NNNNNNNN-KEY.png and show it in MLflow's image grid."""
        if not self._active or (key, images) in self._pictures:
            return
        file = f"samples/images-{images:08d}-{key}.png"
        self._run.write(file, picture.read_bytes() if isinstance(picture, Path) else _png(picture))
        self._pictures.add((key, images))
        self.event("picture", key=key, images=images, file=file)

    def artifact(self, key: str) -> None:
        """Offer a file of the run folder in MLflow too."""
        self.event("artifact", file=key)

    def sync(self) -> None:
        """Put the spool beside the run where the run is not on this machine; to be called with every checkpoint."""
        if self._active and not self._run.local:
            for spool in (self._metrics, self._events):
                self._run.upload(spool.path, spool.path.name)

    def close(self, status: str = "FINISHED", timeout: float = 20.0) -> None:
        """Send what is left, for at most `timeout` seconds; what remains is sent by the next start of this run."""
        if not self._active:
            return
        rows, files = self._drain.finish(status, timeout) if self._drain else (0, 0)
        if rows or files:
            self._events.append({"kind": "unsent", "time": _now(), "rows": rows, "files": files})
            cure = f"the same command again sends them, or: python -m jobs evaluate {self._run.url}"
            self._warn(f"MLflow may lack {rows} rows of {self._run.where('metrics.jsonl')} and {files} files; {cure}")
        self.sync()
        for spool in (self._metrics, self._events):
            spool.close()
        self._left.close()
        self._active = False

    def _append(self, spool: Spool, row: Row) -> None:
        if not spool.append(row) and spool.path not in self._full:
            self._full.add(spool.path)
            self._warn(f"{spool.path} is full; what follows is not recorded")
        if self._drain is not None:
            self._drain.wake.set()


class Drain(threading.Thread):
    """The thread between the spool and MLflow: connect, send, wait; a failure is an event and a longer wait."""

    def __init__(
        self, run: Storage, config: TrackingConfig, description: Description, metrics: Spool, events: Spool
    ) -> None:
        super().__init__(name="mlflow", daemon=True)
        self._run, self._config, self._description, self._log = run, config, description, events
        self._metrics, self._events = Cursor(metrics), Cursor(events)
        self._target: MlflowRun | None = None
        self._failures, self._status = 0, "FINISHED"
        self.wake, self._stop_asked, self._abandoned = threading.Event(), threading.Event(), threading.Event()

    def run(self) -> None:
        while True:
            self.wake.clear()
            last = self._stop_asked.is_set()
            self._attempt(last)
            if last or self._abandoned.is_set():
                return
            if self._failures:
                self._stop_asked.wait(RETRY_SECONDS[min(self._failures, len(RETRY_SECONDS)) - 1])
            else:
                self.wake.wait()

    def finish(self, status: str, timeout: float) -> tuple[int, int]:
        """Ask for a last round, wait for it no longer than `timeout`; returns (rows, files) that were not sent."""
        self._status = status
        self._stop_asked.set()
        self.wake.set()
        self.join(timeout)
        self._abandoned.set()
        return self._metrics.left(), self._events.left(*FILES)

    def _attempt(self, last: bool) -> None:
        try:
            if self._target is None:
                self._target = MlflowRun(self._config, self._description)
                _remember(self._run, self._target.run_id)
            self._send(self._target)
            if last:
                self._target.terminate(self._status)
            if self._failures:
                self._log.append({"kind": "mlflow reachable again", "time": _now()})
            self._failures = 0
        except Exception as error:  # noqa: BLE001 whatever MLflow, its transport or its database raise, training goes on
            self._failures += 1
            if self._failures == 1 and not self._abandoned.is_set():
                text = f"{type(error).__name__}: {redact(str(error))[:300]}"
                self._log.append({"kind": "mlflow unreachable", "time": _now(), "error": text})

    def _send(self, target: MlflowRun) -> None:
        while rows := _portion(self._metrics.pending()):
            target.send(rows, self._metrics.count + len(rows))
            self._metrics.advance(rows)
        while events := self._events.pending():
            for event in events:
                if event["kind"] in FILES:
                    self._carry(target, event)
                self._events.advance([event])

    def _carry(self, target: MlflowRun, event: Row) -> None:
        try:
            data = self._run.read(event["file"])
        except MissingError:  # somebody tidied up; what follows is to arrive all the same
            self._log.append({"kind": "file gone", "time": _now(), "file": event["file"]})
            return
        target.show(event, data) if event["kind"] == "picture" else target.upload(event["file"], data)


def run_key(run: Storage) -> str:
    """The random key of a run in its run.json, made on the first call."""
    if not run.exists("run.json"):
        try:
            run.create("run.json", canonical_json({"schema": 1, "key": secrets.token_hex(16)}))
        except ConflictError:
            return run_key(run)
    return json.loads(run.read("run.json"))["key"]


def flat_params(config: TrainConfig) -> dict[str, str]:
    """The allow-listed part of a configuration as flat `a.b.c` -> text."""
    leaves = _leaves(dataclasses.asdict(config))
    return {key: str(value) for key, value in leaves if any(f"{key}.".startswith(f"{name}.") for name in PARAMS)}


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _remember(run: Storage, run_id: str) -> None:
    known = json.loads(run.read("run.json"))
    if known.get("run_id") != run_id:
        run.write("run.json", canonical_json(known | {"run_id": run_id}))


def _fetched(run: Storage, folder: Path) -> Path:
    for key in ("metrics.jsonl", "events.jsonl"):
        if run.exists(key):
            run.download(key, folder / key)
    return folder


def _portion(rows: list[Row]) -> list[Row]:
    """As many of the oldest rows as one log_batch takes, at least one."""
    total = 0
    for taken, row in enumerate(rows):
        total += len(row["metrics"])
        if total > BATCH_METRICS and taken:
            return rows[:taken]
    return rows


def _png(picture: Image) -> bytes:
    data = io.BytesIO()
    picture.save(data, "png")
    return data.getvalue()


def _now() -> int:
    return time.time_ns() // 1_000_000
