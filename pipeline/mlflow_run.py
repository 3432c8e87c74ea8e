"""One run on an MLflow server: found or created, filled, ended. Knows nothing of threads, spools or training."""

from __future__ import annotations

import dataclasses
import io
import os
import re
import threading
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config import TrackingConfig
from pipeline.errors import ConflictError, redact
from pipeline.mlflow_server import absolute_uri, connect, database_folder
from pipeline.scratch import scratch
from pipeline.spool import Row
from pipeline.storage import canonical_json, sha256_hex

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor


SMALL = "+compressed.webp"
"""How the name of a picture's thumbnail ends in MLflow's image grid; it is sent after the picture."""

BATCH_METRICS, NAME_LENGTH = 900, 250
"""Metrics of one log_batch, of which MLflow refuses more than 1000, and characters of a metric's name."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Description:
    """What is said about a run once, when it is opened."""

    name: str
    key: str
    params: dict[str, str]
    inputs: dict[str, Any]
    guest: bool = False
    """Adds to a run that is another's: its state, its times and what its machine does are left alone."""


class MlflowRun:
    """One run on an MLflow server, found by its key or created; every call may raise and may be repeated."""

    def __init__(self, config: TrackingConfig, description: Description) -> None:
        self.client, self._uri = connect(config.uri), config.uri
        self.run_id, made = found_or_made(self.client, config, description.name, description.key)
        self._guest = description.guest and not made
        run = self.client.get_run(self.run_id)
        self._last = {metric.key: metric.step for metric in run.to_proto().data.metrics}
        shown = [Path(file.path).name for file in self.client.list_artifacts(self.run_id, "images")]
        self._shown = {name.split("+timestamp")[0] for name in shown if name.endswith(SMALL)}
        self._describe(run.data.params, description.params)
        if description.inputs and not (run.inputs and run.inputs.dataset_inputs):
            self._log_input(description.inputs)
        self._monitor: SystemMetricsMonitor | None = None
        if not self._guest:
            self.client.update_run(self.run_id, status="RUNNING")
            self._monitor = _system_metrics(self.run_id, config.uri)

    def send(self, rows: list[Row], count: int) -> None:
        """Record metric rows that lie beyond what the run holds, and that `count` rows have been dealt with."""
        from mlflow.entities import Metric, RunTag

        metrics = [
            Metric(name, value, row["time"], row["images"])
            for row in rows
            for key, value in row["metrics"].items()
            if row["images"] > self._last.get(name := metric_name(key), -1)
        ]
        while len(metrics) > BATCH_METRICS:  # one row of more classes than a call takes
            self.client.log_batch(self.run_id, metrics=metrics[:BATCH_METRICS])
            metrics = metrics[BATCH_METRICS:]
        self.client.log_batch(self.run_id, metrics=metrics, tags=[RunTag("spool.rows", str(count))])
        if not self._guest and not _watching():  # MLflow's own thread gives up at the first call that fails
            self._monitor = _system_metrics(self.run_id, self._uri)

    def show(self, event: Row, png: bytes) -> None:
        """Put a picture into the run's image grid unless it is there: the files and the tag of MLflow's `log_image`.

        `log_image` makes a random name at every call, so a picture sent again after an outage would stand there twice.
        """
        from mlflow.tracking.multimedia import compress_image_size
        from mlflow.utils.mlflow_tags import MLFLOW_LOGGED_IMAGES
        from PIL import Image

        place = f"{event['key'].replace('/', '~')}+step+{event['images']}"
        if place in self._shown:
            return
        name = f"{place}+timestamp+{event['time']}+{uuid.uuid5(uuid.NAMESPACE_URL, place)}"
        with scratch() as local:
            whole, small = local / f"{name}.png", local / f"{name}{SMALL}"
            whole.write_bytes(png)
            compress_image_size(Image.open(io.BytesIO(png))).save(small)
            for file in (whole, small):
                self.client.log_artifact(self.run_id, str(file), "images")
        self.client.set_tag(self.run_id, MLFLOW_LOGGED_IMAGES, True)

    def upload(self, key: str, data: bytes) -> None:
        """Copy a file of the run folder to the run's artifacts, replacing what is there."""
        folder, name = os.path.split(key)
        with scratch() as local:
            (local / name).write_bytes(data)
            self.client.log_artifact(self.run_id, str(local / name), folder or None)

    def terminate(self, status: str) -> None:
        """End the run and its system metrics, unless it is another's."""
        if self._monitor:
            self._monitor.finish()
        if not self._guest:
            self.client.set_terminated(self.run_id, status)

    def _describe(self, old: Mapping[str, str], new: Mapping[str, str]) -> None:
        """Params of MLflow cannot change: what a resumed run is allowed to change becomes a tag `changed.NAME`."""
        from mlflow.entities import Param, RunTag

        params = [Param(key, value) for key, value in new.items() if key not in old]
        tags = [RunTag(f"changed.{key}", value) for key, value in new.items() if old.get(key, value) != value]
        for start in range(0, len(params), 100):
            self.client.log_batch(self.run_id, params=params[start : start + 100])
        self.client.log_batch(self.run_id, tags=tags)

    def _log_input(self, inputs: Mapping[str, Any]) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        digest, source = str(inputs["digest"]), redact(str(inputs.get("source", "")))
        dataset = Dataset(
            name=str(inputs.get("name", "dataset")),
            digest=digest[:36],  # MLflow keeps no more; the tag below has all of it
            source_type="s3" if source.startswith("s3:") else "local",
            source=canonical_json({"uri": source}).decode(),
            profile=canonical_json({key: inputs[key] for key in inputs if key not in ("name", "source")}).decode(),
        )
        tags = [InputTag("mlflow.data.context", "training"), InputTag("digest", digest)]
        self.client.log_inputs(self.run_id, [DatasetInput(dataset, tags)])
        self.client.set_tag(self.run_id, "data.digest", digest)


def metric_name(key: str) -> str:
    """The name of a metric in MLflow: its own, or where MLflow takes that for none (a class may be called anything) one
    without the odd characters and with a digest, so that two stay two."""
    parts = re.sub(r"[^\w/. :-]", "_", key).split("/")
    name = "/".join(part for part in parts if part not in ("", ".", ".."))
    return key if name == key and len(key) <= NAME_LENGTH else f"{name[:200]}-{sha256_hex(key.encode())[:8]}"


def found_or_made(client: MlflowClient, config: TrackingConfig, name: str, key: str) -> tuple[str, bool]:
    """(id of the MLflow run that carries `key`, whether it was made for this call: others may have made theirs)."""
    experiment = _experiment(client, config)
    if found := client.search_runs([experiment], f"tags.`glow.run` = '{key}'"):
        return found[0].info.run_id, False
    return client.create_run(experiment, run_name=name, tags={"glow.run": key}).info.run_id, True


def _experiment(client: MlflowClient, config: TrackingConfig) -> str:
    from mlflow.exceptions import MlflowException

    folder = database_folder(config.uri)
    location = (folder / "artifacts").as_uri() if folder else None
    for _ in range(2):
        if found := client.get_experiment_by_name(config.experiment):
            return found.experiment_id
        try:
            return client.create_experiment(config.experiment, artifact_location=location)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
    raise ConflictError("the experiment appears and disappears", where=config.experiment)


def _system_metrics(run_id: str, uri: str) -> SystemMetricsMonitor:
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    monitor = SystemMetricsMonitor(run_id, resume_logging=True, tracking_uri=absolute_uri(uri))
    monitor.start()
    return monitor


def _watching() -> bool:
    return any(thread.name == "SystemMetricsMonitor" for thread in threading.enumerate())
