"""The registry: versions in MLflow, one per artifact digest; promotions in the ledger; aliases that follow it.

A version is an MLflow pyfunc whose data folder is a model folder (pipeline/model.py) and whose loader is this module:
no pickle is written or read. Registering the same artifact again finds the version there is.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import secrets
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.config import TrackingConfig
from pipeline.errors import ConfigError, UsageError
from pipeline.gates import Evidence, Limits, Result, as_json, judge, refuse_failures
from pipeline.ledger import Entry, Ledger, current
from pipeline.mlflow_run import absolute_uri, connect, database_folder, default_uri, find_run, translated
from pipeline.model import LoadedModel, read_model
from pipeline.storage import Storage, open_storage
from pipeline.tracking import run_key

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.models import ModelSignature

LEDGER_TAG, DIGEST_TAG, RUN_TAG = "glow.ledger", "glow.digest", "glow.run"
FOLDER = "glow"
"""Name of the model folder inside the MLflow artifact (below data/)."""


def load_model(where: str, uri: str = "") -> LoadedModel:
    """Load a model from a folder, an s3:// prefix, models:/NAME@alias or models:/NAME/3; digests first, then parsing.

    MLflow is asked only for models:/ addresses, at `uri` or where MLFLOW_TRACKING_URI says.
    """
    if not where.startswith("models:/"):
        return read_model(open_storage(where))
    address = re.fullmatch(r"models:/([^/@]+)(?:@([^/@]+)|/(\d+))", where)
    if address is None:
        raise UsageError("not a model address", where=where, cure="models:/NAME@champion or models:/NAME/3")
    name, alias, version = address.groups()
    registry = ModelRegistry(uri or default_uri())
    return registry.load(name, int(version) if version else registry.resolve(name, alias))


@dataclass(frozen=True)
class Promotion:
    """What came of a promotion."""

    entry: Entry | None
    """The ledger entry of the alias now; None when nothing was to be written (a dry run)."""
    results: tuple[Result, ...]
    """The gate table; empty where the version already stood there."""


class ModelRegistry:
    """Registered models at one MLflow address, with their ledgers under one prefix.

    `prefix`: where ledgers lie; by default as the registered model's tag says, else beside a sqlite database.
    """

    def __init__(self, uri: str, prefix: str = "") -> None:
        if not uri:
            raise UsageError("no MLflow address", cure="give --uri or set MLFLOW_TRACKING_URI")
        self.uri, self._prefix = absolute_uri(uri), prefix
        self.client = connect(uri)

    def register(self, name: str, folder: Path, run_id: str, tags: Mapping[str, str]) -> int:
        """Register a local model folder as a version of `name` with its artifact under an MLflow run.

        The same artifact digest gives the version there is, also when two do it at once: the lower number stays.
        """
        loaded = read_model(open_storage(str(folder)))
        with translated(self.uri):
            self._ensure_model(name)
            if known := self._versions(name, loaded.digest):
                return known[0]
            source = self._upload(loaded, folder, run_id)
            all_tags = {**tags, DIGEST_TAG: loaded.digest}
            card = (folder / "card.md").read_text() if (folder / "card.md").exists() else ""
            made = int(self.client.create_model_version(name, source, run_id, all_tags, description=card).version)
            first = self._versions(name, loaded.digest)[0]
            if first != made:
                self.client.delete_model_version(name, str(made))
        return first

    def register_run(self, name: str, run: Storage, tracking: TrackingConfig) -> int:
        """Register RUN/model under the run's MLflow run, with its lineage as tags."""
        tracking = replace(tracking, uri=self.uri)
        folder = run.sub("model")
        lineage = json.loads(folder.read("lineage.json"))
        data = {f"data.{key}": value for key, value in lineage.pop("data").items()}
        tags = {key: str(value) for key, value in (lineage | data | {RUN_TAG: run.url}).items() if value != ""}
        with translated(self.uri), tempfile.TemporaryDirectory() as scratch:
            run_id = find_run(self.client, tracking, lineage["name"], run_key(run))
            for file in folder.list():
                folder.download(file, Path(scratch) / file)
            return self.register(name, Path(scratch), run_id, tags)

    def load(self, name: str, version: int) -> LoadedModel:
        """Load a version, its digest checked against the one it was registered with."""
        import mlflow.artifacts

        with translated(self.uri), tempfile.TemporaryDirectory() as scratch:
            found = self._version(name, version)
            where = self.client.get_model_version_download_uri(name, str(version))
            path = mlflow.artifacts.download_artifacts(where, dst_path=scratch, tracking_uri=self.uri)
            return read_model(open_storage(path).sub(f"data/{FOLDER}"), found.tags.get(DIGEST_TAG, ""))

    def resolve(self, name: str, alias: str) -> int:
        """The version an alias of the MLflow registry stands for."""
        with translated(self.uri):
            return int(self.client.get_model_version_by_alias(name, alias).version)

    def tags(self, name: str, version: int) -> dict[str, str]:
        """The tags of a version: its digest and lineage."""
        with translated(self.uri):
            return dict(self._version(name, version).tags)

    def tags_of_digest(self, name: str, digest: str) -> dict[str, str]:
        """The tags of the version with an artifact digest."""
        with translated(self.uri):
            return dict(self._version(name, self._versions(name, digest)[0]).tags)

    def ledger(self, name: str) -> Ledger:
        """The ledger of a registered model."""
        with translated(self.uri):
            tagged = self.client.get_registered_model(name).tags.get(LEDGER_TAG, "")
        return Ledger(open_storage(tagged or self._default_prefix()), name)

    def promote(
        self,
        name: str,
        version: int,
        evidence: Callable[[LoadedModel], Evidence],
        *,
        alias: str = "champion",
        limits: Limits | None = None,
        forced: Sequence[str] = (),
        reason: str = "",
        dry_run: bool = False,
        announce: Callable[[Sequence[Result]], None] = lambda results: None,
    ) -> Promotion:
        """Let `alias` stand for `version`: reconcile, gates, ledger, alias, in this order.

        `evidence` evaluates a model on the held-out images; `announce` is told the gate table before anything follows
        from it. Raises GateError where a gate fails that is not in `forced`, ConflictError where another promotion came
        in between; either leaves everything as it was.
        """
        _refuse_words(name, alias, forced, reason)
        ledger = self.ledger(name)
        if not dry_run:
            self._reconcile(name, ledger)
        entries = ledger.entries()
        before = current(entries, alias)
        loaded = self.load(name, version)
        if before is not None and (before.version, before.digest) == (version, loaded.digest):
            return Promotion(before, ())
        champion = evidence(self.load(name, before.version)) if before else None
        results = tuple(judge(evidence(loaded), champion, limits or Limits()))
        announce(results)
        failed = refuse_failures(results, forced, f"models:/{name}/{version}")
        if dry_run:
            return Promotion(None, results)
        entry = Entry(
            model=name,
            alias=alias,
            version=version,
            digest=loaded.digest,
            replaces=before.version if before else 0,
            reason=reason,
            forced=failed,
            gates=as_json(results),
        )
        entry = ledger.append(entries, entry)
        self._reconcile(name, ledger)
        return Promotion(entry, results)

    def _reconcile(self, name: str, ledger: Ledger) -> None:
        """Set every alias to what the ledger says, until the ledger did not change meanwhile.

        This finishes a promotion that a crash cut off between ledger and alias, and puts right an alias set late by a
        slower promoter.
        """
        seen: list[Entry] | None = None
        while (entries := ledger.entries()) != seen:
            for alias in {entry.alias for entry in entries}:
                entry = current(entries, alias)
                with translated(self.uri):
                    if entry and self.client.get_registered_model(name).aliases.get(alias) != entry.version:
                        self.client.set_registered_model_alias(name, alias, str(entry.version))
            seen = entries

    def _ensure_model(self, name: str) -> None:
        from mlflow.exceptions import MlflowException

        prefix = self._default_prefix()
        try:
            self.client.create_registered_model(name, tags={LEDGER_TAG: prefix})
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            tagged = self.client.get_registered_model(name).tags.get(LEDGER_TAG, "")
            if self._prefix and open_storage(tagged).url != open_storage(self._prefix).url:
                cure = "leave --registry out, or register under another name"
                raise ConfigError(f"the ledger of {name} is at {tagged}", where=self._prefix, cure=cure) from error

    def _default_prefix(self) -> str:
        folder = database_folder(self.uri)
        prefix = self._prefix or (str(folder / "registry") if folder else "")
        if not prefix:
            raise UsageError("no place for the ledger", cure="give --registry with a folder or an s3:// prefix")
        return open_storage(prefix).url

    def _version(self, name: str, version: int) -> ModelVersion:
        return self.client.get_model_version(name, str(version))

    def _versions(self, name: str, digest: str) -> list[int]:
        """Versions with an artifact digest, oldest first."""
        found = self.client.search_model_versions(f"name = '{name}' and tags.`{DIGEST_TAG}` = '{digest}'")
        return sorted(int(version.version) for version in found)

    def _upload(self, loaded: LoadedModel, folder: Path, run_id: str) -> str:
        """Put the pyfunc artifact under a run and return its address."""
        with tempfile.TemporaryDirectory() as scratch:
            data = Path(scratch) / FOLDER
            data.symlink_to(folder.absolute(), target_is_directory=True)
            save_pyfunc(loaded, data, Path(scratch) / "pyfunc")
            place = f"models/{loaded.digest[:16]}-{secrets.token_hex(4)}"  # never written by two
            self.client.log_artifacts(run_id, str(Path(scratch) / "pyfunc"), place)
        return f"{self.client.get_run(run_id).info.artifact_uri}/{place}"


