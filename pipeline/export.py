"""From a run's newest checkpoint to a model folder: averaged weights, directions, golden samples, card, lineage."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from glow import Flow, attribute_directions, make_flow
from pipeline.checkpoint import accepting, load_latest
from pipeline.config import DataConfig, TrainConfig, read_config
from pipeline.errors import ConfigError, UsageError
from pipeline.evaluate import BATCH, NOISE_SEED
from pipeline.fingerprint import decisive, fingerprint
from pipeline.golden import EXAMPLES, decoder
from pipeline.learner import Examples
from pipeline.manifest import Manifest
from pipeline.model import ModelConfig, weights_of, write_model
from pipeline.model_card import model_card
from pipeline.order import Sequential
from pipeline.origin import origin
from pipeline.recipe import Attempt
from pipeline.report import kept_review
from pipeline.sampling import Condition, one_thread
from pipeline.scratch import scratch
from pipeline.storage import MissingError, Storage, sha256_hex
from pipeline.stream import Stream
from pipeline.world import World

DIRECTION_IMAGES = 512
"""First images of the training split that directions are taken over."""


@dataclass(frozen=True, kw_only=True)
class TrainedRun:
    """The newest checkpoint of a run."""

    storage: Storage
    config: TrainConfig
    step: int
    images: int
    tensors: Mapping[str, Tensor] = field(repr=False)
    attempts: list[Attempt] = field(default_factory=list[Attempt], repr=False)
    """By what it learned, from its first image on (pipeline/recipe.py)."""

    def model(self, weights: str = "ema") -> Flow:
        """The model with its averaged ("ema") or last ("raw") weights."""
        kept = {key.removeprefix("model/"): tensor for key, tensor in self.tensors.items() if key.startswith("model/")}
        averaged = {name: self.tensors.get(f"ema/{name}", tensor) for name, tensor in kept.items()}
        model = make_flow(self.config.model)
        model.load_state_dict(averaged if weights == "ema" else kept)
        return model.eval()


def read_run(run: Storage) -> TrainedRun:
    """Load a run's configuration and newest whole checkpoint; UsageError where there is none yet."""
    try:
        text = run.read("config.toml")
    except MissingError as error:
        raise UsageError(
            "not a run: no config.toml", where=run.url, cure="give a run's folder: STORAGE/NAME"
        ) from error
    with scratch() as folder:
        (folder / "config.toml").write_bytes(text)
        config = read_config(folder / "config.toml")
    digest = config.data.digest
    loaded = load_latest(run, World(), accepting(fingerprint(config, digest), decisive(config, digest)))
    if loaded is None:
        raise UsageError("no checkpoint yet", where=run.url, cure="train it first, or for longer")
    found = {"step": loaded.step, "images": loaded.images, "attempts": loaded.state.get("attempts", [])}
    return TrainedRun(storage=run, config=config, tensors=loaded.tensors, **found)


def natural_stream(manifest: Manifest, split: str, data: DataConfig) -> Stream:
    """A split in its natural order: position i is sample i."""
    found = manifest.split(split)
    order = Sequential([shard.samples for shard in found.shards])
    cache = Path(data.cache) if data.cache else Path.home() / ".cache" / "glow-pipeline"
    return Stream(manifest.storage, manifest, found, order, cache, int(data.cache_gb * 1e9))


def export_model(run: TrainedRun, manifest: Manifest) -> str:
    """Write RUN/model from the averaged weights and return its digest; equal weights and data give an equal digest."""
    if manifest.digest != run.config.data.digest:
        found = f"dataset {manifest.digest[:12]}, the run learned from {run.config.data.digest[:12]}"
        raise ConfigError(found, where=manifest.storage.url, cure="give --data with the prefix it was trained on")
    model = run.model()
    inputs = Examples(run.config, manifest, torch.device("cpu"))
    kept = kept_review(run.storage, run.config.data.validation, sha256_hex(weights_of(model)), manifest.digest)
    with natural_stream(manifest, run.config.data.train, run.config.data) as stream:
        return write_model(
            run.storage.sub("model"),
            model,
            model_config(run.config, manifest),
            directions=directions(model, stream, inputs, manifest, run.config.data.bits),
            examples=example_conditions(stream, inputs),
            lineage=lineage_of(run, manifest),
            card=model_card(run.config, manifest, run.images, kept),
        )


def model_config(config: TrainConfig, manifest: Manifest) -> ModelConfig:
    """What config.json says of a run's model."""
    data = {
        "digest": manifest.digest,
        "license": manifest.license,
        "lossless": manifest.lossless,
        "train": config.data.train,
        "validation": config.data.validation,
    }
    return ModelConfig(
        model=config.model,
        family=config.model.family,
        bits=config.data.bits,
        attributes=tuple(manifest.attributes),
        editable=tuple(manifest.editable),
        labels=tuple(manifest.labels),
        data=data,
    )


@torch.no_grad()
def directions(model: Flow, stream: Stream, inputs: Examples, manifest: Manifest, bits: int) -> list[Tensor]:
    """Mean latent with each editable attribute minus without it, per level [A, c, h, w], over the first images.

    Images are encoded as if nothing were known about them, so that what makes the difference is in the latents.
    """
    columns = [manifest.attributes.index(name) for name in manifest.editable]
    if not columns:
        return [torch.zeros(0, *shape) for shape in model.latent_shapes()]

    def encoded() -> Iterator[tuple[list[Tensor], Tensor]]:
        for batch in stream.batches(0, BATCH, stop=min(DIRECTION_IMAGES, stream.samples)):
            x = model.dequantized(inputs.of(batch, NOISE_SEED)[0], bits)[0]
            yield model.encode(x), batch.attributes[:, columns]

    with one_thread():
        return attribute_directions(encoded(), len(columns))


def example_conditions(stream: Stream, inputs: Examples) -> Condition:
    """Labels and attributes of the first images, as far as the model is conditioned on them."""
    _, label, attributes = inputs.of(stream.fetch(np.arange(min(EXAMPLES, stream.samples))), NOISE_SEED)
    return label, attributes


def lineage_of(run: TrainedRun, manifest: Manifest) -> dict[str, Any]:
    """Where a model comes from: names, places and times, none of which the artifact digest depends on."""
    return {
        "schema": 2,
        "run": run.storage.url,
        "name": run.config.name,
        "fingerprint": fingerprint(run.config, manifest.digest),
        "step": run.step,
        "images": run.images,
        "data": {"prefix": manifest.storage.url, "digest": manifest.digest, "split": run.config.data.train},
        "attempts": run.attempts,
        "export": origin() | decoder(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }
