"""The registry: versions in MLflow, one per artifact digest; promotions in the ledger; aliases that follow it.

A version is an MLflow pyfunc (pipeline/pyfunc.py) around a model folder (pipeline/model.py). Registering the same
artifact again finds the version there is. Promoting is pipeline/promotion.py.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config import TrackingConfig
from pipeline.errors import ConfigError, DataError, UsageError
from pipeline.ledger import Ledger
from pipeline.mlflow_run import found_or_made
from pipeline.mlflow_server import absolute_uri, connect, database_folder, default_uri, translated
from pipeline.model import LoadedModel, read_model
from pipeline.pyfunc import FOLDER, refuse_foreign, save_pyfunc
from pipeline.scratch import scratch
from pipeline.storage import Storage, open_storage
from pipeline.tracking import run_key

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

ABOUT = (
    "Images by an invertible flow with exact likelihoods. The alias `champion` is set by "
    "`python -m jobs models promote`, which writes who, when, why and the gates into the ledger named by the tag "
    "`glow.ledger`; `python -m jobs models history` shows it. An alias set by hand lasts until the next promotion."
)
PROMOTED = "## Promotion"
LEDGER_TAG, DIGEST_TAG, RUN_TAG = "glow.ledger", "glow.digest", "glow.run"


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


def checked_name(name: str) -> str:
    """The name of a registered model; UsageError for one that an address or the ledger could not hold."""
    if not re.fullmatch(r"\w[\w.-]{0,99}", name):
        raise UsageError(f"model name {name!r}", cure="letters, digits, dots, dashes and underscores, at most 100")
    return name


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
        """Register RUN/model under the run's MLflow run, with its lineage as tags; its checkpoint stays.

        MLflow numbers versions one by one but makes runs side by side: of several who made one for a run it did not
        know, those whose version did not stay remove theirs.
        """
        from pipeline.recipe import known_of  # these two know how runs are trained; whoever loads a model need not
        from pipeline.retention import pin

        tracking = replace(tracking, uri=self.uri)
        folder = run.sub("model")
        lineage = json.loads(folder.read("lineage.json"))
        pin(run, lineage["step"])
        data = {f"data.{key}": value for key, value in lineage["data"].items()}
        known = known_of(lineage) | data | {RUN_TAG: run.url}
        tags = {key: str(value) for key, value in known.items() if value != ""}
        with translated(self.uri), scratch() as local:
            run_id, made = found_or_made(self.client, tracking, lineage["name"], run_key(run))
            for file in folder.list():
                folder.download(file, local / file)
            version = self.register(name, local, run_id, tags)
            if made and self._version(name, version).run_id != run_id:
                self.client.delete_run(run_id)
            return version

    def load(self, name: str, version: int, digest: str = "") -> LoadedModel:
        """Load a version with the digest it was registered with (or `digest`) and nothing foreign around it."""
        import mlflow.artifacts

        with translated(self.uri), scratch() as local:
            digest = digest or self._version(name, version).tags.get(DIGEST_TAG, "")
            if not digest:
                where, cure = f"models:/{name}/{version}", "register it with: python -m jobs models register RUN"
                raise DataError("the version has no digest", where=where, cure=cure)
            where = self.client.get_model_version_download_uri(name, str(version))
            path = mlflow.artifacts.download_artifacts(where, dst_path=str(local), tracking_uri=self.uri)
            refuse_foreign(Path(path))
            return read_model(open_storage(path).sub(f"data/{FOLDER}"), digest)

    def resolve(self, name: str, alias: str) -> int:
        """The version an alias of the MLflow registry stands for."""
        with translated(self.uri):
            return int(self.client.get_model_version_by_alias(name, alias).version)

    def versions(self, name: str) -> set[int]:
        """Numbers of the versions there are."""
        with translated(self.uri):
            return {int(version.version) for version in self.client.search_model_versions(f"name = '{name}'")}

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

    def aliases(self, name: str) -> dict[str, int]:
        """The versions that aliases stand for in MLflow."""
        with translated(self.uri):
            return {alias: int(version) for alias, version in self.client.get_registered_model(name).aliases.items()}

    def set_aliases(self, name: str, versions: Mapping[str, int]) -> None:
        """Let aliases stand for versions, where they do not already."""
        there = self.aliases(name)
        with translated(self.uri):
            for alias, version in versions.items():
                if there.get(alias) != version:
                    self.client.set_registered_model_alias(name, alias, str(version))

    def describe(self, name: str, version: int, promoted: str) -> None:
        """Put what came of a promotion beneath the model card, in place of what an earlier one put there."""
        with translated(self.uri):
            there = self._version(name, version).description or ""
            card = there.partition(PROMOTED)[0].rstrip() + f"\n\n{PROMOTED}\n\n{promoted}\n"
            if card != there:
                self.client.update_model_version(name, str(version), card)

    def refuse(self, name: str) -> None:
        """What would stop `register` later, before anything is written: an odd name, no or another ledger."""
        checked_name(name)
        prefix = self._default_prefix()
        with translated(self.uri):
            found = self.client.search_registered_models(f"name = '{name}'")
        tagged = found[0].tags.get(LEDGER_TAG, prefix) if found else prefix
        if self._prefix and open_storage(tagged).url != prefix:
            cure = "leave --registry out, or register under another name"
            raise ConfigError(f"the ledger of {name} is at {tagged}", where=self._prefix, cure=cure)

    def _ensure_model(self, name: str) -> None:
        from mlflow.exceptions import MlflowException

        try:
            self.client.create_registered_model(checked_name(name), {LEDGER_TAG: self._default_prefix()}, ABOUT)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            self.refuse(name)

    def _default_prefix(self) -> str:
        folder = database_folder(self.uri)
        prefix = self._prefix or (str(folder / "registry") if folder else "")
        if not prefix:
            raise UsageError("no place for the ledger", cure="give --registry with a folder or an s3:// prefix")
        storage = open_storage(prefix)
        if storage.local and storage.local.is_file():
            raise UsageError("a file", where=storage.url, cure="give --registry with a folder or an s3:// prefix")
        return storage.url

    def _version(self, name: str, version: int) -> ModelVersion:
        if not 0 < version < 2**31:  # more than its database holds
            raise UsageError(f"no version {version}", where=f"models:/{name}", cure="1 or more, as MLflow numbers them")
        return self.client.get_model_version(name, str(version))

    def _versions(self, name: str, digest: str) -> list[int]:
        """Versions with an artifact digest, oldest first."""
        found = self.client.search_model_versions(f"name = '{name}' and tags.`{DIGEST_TAG}` = '{digest}'")
        return sorted(int(version.version) for version in found)

    def _upload(self, loaded: LoadedModel, folder: Path, run_id: str) -> str:
        """Put the pyfunc artifact under a run and return its address."""
        with scratch() as local:
            data = local / FOLDER
            data.symlink_to(folder.absolute(), target_is_directory=True)
            save_pyfunc(loaded, data, local / "pyfunc")
            place = f"models/{loaded.digest[:16]}-{secrets.token_hex(4)}"  # never written by two
            self.client.log_artifacts(run_id, str(local / "pyfunc"), place)
        return f"{self.client.get_run(run_id).info.artifact_uri}/{place}"