def save_pyfunc(loaded: LoadedModel, folder: Path, target: Path) -> None:
    """Write an MLflow pyfunc around a model folder: its requirements and its parameters, and no pickle."""
    packages = ("glow-pipeline", "mlflow", "numpy", "safetensors", "torch")
    with warnings.catch_warnings():
        # MLflow 3.17 warns about its own type hints on import, and wants an example of the input there is none of.
        warnings.simplefilter("ignore")
        import mlflow.pyfunc

        mlflow.pyfunc.save_model(
            path=str(target),
            loader_module="pipeline.registry",
            data_path=str(folder),
            signature=_signature(loaded),
            pip_requirements=[f"{name}=={importlib.metadata.version(name)}" for name in packages],
        )


def _signature(loaded: LoadedModel) -> ModelSignature:
    from mlflow.models import ModelSignature
    from mlflow.types import ParamSchema, ParamSpec, Schema, TensorSpec

    model = loaded.config.model
    params = [
        ParamSpec("attributes", "string", ""),
        ParamSpec("label", "long", -1),
        ParamSpec("temperature", "double", 0.7),
        ParamSpec("seed", "long", 0),
        ParamSpec("count", "long", 1),
    ]
    outputs = Schema([TensorSpec(np.dtype("uint8"), (-1, model.size, model.size, model.channels), "images")])
    return ModelSignature(outputs=outputs, params=ParamSchema(params))


class Sampler:
    """What mlflow.pyfunc serves: images of the seeds seed, seed + 1, ... seed + count - 1."""

    def __init__(self, loaded: LoadedModel) -> None:
        self.loaded = loaded

    def predict(self, model_input: Any, params: Mapping[str, Any] | None = None) -> np.ndarray:
        """uint8 [count, h, w, c]; `model_input` is not looked at, everything is in `params` (see the signature)."""
        asked = {"attributes": "", "label": -1, "temperature": 0.7, "seed": 0, "count": 1} | dict(params or {})
        seeds = range(int(asked["seed"]), int(asked["seed"]) + int(asked["count"]))
        pixels = self.loaded.sample(seeds, float(asked["temperature"]), asked["attributes"], int(asked["label"]))
        return pixels.permute(0, 2, 3, 1).contiguous().numpy()


def _load_pyfunc(data_path: str) -> Sampler:
    """Load the sampler; MLflow calls this by name."""
    return Sampler(read_model(open_storage(data_path)))


def _refuse_words(name: str, alias: str, forced: Sequence[str], reason: str) -> None:
    if not re.fullmatch(r"[a-z][a-z0-9-]*", alias):
        raise UsageError(f"alias {alias!r}", cure="aliases are lower case: champion and Champion would be two")
    if forced and not reason:
        raise UsageError("--force-gate without --reason", cure="say why; it is written into the ledger")
    if not re.fullmatch(r"[\w][\w.-]*", name):
        raise UsageError(f"model name {name!r}", cure="letters, digits, dots, dashes and underscores")
