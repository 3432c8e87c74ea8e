"""From a configuration to a job: the code that is installed here, packed so that equal code gives an equal package.

Nothing secret goes along: credentials reach drivers and workers through the environment of their nodes, and a
configuration that holds any is refused. What was sent is recorded with the run, in RUN/attempts/.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.cluster.jobs import refuse_second, send
from pipeline.config import TrainConfig, refuse_impossible, write_config
from pipeline.errors import ConfigError, ConflictError, redact
from pipeline.manifest import open_manifest
from pipeline.mlflow_server import refuse_silent
from pipeline.origin import JOB, REVISION, revision
from pipeline.scratch import scratch
from pipeline.storage import Storage, canonical_json, open_storage, sha256_file, sha256_hex

if TYPE_CHECKING:
    from jobs.cluster.jobs import Client

PACKAGES = ("glow", "jobs", "pipeline")
CONFIG = "config.toml"
ENTRYPOINT = f"exec python -m jobs train {CONFIG}"


def submitted(client: Client, config: TrainConfig) -> str:
    """Send a run to the cluster as its next attempt; the submission's id, RUN-ATTEMPT."""
    config = prepared(config)
    run = open_storage(config.storage).sub(config.name)
    refuse_second(client, config.name, run.url)
    with scratch() as folder:
        code = pack(folder)
        text = write_config(config)
        (folder / CONFIG).write_text(text, encoding="utf-8")
        job = claim(run, config.name, {"code": code, "config": sha256_hex(text.encode()), "cluster": client.address})
        metadata = {"run": config.name, "url": run.url, "code": code}
        commit, changed = revision()
        environment = {REVISION: f"{commit}-dirty" if changed else commit, JOB: job}  # the package has no git
        packed = {"working_dir": str(folder), "env_vars": environment}
        send(client, job, entrypoint=ENTRYPOINT, metadata=metadata, runtime_env=packed)
    return job


def prepared(config: TrainConfig) -> TrainConfig:
    """The configuration as the cluster gets it; ConfigError for what can be known to fail there."""
    refuse_impossible(config)
    if not config.data.prefix:
        raise ConfigError("no dataset given", cure="--data.prefix s3://... made by: python -m jobs data prepare")
    if config.cluster.workers < 1:
        raise ConfigError("cluster.workers is 0", cure="--cluster.workers 2, or as many as there are nodes")
    uri = config.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI", "")
    for name, address in (("tracking.uri", uri), ("storage", config.storage), ("data.prefix", config.data.prefix)):
        refuse_password(name, address)
    for name, address in (("storage", config.storage), ("data.prefix", config.data.prefix)):
        if not address.startswith("s3://"):
            raise ConfigError(f"{name} is {address!r}, which the nodes may not see", cure="an s3:// prefix")
    open_manifest(open_storage(config.data.prefix))
    refuse_silent(uri)
    return replace(
        config,
        tracking=replace(config.tracking, uri=uri),
        cluster=replace(config.cluster, address="auto"),
    )


def refuse_password(name: str, address: str) -> None:
    """ConfigError for an address that says who we are: it would be read by everybody who sees the job."""
    if redact(address) != address:
        raise ConfigError(f"{name} holds a password", cure="leave it to the nodes' environment")


def pack(folder: Path) -> str:
    """Copy the packages as they are installed; their digest."""
    for name, path in _sources():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    return digest()


def digest() -> str:
    """The sha256 of all the packages are made of, by name and content, as they are installed here."""
    listing = hashlib.sha256()
    for name, path in _sources():
        listing.update(f"{name.as_posix()} {sha256_file(path)}\n".encode())
    return listing.hexdigest()


def _sources() -> Iterator[tuple[Path, Path]]:
    """(name in the package, file) of all code and data, in order."""
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        assert spec is not None, package
        assert spec.submodule_search_locations, package
        root = Path(spec.submodule_search_locations[0])
        for path in sorted(root.rglob("*")):
            name = Path(package, path.relative_to(root))
            if path.is_file() and "__pycache__" not in name.parts and not any(p.startswith(".") for p in name.parts):
                yield name, path


def claim(run: Storage, name: str, record: dict[str, str]) -> str:
    """Take the run's next number for this attempt, and leave a record of it; of many who try each gets another."""
    number = len(run.list("attempts"))
    while True:
        number += 1
        job = f"{name}-{number}"
        with contextlib.suppress(ConflictError):
            run.create(f"attempts/{number:05d}.json", canonical_json({"submission": job, **record}))
            return job
