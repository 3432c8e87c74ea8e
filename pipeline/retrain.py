"""A model trained again from its lineage alone: whether the same settings, data and seeds come to the same artifact."""

from __future__ import annotations

import itertools
from dataclasses import replace

from pipeline.config import EvaluateConfig, TrainConfig
from pipeline.errors import ConfigError, DataError, Interrupted, PipelineError
from pipeline.export import export_model, read_run
from pipeline.manifest import Manifest, open_manifest
from pipeline.model import LoadedModel, read_model
from pipeline.recipe import config_again
from pipeline.scratch import scratch
from pipeline.storage import open_storage
from pipeline.train import Report, run


def retrained(loaded: LoadedModel, data: str = "", report: Report = lambda row: None) -> str:
    """Train as the lineage says in a folder that goes away, export, and give the artifact digest, which is the same.

    `data` is where the dataset lies now, where that has changed. `ConfigError` where this code or machine would not
    come to the same bits or the dataset is gone, `DataError` naming the files where they do not.
    """
    config = config_again(loaded.lineage, loaded.where)
    manifest = _dataset(loaded, data)
    with scratch() as place:
        own = replace(config.data, prefix=manifest.storage.url, digest=manifest.digest, cache=str(place / "cache"))
        looks = EvaluateConfig(every=config.schedule.images, images=1, temperatures=(), rows=1)
        config = replace(config, storage=str(place), data=own, evaluate=looks)
        _train(config, loaded.lineage["images"], report)
        folder = open_storage(str(place)).sub(config.name)
        export_model(read_run(folder), manifest)
        again = read_model(folder.sub("model"))
    _refuse_other(loaded, again)
    return again.digest


def _dataset(loaded: LoadedModel, data: str) -> Manifest:
    """The dataset it learned from; ConfigError where it is gone or another."""
    recorded = loaded.lineage.get("data", {})
    prefix, digest = data or str(recorded.get("prefix", "")), loaded.config.data["digest"]
    cure = "give --data with the prefix where the dataset lies now"
    try:
        manifest = open_manifest(open_storage(prefix))
    except PipelineError as error:
        raise ConfigError(f"the dataset is gone: {error.what}", where=error.where or prefix, cure=cure) from error
    if manifest.digest != digest:
        found = f"dataset {manifest.digest[:12]}, the model learned from {digest[:12]}"
        raise ConfigError(found, where=prefix, cure=cure)
    return manifest


def _train(config: TrainConfig, images: int, report: Report) -> None:
    """Train to the position at which the model was exported, which may be before the schedule's end."""
    batches = itertools.count(1)
    last = -(-images // config.schedule.batch)
    try:
        run(config, report, stop=lambda: next(batches) == last)
    except Interrupted:
        if next(batches) <= last:  # somebody else's wish
            raise


def _refuse_other(loaded: LoadedModel, again: LoadedModel) -> None:
    if again.digest == loaded.digest:
        return
    other = [name for name, digest in loaded.files.items() if again.files[name] != digest]
    what = f"trained again it comes to artifact {again.digest}, not {loaded.digest}: {', '.join(other)} differ"
    raise DataError(what, where=loaded.where, cure="its lineage is not where it comes from")
